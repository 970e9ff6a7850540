"""The promise on several ranks, bitwise: whichever of them is killed, the run ends as the one that never was.

Every rank is a process of its own and every kill a real signal. Here is a sample of the matrix; `nox -s ranks` runs as
much of it as one likes.
"""

import dataclasses
import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import in_seeded_order, pairs_of
from job import Place
from job_runner import differing
from rank_job import RankJob
from rank_matrix import (
    RankCase,
    differences,
    is_valid,
    job_of,
    kills_of,
    reference_of,
    run_case,
    valid_cases,
    victims_of,
)
from rank_runner import evidence, outputs, places_of, run_killed

from helios.chkpt import find_last_checkpoint, load, save

SEED = 5
PLAIN = RankCase(2, "ddp", "SIGKILL", "one", 0, 1, "mid-epoch", "iteration", False, False)
FSDP = dataclasses.replace(PLAIN, strategy="fsdp")


def small_cases() -> list[RankCase]:
    """Return those of at most two ranks, which take about a second each."""
    return [case for case in valid_cases() if case.world_size <= 2]


def sample() -> list[RankCase]:
    """Return cases that have every pair of settings of up to two ranks, and a few of four."""
    ordered = in_seeded_order(small_cases(), SEED)
    wanted = set().union(*map(pairs_of, ordered))
    num_needed = next(n for n in range(len(ordered)) if set().union(*map(pairs_of, ordered[:n])) == wanted)
    of_four = [case for case in valid_cases() if case.world_size == 4]
    ddp, fsdp = ([case for case in of_four if case.strategy == strategy] for strategy in ("ddp", "fsdp"))
    return [*ordered[:num_needed], *in_seeded_order(ddp, SEED)[:2], *in_seeded_order(fsdp, SEED)[:1]]


@pytest.fixture(scope="session")
def whole_job(run_ranks, tmp_path_factory):
    """Folder of the run of a job that nothing happens to."""

    @functools.cache
    def run(job: RankJob) -> Path:
        root = tmp_path_factory.mktemp("whole")
        run_killed(run_ranks, dataclasses.replace(job, root=str(root)), [])
        return root

    return lambda job: run(dataclasses.replace(job, root="", signal="SIGKILL", workers=0, is_async=False))


@pytest.fixture(scope="session")
def whole(whole_job):
    """Folder of the run of a case that nothing happens to."""
    return lambda case: whole_job(job_of(reference_of(case), Path()))


@pytest.mark.parametrize("case", sample(), ids=str)
def test_killed_and_resumed_is_uninterrupted(run_ranks, whole, tmp_path, case):
    assert run_case(run_ranks, case, tmp_path, whole)[0] == []


@dataclass(frozen=True)
class Awkward:
    """Kills that are not among the points of the matrix: where, of whom, and what else is special about the run."""

    kills: tuple[Place, ...]
    victims: tuple[int, ...]
    signal: str = "SIGKILL"
    changes: tuple[tuple[str, object], ...] = ()
    case: RankCase = PLAIN


# With batches of 5 the second rank has a batch less than the first in a validation.
UNEVEN = (("batch_size", 5),)
AWKWARD = {
    "before the note of the start": Awkward((("before_replace", 0),), (0,)),
    "in start-up, before the first checkpoint": Awkward((("setup", 0), ("setup", 0)), (1,)),
    "in the first batch, before the first checkpoint": Awkward((("first_batch", 0),), (1,), case=FSDP),
    "rank 0, while others wait for the first checkpoint": Awkward((("before_replace", 2),), (0,), case=FSDP),
    "rank 1, while the others wait for it in a save": Awkward((("state_dict", 4),), (1,), case=FSDP),
    "in the last save": Awkward((("before_replace", 12),), (0,)),
    "rank 0 in a batch that others do not have": Awkward((("valid_step", 12),), (0,), changes=UNEVEN),
    "rank 1, while others have a batch more": Awkward((("valid_step", 11),), (1,), changes=UNEVEN),
    "loader workers outlive their rank": Awkward((("train_step", 5),), (0,), changes=(("workers", 2),)),
    "at the end": Awkward((("on_training_end", 0),), (1,)),
}


@pytest.mark.parametrize("place", AWKWARD)
def test_killed_at_awkward_places(run_ranks, whole_job, tmp_path, place):
    awkward = AWKWARD[place]
    job = dataclasses.replace(job_of(awkward.case, tmp_path), **dict(awkward.changes))
    run_killed(run_ranks, job, awkward.kills, awkward.victims)
    assert differing(evidence(tmp_path), evidence(whole_job(job))) == []


STOPS = {
    "one in start-up, twice": Awkward((("setup", 0), ("setup", 0)), (1,)),
    "rank 1 in the first batch": Awkward((("first_batch", 0),), (1,)),
    "all in the first batch, sharded": Awkward((("first_batch", 0),), (0, 1), case=FSDP),
    "rank 0 in a batch that others do not have": Awkward((("valid_step", 12),), (0,), changes=UNEVEN),
    "rank 1, while others have a batch more": Awkward((("valid_step", 11),), (1,), changes=UNEVEN),
    "one in a resume": Awkward((("train_step", 4), ("load_state_dict", 0)), (1,)),
    "when training has just ended": Awkward((("on_training_end", 0),), (1,)),
}


@pytest.mark.parametrize("place", STOPS)
def test_asked_to_stop_at_awkward_places(run_ranks, whole_job, tmp_path, place):
    stop = STOPS[place]
    job = dataclasses.replace(job_of(stop.case, tmp_path), signal="SIGTERM", **dict(stop.changes))
    run_killed(run_ranks, job, stop.kills, stop.victims)
    assert differences(tmp_path, whole_job(job), "SIGTERM") == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_second_signal_to_all_ends_at_once(run_ranks, whole_job, tmp_path, strategy):
    job = job_of(dataclasses.replace(PLAIN, strategy=strategy), tmp_path)
    job = dataclasses.replace(job, signal="SIGTERM", num_signals=2, kill=("train_step", 5), victims=(0, 1))
    answer = run_ranks(job)
    statuses = answer["statuses"]
    # Of one that had not come to the second yet the other's death may have been the end.
    assert -signal.SIGTERM in statuses and all(status not in (0, os.EX_TEMPFAIL) for status in statuses)
    assert not answer["was_killed"], outputs(job)
    run_killed(run_ranks, dataclasses.replace(job, kill=None), [])
    assert differing(evidence(tmp_path), evidence(whole_job(dataclasses.replace(job, num_signals=1)))) == []


def test_a_finished_run_that_is_started_again_does_nothing(run_ranks, whole, tmp_path):
    job = job_of(PLAIN, tmp_path)
    run_killed(run_ranks, job, [])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    run_killed(run_ranks, job, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == before
    assert "nothing to do" in (tmp_path / "rank0" / "output.txt").read_text()
    assert differing(evidence(tmp_path), evidence(whole(PLAIN))) == []


OWN = ("training_state", "trainer")


def of_first_rank_to_all(state: dict) -> None:
    """Give all ranks the generators of the first."""
    first = {key: value for key, value in state["rng"].items() if key != "ranks"}
    state["rng"]["ranks"] = [first for _ in state["rng"]["ranks"]]


def without(part: str) -> Callable[[dict], None]:
    """Take away what ranks but the first have of their own of a part."""

    def change(state: dict) -> None:
        for own in state[OWN[0]][OWN[1]]["ranks"]:
            del own[part]

    return change


def with_all_synchronised(state: dict) -> None:
    """Let each copy begin with the buffers of the first rank."""
    own = state[OWN[0]][OWN[1]]
    assert own["unsynchronised"]
    own["unsynchronised"] = []


@dataclass(frozen=True)
class Control:
    """A checkpoint with one part changed, as if it had not been saved, and what that must make differ.

    Attributes:
        change: changes the checkpoint.
        differing: names of the evidence that must differ then.
        case: the run.
        kill: where all ranks are killed.
        changes: what else is special about the run.
    """

    change: Callable[[dict], None]
    differing: tuple[str, ...]
    case: RankCase = PLAIN
    kill: Place = ("train_step", 6)
    changes: tuple[tuple[str, object], ...] = ()


# Three batches an epoch, two of which make a step: at the end of the first epoch gradients are left.
BY_EPOCH = dataclasses.replace(PLAIN, unit="epoch", accumulation=2)
# So many that copies are not synchronised until the second epoch is over.
LONG = dataclasses.replace(BY_EPOCH, accumulation=7)
CONTROLS = {
    "nothing": Control(lambda state: None, ()),
    "nothing, sharded": Control(lambda state: None, (), FSDP),
    "nothing, in an accumulation": Control(lambda state: None, (), BY_EPOCH, ("train_step", 4)),
    "generators": Control(of_first_rank_to_all, ("rng.ranks", "model.net")),
    "generators, sharded": Control(of_first_rank_to_all, ("rng.ranks", "model.net"), FSDP),
    "buffers, sharded": Control(without("buffers"), ("trainer.ranks",), FSDP),
    "running losses": Control(without("tables"), ("scalars",), kill=("train_step", 5)),
    "whose buffers count": Control(
        with_all_synchronised, ("trainer.ranks",), LONG, ("train_step", 4), (("valid_frequency", None),)
    ),
    "gradients": Control(without("gradients"), ("model.net",), BY_EPOCH, ("train_step", 4)),
}


@pytest.mark.parametrize("part", CONTROLS)
def test_control_without_one_saved_part_the_runs_differ(run_ranks, whole_job, tmp_path, part):
    """What the matrix compares depends on what each rank has of its own; rewriting the file alone is harmless."""
    control = CONTROLS[part]
    job = dataclasses.replace(job_of(control.case, tmp_path), **dict(control.changes))
    answer = run_ranks(dataclasses.replace(job, kill=control.kill, victims=(0, 1)))
    assert -signal.SIGKILL in answer["statuses"], outputs(job)
    found = find_last_checkpoint(tmp_path / "checkpoints")
    path = found / "helios.pth" if found.is_dir() else found
    before = path.read_bytes()
    state = load(path)
    del state["version"]
    control.change(state)
    save(state, path)
    run_killed(run_ranks, job, [])
    path.write_bytes(before)  # so that what differs is not the change itself but what it led to
    names = differing(evidence(tmp_path), evidence(whole_job(job)))
    assert set(names) >= set(control.differing)
    assert bool(names) == bool(control.differing)


@pytest.mark.parametrize("is_raw", [False, True])
def test_control_ddp_alone_sums_gradients_in_another_order_after_a_restart(
    run_ranks, whole_job, tmp_path, is_raw
):
    """Four ranks and layers used in another order than they are registered in; `Model.distribute` helps."""
    job = job_of(dataclasses.replace(PLAIN, world_size=4), tmp_path)
    job = dataclasses.replace(job, is_crossed=True, is_raw=is_raw)
    run_killed(run_ranks, job, [("train_step", 5)], (0, 1, 2, 3))
    names = differing(evidence(tmp_path), evidence(whole_job(job)))
    assert ("model.net" in names) == is_raw
    assert bool(names) == is_raw


def test_the_matrix_is_what_it_says(whole):
    cases = sample()
    assert len(set(cases)) == len(cases) and all(map(is_valid, cases))
    assert set().union(*map(pairs_of, cases)) >= set().union(*map(pairs_of, small_cases()))
    victims = {case.point: set() for case in cases}
    for case in small_cases():
        if case.victims == "one" and reference_of(case) == reference_of(PLAIN):
            passed = {rank: places_of(whole(case), rank) for rank in range(2)}
            kills = kills_of(case, passed[0])
            assert all(kill in passed[0] or kill == ("load_state_dict", 0) for kill in kills)
            victims[case.point].update(victims_of(case, kills, passed))
    # Only the first rank writes files; at other points it is not always the same one.
    assert victims.pop("save before rename") == {0}
    assert all(each == {0, 1} for each in victims.values())


def test_a_rank_that_hangs_ends_the_others_with_the_reason(run_ranks, tmp_path):
    job = dataclasses.replace(job_of(PLAIN, tmp_path), signal="hang", dist_timeout_s=3.0)
    answer = run_ranks(dataclasses.replace(job, kill=("train_step", 5), victims=(1,)))
    assert answer["statuses"] == [1, -signal.SIGKILL]  # which the runner sent to the one that hung
    assert not answer["was_killed"], outputs(job)
    output = (tmp_path / "rank0" / "output.txt").read_text().lower()
    assert "timed out" in output or "timeout" in output, output


@pytest.mark.parametrize("other", ["accumulation", "model"])
def test_ranks_with_other_settings_or_code_are_told_apart_at_the_start(run_ranks, tmp_path, other):
    job = dataclasses.replace(job_of(PLAIN, tmp_path), other_on_rank_1=other)
    answer = run_ranks(job)
    assert answer["statuses"] == [1, 1] and not answer["was_killed"], outputs(job)
    found = {
        "accumulation": ("accumulation_steps must be the same", "rank 0: 1; rank 1: 2"),
        "model": ("the model must be the same", "rank 1: RankModel (source"),
    }[other]
    for rank in (0, 1):
        last = (tmp_path / f"rank{rank}" / "output.txt").read_text().splitlines()[-1]
        assert all(part in last for part in found), last
        assert not (tmp_path / f"rank{rank}" / "places.txt").exists()  # nothing was set up
