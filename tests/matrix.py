"""The matrix of kills and resumes: its cases, where each is killed, and what must not differ after.

A case is a run with some settings that is killed at one place or more. The places come from `timeline`, which says
without running anything what an uninterrupted run passes, in order.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import BATCHES_PER_EPOCH, BATCHES_PER_VALIDATION, Job, Place
from job_runner import JobRunner, differing, evidence, run_killed

UNITS = ("epoch", "iteration")
WORKERS = (0, 1, 3, -2)
ACCUMULATIONS = (1, 2, 3)
# How often there is a validation, beside checkpoints: (valid_frequency, chkpt_frequency) by unit.
FREQUENCIES: dict[str, dict[str, tuple[int | None, int]]] = {
    "never": {"epoch": (None, 1), "iteration": (None, 2)},
    "more often": {"epoch": (1, 2), "iteration": (1, 2)},
    "less often": {"epoch": (2, 1), "iteration": (4, 2)},
    "as often": {"epoch": (1, 1), "iteration": (2, 2)},
    "coprime": {"epoch": (3, 2), "iteration": (3, 2)},
}
POINTS = (
    "mid-epoch",
    "mid-accumulation",
    "last batch",
    "epoch end",
    "epoch start",
    "validation start",
    "validation middle",
    "validation end",
    "save before rename",
    "save after rename",
    "resume setup",
    "resume load",
    "resume first batch",
    "twice",
    "three at random",
)
# Whether early_stop_cycles is set; if so, there is one more kill: before the validation that makes training stop,
# between it and its effect, or after that.
EARLY_STOPS = ("unset", "before", "between", "after")
EARLY_STOP_CYCLES = 2
SIGNALS = ("SIGKILL", "SIGTERM")
NUM_EPOCHS = 7
NUM_BATCHES = 42  # by ITERATION; every accumulation divides it, and it ends within an epoch


@dataclass(frozen=True)
class Case:
    """Settings of a run, and what becomes of it. The values are those of the tuples above.

    Attributes:
        unit: the training unit.
        workers: loader processes; -2 means 2 that persist.
        accumulation: batches whose gradients are accumulated.
        validation: how often there is one, beside checkpoints.
        point: where the run is killed.
        early_stop: where it is killed besides, if it stops early.
        is_async: whether checkpoints are written in the background.
        signal: what it is killed by; SIGTERM asks it to stop after the iteration or validation in progress.
    """

    unit: str
    workers: int
    accumulation: int
    validation: str
    point: str
    early_stop: str
    is_async: bool
    signal: str = "SIGKILL"

    def __str__(self) -> str:
        """Return a name for tables, test ids and command lines."""
        stop = f"stop:{self.early_stop}"
        save = "async" if self.is_async else "sync"
        parts = [
            self.unit,
            f"w{self.workers}",
            f"a{self.accumulation}",
            f"valid:{self.validation}",
            self.point,
        ]
        return ",".join([*parts, stop, save, self.signal]).replace(" ", "-")


def is_valid(case: Case) -> bool:
    """Whether the run of a case passes the places where it is to be killed."""
    if case.point == "mid-accumulation" and case.accumulation == 1:
        return False
    needs_validation = case.point.startswith("validation") or case.early_stop != "unset"
    return case.validation != "never" or not needs_validation


def valid_cases() -> list[Case]:
    """Return all cases that can be run."""
    values = (UNITS, WORKERS, ACCUMULATIONS, FREQUENCIES, POINTS, EARLY_STOPS, (False, True), SIGNALS)
    return [case for case in itertools.starmap(Case, itertools.product(*values)) if is_valid(case)]


def job_of(case: Case, root: Path) -> Job:
    """Return the run of a case, with nothing that kills it."""
    by_epoch = case.unit == "epoch"
    total_steps = NUM_EPOCHS if by_epoch else NUM_BATCHES // case.accumulation
    valid_frequency, chkpt_frequency = FREQUENCIES[case.validation][case.unit]
    job = Job(str(root), case.unit, total_steps, case.accumulation, valid_frequency, chkpt_frequency)
    job = dataclasses.replace(job, workers=case.workers, is_async=case.is_async, signal=case.signal)
    if case.early_stop == "unset" or valid_frequency is None:
        return job
    stop_cycle = (total_steps - 1) // valid_frequency  # the last validation before training would end anyway
    worse_from = stop_cycle - EARLY_STOP_CYCLES + 1
    return dataclasses.replace(job, early_stop_cycles=EARLY_STOP_CYCLES, worse_from=worse_from)


def timeline(job: Job) -> list[Place]:
    """Return the places that the run passes, in order, if nothing happens to it and it saves in the foreground."""
    places = [("before_replace", 0), ("after_replace", 0), ("setup", 0)]
    for batch in itertools.count(1):
        epoch = (batch - 1) // BATCHES_PER_EPOCH + 1
        is_last_of_epoch = batch % BATCHES_PER_EPOCH == 0
        if batch % BATCHES_PER_EPOCH == 1:
            places.append(("on_training_epoch_start", epoch))
        if batch == 1:
            places.append(("first_batch", 0))
        places += [("train_step", batch), ("on_training_batch_end", batch)]
        step = _step_after(job, batch)
        is_over = step is not None and _is_last(job, step)
        if step is not None:
            places += _places_after_step(job, step, batch)
        if is_last_of_epoch or is_over:
            places.append(("on_training_epoch_end", epoch))
        if is_over:
            return [*places, ("on_training_end", 0), ("before_replace", batch), ("after_replace", batch)]
    raise AssertionError


def _step_after(job: Job, batch: int) -> int | None:
    """Return the step of the training unit that ends with a batch, if one does."""
    num_batches = BATCHES_PER_EPOCH if job.unit == "epoch" else job.accumulation
    return batch // num_batches if batch % num_batches == 0 else None


def _is_last(job: Job, step: int) -> bool:
    return step >= job.total_steps or step == _stop_step(job)


def _stop_step(job: Job) -> int | None:
    """Return the step whose validation makes training stop early, if one does."""
    if job.early_stop_cycles is None or job.worse_from is None or job.valid_frequency is None:
        return None
    return (job.worse_from + job.early_stop_cycles - 1) * job.valid_frequency


def _places_after_step(job: Job, step: int, batch: int) -> Iterator[Place]:
    has_validated = job.valid_frequency is not None and step % job.valid_frequency == 0
    cycle = step // job.valid_frequency if has_validated else 0
    if has_validated:
        yield ("on_validation_start", cycle)
        for number in range(BATCHES_PER_VALIDATION):
            yield ("valid_step", cycle * 10 + number)
        yield ("on_validation_end", cycle)
    if step % job.chkpt_frequency == 0:
        yield from [("before_replace", batch), ("after_replace", batch)]
    if has_validated:
        yield ("have_metrics_improved", cycle)


def kills_of(case: Case, job: Job) -> list[Place]:
    """Return where a case is killed, in the order of the timeline; each process dies at one of the places."""
    places = timeline(job)
    if case.early_stop == "unset":
        return _kills_at_point(case, pieces_of(job, places))
    step = _stop_step(job)
    batch = step * (BATCHES_PER_EPOCH if case.unit == "epoch" else job.accumulation)
    last = {
        "before": ("on_training_batch_end", batch),
        "between": ("have_metrics_improved", step // job.valid_frequency),
        "after": ("on_training_epoch_end", (batch - 1) // BATCHES_PER_EPOCH + 1),
    }[case.early_stop]
    before = list(itertools.takewhile(lambda piece: last not in piece, pieces_of(job, places)))
    return [*_kills_at_point(case, before), last]


def pieces_of(job: Job, places: Sequence[Place]) -> list[list[Place]]:
    """Return the places in pieces that end with a complete iteration: a run asked to stop in one stops in it."""
    pieces: list[list[Place]] = [[]]
    for hook, number in places:
        pieces[-1].append((hook, number))
        is_complete = job.unit == "epoch" or number % job.accumulation == 0
        if hook == "on_training_batch_end" and is_complete:
            pieces.append([])
    return pieces


def _kills_at_point(case: Case, pieces: Sequence[Sequence[Place]]) -> list[Place]:
    """Return the kills that a case's point means, in an epoch other than the first."""
    if case.point == "three at random":
        chance = random.Random(str(case))
        return [_any_of(pieces[n], case, chance) for n in sorted(chance.sample(range(len(pieces)), 3))]
    places = [place for piece in pieces for place in piece]
    saved_epochs = (n // BATCHES_PER_EPOCH for hook, n in places if hook == "after_replace" and n >= 10)
    # An epoch after whose last batch there is a checkpoint, for the loader stands elsewhere then.
    boundary = next(e for e in saved_epochs if ("after_replace", e * BATCHES_PER_EPOCH) in places)
    middle = ("train_step", 17 if case.accumulation == 1 else 18)
    later = places[places.index(("train_step", 11)) :]
    return {
        "mid-epoch": lambda: [middle],
        "mid-accumulation": lambda: [("train_step", 17)],
        "last batch": lambda: [("on_training_batch_end", boundary * BATCHES_PER_EPOCH)],
        "epoch end": lambda: [("on_training_epoch_end", boundary)],
        "epoch start": lambda: [("on_training_epoch_start", boundary + 1)],
        "validation start": lambda: [_first(later, "on_validation_start")],
        "validation middle": lambda: [
            _first(later[later.index(_first(later, "valid_step")) + 1 :], "valid_step")
        ],
        "validation end": lambda: [_first(later, "on_validation_end")],
        "save before rename": lambda: [_first(later, "before_replace")],
        "save after rename": lambda: [_first(later, "after_replace")],
        "resume setup": lambda: [middle, ("setup", 0)],
        "resume load": lambda: [middle, ("load_state_dict", 0)],
        "resume first batch": lambda: [middle, ("first_batch", 0)],
        "twice": lambda: [middle, ("on_training_batch_end", 28)],
    }[case.point]()


def _any_of(places: Sequence[Place], case: Case, chance: random.Random) -> Place:
    # In the background a file takes its name at no certain time, so it may be in another piece.
    return chance.choice([place for place in places if not (case.is_async and place[0].endswith("_replace"))])


def _first(places: Sequence[Place], hook: str) -> Place:
    return next(place for place in places if place[0] == hook)


def reference_of(case: Case) -> Case:
    """Return the case whose uninterrupted run is what a case must end as; workers and kills must not matter."""
    stop = "unset" if case.early_stop == "unset" else "after"
    return dataclasses.replace(
        case, workers=0, point="mid-epoch", early_stop=stop, is_async=False, signal="SIGKILL"
    )


def run_whole(runner: JobRunner, case: Case, root: Path) -> dict[str, str]:
    """Run the run of a case with nothing that kills it, and return its evidence."""
    run_killed(runner, job_of(case, root), [])
    return evidence(root)


def run_case(
    runner: JobRunner, case: Case, root: Path, whole: Callable[[Case], dict[str, str]]
) -> tuple[list[str], int]:
    """Run a case in a folder, kills and all.

    Args:
        runner: runs the processes.
        case: the case.
        root: an empty folder.
        whole: gives the evidence of a reference, as `run_whole`.

    Returns:
        The names of what differs from the uninterrupted run, and how often it was killed.
    """
    job = job_of(case, root)
    kills = kills_of(case, job)
    run_killed(runner, job, kills)
    return _differences(case, job, whole(reference_of(case))), len(kills)


def _differences(case: Case, job: Job, expected: dict[str, str]) -> list[str]:
    root = Path(job.root)
    if case.signal == "SIGKILL":
        return differing(evidence(root), expected)
    # Where it stopped there is a checkpoint that the other run lacks. But nothing was done twice.
    places = timeline(job)
    due = {number for hook, number in places if hook == "before_replace"}
    passed = [tuple(line.split()) for line in (root / "places.txt").read_text().splitlines()]
    is_same = _once([(hook, int(number)) for hook, number in passed]) == _once(places)
    return differing(evidence(root, due), expected) + ([] if is_same else ["hooks that were called"])


def _once(places: Sequence[Place]) -> list[Place]:
    """Return the places that a run passes once however often it was asked to stop."""
    often = ("setup", "load_state_dict", "first_batch", "before_replace", "after_replace")
    return [place for place in places if place[0] not in often]
