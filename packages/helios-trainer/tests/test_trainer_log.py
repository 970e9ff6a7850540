"""Model.log: each scalar once, in TensorBoard and on the bar, and nobody waits for a device."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from helios.chkpt import load
from helios.trainer import Model
from helios.trainer._scalars import ScalarLog
from helios.trainer._training_state import TrainingState
from helios.trainer.logging._loggers import RunLoggers
from helios.trainer.logging._places import LogTargets


def scalars(folder):
    """Sorted (tag, step, value) of a run's only folder."""
    (run,) = folder.iterdir()
    found = []
    for path in sorted(run.iterdir()):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found += [(tag, event.step, event.value) for event in events.Scalars(tag)]
    return sorted(found)


def make(kit, abort_at=None):
    class Logging(kit.Net):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            self.log("train/loss", self._loss_items["loss"])
            self.log("train/count", state.global_iteration, 10 * state.global_iteration)

        def on_validation_end(self, validation_cycle):
            super().on_validation_end(validation_cycle)
            self.log("valid/sum", self._val_scores["sum"], validation_cycle)

        def test_step(self, batch, step):
            super().test_step(batch, step)
            self.log("test/step", 0.5, step)

    return Logging(abort_at=abort_at)


def fit(kit, root, abort_at=None):
    trainer = kit.trainer(
        total_steps=4, valid_frequency=1, chkpt_frequency=2, chkpt_root=root / "c", enable_tensorboard=True,
        run_path=root / "t", run_name="r",
    )  # fmt: skip
    model = make(kit, abort_at)
    return trainer, model, kit.Data()


def test_each_scalar_once_whatever_happens(kit, tmp_path):
    trainer, model, data = fit(kit, tmp_path / "whole")
    trainer.fit(model, data)
    whole = scalars(tmp_path / "whole" / "t")
    assert [(tag, step) for tag, step, _ in whole if tag == "train/loss"] == [
        ("train/loss", i) for i in range(1, 13)
    ]
    assert ("train/count", 120, 12.0) in whole
    assert sum(tag == "valid/sum" for tag, _, _ in whole) == 4
    trainer, model, data = fit(kit, tmp_path / "two", abort_at=75)
    with pytest.raises(kit.AbortError):
        trainer.fit(model, data)
    assert len(scalars(tmp_path / "two" / "t")) > 0
    trainer, model, data = fit(kit, tmp_path / "two")
    trainer.fit(model, data)
    assert scalars(tmp_path / "two" / "t") == whole
    trainer.test(model, data)
    assert [each for each in scalars(tmp_path / "two" / "t") if each not in whole] == [
        ("test/step", 0, 0.5),
        ("test/step", 1, 0.5),
    ]


def test_outside_a_run_and_without_tensorboard_it_does_nothing(kit):
    model = make(kit)
    model.log("a", 1.0)
    kit.trainer(total_steps=1).fit(model, kit.Data())
    model.log("a", 1.0)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("x", TypeError, r"log takes a number .* found str for 'loss'"),
        (torch.tensor(1j), TypeError, "found complex"),
        (np.ones(3), ValueError, r"found the shape \(3,\) for 'loss'"),
        (None, TypeError, "found NoneType"),
        (torch.ones(2), ValueError, r"found the shape \(2,\) for 'loss'"),
    ],
)
def test_wrong_values(value, kind, message):
    with pytest.raises(kind, match=message):
        ScalarLog(None, TrainingState()).add("loss", value, None)


class Writer:
    """Notes what TensorBoard's writer is given."""

    def __init__(self):
        self.rows = []

    def add_scalar(self, name, value, step, walltime=None):
        self.rows.append((name, value, step))


def test_what_is_on_the_cpu_is_written_at_once():
    writer, state = Writer(), TrainingState(global_iteration=7)
    log = ScalarLog(writer, state)
    tensor = torch.tensor([2.5], requires_grad=True)
    log.add("a", tensor, None)
    log.add("b", 3, 1)
    log.add("c", torch.tensor(True), np.int64(2))
    for number in (np.float32(4), np.array(4), np.array([4.0]), np.int64(4)):
        log.add("d", number, 3)
    assert writer.rows == [("a", 2.5, 7), ("b", 3.0, 1), ("c", 1.0, 2), *[("d", 4.0, 3)] * 4]
    assert log.shown == {"a": 2.5, "b": 3.0, "c": 1.0, "d": 4.0}


@pytest.mark.parametrize(("name", "step"), [(1, None), ("loss", "x"), ("loss", 1.5)])
def test_wrong_names_and_steps(name, step):
    with pytest.raises(TypeError, match="log takes a name, a number and an int as step"):
        ScalarLog(None, TrainingState()).add(name, 1.0, step)


WAITING_OPS = {"aten::_local_scalar_dense", "aten::_to_copy", "aten::item", "aten::copy_", "aten::is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts what makes the processor wait for a device: reading a scalar, and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in WAITING_OPS:
            self.ops.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_what_is_on_a_device_waits_there_until_it_is_asked_for():
    """The meta device has no numbers: whoever would read one gets an error."""
    log = ScalarLog(Writer(), TrainingState())
    loss = torch.empty((), device="meta")
    for step in range(999):
        log.add("loss", loss, step)
    assert log.shown == {}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        log.flush()


def test_many_are_fetched_in_one_copy(monkeypatch):
    """A CPU tensor that says it is elsewhere stands for the device."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("meta")

    writer = Writer()
    log = ScalarLog(writer, TrainingState())
    value = torch.zeros(()).as_subclass(Elsewhere)
    for step in range(5):
        value += 1  # the copy that waits must not change
        log.add("loss", value, step)
    assert writer.rows == []
    lists = []
    monkeypatch.setattr(
        torch.Tensor,
        "tolist",
        lambda self, original=torch.Tensor.tolist: lists.append(self.numel()) or original(self),
    )
    log.flush()
    assert writer.rows == [
        ("loss", 1.0, 0),
        ("loss", 2.0, 1),
        ("loss", 3.0, 2),
        ("loss", 4.0, 3),
        ("loss", 5.0, 4),
    ]
    assert set(lists) == {5}  # one copy of five, not five of one
    log.flush()
    assert len(writer.rows) == 5


class Quiet(Model):
    """Reads nothing itself: what is read in its loop, the trainer reads."""

    def __init__(self, reads=False):
        super().__init__("quiet")
        self.reads = reads

    def setup(self, fast_init=False):
        self.weight = torch.zeros(3)

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state, fast_init=False):
        self.weight = state["weight"]

    def train_step(self, batch, state):
        if state.global_iteration == 3:
            self.waits = Waits()
            self.waits.__enter__()
        self._loss_items["loss"] = (self.weight + 1).sum()
        if self.reads:
            self._loss_items["loss"].item()

    def on_training_batch_end(self, state, should_log=False):
        super().on_training_batch_end(state, should_log)
        if state.global_iteration == 40:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
@pytest.mark.parametrize("reads", [False, True])
def test_nothing_in_the_loop_waits_for_a_device(kit, tmp_path, unit, reads):
    total_steps = 2 if unit == "EPOCH" else 60
    model = Quiet(reads)
    trainer = kit.trainer(
        getattr(kit, unit), total_steps, print_frequency=1, chkpt_root=tmp_path, chkpt_frequency=50
    )
    trainer.fit(model, kit.Data(train=30))
    assert ("aten::_local_scalar_dense" in model.waits.ops) == reads  # control: it is seen if the model reads
    assert load(next(tmp_path.glob("*.pth")))["model"]["weight"].shape == (3,)


def test_a_log_file_that_only_rank_0_can_write(tmp_path):
    (tmp_path / "file").touch()
    targets = LogTargets(log_file=tmp_path / "file" / "run.log", run_folder=None)
    for rank in (0, 1):
        loggers = RunLoggers(capture_warnings=False, rank=rank)
        try:
            if rank == 0:
                with pytest.raises(OSError, match="log_path"):
                    loggers.open_log_file(targets)
            else:
                loggers.open_log_file(targets)  # on another machine, say
        finally:
            loggers.close()
