"""The promise, bitwise: a run that is killed and started again ends as the run that never was.

Every run is a process of its own and every kill a real signal. Here is a sample of the matrix; `nox -s matrix` runs
as much of it as one likes.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cases import in_seeded_order, pairs_of
from job import Place
from job_runner import KILLED, differing, evidence, run_killed
from matrix import (
    ACCUMULATIONS,
    UNITS,
    Case,
    is_valid,
    job_of,
    kills_of,
    pieces_of,
    reference_of,
    run_case,
    timeline,
    valid_cases,
)
from prove_resume import read_scalars

from helios.chkpt import find_last_checkpoint, format_name, load, parse_name, save

SEED = 5
NUM_SAMPLED = 80  # every pair of values is in these
PLAIN = Case("iteration", 0, 1, "never", "mid-epoch", "unset", False)


@pytest.fixture(scope="session")
def root_of(run_job, tmp_path_factory):
    """Folder of the run that nothing happened to."""

    @functools.cache
    def run(case: Case) -> Path:
        root = tmp_path_factory.mktemp("whole")
        run_killed(run_job, job_of(case, root), [])
        return root

    return lambda case: run(reference_of(case))


@pytest.fixture(scope="session")
def whole(root_of):
    """Evidence of the run that nothing happened to; without workers, which must not matter."""
    return functools.cache(lambda case: evidence(root_of(case)))


@pytest.mark.parametrize("case", in_seeded_order(valid_cases(), SEED)[:NUM_SAMPLED], ids=str)
def test_killed_and_resumed_is_uninterrupted(run_job, whole, tmp_path, case):
    assert run_case(run_job, case, tmp_path, whole)[0] == []


def awkward_places(case: Case) -> dict[str, list[Place]]:
    """Return kills that are not among the points of the matrix."""
    places = timeline(job_of(case, Path()))
    saves = [number for hook, number in places if hook == "before_replace"]
    return {
        "before the note of the start": [("before_replace", 0)],
        "after the note of the start": [("after_replace", 0)],
        "in start-up": [("setup", 0)],
        "in the first batch": [("first_batch", 0), ("first_batch", 0)],
        "in the first checkpoint": [("before_replace", saves[1]), ("before_replace", saves[1])],
        "after the first checkpoint": [("after_replace", saves[1])],
        "in a resume, twice": [("train_step", 13), ("load_state_dict", 0), ("setup", 0)],
        "at the end": [("on_training_end", 0)],
        "in the last save": [
            ("before_replace", saves[3]),
            ("on_training_end", 0),
            ("before_replace", saves[-1]),
        ],
    }


@pytest.mark.parametrize("place", awkward_places(PLAIN))
@pytest.mark.parametrize("unit", UNITS)
def test_killed_at_awkward_places(run_job, whole, tmp_path, unit, place):
    case = Case(unit, 0, 1, "as often", "mid-epoch", "after", is_async=unit == "epoch")
    # Each start has other workers: how many there are must not matter.
    run_killed(run_job, job_of(case, tmp_path), awkward_places(case)[place], workers=(0, 1, -2))
    assert differing(evidence(tmp_path), whole(case)) == []


STOPS = {
    "before the note of the start": [("before_replace", 0)],
    "in start-up, twice": [("setup", 0), ("setup", 0)],
    "in the first batch, twice": [("first_batch", 0), ("first_batch", 0)],
    "in a resume, twice": [("train_step", 14), ("load_state_dict", 0), ("setup", 0)],
    "in a validation right after a resume": [("train_step", 24), ("valid_step", 21), ("train_step", 26)],
    "at the end": [("on_training_end", 0)],
}


@pytest.mark.parametrize(
    ("signal", "to_workers"), [("SIGTERM", False), ("SIGTERM", True), ("SIGUSR1", True), ("SIGINT", True)]
)
@pytest.mark.parametrize("place", STOPS)
def test_asked_to_stop_at_awkward_places(run_job, whole, tmp_path, place, signal, to_workers):
    case = Case("iteration", 0, 3, "less often", "mid-epoch", "unset", is_async=True)
    job = dataclasses.replace(job_of(case, tmp_path), signal=signal, to_workers=to_workers)
    run_killed(run_job, job, STOPS[place], workers=(3, -2, 1))
    due = {number for hook, number in timeline(job) if hook == "before_replace"}
    assert differing(evidence(tmp_path, due), whole(case)) == []


def test_a_finished_run_that_is_started_again_does_nothing(run_job, whole, tmp_path):
    case = dataclasses.replace(PLAIN, unit="epoch", validation="as often")
    job = job_of(case, tmp_path)
    run_killed(run_job, job, [])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    assert run_job(dataclasses.replace(job, kill=("on_training_epoch_start", 1))) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == before
    assert "nothing to do" in (tmp_path / "output.txt").read_text()
    assert differing(evidence(tmp_path), whole(case)) == []


def other_rng(part: str) -> Callable[[dict], None]:
    """Put another generator's state in the place of one."""

    def change(state: dict) -> None:
        from helios.core import rng

        with rng.preserve_rng_state():
            rng.seed_rngs(99)
            state["rng"][part] = rng.get_rng_state_dict()[part]

    return change


def put(path: str, value: object) -> Callable[[dict], None]:
    """Put another value in the place of one; the path is keys with slashes between."""

    def change(state: dict) -> None:
        *outer, last = path.split("/")
        holder = functools.reduce(lambda part, key: part[key], outer, state)
        assert holder[last] != value
        holder[last] = value

    return change


@dataclass(frozen=True)
class Control:
    """A checkpoint with one part changed, as if it had not been saved, and what that must make differ.

    Attributes:
        change: changes the checkpoint.
        differing: names of the evidence that must differ then.
        case: the run, killed where the case says that it is...
        kill: ... unless there is a place here.
    """

    change: Callable[[dict], None]
    differing: tuple[str, ...]
    case: Case = PLAIN
    kill: Place | None = None


OWN = "training_state/trainer"
VALIDATED = dataclasses.replace(PLAIN, validation="as often")
STOPPED = dataclasses.replace(PLAIN, validation="less often", early_stop="after")
CONTROLS = {
    "nothing": Control(lambda state: None, ()),
    "torch's RNG": Control(other_rng("torch"), ("rng.torch", "model.net")),
    "Python's RNG": Control(other_rng("python"), ("rng.python", "model.net")),
    "NumPy's RNG": Control(other_rng("numpy"), ("rng.numpy", "model.net")),
    "the loader": Control(put("data/consumed", 0), ("loader", "trace", "name")),
    "the optimizer": Control(put("model/optimizer/state", {}), ("model.optimizer", "model.net")),
    "the scheduler": Control(put("model/scheduler/last_epoch", 0), ("model.scheduler", "model.optimizer")),
    "the model's best": Control(put("model/best", -1.0), ("model.best",), VALIDATED),
    "the model's number": Control(
        put("model/cycle", 99),
        ("model.cycle",),
        dataclasses.replace(PLAIN, validation="coprime"),
        ("train_step", 14),
    ),
    "accumulated gradients": Control(
        put(f"{OWN}/gradients", {}),
        ("trainer.gradients", "model.net"),
        dataclasses.replace(PLAIN, unit="epoch", accumulation=3),
        ("train_step", 12),  # saved after 10
    ),
    "running losses": Control(put(f"{OWN}/tables/_running_losses", {}), ("trainer.tables", "scalars")),
    "modes": Control(put(f"{OWN}/modes/evaluating", ["net.1"]), ("trainer.modes", "model.net")),
    "frozen parameters": Control(
        put(f"{OWN}/modes/frozen", ["net.0.weight"]), ("trainer.modes", "model.net")
    ),
    "the current iteration": Control(
        put("training_state/current_iteration", 0), ("counters.current_iteration",)
    ),
    "the global iteration": Control(
        put("training_state/global_iteration", 2016), ("counters.global_iteration", "name")
    ),
    "the epoch": Control(put("training_state/global_epoch", 9), ("counters.global_epoch", "name")),
    "the batch in the epoch": Control(put("training_state/dataset_iter", 0), ("counters.dataset_iter",)),
    "batches since the validation": Control(
        put("training_state/running_iter", 0), ("counters.running_iter",)
    ),
    "the validation cycle": Control(
        put("training_state/validation_cycles", 0), ("counters.validation_cycles", "scalars"), VALIDATED
    ),
    "validations without improvement": Control(
        put("training_state/early_stop_count", 0),
        ("counters.early_stop_count", "trainer.stop", "name"),
        STOPPED,
        ("train_step", 39),
    ),
    "that a validation came just before": Control(
        put(f"{OWN}/cut/has_validated", False),
        ("trainer.cut", "trainer.stop", "name"),
        STOPPED,
        ("have_metrics_improved", 10),
    ),
}


def name_of(state: dict[str, Any], path: Path) -> str:
    """The name that goes with the counters in a state: a file of another name is refused."""
    name, counters = parse_name(path.name), state["training_state"]
    epoch, iteration = counters["global_epoch"], counters["global_iteration"]
    return format_name(dataclasses.replace(name, epoch=epoch, iteration=iteration))


@pytest.mark.parametrize("part", CONTROLS)
def test_control_without_one_saved_part_the_runs_differ(run_job, whole, tmp_path, part):
    """What the matrix compares depends on every part; with all of them, rewriting the file is harmless."""
    control = CONTROLS[part]
    job = job_of(control.case, tmp_path)
    kill = control.kill or kills_of(control.case, job)[0]
    assert run_job(dataclasses.replace(job, kill=kill)) == KILLED
    path = find_last_checkpoint(tmp_path / "checkpoints")
    before = path.read_bytes()
    state = load(path)
    del state["version"]
    control.change(state)
    path.unlink()
    changed = path.with_name(name_of(state, path))
    save(state, changed)
    assert run_job(job) == 0, (tmp_path / "output.txt").read_text()
    changed.unlink()
    path.write_bytes(before)  # so that what differs is not the change itself but what it led to
    found = differing(evidence(tmp_path), whole(control.case))
    assert set(found) >= set(control.differing)
    assert bool(found) == bool(control.differing)


def test_everything_that_is_compared_has_a_control(whole):
    # Another accumulation is another run, and refused on resume, so the settings need a control of another kind.
    cases = [dataclasses.replace(PLAIN, unit="epoch", accumulation=n) for n in (1, 2)]
    others = differing(*map(whole, cases))
    assert "trainer.settings" in others and "name" not in others
    assert "trainer.noted" in differing(
        whole(PLAIN), whole(VALIDATED)
    )  # likewise: it is what is only warned of
    names = {name for control in CONTROLS.values() for name in control.differing}
    of_ranks = {
        "trainer.world_size",
        "trainer.ranks",
        "trainer.unsynchronised",
    }  # see test_rank_matrix.py, and test_elastic.py for the first
    assert names | {"trainer.settings", "trainer.noted"} | of_ranks == set(whole(VALIDATED))


@pytest.mark.parametrize(
    "part", ["rng", "rng.torch", "rng.python", "rng.numpy", "data", "data.consumed", "model"]
)
def test_a_missing_part_stops_the_run_and_is_named(run_job, tmp_path, part):
    job = job_of(PLAIN, tmp_path)
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


SHAPES = [
    Case(unit, 0, accumulation, "coprime", "mid-epoch", early_stop, False)
    for unit in UNITS
    for accumulation in ACCUMULATIONS
    for early_stop in ("unset", "after")
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_timeline_is_what_a_run_passes(root_of, case):
    lines = (root_of(case) / "places.txt").read_text().splitlines()
    assert lines == [f"{hook} {number}" for hook, number in timeline(job_of(case, Path()))]


def test_every_scalar_is_there_once(root_of):
    scalars = read_scalars(root_of(VALIDATED) / "tensorboard")
    assert len({(tag, step) for tag, step, _ in scalars}) == len(scalars) > 100


def test_the_matrix_is_what_it_says():
    sample = in_seeded_order(valid_cases(), SEED)[:NUM_SAMPLED]
    assert len(set(sample)) == NUM_SAMPLED and all(map(is_valid, sample))
    assert set().union(*map(pairs_of, sample)) == set().union(*map(pairs_of, valid_cases()))
    for case in sample:
        job = job_of(case, Path())
        places, kills = timeline(job), kills_of(case, job)
        assert all(kill in places or kill == ("load_state_dict", 0) for kill in kills)
        # A run asked to stop at one is not past the next when it stops: that comes in a later iteration.
        pieces = pieces_of(job, places)
        at_place = [
            kill for kill in kills if kill not in (("setup", 0), ("load_state_dict", 0), ("first_batch", 0))
        ]
        where = [next(n for n, piece in enumerate(pieces) if kill in piece) for kill in at_place]
        assert where == sorted(set(where))
    boundaries = [("on_training_epoch_end", 2), ("on_training_epoch_end", 4), ("on_training_epoch_end", 6)]
    for accumulation, boundary in zip(ACCUMULATIONS, boundaries, strict=True):
        case = dataclasses.replace(PLAIN, accumulation=accumulation, point="epoch end")
        assert kills_of(case, job_of(case, Path())) == [boundary]
