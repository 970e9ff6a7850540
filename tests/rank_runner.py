"""Runs jobs on several ranks in real processes, kills included, and reads what they leave."""

import dataclasses
import os
import signal
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from job import Place
from job_runner import parts_of
from line_server import LineServer
from prove_resume import digest, read_scalars, read_trace
from rank_job import RankJob

from helios.chkpt import load, parse_name


class RankRunner(LineServer):
    """Runs jobs, one at a time, each of their ranks in a process of its own. A context manager."""

    def __init__(self) -> None:
        super().__init__("rank_server.py")

    def __call__(self, job: RankJob) -> dict[str, Any]:
        """Run a job; see `rank_server.run`."""
        answer: dict[str, Any] = self.ask(dataclasses.asdict(job))
        assert "error" not in answer, answer["error"]
        return answer


def run_killed(
    runner: RankRunner,
    job: RankJob,
    kills: Sequence[Place],
    victims: Sequence[int] = (),
    workers: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Run a job, with some ranks killed at each place, until it ends; each start may have other workers.

    Of several victims some may die of the death of another before they come to the place themselves.

    Returns:
        What the runner said of each start.

    Raises:
        AssertionError: no rank came to its place, one did not die or stop then, or the last start failed.
    """
    answers = []
    for number, kill in enumerate([*kills, None]):
        started = dataclasses.replace(job, kill=kill, victims=tuple(victims))
        if workers:
            started = dataclasses.replace(started, workers=workers[number % len(workers)])
        answer = runner(started)
        answers.append(answer)
        statuses = answer["statuses"]
        said = f"{kill}: {answer}\n{outputs(job)}"
        assert not answer["was_killed"], f"a rank did not notice that another died: {said}"
        if kill is None:
            assert statuses == [0] * job.world_size, said
            break
        assert max(num_kills(job, victim) for victim in victims) == number + 1, f"not reached: {said}"
        if job.signal == "SIGKILL":
            assert all(statuses), f"a rank lived on: {said}"
            assert -signal.SIGKILL in [statuses[victim] for victim in victims], said
        else:  # all stop, or all come to their end
            assert set(statuses) in ({os.EX_TEMPFAIL}, {0}), said
    return answers


def num_kills(job: RankJob, rank: int) -> int:
    """Return how often a rank was killed."""
    path = Path(job.root, f"rank{rank}", "kills.txt")
    return path.read_text().count("\n") if path.exists() else 0


def places_of(root: Path, rank: int) -> list[Place]:
    """Return the places that a rank passed, in order."""
    lines = Path(root, f"rank{rank}", "places.txt").read_text().splitlines()
    return [(hook, int(number)) for hook, number in map(str.split, lines)]


def outputs(job: RankJob) -> str:
    """Return what the ranks printed."""
    paths = sorted(Path(job.root).glob("rank*/output.txt"))
    return "\n".join(f"--- {path.parent.name}\n{path.read_text()[-3000:]}" for path in paths)


def evidence(root: Path, batches: Container[int] | None = None) -> dict[str, str]:
    """Return digests of all that must be the same, by name: of checkpoints, of each rank's trace, and the scalars.

    Args:
        root: folder of the run.
        batches: only checkpoints after these; None takes all.
    """
    parts: dict[str, list[Any]] = {}
    for path in sorted((root / "checkpoints").iterdir()):
        name = parse_name(path.name)
        if name is not None and (batches is None or name.iteration in batches):
            for part, value in {"name": path.name, **parts_of(load(path))}.items():
                parts.setdefault(part, []).append(value)
    for trace in sorted(root.glob("rank*/trace.txt")):
        try:
            parts[f"trace of {trace.parent.name}"] = read_trace(trace)
        except ValueError as error:  # a batch that was repeated was another one
            parts[f"trace of {trace.parent.name}"] = [str(error)]
    parts["scalars"] = read_scalars(root / "tensorboard")
    return {name: digest(part) for name, part in parts.items()}
