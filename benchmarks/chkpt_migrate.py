"""Table 11: what migrating a file of an earlier release costs over copying it."""

import os
import random
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chkpt_states import Took, fsync, large_state, remove, scratch, size, took
from benchmarks.harness import Case, Options, in_fresh_process, interleave, peak_growth, ratio, rss, table

TITLE = "Migrate: milliseconds, and memory, to bring an old file to the current version"
NOTES = (
    "One file with the structure of release 1.0.0, written by `torch.save`, in a folder of its own; in one process, on "
    "a disk that is at rest and with the file in the page cache. cp + fsync: `cp` of the same file, then fsync; "
    "control: the same again. By hand: `torch.load(mmap=True)`, a changed version, `torch.save` to a new name, fsync, "
    "rename. Helios: `migrate_checkpoints_to_current_version`, with its backup and its proof that no tensor changed. "
    "CPU: processor time of the process; without that of `cp`. Memory: of a fresh process that does it once: all "
    "that it has at its peak (whole), and growth over what it had with everything imported (grown); mapped parts of "
    "the file count as its memory."
)
NAME = "bench_epoch_1_iter_6.pth"


def legacy_state(mib: int) -> dict[str, Any]:
    """Make a dict as release 1.0.0 saved it, with large tensors."""
    import numpy
    import torch

    fields = ("current_iteration", "global_iteration", "global_epoch", "validation_cycles", "dataset_iter")
    training_state: dict[str, Any] = dict(zip(fields, (6, 6, 1, 1, 6), strict=True))
    training_state |= {"early_stop_count": 0, "average_iter_time": 0.01, "running_iter": 2}
    net = OrderedDict(large_state(mib)["model"])
    return {
        "training_state": training_state,
        "model": {"net": net, "best_loss": 0.5},
        "rng": {
            "torch": torch.get_rng_state(),
            "rand": random.getstate(),
            "numpy": numpy.random.default_rng(0).bit_generator.state,
        },
        "version": "1.0.0",
    }


def cp(source: Path, folder: Path) -> None:
    """Copy the file and sync it."""
    subprocess.run(["cp", str(source), str(folder / "copy")], check=True)  # noqa: S603, S607
    fsync(folder / "copy")


def by_hand(source: Path, folder: Path) -> None:
    """What a script of ten lines would do."""
    import torch

    state = torch.load(source, mmap=True, weights_only=True)
    state["version"] = "3.0.0"
    temp = folder / "temp"
    torch.save(state, temp)
    fsync(temp)
    temp.replace(source)


def helios(source: Path, folder: Path) -> None:
    """Our migration of the folder."""
    from helios.chkpt_migrator import migrate_checkpoints_to_current_version

    migrate_checkpoints_to_current_version(folder)


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {
    "cp + fsync": cp,
    "control": cp,
    "by hand": by_hand,
    "helios": helios,
}


def check(original: Path, folder: Path) -> None:
    """Raise unless our migration gives a file that Helios loads, with the tensors of the old one."""
    import torch

    from helios.chkpt import load

    folder.mkdir()
    shutil.copy(original, folder / NAME)
    helios(folder / NAME, folder)
    state: Any = load(folder / NAME)
    old = torch.load(original, mmap=True, weights_only=True)
    for name, tensor in old["model"]["net"].items():
        if not torch.equal(tensor, state["model"]["net"][name]):
            raise RuntimeError(f"{name} changed")


def turn(migrate: Callable[[Path, Path], None], original: Path, folder: Path) -> Took:
    """Migrate a new copy of the file, and return how long that took."""
    remove(folder)
    folder.mkdir()
    shutil.copy(original, folder / NAME)
    os.sync()
    milliseconds = took(lambda: migrate(folder / NAME, folder))
    remove(folder)
    return milliseconds


def run_case(case: Case) -> Any:
    """Write the old file, check, or migrate once for the memory; runs in a process of its own."""
    original, folder = Path(case["original"]), Path(case["folder"])
    if case["what"] == "write":
        import torch

        torch.save(legacy_state(case["mib"]), original)
    elif case["what"] == "check":
        check(original, folder)
    else:
        migrate = CONTENDERS[case["what"]]
        turn(migrate, original.with_name("small.pth"), folder)  # what it imports does not count as growth
        folder.mkdir()
        shutil.copy(original, folder / NAME)
        grown = peak_growth(lambda: migrate(folder / NAME, folder))
        remove(folder)
        return {"whole": rss("VmHWM"), "grown": grown}
    return None


def run(options: Options) -> str:
    """Measure all and return the tables."""
    with scratch(6 * options.mib) as place:
        original, small, folder = place / "old.pth", place / "small.pth", place / "root"

        def ask(what: str, original: Path = original, mib: int = 0) -> Any:
            case = {"what": what, "original": str(original), "folder": str(folder), "mib": mib}
            return in_fresh_process("chkpt_migrate", case, timeout=300)

        for path, mib in ((small, 4), (original, options.mib)):
            if failure := ask("write", path, mib):
                raise RuntimeError(f"writing the old file failed: {failure}")
        failure = ask("check", small)
        remove(folder)
        contenders = {who: CONTENDERS[who] for who in CONTENDERS if who != "helios" or not failure}
        runs = {who: partial(turn, work, original, folder) for who, work in contenders.items()}
        results = interleave(runs, 60 if options.large else 20)
        base = [each.wall for each in results["cp + fsync"]]
        rows: list[list[object]] = []
        for who in CONTENDERS:
            if who not in results:
                reason = failure.partition(":")[0].rpartition(".")[2]
                rows.append([who, f"- ({reason})", None, None])
                continue
            wall = [each.wall for each in results[who]]
            rows.append([who, median(wall), f"{ratio(wall, base):.2f}", median(e.cpu for e in results[who])])
        memory: list[list[object]] = []
        for mib in (options.mib // 4, options.mib):
            path = original if mib == options.mib else place / "quarter.pth"
            if not path.exists():
                ask("write", path, mib)
            for who in ("by hand", "helios"):
                found = ask(who, path) if who in contenders else "not there"
                cells = [f"- ({found})", None] if isinstance(found, str) else [found["whole"], found["grown"]]
                memory.append([who, size(mib), *cells])
    head = [f"{size(options.mib)}", "ms", "over cp + fsync", "CPU, ms"]
    memory_head = ["memory", "file", "whole, MiB", "grown, MiB"]
    return table(head, rows) + "\n\n" + table(memory_head, memory)
