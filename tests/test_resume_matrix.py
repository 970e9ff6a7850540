"""The promise, bitwise: a run that is killed and started again ends as the run that never was.

Every run is a process of its own and every kill a real SIGKILL.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
from conftest import KILLED, evidence
from job import BATCHES_PER_EPOCH, Job

from helios.chkpt import find_last_checkpoint, load, save

UNITS = ("epoch", "iteration")


def job_of(root: Path, unit: str, accumulation: int, validates: bool) -> Job:
    """A run of at least five epochs, saved every epoch or every second complete iteration."""
    steps = 5 if unit == "epoch" else 42 // accumulation
    return Job(str(root), unit, steps, accumulation, 1 if unit == "epoch" else 2, validates)


def boundary_of(unit: str, accumulation: int) -> int:
    """The epoch (from 1) after whose last batch a checkpoint is saved."""
    return 3 if unit == "iteration" and accumulation == 3 else 2


def kills_of(point: str, unit: str, accumulation: int) -> list[tuple[str, int]]:
    """Where to kill: in an epoch other than the first."""
    epoch = boundary_of(unit, accumulation)
    return {
        "mid-epoch": [("train_step", BATCHES_PER_EPOCH + 5)],
        "last batch": [("on_training_epoch_end", epoch)],  # all of the epoch's batches are done and saved
        "epoch boundary": [("on_training_epoch_start", epoch + 1)],
        "twice": [
            ("train_step", BATCHES_PER_EPOCH + 3),
            ("on_training_batch_end", 2 * BATCHES_PER_EPOCH + 5),
        ],
    }[point]


@pytest.fixture(scope="session")
def reference(run_job, tmp_path_factory):
    """Evidence of the run that nothing happened to; without workers, which must not matter."""

    @functools.cache
    def run_whole(unit: str, accumulation: int, validates: bool) -> dict[str, str]:
        job = job_of(tmp_path_factory.mktemp("whole"), unit, accumulation, validates)
        assert run_job(job) == 0, Path(job.root, "output.txt").read_text()
        return evidence(job)

    return run_whole


def run_killed(run_job, job: Job, kills: list[tuple[str, int]], workers: tuple[int, ...] = ()) -> Job:
    """Run a job, killed once at each place, until it ends; each start may have other workers."""
    for number, kill in enumerate([*kills, None]):
        started = dataclasses.replace(job, kill=kill)
        if workers:
            started = dataclasses.replace(started, workers=workers[number % len(workers)])
        assert run_job(started) == (0 if kill is None else KILLED), Path(job.root, "output.txt").read_text()
    return job


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return [name for name in a | b if a.get(name) != b.get(name)]


@pytest.mark.parametrize("validates", [False, True], ids=["", "validates"])
@pytest.mark.parametrize("point", ["mid-epoch", "last batch", "epoch boundary", "twice"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("unit", UNITS)
def test_killed_and_resumed_is_uninterrupted(
    run_job, reference, tmp_path, unit, workers, accumulation, point, validates
):
    job = dataclasses.replace(job_of(tmp_path, unit, accumulation, validates), workers=workers)
    kills = kills_of(point, unit, accumulation)
    run_killed(run_job, job, kills)
    assert differing(evidence(job), reference(unit, accumulation, validates)) == []


PLACES = {
    "in a validation": [("valid_step", 21)],
    "after a validation": [("have_metrics_improved", 3)],
    "before a checkpoint takes its name": [("before_replace", 3)],
    "after a checkpoint took its name": [("after_replace", 3)],
    "before the first checkpoint": [("before_replace", 1)],
    "in start-up": [("setup", 0)],
    "in a resume": [("train_step", 13), ("load_state_dict", 0)],
    "in a resume, twice": [("train_step", 13), ("load_state_dict", 0), ("setup", 0)],
    "in the first batch after a resume": [("train_step", 20), ("train_step", 19)],
    "at the end": [("on_training_end", 0)],
    "in the last save": [("before_replace", 3), ("on_training_end", 0), ("before_replace", 1)],
}


@pytest.mark.parametrize("is_async", [False, True], ids=["", "async"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("unit", UNITS)
def test_killed_at_awkward_places(run_job, reference, tmp_path, unit, place, is_async):
    job = dataclasses.replace(job_of(tmp_path, unit, 1, True), is_async=is_async)
    run_killed(run_job, job, PLACES[place], workers=(0, 1, -2))
    assert differing(evidence(job), reference(unit, 1, True)) == []


def test_a_finished_run_that_is_started_again_does_nothing(run_job, reference, tmp_path):
    job = job_of(tmp_path, "epoch", 1, True)
    run_killed(run_job, job, [])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    assert run_job(dataclasses.replace(job, kill=("on_training_epoch_start", 1))) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == before
    assert "nothing to do" in (tmp_path / "output.txt").read_text()
    assert differing(evidence(job), reference("epoch", 1, True)) == []


def other_rng(part: str):
    """Put another generator's state in the place of one."""

    def change(state: dict) -> None:
        from helios.core import rng

        with rng.preserve_rng_state():
            rng.seed_rngs(99)
            state["rng"][part] = rng.get_rng_state_dict()[part]

    return change


def rewind_loader(state: dict) -> None:
    state["data"]["consumed"] = 0


def forget_optimizer(state: dict) -> None:
    state["model"]["optimizer"]["state"] = {}


def forget_gradients(state: dict) -> None:
    assert state["training_state"]["trainer"]["gradients"]
    state["training_state"]["trainer"]["gradients"] = {}


def forget_running_losses(state: dict) -> None:
    assert state["training_state"]["trainer"]["tables"]["_running_losses"]
    state["training_state"]["trainer"]["tables"]["_running_losses"] = {}


CONTROLS = {
    "torch's RNG": (other_rng("torch"), "iteration", 1),
    "Python's RNG": (other_rng("python"), "iteration", 1),
    "NumPy's RNG": (other_rng("numpy"), "iteration", 1),
    "the loader": (rewind_loader, "iteration", 1),
    "the optimizer": (forget_optimizer, "iteration", 1),
    "accumulated gradients": (forget_gradients, "epoch", 3),
    "running losses": (forget_running_losses, "iteration", 1),
    "nothing": (lambda state: None, "iteration", 1),
}


@pytest.mark.parametrize("part", CONTROLS)
def test_control_without_one_saved_part_the_runs_differ(run_job, reference, tmp_path, part):
    """What the matrix compares depends on every part; with all of them, rewriting the file is harmless."""
    change, unit, accumulation = CONTROLS[part]
    job = job_of(tmp_path, unit, accumulation, False)
    assert run_job(dataclasses.replace(job, kill=("train_step", BATCHES_PER_EPOCH + 5))) == KILLED
    path = find_last_checkpoint(tmp_path / "checkpoints")
    state = load(path)
    del state["version"]
    change(state)
    save(state, path)
    assert run_job(job) == 0, (tmp_path / "output.txt").read_text()
    try:
        is_equal = differing(evidence(job), reference(unit, accumulation, False)) == []
    except ValueError:  # the trace itself shows another batch
        is_equal = False
    assert is_equal == (part == "nothing")


@pytest.mark.parametrize(
    "part", ["rng", "rng.torch", "rng.python", "rng.numpy", "data", "data.consumed", "model"]
)
def test_a_missing_part_stops_the_run_and_is_named(run_job, tmp_path, part):
    job = job_of(tmp_path, "iteration", 1, False)
    assert run_job(dataclasses.replace(job, kill=("train_step", 13))) == KILLED
    path = find_last_checkpoint(tmp_path / "checkpoints")
    state = load(path)
    del state["version"]
    *outer, last = part.split(".")
    holder = state
    for key in outer:
        holder = holder[key]
    del holder[last]
    save(state, path)
    assert run_job(job) == 1
    output = (tmp_path / "output.txt").read_text()
    assert last in output.splitlines()[-1], output


def test_the_matrix_is_what_it_says():
    cases = list(itertools.product(UNITS, (1, 3)))
    for unit, accumulation in cases:
        epoch = boundary_of(unit, accumulation)
        job = job_of(Path(), unit, accumulation, False)
        batches = epoch * BATCHES_PER_EPOCH
        if unit == "iteration":
            assert batches % (accumulation * job.frequency) == 0  # saved after the epoch's last batch
            assert job.total_steps * accumulation > batches + 2 * BATCHES_PER_EPOCH  # two boundaries follow
        else:
            assert job.total_steps >= epoch + 2
