"""Runs jobs in real processes, kills included, and reads what they leave."""

import dataclasses
import os
import signal
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from line_server import HERE, LineServer

sys.path.append(str(HERE.parent / "examples"))

from job import Job, Place
from prove_resume import digest, read_scalars, read_trace

from helios.chkpt import load, parse_name

KILLED = -signal.SIGKILL
STOPPED = os.EX_TEMPFAIL  # of a process that was asked to stop and is to go on another time


class JobRunner(LineServer):
    """Runs jobs, one at a time, each in a process of its own. A context manager."""

    def __init__(self) -> None:
        super().__init__("fork_server.py")

    def __call__(self, job: Job) -> int:
        """Run a job and return its status; negative is a signal."""
        return int(self.ask(dataclasses.asdict(job)))


def run_killed(runner: JobRunner, job: Job, kills: Sequence[Place], workers: Sequence[int] = ()) -> None:
    """Run a job, killed once at each place, until it ends; each start may have other workers.

    Asked to stop at the last place it may end instead, if there is nothing left to do then.

    Raises:
        AssertionError: a process did not come to its place or did not die of it, or the last did not end well.
    """
    for number, kill in enumerate([*kills, None]):
        started = dataclasses.replace(job, kill=kill)
        if workers:
            started = dataclasses.replace(started, workers=workers[number % len(workers)])
        status = runner(started)
        output = Path(job.root, "output.txt").read_text()
        if kill is None:
            assert status == 0, f"status {status}\n{output}"
            return
        expected = [KILLED] if job.signal == "SIGKILL" else [STOPPED, 0] if kill == kills[-1] else [STOPPED]
        assert status in expected, f"{job.signal} at {kill}: status {status}\n{output}"
        noted = Path(job.root, "kills.txt").read_text().splitlines()
        assert len(noted) == number + 1, f"{kill} was not reached, only {noted}"


def evidence(root: Path, batches: Container[int] | None = None) -> dict[str, str]:
    """Return digests of all that must be the same, by name: of checkpoints, of the trace and the scalars.

    Args:
        root: folder of the run.
        batches: only checkpoints after these; None takes all.
    """
    parts: dict[str, list[Any]] = {}
    for path in sorted((root / "checkpoints").glob("*.pth")):
        name = parse_name(path.name)
        assert name is not None
        if batches is None or name.iteration in batches:
            for part, value in {"name": path.name, **parts_of(load(path))}.items():
                parts.setdefault(part, []).append(value)
    try:
        parts["trace"] = read_trace(root / "trace.txt")
    except ValueError as error:  # a batch that was repeated was another one
        parts["trace"] = [str(error)]
    parts["scalars"] = read_scalars(root / "tensorboard")
    return {name: digest(part) for name, part in parts.items()}


def parts_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same of a checkpoint, by name."""
    counters = dict(checkpoint["training_state"])
    own = dict(counters.pop("trainer"))
    del counters["average_iter_time"]  # seconds
    assert own.pop("aliases") == {}  # this model has none; the trainer's own tests have some
    del own["event_sizes"]  # of files that a restart continues in another file
    return {
        **{f"model.{key}": value for key, value in checkpoint["model"].items()},
        **{f"rng.{key}": value for key, value in checkpoint["rng"].items()},
        "loader": checkpoint["data"],
        **{f"counters.{key}": value for key, value in counters.items()},
        **{f"trainer.{key}": value for key, value in own.items()},
    }


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Return the names of what differs between two pieces of evidence."""
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]
