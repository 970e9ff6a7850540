"""Table 10: how soon the commands answer, and what is known of a file that is too large to be read."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.chkpt_states import large_state, scratch, size
from benchmarks.harness import (
    MIB,
    ROOT,
    Case,
    Options,
    cold_and_warm,
    in_fresh_process,
    interleave,
    ratio,
    table,
)

TITLE = "Start: milliseconds until a command has answered, and until the version of a file is known"
NOTES = (
    "Commands: a new process each time, from start to exit, on a folder of two equal checkpoints of 1 MiB; they take "
    "turns, ratios are medians over neighbouring turns. CPU: processor time of the process. torch: whether it was "
    "imported. Version: `inspect` in a process that runs already, the first time in it (cold: with what that imports) "
    "and the median of many (warm). The largest file has ten times the MiB of `--mib`, all zeros, and holes for them "
    "on the disk, dug after it was written, so that every sum in it is right. zipfile: opening it and reading the list "
    "of its members, which is less than any version."
)
SPARSE = 10


class Started(NamedTuple):
    """Milliseconds from start to exit, and of processor time."""

    wall: float
    cpu: float


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands, by what they are called in the table; an empty one is not installed."""
    python = [sys.executable, "-W", "ignore"]
    script = Path(sys.executable).with_name("helios-chkpt")
    ours = [str(script)] if script.exists() else []
    first, second = (str(folder / f"bench_epoch_1_iter_{number}.pth") for number in (1, 2))
    arguments = {"ls": [str(folder)], "inspect": [first], "verify": [first], "diff": [first, second]}
    return {
        "`python -c pass`": [*python, "-c", "pass"],
        "`python -c 'import torch'`": [*python, "-c", "import torch"],
        **{f"`helios-chkpt {name}`": ours and [*ours, name, *rest] for name, rest in arguments.items()},
        "`python -m helios.chkpt_migrator`": [*python, "-m", "helios.chkpt_migrator", str(folder)],
    }


def start(command: list[str]) -> Started:
    """Run a command, and return how long it took."""
    begin, before = time.perf_counter(), os.times()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)  # noqa: S603  # our own commands
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Started((time.perf_counter() - begin) * 1e3, cpu * 1e3)


def imports_torch(command: list[str]) -> str | None:
    """Say whether a command imports torch; None if it fails."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    if done.returncode:
        return None
    return (
        "yes"
        if any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())
        else "no"
    )


def starts(folder: Path, seconds: float) -> list[list[object]]:
    """Return the rows of the commands."""
    known = commands(folder)
    torch = {name: imports_torch(command) if command else None for name, command in known.items()}
    results = interleave({name: partial(start, known[name]) for name in known if torch[name]}, seconds)
    wall = {name: [each.wall for each in turns] for name, turns in results.items()}
    rows: list[list[object]] = []
    for name, command in known.items():
        if name not in results:
            reason = "fails" if command else "not installed"
            rows.append([name, f"- ({reason})", *[None] * 5])
            continue
        rows.append(
            [
                name,
                median(wall[name]),
                min(wall[name]),
                median(each.cpu for each in results[name]),
                ratio(wall[name], wall["`python -c pass`"]),
                ratio(wall[name], wall["`python -c 'import torch'`"]),
                torch[name],
            ]
        )
    return rows


def ours_inspect(path: Path) -> object:
    """Ask Helios for what is known without reading a tensor."""
    import helios.chkpt

    inspect: Any = getattr(helios.chkpt, "inspect", None)
    return inspect(path)


def torch_version(path: Path) -> object:
    """Map the file and take the version."""
    import torch

    return torch.load(path, mmap=True, weights_only=True)["version"]


def zip_names(path: Path) -> object:
    """List the members."""
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


READERS: dict[str, Callable[[Path], object]] = {
    "helios inspect": ours_inspect,
    "zipfile": zip_names,
    "torch.load(mmap=True)": torch_version,
}


def run_case(case: Case) -> Any:
    """Write a file, or time who reads its version; runs in a process of its own."""
    path = Path(case["path"])
    if case["what"] == "write":
        write(path, case["mib"], case["zeros"])
        return None
    reader = READERS[case["what"]]
    return cold_and_warm(lambda turn: path, reader)


def write(path: Path, mib: int, zeros: bool) -> None:
    """Write a checkpoint; one of zeros gets holes, which change nothing of its content."""
    import torch

    from helios.chkpt import save

    save({"model": {"layer0": torch.zeros(mib * MIB // 4)}} if zeros else large_state(mib, 1), path)
    program = shutil.which("fallocate")
    if zeros and program:
        subprocess.run([program, "--dig-holes", str(path)], check=True)  # noqa: S603  # ours, and its arguments too


def written(path: Path, mib: int, zeros: bool = False) -> Path:
    """Have a file written by another process."""
    case = {"what": "write", "path": str(path), "mib": mib, "zeros": zeros}
    failure = in_fresh_process("chkpt_start", case, timeout=300)
    if failure:
        raise RuntimeError(f"writing {path.name} failed: {failure}")
    return path


def versions(path: Path) -> list[list[object]]:
    """Return the rows of a file."""
    status = path.stat()
    on_disk = size(status.st_blocks * 512 / MIB)
    rows: list[list[object]] = []
    for who in READERS:
        found = in_fresh_process("chkpt_start", {"what": who, "path": str(path)})
        cells = [f"- ({found})", None] if isinstance(found, str) else [found["cold"], found.get("warm")]
        rows.append([who, size(status.st_size / MIB), on_disk, *cells])
    return rows


def run(options: Options) -> str:
    """Measure all and return the tables."""
    seconds = 90 if options.large else 30
    with scratch(options.mib * (SPARSE + 1) + 8) as folder:
        small = folder / "small"
        small.mkdir()
        first = written(small / "bench_epoch_1_iter_1.pth", 1)
        shutil.copy(first, small / "bench_epoch_1_iter_2.pth")
        rows = starts(small, seconds)
        known = versions(first)
        known += versions(written(folder / "large.pth", options.mib))
        known += versions(written(folder / "sparse.pth", options.mib * SPARSE, zeros=True))
    head = ["command", "median, ms", "fastest, ms", "CPU, ms", "over pass", "over import torch", "torch"]
    version_head = ["version of a file", "size", "on the disk", "cold, ms", "warm, ms"]
    return table(head, rows) + "\n\n" + table(version_head, known)
