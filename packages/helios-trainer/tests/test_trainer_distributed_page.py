"""The page about several processes: its program runs spawned and under torchrun, and ends with the same bits."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import helios.trainer as hlt
from helios.chkpt import load

pytestmark = pytest.mark.long

PAGE = Path(__file__).parents[1].joinpath("docs", "distributed.md").read_text(encoding="utf-8")
(SCRIPT,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "__main__" in block)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Rank 1 alone is asked to stop; the data note where they are prepared. After that, runs of FSDP2: whole, and stopped.
STOPPED = """
import os, signal
import script

class Data(script.PointData):
    def prepare_data(self):
        print("prepared", flush=True)

class Model(script.PointModel):
    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        if self.rank == 1 and state.global_iteration == 40:
            os.kill(os.getpid(), signal.SIGTERM)

class Parts(script.PointModel):
    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        if self.rank == 1 and state.global_iteration == self.stop_after:
            self.trainer.request_stop()

def fit_parts(root, stop_after=None):
    options = {"chkpt_frequency": 1, "chkpt_root": root, "use_cpu": True, "strategy": script.hlt.Strategy.FSDP}
    model = Parts("points")
    model.stop_after = stop_after
    return script.hlt.Trainer("points", total_steps=2, **options).fit(model, script.PointData())

originals = script.PointModel, script.PointData
script.PointModel, script.PointData = Model, Data
script.main()
script.PointModel, script.PointData = originals
assert fit_parts("whole")
assert not fit_parts("parts", stop_after=40)
assert fit_parts("parts")
"""


def started(folder, *command):
    """Run Python to its end, one thread in each rank, and return what it said on standard output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder and what was said for the whole run, which is spawned; and one that torchrun began and went on with."""
    whole, stopped = (tmp_path_factory.mktemp(name) for name in ("whole", "stopped"))
    for folder in (whole, stopped):
        (folder / "script.py").write_text(SCRIPT)
    (stopped / "stopped.py").write_text(STOPPED)

    def stop_and_go_on():
        said = [started(stopped, *TORCHRUN, "stopped.py")]
        shutil.copytree(stopped / "runs", stopped / "then")
        return [*said, started(stopped, *TORCHRUN, "script.py")]

    with ThreadPoolExecutor() as pool:
        other = pool.submit(stop_and_go_on)
        return whole, started(whole, "script.py"), stopped, other.result()


def checkpoints(folder):
    return {path.name: path for path in (folder / "chkpt").iterdir()}


def content(path):
    """All that a checkpoint holds, by place; but for a time that is measured."""
    found = {}

    def look(value, place):
        if isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                look(item, f"{place}/{key}")
        elif not place.endswith("/average_iter_time"):
            is_tensor = isinstance(value, torch.Tensor)
            found[place] = (value.dtype, value.shape, value.numpy().tobytes()) if is_tensor else value

    look(load(path), "")
    return found


def test_the_bits_are_the_same(runs):
    """Spawned as a whole; under torchrun stopped in the second epoch by a signal to rank 1, and gone on with."""
    whole, _, stopped, _ = runs
    name = "points_epoch_3_iter_96.pth"
    expected = content(checkpoints(whole / "runs")[name])
    assert content(checkpoints(stopped / "runs")[name]) == expected
    assert len([place for place in expected if place.startswith("/model/")]) > 10
    earlier = content(checkpoints(whole / "runs")["points_epoch_2_iter_64.pth"])
    assert earlier.keys() == expected.keys() and earlier != expected  # control
    rng = load(checkpoints(whole / "runs")[name])["rng"]
    assert len(rng["ranks"]) == 1
    assert not torch.equal(rng["torch"], rng["ranks"][0]["torch"])  # each rank has streams of its own


def test_all_ranks_stop_after_the_same_iteration(runs):
    _, _, stopped, (said, then) = runs
    assert said.count("stopped, to go on") == 2
    (summary,) = re.findall(r"stopped by SIGTERM.*; epoch 2, iteration (\d+);", said)
    assert int(summary) >= 40
    assert f"points_epoch_2_iter_{summary}.pth" in checkpoints(stopped / "then")
    assert said.count("prepared") == 1
    assert f"goes on from runs/chkpt/points_epoch_2_iter_{summary}.pth" in then
    assert len(re.findall("finished(?!:)", then)) == 2


def test_networks_in_parts(runs):
    """FSDP2, stopped on two ranks and gone on with; each has written its part."""
    whole, parts = (runs[2] / name for name in ("whole", "parts"))
    name = "points_epoch_2_iter_64.dcp"
    assert len(list((whole / name).glob("shards-*/*.distcp"))) == 2
    assert len(list(parts.glob("points_epoch_2_*.dcp"))) == 2
    expected = content(whole / name)
    assert content(parts / name) == expected
    assert content(whole / "points_epoch_1_iter_32.dcp") != expected  # control


def test_only_rank_0_writes(runs):
    whole, said, _, _ = runs
    names = [f"points_epoch_{epoch}_iter_{32 * epoch}.pth" for epoch in (1, 2, 3)]
    assert sorted(checkpoints(whole / "runs")) == names
    assert said.count("1001 points, accuracy") == 3  # with uneven batches every point is counted once
    came_to = re.findall(r"^rank (\d) came to ([\d.]+)$", said, re.MULTILINE)
    assert sorted(rank for rank, _ in came_to) == ["0", "1"]
    assert len({accuracy for _, accuracy in came_to}) == 1 and float(came_to[0][1]) > 0.85


def test_on_another_number_of_ranks(runs, tmp_path, caplog):
    """The run that was stopped on two goes on here, on one, with the samples that were left of the epoch."""
    names = runpy.run_path(str(runs[2] / "script.py"))
    seen = []

    class Points(names["Points"]):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            seen.append((index, item[0].tolist()))
            return item

    class Data(names["PointData"]):
        def setup(self):
            self._train_dataset = self._create_dataset(Points(2048, 1), {"batch_size": 32, "shuffle": True})

    def fit(root):
        seen.clear()
        options = {"chkpt_frequency": 1, "chkpt_root": root, "use_cpu": True}
        hlt.Trainer("points", total_steps=2, **options).fit(names["PointModel"]("points"), Data())
        return list(seen)

    alone = fit(tmp_path / "alone")
    shutil.copytree(runs[2] / "then" / "chkpt", tmp_path / "chkpt")
    rest = fit(tmp_path / "chkpt")
    (path,) = (tmp_path / "chkpt").glob("*_epoch_2_iter_4?.pth")
    batches = int(re.search(r"iter_(\d+)", path.name)[1]) - 32  # of the second epoch, each of two ranks
    assert len(rest) == 2048 - 2 * 32 * batches > 0
    assert rest == alone[-len(rest) :]  # order and augmentation
    assert "was written with world size 2, and the run goes on with 1" in caplog.text
    assert "the generators of the ranks are seeded anew" in caplog.text
