"""The matrix of kills and resumes on several ranks: its cases, where each is killed, and what must not differ after.

Where a run can be killed is seen from the places that each rank of the uninterrupted run has passed.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from job import Place
from job_runner import differing
from rank_job import BATCH_SIZE, RankJob
from rank_runner import RankRunner, evidence, places_of, run_killed

WORLD_SIZES = (1, 2, 4)
STRATEGIES = ("ddp", "fsdp")
SIGNALS = ("SIGKILL", "SIGTERM")
VICTIMS = ("one", "all")
WORKERS = (0, 2)
ACCUMULATIONS = (1, 2)
POINTS = (
    "mid-epoch",
    "epoch end",
    "validation",
    "save",
    "save before rename",
    "resume load",
    "twice",
)
UNITS = ("epoch", "iteration")
NUM_BATCHES = 12  # by ITERATION; every accumulation divides it
NUM_EPOCHS = {1: 3, 2: 4, 4: 6}  # of 6, 3 and 2 batches
# What a run passes once, however often it was asked to stop, is all but this.
OFTEN = ("setup", "load_state_dict", "first_batch", "state_dict", "before_replace", "after_replace")


@dataclass(frozen=True)
class RankCase:
    """Settings of a run, and what becomes of it. The values are those of the tuples above.

    Attributes:
        world_size: how many ranks.
        strategy: how the network is on them.
        signal: what the victims are killed by; SIGTERM asks the run to stop.
        victims: which ranks get it: one, which is another one in each case, or all.
        workers: loader processes of each rank.
        accumulation: batches whose gradients are accumulated.
        point: where the run is killed.
        unit: the training unit.
        is_async: whether checkpoints are written in the background.
        draws_on_rank_1: whether rank 1 draws more random numbers than the others.
    """

    world_size: int
    strategy: str
    signal: str
    victims: str
    workers: int
    accumulation: int
    point: str
    unit: str
    is_async: bool
    draws_on_rank_1: bool

    def __str__(self) -> str:
        """Return a name for tables, test ids and command lines."""
        parts = [f"{self.world_size}x{self.strategy}", self.signal, self.victims, f"w{self.workers}"]
        parts += [f"a{self.accumulation}", self.point, self.unit, "async" if self.is_async else "sync"]
        return ",".join([*parts, *(["draws"] if self.draws_on_rank_1 else [])]).replace(" ", "-")


def is_valid(case: RankCase) -> bool:
    """Whether a case is unlike others: one rank is all there are, sharded checkpoints are written in the foreground."""
    if case.world_size == 1 and (case.victims == "all" or case.draws_on_rank_1):
        return False
    return not (case.strategy == "fsdp" and case.is_async)


def valid_cases() -> list[RankCase]:
    """Return all cases that can be run."""
    values = (WORLD_SIZES, STRATEGIES, SIGNALS, VICTIMS, WORKERS, ACCUMULATIONS, POINTS, UNITS)
    every = itertools.starmap(RankCase, itertools.product(*values, (False, True), (False, True)))
    return [case for case in every if is_valid(case)]


def job_of(case: RankCase, root: Path) -> RankJob:
    """Return the run of a case, with nothing that kills it."""
    by_epoch = case.unit == "epoch"
    return RankJob(
        root=str(root),
        unit=case.unit,
        total_steps=NUM_EPOCHS[case.world_size] if by_epoch else NUM_BATCHES // case.accumulation,
        accumulation=case.accumulation,
        valid_frequency=2 if by_epoch else 3,
        chkpt_frequency=1 if by_epoch else 2,
        workers=case.workers,
        is_async=case.is_async,
        signal=case.signal,
        world_size=case.world_size,
        strategy=case.strategy,
        draws_on_rank_1=case.draws_on_rank_1,
        batch_size=BATCH_SIZE,
    )


def reference_of(case: RankCase) -> RankCase:
    """Return the case whose uninterrupted run is what a case must end as; workers and kills must not matter."""
    other = {"signal": "SIGKILL", "victims": "one", "workers": 0, "point": "mid-epoch", "is_async": False}
    return dataclasses.replace(case, **other)


def kills_of(case: RankCase, places: Sequence[Place]) -> list[Place]:
    """Return where a case is killed, given what rank 0 passes; each start of the run dies at one of the places."""
    # In mid-epoch, after a checkpoint; by EPOCH one rank has its first after 6 batches.
    batch = 9 if case.unit == "epoch" and case.world_size == 1 else 5
    middle = ("train_step", batch)
    later = places[places.index(middle) :]
    return {
        "mid-epoch": lambda: [middle],
        "epoch end": lambda: [_first(later, "on_training_epoch_end")],
        "validation": lambda: [_first(later, "valid_step")],
        "save": lambda: [_first(later, "state_dict")],
        "save before rename": lambda: [_first(later, "before_replace")],
        "resume load": lambda: [middle, ("load_state_dict", 0)],
        "twice": lambda: [middle, ("on_training_batch_end", batch + 6)],
    }[case.point]()


def _first(places: Sequence[Place], hook: str) -> Place:
    return next(place for place in places if place[0] == hook)


def victims_of(case: RankCase, kills: Sequence[Place], passed: Mapping[int, Sequence[Place]]) -> list[int]:
    """Return the ranks that are killed, of those that come to the places; `passed` has what each rank passes."""
    often = {("load_state_dict", 0)}
    able = [rank for rank, places in passed.items() if set(kills) <= {*places, *often}]
    return able if case.victims == "all" else [random.Random(str(case)).choice(able)]


def run_whole(runner: RankRunner, case: RankCase, root: Path) -> Path:
    """Run the run of a case with nothing that kills it, and return its folder."""
    run_killed(runner, job_of(case, root), [])
    return root


def run_case(
    runner: RankRunner, case: RankCase, root: Path, whole: Callable[[RankCase], Path]
) -> tuple[list[str], int]:
    """Run a case in a folder, kills and all.

    Args:
        runner: runs the processes.
        case: the case.
        root: an empty folder.
        whole: gives the folder of a reference, as `run_whole`.

    Returns:
        The names of what differs from the uninterrupted run, and how often ranks were killed.
    """
    job, reference = job_of(case, root), whole(reference_of(case))
    passed = {rank: places_of(reference, rank) for rank in range(case.world_size)}
    kills = kills_of(case, passed[0])
    victims = victims_of(case, kills, passed)
    run_killed(runner, job, kills, victims)
    return differences(root, reference, case.signal), len(kills) * len(victims)


def differences(root: Path, reference: Path, signal: str) -> list[str]:
    """Return the names of what differs between a run that was killed and an uninterrupted one, by their folders."""
    passed = {path.name: places_of(reference, int(path.name[4:])) for path in reference.glob("rank*")}
    if signal == "SIGKILL":
        return differing(evidence(root), evidence(reference))
    # Where it stopped there is a checkpoint that the other run lacks. But nothing was done twice.
    due = {number for hook, number in passed["rank0"] if hook == "before_replace"}
    others = [
        f"hooks that were called on {rank}"
        for rank, places in passed.items()
        if _once(places_of(root, int(rank[4:]))) != _once(places)
    ]
    return differing(evidence(root, due), evidence(reference)) + others


def _once(places: Sequence[Place]) -> list[Place]:
    return [place for place in places if place[0] not in OFTEN]
