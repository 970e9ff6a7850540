"""Runs that go on on other numbers of ranks, and which samples they trained on."""

import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rank_job import RankJob
from rank_runner import RankRunner, outputs

from helios.chkpt import find_last_checkpoint, parse_name

Sample = tuple[int, str]  # its index, and a digest of it as it was augmented


@dataclass(frozen=True)
class Phase:
    """A start of a run: on how many ranks, and in which batch of the run all of them get the signal, if in any."""

    world_size: int
    batch: int | None = None
    batch_size: int = 1
    signal: str = "SIGTERM"
    strategy: str | None = None
    has_group: bool = True


def job_of(phase: Phase, job: RankJob) -> RankJob:
    """Return the job as it is in a phase."""
    return dataclasses.replace(
        job,
        world_size=phase.world_size,
        victims=tuple(range(phase.world_size)),
        kill=None if phase.batch is None else ("train_step", phase.batch),
        batch_size=phase.batch_size,
        signal=phase.signal,
        strategy=phase.strategy or job.strategy,
        has_group=phase.has_group,
    )


def run_phases(runner: RankRunner, job: RankJob, phases: Sequence[Phase]) -> dict[int, list[Sample]]:
    """Run a job, each phase on other ranks, and return by epoch what it trained on.

    Raises:
        AssertionError: a phase did not stop or end as it should.
    """
    trained: list[tuple[int, int, Sample]] = []
    for phase in phases:
        for path in Path(job.root).glob("rank*/samples.txt"):
            path.unlink()
        run_phase(runner, job, phase)
        # What came after the last checkpoint is lost, and trained on again.
        last = find_last_checkpoint(Path(job.root, "checkpoints"))
        name = None if last is None else parse_name(last.name)
        done = 0 if name is None else name.iteration
        trained += [sample for sample in samples_of(Path(job.root)) if sample[1] <= done]
    return {epoch: [s for e, _, s in trained if e == epoch] for epoch in sorted({e for e, _, _ in trained})}


def run_phase(runner: RankRunner, job: RankJob, phase: Phase) -> dict[str, Any]:
    """Run one phase, and return what the runner says."""
    answer = runner(job_of(phase, job))
    statuses = set(answer["statuses"])
    said = f"{phase}: {answer}\n{outputs(job)}"
    assert not answer["was_killed"], said
    if phase.batch is None:
        assert statuses == {0}, said
    elif phase.signal == "SIGTERM":
        assert statuses == {os.EX_TEMPFAIL}, said
    else:
        assert -signal.SIGKILL in statuses, said
    return answer


def samples_of(root: Path) -> list[tuple[int, int, Sample]]:
    """Return epoch, batch and sample of what was trained on since the notes were deleted."""
    samples = []
    for path in root.glob("rank*/samples.txt"):
        for epoch, batch, index, augmented in map(str.split, path.read_text().splitlines()):
            samples.append((int(epoch), int(batch), (int(index), augmented)))
    return samples


def repeated(samples: Sequence[Sample]) -> int:
    """Return how many of the samples are there for a second time or more often."""
    return sum(n - 1 for n in Counter(index for index, _ in samples).values())
