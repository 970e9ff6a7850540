"""Train the digits example uninterrupted, then again while killing it, and compare every bit.

    python examples/prove_resume.py [--seed N] [--unit epoch|iteration] [--keep FOLDER]

The second run is killed with SIGKILL three times, with its workers: in the middle of an epoch, during the
save of a checkpoint, and anywhere at all, start-up included. The moments are random; `--seed` says which.
Each restart also takes another number of loader workers, since that must not matter either.
Exits with status 1 if anything differs.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helios.chkpt import find_last_checkpoint, load

EXAMPLE = Path(__file__).with_name("digits.py")
BATCHES_PER_EPOCH = 34


@dataclass(frozen=True)
class Run:
    """A run of the example: its folder, and how it is started."""

    folder: Path
    unit: str
    epochs: int

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def trace(self) -> Path:
        """File with a line for every batch."""
        return self.folder / "trace.txt"

    def start(self, num_workers: int) -> "subprocess.Popen[str]":
        """Start a process that begins the run or goes on with it, in a process group of its own."""
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, str(EXAMPLE), "--root", str(self.folder), "--trace", str(self.trace)]
        command += ["--unit", self.unit, "--epochs", str(self.epochs), "--workers", str(num_workers)]
        errors = (self.folder / "stderr.txt").open("a")
        with errors:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )

    def finish(self, num_workers: int) -> str:
        """Start a process, wait for its end, and return the test accuracy that it prints."""
        process = self.start(num_workers)
        output, _ = process.communicate()
        accuracy = re.search(r"test accuracy: (\S+)", output)
        if process.returncode != 0 or accuracy is None:
            tail = (self.folder / "stderr.txt").read_text()[-2000:]
            sys.exit(f"the example failed with status {process.returncode}:\n{output}\n{tail}")
        return accuracy[1]

    def num_batches(self) -> int:
        """Batches that were trained on so far, repeated ones included."""
        return self.trace.read_text().count("\n") if self.trace.exists() else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any(self.checkpoints.glob(".*.tmp"))


def kill_when(run: Run, num_workers: int, is_time: Callable[[], bool]) -> bool:
    """Start a process and kill it, workers and all, once `is_time`; say whether it was still running."""
    process = run.start(num_workers)
    try:
        while not is_time():
            if process.poll() is not None:
                return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_in_mid_epoch(run: Run, chance: random.Random) -> str:
    """Kill when a batch that is neither the first nor the last of an epoch has been trained on."""
    target = run.num_batches() + BATCHES_PER_EPOCH * chance.randint(1, 4) + chance.randint(5, 29)
    target -= target % BATCHES_PER_EPOCH == 0
    if not kill_when(run, 2, lambda: run.num_batches() >= target):
        sys.exit("the run ended before it was killed in mid-epoch")
    return f"in mid-epoch, at batch {run.num_batches()}"


def kill_in_save(run: Run, chance: random.Random) -> str:
    """Kill during a save: its temporary file must be there before and after."""
    for attempt in range(1, 11):
        target = run.num_batches() + chance.randint(1, BATCHES_PER_EPOCH)
        if not kill_when(run, 0, lambda t=target: run.num_batches() >= t and run.is_saving()):
            sys.exit("the run ended before it was killed in a save")
        if run.is_saving():
            return f"during a save (attempt {attempt})"
    sys.exit("no kill hit a save")


def kill_anywhere(run: Run, chance: random.Random) -> str:
    """Kill in start-up, or some milliseconds after some batch: in a step, a validation, a save, ..."""
    num_more = chance.randint(-30, 200)
    before = run.num_batches()
    end_s = time.monotonic() + chance.uniform(0, 2) if num_more < 0 else float("inf")
    delay_s = chance.uniform(0, 0.05)

    def is_time() -> bool:
        if num_more >= 0 and run.num_batches() >= before + num_more:
            time.sleep(delay_s)
            return True
        return time.monotonic() > end_s

    if not kill_when(run, 1, is_time):
        sys.exit("the run ended before it was killed anywhere")
    return "anywhere: " + ("in start-up" if num_more < 0 else f"at batch {run.num_batches()}")


def digest(value: Any) -> str:
    """Return a digest of every bit of a nested value."""
    seen = hashlib.sha256()

    def add(part: Any) -> None:
        seen.update(type(part).__name__.encode())
        if isinstance(part, torch.Tensor):
            seen.update(f"{part.dtype}{tuple(part.shape)}".encode())
            seen.update(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, item in part.items():
                add(key)
                add(item)
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        else:
            seen.update(repr(part).encode())

    add(value)
    return seen.hexdigest()


def read_trace(path: Path) -> list[str]:
    """Return one line for each batch.

    Raises:
        ValueError: a batch that was trained on again after a kill was another one.
    """
    lines: dict[int, str] = {}
    for line in path.read_text().splitlines():
        iteration = int(line.split()[1])
        if lines.setdefault(iteration, line) != line:
            raise ValueError(f"batch {iteration} was another one when repeated:\n{lines[iteration]}\n{line}")
    return [lines[iteration] for iteration in sorted(lines)]


def read_scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Return every scalar that TensorBoard shows: tag, step, value."""
    # A run that is killed right when it takes the name of its logs leaves them empty, and takes another.
    (run_folder,) = (path for path in folder.iterdir() if any(path.iterdir()))
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    # Sorted, for TensorBoard reads the files of processes that began in one second by the digits of their numbers.
    return sorted((tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def evidence(run: Run) -> dict[str, Any]:
    """Return what must be the same, by name."""
    path = find_last_checkpoint(run.checkpoints)
    assert path is not None
    last = load(path)
    batches = [line.split() for line in read_trace(run.trace)]
    scalars = read_scalars(run.folder / "tensorboard")
    return {
        "weights and buffers": last["model"]["net"],
        "optimizer": last["model"]["optimizer"],
        "scheduler": last["model"]["scheduler"],
        "RNG (torch, Python, NumPy)": last["rng"],
        "loader": last["data"],
        f"sample order, {len(batches)} batches": [b[:3] for b in batches],
        "augmented samples": [b[3] for b in batches],
        f"logged scalars, {len(scalars)}": scalars,
        "checkpoint's name": path.name,
    }


def prove(folder: Path, unit: str, epochs: int, seed: int) -> bool:
    """Make both runs, print the table, and say whether all was equal."""
    chance = random.Random(seed)
    whole, killed = Run(folder / "whole", unit, epochs), Run(folder / "killed", unit, epochs)
    began_s = time.monotonic()
    accuracy = {"whole": whole.finish(num_workers=2)}
    run_s = time.monotonic() - began_s
    print(f"uninterrupted: {run_s:.1f} s, test accuracy {accuracy['whole']}")
    kills = [kill(killed, chance) for kill in (kill_in_mid_epoch, kill_in_save, kill_anywhere)]
    for number, kill in enumerate(kills, 1):
        print(f"kill {number}: {kill}")
    accuracy["killed"] = killed.finish(num_workers=2)

    a, b = evidence(whole), evidence(killed)
    rows = [(name, digest(a[name])[:16], digest(b.get(name))[:16]) for name in a]
    rows.insert(0, ("test accuracy", accuracy["whole"], accuracy["killed"]))
    print(f"\n{'':34}{'uninterrupted':18}{f'{len(kills)} x SIGKILL':18}equal")
    for name, one, other in rows:
        print(f"{name:34}{one:18}{other:18}{'yes' if one == other else 'NO'}")
    is_equal = all(one == other for _, one, other in rows)
    print(f"\nseed {seed}, unit {unit}: {'every bit is the same' if is_equal else 'THE RUNS DIFFER'}")
    if not float(accuracy["whole"]) > 0.97:
        print("the accuracy is below 97%")
        return False
    return is_equal


def main() -> None:
    """Read the arguments and prove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--unit", choices=["epoch", "iteration"], default="iteration")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="new folder to keep both runs in")
    arguments = parser.parse_args()
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True)
        sys.exit(not prove(arguments.keep, arguments.unit, arguments.epochs, arguments.seed))
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not prove(Path(folder), arguments.unit, arguments.epochs, arguments.seed))


if __name__ == "__main__":
    main()
