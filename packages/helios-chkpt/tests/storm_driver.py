"""Storms of kills: fork a child that changes checkpoints, kill -9 it, look at what is left.

    python storm_driver.py FOLDER OPERATION random NUM_KILLS [SEED]
    python storm_driver.py FOLDER OPERATION calls

``random`` kills a child that repeats the operation, at random instants. ``calls`` kills it right before and right
after each of the calls by which the operation changes files, one kill for each. Prints counts as JSON. A program of
its own so that the children are forked from a process without threads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from helios import chkpt
from helios.chkpt_migrator import migrate_checkpoints_to_current_version

HERE = Path(__file__).parent
RUN = "run"
LEGACY = HERE / "legacy" / "2.0.1" / "amp" / "tiny_epoch_1_iter_6.pth"
COUNTS = ("kills", "orphans", "lost", "wrong", "unswept")


def kit() -> object:
    spec = importlib.util.spec_from_file_location("chkpt_kit", HERE / "chkpt_kit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chkpt_kit"] = module
    spec.loader.exec_module(module)
    return module


def name_of(step: int) -> str:
    return chkpt.format_name(chkpt.CheckpointName(RUN, 1, step))


class Overwrite:
    """`save` onto one name, again and again; what is there is the file of the last step or of the one before."""

    def __init__(self, folder: Path, num_floats: int) -> None:
        self.folder = folder
        self.num_floats = num_floats
        self.path = folder / name_of(1)

    def state(self, step: int) -> dict[str, object]:
        return {"step": step, "w": torch.full((self.num_floats,), float(step))}

    def prepare(self) -> None:
        chkpt.save(self.state(0), self.path)

    def run(self, step: int) -> None:
        chkpt.save(self.state(step), self.path)

    def found(self) -> int:
        """The step of the newest file that loads; CheckpointError if there is none, or it is another's."""
        path = chkpt.find_last_checkpoint(self.folder, RUN)
        if path is None:
            raise chkpt.CheckpointError("nothing that verifies")
        chkpt.verify(path)
        loaded = chkpt.load(path)
        step, weights = loaded["step"], loaded["w"]
        assert isinstance(step, int) and isinstance(weights, torch.Tensor)
        if not (weights == step).all():
            raise ValueError("the wrong weights")
        return step


class InPlace(Overwrite):
    """The control: what torch does."""

    def run(self, step: int) -> None:
        torch.save({**self.state(step), "version": chkpt.__version__}, self.path)


class Background(Overwrite):
    """`save_async` onto one name."""

    def __init__(self, folder: Path, num_floats: int) -> None:
        super().__init__(folder, num_floats)
        self.store: chkpt.CheckpointStore | None = None

    def run(self, step: int) -> None:
        if self.store is None:
            self.store = chkpt.CheckpointStore(self.folder, RUN)
        self.store.save_async(self.state(step), epoch=1, iteration=1)
        self.store.wait()


class Retention(Overwrite):
    """`save` under a new name each time, and the one before it is deleted."""

    def run(self, step: int) -> None:
        with chkpt.CheckpointStore(self.folder, RUN, keep_last=1) as store:
            store.save(self.state(step), epoch=1, iteration=step)


class Migrate(Overwrite):
    """A file of an earlier release is migrated; it is the old one, byte for byte, or the new one, whole."""

    def prepare(self) -> None:
        self.path = self.folder / LEGACY.name
        shutil.copy(LEGACY, self.path)
        for backup in self.folder.glob("*.bak"):
            backup.unlink()

    def run(self, step: int) -> None:
        shutil.copy(LEGACY, self.folder / ".fresh")
        (self.folder / ".fresh").replace(self.path)
        for backup in self.folder.glob("*.bak"):
            backup.unlink()
        assert migrate_checkpoints_to_current_version(self.folder).ok

    def found(self) -> int:
        if self.path.read_bytes() != LEGACY.read_bytes():
            chkpt.verify(self.path)
            chkpt.load(self.path)
        report = migrate_checkpoints_to_current_version(self.folder)
        (self.folder / ".fresh").unlink(missing_ok=True)
        if not report.ok:
            raise chkpt.CheckpointError(report.results[0].reason)
        chkpt.load(self.path)
        return -1


OPERATIONS: dict[str, Callable[[Path, int], Overwrite]] = {
    "overwrite": Overwrite,
    "in_place": InPlace,
    "async": Background,
    "retention": Retention,
    "migrate": Migrate,
}


def look(operation: Overwrite, expected: tuple[int, ...], counts: Counter[str]) -> int:
    """Count what is wrong after a kill; return the step that is there now."""
    counts["kills"] += 1
    counts["orphans"] += len(list(operation.folder.glob(".*.tmp")))
    step = expected[0]
    try:
        step = operation.found()
        counts["wrong"] += step not in expected
    except chkpt.CheckpointError:
        counts["lost"] += 1
    except ValueError:
        counts["wrong"] += 1
    with chkpt.CheckpointStore(operation.folder, RUN):
        counts["unswept"] += len(list(operation.folder.glob(".*")))
    return step


def repeat(operation: Overwrite, first: int, report: int) -> NoReturn:
    step = first
    while True:
        operation.run(step)
        os.write(report, step.to_bytes(8, "little"))
        step += 1


def kill_one(operation: Overwrite, first: int, delay_s: float) -> int:
    """The last step that the child reported as done."""
    reader, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        repeat(operation, first, report)
    os.close(report)
    with os.fdopen(reader, "rb") as pipe:
        done = pipe.read(8)  # the loop runs
        assert done, "the child failed"
        time.sleep(delay_s)  # the instant of the kill, not a synchronisation
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += pipe.read()
    return int.from_bytes(done[-8:], "little")


def kill_at_random(operation: Overwrite, num_kills: int, seed: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    rng = random.Random(seed)
    operation.prepare()
    last = 0
    for _ in range(num_kills):
        done = kill_one(operation, last + 1, rng.uniform(0.0, 0.06))
        expected = (-1,) if isinstance(operation, Migrate) else (done, done + 1)
        last = max(done, look(operation, expected, counts))
    return counts


def kill_at_every_call(operation: Overwrite) -> Counter[str]:
    tools = kit()
    counts: Counter[str] = Counter()
    step = 0
    operation.prepare()
    for after in (False, True):
        number = 0
        while True:
            disk = tools.Disk(operation.folder, tools.kill, number, after)  # type: ignore[attr-defined]

            def work(disk: object = disk, step: int = step + 1) -> None:
                with tools.watched(disk):  # type: ignore[attr-defined]
                    operation.run(step)

            status = tools.in_child(work)  # type: ignore[attr-defined]
            assert status in (0, -signal.SIGKILL), f"the child failed: {status}"
            expected = (-1,) if isinstance(operation, Migrate) else (step, step + 1)
            step = max(step, look(operation, expected, counts))
            if status == 0:
                counts["kills"] -= 1
                break
            number += 1
    return counts


def main(folder: Path, name: str, how: str, num_kills: int = 0, seed: int = 20260101) -> None:
    torch.set_num_threads(1)
    operation = OPERATIONS[name](folder, 1 << 18 if how == "random" else 1 << 4)
    counts = kill_at_random(operation, num_kills, seed) if how == "random" else kill_at_every_call(operation)
    print(json.dumps({key: counts[key] for key in COUNTS}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
