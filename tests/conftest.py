"""Runs jobs in real processes, and reads what they leave."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from job import Job  # noqa: E402
from prove_resume import digest, read_scalars, read_trace  # noqa: E402

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
    scalars = read_scalars(root / "tensorboard")
    assert len({(tag, step) for tag, step, _ in scalars}) == len(scalars), "a scalar is there twice"
    parts: dict[str, Any] = {
        "name": path.name,
        **{f"model.{key}": value for key, value in last["model"].items()},
        **{f"rng.{key}": value for key, value in last["rng"].items()},
        "loader": last["data"],
        "counters": counters,
        **{f"trainer.{key}": value for key, value in own.items()},
        "trace": read_trace(root / "trace.txt"),
        "scalars": scalars,
    }
    return {name: digest(part) for name, part in parts.items()}
