"""Runs jobs in real processes, and reads what they leave."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from job import Job  # noqa: E402

KILLED = -signal.SIGKILL


@pytest.fixture(scope="session")
def run_job() -> Iterator[Callable[[Job], int]]:
    """Run a job in a process of its own and return its status; negative is a signal."""
    command = [sys.executable, str(HERE / "fork_server.py")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None

    def run(job: Job) -> int:
        server.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()


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


def scalars_of(folder: Path) -> list[tuple[str, int, float]]:
    """Return what TensorBoard shows, by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run_folder,) = folder.iterdir()
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(tag, e.step, e.value) for tag in sorted(events.Tags()["scalars"]) for e in events.Scalars(tag)]


def trace_of(path: Path) -> list[str]:
    """Return a line for each batch; one that was trained on again must have been the same again."""
    lines: dict[int, str] = {}
    for line in path.read_text().splitlines():
        assert lines.setdefault(int(line.split()[1]), line) == line, "a batch was another one when repeated"
    return [lines[number] for number in sorted(lines)]


def evidence(job: Job) -> dict[str, str]:
    """Return digests of all that must be the same, by name."""
    from helios.chkpt import find_last_checkpoint, load

    root = Path(job.root)
    path = find_last_checkpoint(root / "checkpoints")
    assert path is not None
    last = load(path)
    counters = dict(last["training_state"])
    own = dict(counters.pop("trainer"))
    del counters["average_iter_time"]  # seconds
    del own["event_sizes"]  # of files that a restart continues in another file
    scalars = scalars_of(root / "tensorboard")
    assert len({(tag, step) for tag, step, _ in scalars}) == len(scalars), "a scalar is there twice"
    parts: dict[str, Any] = {
        "name": path.name,
        **{f"model.{key}": value for key, value in last["model"].items()},
        **{f"rng.{key}": value for key, value in last["rng"].items()},
        "loader": last["data"],
        "counters": counters,
        **{f"trainer.{key}": value for key, value in own.items()},
        "trace": trace_of(root / "trace.txt"),
        "scalars": scalars,
    }
    return {name: digest(part) for name, part in parts.items()}
