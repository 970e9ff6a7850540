"""A run that goes on on other ranks, with another batch size, strategy or none, loses and repeats nothing."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elastic import Phase, repeated, run_phase, run_phases
from job_runner import differing
from prove_resume import digest
from rank_job import RankJob
from rank_runner import RankRunner, evidence

from helios.chkpt import find_last_checkpoint, load

NUM_EPOCHS = 3
# By one sample of each rank, 24 come out even, also after the others: two batches of 4, two of 2, four of 3; then in
# the second epoch two of 3, four of 1, seven of 2. Asked to stop in a batch, a run stops after the next.
SCHEDULE = (Phase(4, 1), Phase(2, 3), Phase(3, 9), Phase(1, 13), Phase(2))
# Killed in the batch after a checkpoint. There is one after every second batch.
KILLED = tuple(dataclasses.replace(p, batch=p.batch and p.batch + 2, signal="SIGKILL") for p in SCHEDULE)
OTHER_BATCHES = (Phase(2, 1), Phase(2, 3, batch_size=3), Phase(1, 5, batch_size=4), Phase(4))


def job_of(root: Path, strategy: str = "ddp", **changes: object) -> RankJob:
    """Return a run of 3 epochs by single samples."""
    job = RankJob(
        root=str(root),
        unit="epoch",
        total_steps=NUM_EPOCHS,
        accumulation=1,
        valid_frequency=2,
        chkpt_frequency=1,
        strategy=strategy,
        batch_size=1,
        has_batch_norm=False,
        num_samples=24,
    )
    return dataclasses.replace(job, **changes)


def by_iteration(job: RankJob) -> RankJob:
    """Return the job with a checkpoint after every second batch; the schedule above has 33."""
    return dataclasses.replace(job, unit="iteration", total_steps=33, valid_frequency=7, chkpt_frequency=2)


@pytest.fixture(scope="session")
def alone(run_ranks, tmp_path_factory):
    """What an epoch consists of, with augmentation, as a run on one rank has it: by number of samples."""

    def run(num_samples: int) -> dict[int, set[tuple[int, str]]]:
        job = job_of(tmp_path_factory.mktemp("alone"), num_samples=num_samples, valid_frequency=None)
        return {
            epoch: set(samples)
            for epoch, samples in run_phases(run_ranks, job, [Phase(1, batch_size=4)]).items()
        }

    return {num_samples: run(num_samples) for num_samples in (23, 24)}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("schedule", [SCHEDULE, KILLED, OTHER_BATCHES], ids=["asked", "killed", "batches"])
def test_each_sample_is_there_once_with_its_augmentation(run_ranks, alone, tmp_path, strategy, schedule):
    job = job_of(tmp_path, strategy)
    epochs = run_phases(run_ranks, by_iteration(job) if schedule is KILLED else job, schedule)
    assert list(epochs) == [1, 2, 3]
    for epoch, samples in epochs.items():
        assert repeated(samples) == 0
        assert set(samples) == alone[24][epoch]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_none_is_missing_where_the_end_of_an_epoch_is_filled_up(run_ranks, alone, tmp_path, strategy):
    epochs = run_phases(run_ranks, job_of(tmp_path, strategy, num_samples=23), SCHEDULE)
    assert list(epochs) == [1, 2, 3]
    for epoch, samples in epochs.items():
        assert repeated(samples) < 4
        assert {index for index, _ in samples} == set(range(23))
        assert set(samples) >= alone[23][epoch]


def test_control_other_seeds_are_another_augmentation(alone):
    assert alone[24][1] != alone[24][2]
    assert {index for index, _ in alone[24][1]} == {index for index, _ in alone[24][2]}


STRATEGIES = {
    "ddp to fsdp": (Phase(2, 4), Phase(2, strategy="fsdp")),
    "fsdp to ddp": (Phase(2, 4, strategy="fsdp"), Phase(2)),
    "ddp to a plain process": (Phase(2, 4), Phase(1, has_group=False)),
    "fsdp to a plain process": (Phase(2, 4, strategy="fsdp"), Phase(1, has_group=False)),
    "a plain process to ddp": (Phase(1, 4, has_group=False), Phase(2)),
    "a plain process to fsdp": (Phase(1, 4, has_group=False), Phase(2, strategy="fsdp")),
    "fsdp to more ranks": (Phase(2, 4, strategy="fsdp"), Phase(3, strategy="fsdp")),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_weights_and_optimizer_are_the_same_bits_in_another_layout(run_ranks, tmp_path, case):
    before, after = STRATEGIES[case]
    job = job_of(tmp_path, notes_loaded=True)
    run_phase(run_ranks, job, before)
    path = find_last_checkpoint(tmp_path / "checkpoints")
    saved = load(path)["model"]
    assert path.suffix == (".dcp" if before.strategy == "fsdp" else ".pth")
    run_phase(run_ranks, job, after)
    for rank in range(after.world_size):
        loaded = load(tmp_path / f"rank{rank}" / "loaded.pth")
        assert saved["optimizer"]["state"] and set(saved) < set(loaded)
        assert differing(*({key: digest(each[key]) for key in saved} for each in (saved, loaded))) == []
    log = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert ("the generators of the ranks are seeded anew" in log) == (before.world_size != after.world_size)


class Stopped:
    """A run on two ranks that was asked to stop, and can go on in several ways. It knows the path of its logs."""

    def __init__(self, run_ranks: RankRunner, folder: Path, strategy: str) -> None:
        self._run_ranks = run_ranks
        self._kept = folder / "kept"
        self.job = job_of(folder / "run", strategy)
        self.root = folder / "run"
        run_phase(run_ranks, self.job, Phase(2, 4))
        shutil.copytree(self.root, self._kept)

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        path = find_last_checkpoint(self.root / "checkpoints")
        assert path is not None
        return path

    def again(self) -> None:
        """Let it be as it was when it had stopped."""
        shutil.rmtree(self.root)
        shutil.copytree(self._kept, self.root)

    def go_on(self, *phases: Phase) -> dict[str, str]:
        """Let it go on, and return the evidence."""
        for phase in phases:
            run_phase(self._run_ranks, self.job, phase)
        return evidence(self.root)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_another_number_of_ranks_it_goes_on_with_the_same_bits_each_time(run_ranks, tmp_path, strategy):
    stopped = Stopped(run_ranks, tmp_path, strategy)
    expected = stopped.go_on(Phase(3))
    stopped.again()
    assert differing(stopped.go_on(Phase(3)), expected) == []
    stopped.again()  # and killed on that number
    assert differing(stopped.go_on(Phase(3, 11, signal="SIGKILL"), Phase(3)), expected) == []
    stopped.again()
    # As it would have been.
    assert {"model.net", "trainer.world_size"} <= set(differing(stopped.go_on(Phase(2)), expected))


@pytest.mark.parametrize("strategy", ["fsdp"])
def test_converted_there_and_back_it_goes_on_with_the_same_bits(run_ranks, tmp_path, strategy):
    stopped = Stopped(run_ranks, tmp_path, strategy)
    expected = stopped.go_on(Phase(2))
    stopped.again()
    path = stopped.checkpoint
    other = path.with_suffix(".pth" if path.suffix == ".dcp" else ".dcp")
    convert(path, other)
    convert(other, path)
    assert stopped.checkpoint == path
    assert differing(stopped.go_on(Phase(2)), expected) == []


@pytest.mark.parametrize(("strategy", "other"), [("ddp", "fsdp")])
def test_whether_a_checkpoint_was_converted_for_another_layout_does_not_matter(
    run_ranks, tmp_path, strategy, other
):
    stopped = Stopped(run_ranks, tmp_path, strategy)
    expected = stopped.go_on(Phase(2, strategy=other))
    stopped.again()
    path = stopped.checkpoint
    convert(path, path.with_suffix(".pth" if path.suffix == ".dcp" else ".dcp"))
    found = stopped.go_on(Phase(2, strategy=other))
    assert differing(found, expected) == ["name"]  # of the first checkpoint, which was converted


def convert(source: Path, target: Path) -> None:
    """Convert a checkpoint by the command, and delete the old one."""
    command = Path(sys.executable).with_name("helios-chkpt")
    subprocess.run([str(command), "convert", str(source), str(target)], check=True)
    shutil.rmtree(source) if source.is_dir() else source.unlink()
