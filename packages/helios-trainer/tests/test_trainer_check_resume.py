"""check_resume passes a model that keeps all its state, and names whatever is forgotten, changed or drawn elsewhere."""
# ruff: noqa: NPY002  # NumPy's legacy generator is one of the things to be found

import itertools
import logging
import pickle
import random
import re
import time
from collections import deque
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helios.core import rng
from helios.data import DataModule
from helios.trainer import Model, Plugin, Trainer, TrainingUnit
from helios.trainer.testing import ResumeError, check_resume

pytestmark = pytest.mark.long

NUM_SAMPLES, BATCH_SIZE = 8, 2  # epochs of 4 batches


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another take most of the time of networks as small as these."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Scaler:
    """Like a GradScaler: a scale that grows, with a state_dict of its own."""

    def __init__(self):
        self.scale, self.counted = 1.0, 0

    def step(self):
        self.counted += 1
        if self.counted % 3 == 0:
            self.scale *= 2

    def state_dict(self):
        return {"scale": self.scale, "counted": self.counted}

    def load_state_dict(self, state):
        self.scale, self.counted = state["scale"], state["counted"]


class Points(torch.utils.data.Dataset):
    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        return torch.sin(torch.arange(4.0) * (index + 1)) + 0.1 * torch.randn(4) + self.draw()


class Data(DataModule):
    """Args: draw makes, in setup, what is added to each sample."""

    def __init__(self, make_draw=lambda: float, num_workers=0):
        super().__init__()
        self.make_draw, self.num_workers = make_draw, num_workers

    def setup(self):
        params = {"batch_size": BATCH_SIZE, "num_workers": self.num_workers}
        self._train_dataset = self._create_dataset(Points(self.make_draw()), {**params, "shuffle": True})
        self._valid_dataset = self._create_dataset(Points(float), {"batch_size": 4})


class Everything(Model):
    """Keeps one of each kind of state, but for what a test makes it forget."""

    forgotten = ()  # in state_dict
    ignored = ()  # in load_state_dict

    def __init__(self):
        super().__init__("everything")

    def setup(self, fast_init=False):
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 1))
        self.average = deepcopy(self.net).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.scaler = Scaler()
        self.generator = torch.Generator().manual_seed(1)
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.counts = {"seen": 0}
        self.best = float("inf")

    def parts(self):
        return {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "python": self.python.getstate(),
            "numpy": self.numpy.bit_generator.state,
            "counts": dict(self.counts),
            "best": self.best,
        }

    def state_dict(self):
        return {name: part for name, part in self.parts().items() if name not in self.forgotten}

    def load_state_dict(self, state, fast_init=False):
        state = {name: part for name, part in state.items() if name not in self.ignored}
        for name in ("net", "average", "optimizer", "scheduler", "scaler"):
            if name in state:
                getattr(self, name).load_state_dict(state[name])
        self.best = state.get("best", self.best)
        self.counts = state.get("counts", self.counts)
        if "generator" in state:
            self.generator.set_state(state["generator"])
        if "python" in state:
            self.python.setstate(state["python"])
        if "numpy" in state:
            self.numpy.bit_generator.state = state["numpy"]

    def train_step(self, batch, state):
        x = batch + 0.01 * torch.rand(batch.shape, generator=self.generator) + 0.01 * self.python.random()
        loss = self.net(x + 0.01 * self.numpy.random()).square().mean()
        self._loss_items["loss"] = loss
        (loss * self.scaler.scale).backward()
        if state.global_iteration % self.trainer.settings.accumulation_steps == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        self.scaler.step()
        self.counts["seen"] += 1
        for mean, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(now.detach(), 0.5)
        self.log("train/loss", loss.detach())

    def valid_step(self, batch, step):
        total = self._val_scores.get("loss", 0) + self.net(batch).square().mean()
        self._val_scores["loss"] = total

    def have_metrics_improved(self):
        improved = self._val_scores["loss"].item() < self.best
        self.best = min(self.best, self._val_scores["loss"].item())
        return improved


def trainer_maker(unit=TrainingUnit.ITERATION, total_steps=8, plugin=None, **options):
    options = {"use_cpu": True, "chkpt_frequency": 2, **options}

    def make_trainer(chkpt_root):
        trainer = Trainer("r", unit, total_steps, chkpt_root=chkpt_root, **options)
        if plugin is not None:
            trainer.plugins.append(plugin())
        return trainer

    return make_trainer


def variant(**attributes):
    """A class like Everything, with other attributes or methods."""
    return type("Everything", (Everything,), attributes)


def difference(model=Everything, data=Data, *, stop_at=5, make_trainer=None, **options):
    report = check_resume(
        make_trainer or trainer_maker(), model, data, stop_at=stop_at, raises=False, **options
    )
    assert not report.is_exact
    return report.difference


SETUPS = {
    "epochs": (TrainingUnit.EPOCH, 3, {"valid_frequency": 1, "chkpt_frequency": 1}),
    "iterations": (TrainingUnit.ITERATION, 9, {"valid_frequency": 3, "chkpt_frequency": 2}),
    "accumulation": (TrainingUnit.ITERATION, 5, {"valid_frequency": 2, "accumulation_steps": 2}),
    "accumulation by epoch": (TrainingUnit.EPOCH, 2, {"accumulation_steps": 3, "chkpt_frequency": 1}),
    "early stop": (
        TrainingUnit.EPOCH,
        9,
        {"valid_frequency": 1, "early_stop_cycles": 1, "chkpt_frequency": 1},
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_a_model_that_keeps_everything_passes(name, tmp_path):
    unit, total_steps, options = SETUPS[name]
    logs = {"enable_tensorboard": True, "run_path": tmp_path} if name == "iterations" else {}
    report = check_resume(
        trainer_maker(unit, total_steps, **options, **logs), Everything, Data, num_points=1, seed=3
    )
    assert report.is_exact
    assert any("killed" in each for each in report.interrupted)
    assert any(" and then killed at step " in each for each in report.interrupted)
    assert any("in validation" in each for each in report.interrupted) is ("valid_frequency" in options)
    assert f"the same bits in each of {report.num_steps} steps" in str(report)
    assert list(tmp_path.iterdir()) == []


THE_REPORT = """\
scheduler.last_epoch: 6 != 1 at step 6, not in Model.state_dict

    the whole run: 6
    resumed:       1
    seen:          after the step, step 6 of epoch 2
    the run was:   asked to stop at step 5, and resumed from r_epoch_2_iter_5.pth

    At the checkpoint it was 5, after the resume 0.
    Nothing keeps it. In Everything:
        state_dict:       'scheduler': self.scheduler.state_dict(),
        load_state_dict:  self.scheduler.load_state_dict(state['scheduler'])

    Also different then: scheduler._step_count, scheduler._last_lr, optimizer.param_groups[0].lr"""


def test_the_report_of_a_forgotten_scheduler():
    with pytest.raises(ResumeError) as caught:
        check_resume(trainer_maker(), variant(forgotten=("scheduler",)), Data, stop_at=5)
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value) == THE_REPORT
    assert caught.value.report.difference.others[-1] == "optimizer.param_groups[0].lr"


def test_the_report_in_the_readme():
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    example, check = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:2]
    there = {}
    exec(example.partition("trainer = hlt.Trainer(")[0] + check, there)

    class SineModel(there["SineModel"]):
        def setup(self, fast_init=False):
            super().setup(fast_init)
            self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)

        def train_step(self, batch, state):
            super().train_step(batch, state)
            self.scheduler.step()

    there["SineModel"] = SineModel
    with pytest.raises(ResumeError) as caught:
        there["test_resume"]()
    assert f"```text\n{caught.value}\n```" in readme


@pytest.mark.parametrize(
    ("name", "component", "line"),
    [
        (
            "optimizer",
            "optimizer.param_groups[0].lr",
            "self.optimizer.load_state_dict(state['optimizer'])",
        ),
        ("net", "net.0.weight", "self.net.load_state_dict(state['net'])"),
        ("average", "average.0.weight", "'average': self.average.state_dict(),"),
        ("scaler", "scaler.scale", "'scaler': self.scaler.state_dict(),"),
        ("generator", "generator", "self.generator.set_state(state['generator'].cpu())"),
        ("python", "python", "self.python.setstate(state['python'])"),
        ("numpy", "numpy", "self.numpy.bit_generator.state = state['numpy']"),
        ("counts", "counts.seen", "self.counts = state['counts']"),
        ("best", "best", "self.best = state['best']"),
    ],
)
def test_what_is_forgotten_is_named(name, component, line):
    make_trainer = trainer_maker(valid_frequency=4)
    lost = difference(variant(forgotten=(name,)), make_trainer=make_trainer)
    assert (lost.component, lost.cause) == (component, "not in Model.state_dict")
    assert line in str(lost)
    assert (lost.epoch, lost.is_by_itself) == (2, False)


@pytest.mark.parametrize("name", ["scheduler", "net", "best", "generator"])
def test_what_is_kept_and_not_loaded_is_told_from_what_is_forgotten(name):
    lost = difference(variant(ignored=(name,)), make_trainer=trainer_maker(valid_frequency=4))
    assert lost.component.startswith(name)
    assert lost.cause == "in Model.state_dict, but not put back by load_state_dict"


def test_values_of_large_tensors_are_compared():
    lost = difference(variant(forgotten=("net",)))
    assert lost.summary.startswith("12 of 12 elements differ, by up to ")
    assert lost.expected.endswith(" at [0, 0] of float32 [3, 4]")
    assert lost.expected != lost.found
    assert str(lost).splitlines()[0].endswith(", at step 6, not in Model.state_dict")


def test_buffers():
    def parts(self):
        return {**Everything.parts(self), "net": dict(self.net.named_parameters())}

    def load_state_dict(self, state, fast_init=False):
        self.net.load_state_dict(state.pop("net"), strict=False)
        Everything.load_state_dict(self, state)

    lost = difference(variant(parts=parts, load_state_dict=load_state_dict))
    assert (lost.component, lost.cause) == ("net.1.running_mean", "not in Model.state_dict")

    def setup(self, fast_init=False):
        Everything.setup(self)
        self.net[1].register_buffer("total", torch.zeros(1), persistent=False)

    def train_step(self, batch, state):
        Everything.train_step(self, batch, state)
        self.net[1].total += batch.sum()

    lost = difference(variant(setup=setup, train_step=train_step))
    assert (lost.component, lost.cause) == ("net.1.total", "not in Model.state_dict")
    assert "self.net[1].total.copy_(state['net.1.total'])" in str(lost)


def test_weights_changed_in_on_training_start():
    def on_training_start(self):
        with torch.no_grad():
            self.net[0].bias.zero_()

    lost = difference(variant(on_training_start=on_training_start))
    assert (lost.component, lost.cause) == ("net.0.bias", "changed by Everything's on_training_start")


class Noise(Plugin):
    """Adds noise of a generator of its own to the batches."""

    keeps = True
    resets = False

    def __init__(self):
        super().__init__("noise")

    def setup(self):
        self.generator, self.batches = torch.Generator().manual_seed(5), 0

    def on_training_start(self):
        if self.resets:
            self.batches = 0

    def process_training_batch(self, batch, state):
        self.batches += 1
        return batch + torch.rand(batch.shape, generator=self.generator)

    def state_dict(self):
        return {"generator": self.generator.get_state(), "batches": self.batches} if self.keeps else {}

    def load_state_dict(self, state):
        if state:
            self.generator.set_state(state["generator"])
            self.batches = state["batches"]


def test_state_of_plugins():
    assert check_resume(trainer_maker(plugin=Noise), Everything, Data, stop_at=5).is_exact
    forgetful = type("Noise", (Noise,), {"keeps": False})
    lost = difference(make_trainer=trainer_maker(plugin=forgetful))
    assert (lost.component, lost.cause) == ("plugins.noise.generator", "not in Plugin.state_dict")
    assert "In Noise:" in str(lost) and "self.generator.get_state()," in str(lost)
    resetting = type("Noise", (Noise,), {"resets": True})
    lost = difference(make_trainer=trainer_maker(plugin=resetting))
    assert (lost.component, lost.cause) == (
        "plugins.noise.batches",
        "changed by a plug-in's on_training_start",
    )


def seeded_legacy():
    np.random.seed(0)
    return np.random.rand


@pytest.mark.parametrize(
    ("make_draw", "num_workers", "cause", "is_by_itself"),
    [
        (lambda: np.random.rand, 0, "drawn from NumPy's legacy generator (np.random.*)", True),
        (seeded_legacy, 0, "drawn from NumPy's legacy generator (np.random.*)", False),
        (seeded_legacy, 2, "drawn from NumPy's legacy generator (np.random.*)", False),
        (lambda: np.random.default_rng(0).random, 0, "a sample is another each time it is fetched", False),
        (lambda: np.random.default_rng(0).random, 2, "a sample is another each time it is fetched", False),
    ],
)
def test_generators_in_the_dataset(make_draw, num_workers, cause, is_by_itself):
    lost = difference(data=lambda: Data(make_draw, num_workers), stop_at=6)
    assert (lost.component, lost.cause, lost.is_by_itself) == ("batch", cause, is_by_itself)
    assert lost.step == (1 if is_by_itself else 7)
    # Control: the generators that Helios re-keys are no fault.
    good = check_resume(
        trainer_maker(), Everything, lambda: Data(lambda: random.random, num_workers), stop_at=6
    )
    assert good.is_exact


def test_the_legacy_generator_in_a_step():
    def train_step(self, batch, state):
        Everything.train_step(self, batch + np.random.rand(), state)

    lost = difference(variant(train_step=train_step))
    assert (lost.step, lost.cause) == (1, "drawn from NumPy's legacy generator (np.random.*)")
    assert "It was used in a training step." in str(lost)


class Meter:
    """A mean that is called, as user classes are."""

    def __init__(self):
        self.total, self.span = torch.tensor(0.0), (float("inf"), 0)

    def __call__(self, value):
        self.total += value
        self.span = (min(self.span[0], value), self.span[1] + 1)


@pytest.mark.parametrize("kept", [(), ("total",), ("span",), ("total", "span")])
def test_objects_of_the_user_in_lists_and_dicts(kept):
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.stages = [{"meter": Meter()}]

    def parts(self):
        meter = self.stages[0]["meter"]
        return {**Everything.parts(self), **{name: getattr(meter, name) for name in kept}}

    def load_state_dict(self, state, fast_init=False):
        Everything.load_state_dict(self, state)
        for name in kept:
            setattr(self.stages[0]["meter"], name, state[name])

    def train_step(self, batch, state):
        Everything.train_step(self, batch, state)
        self.stages[0]["meter"](self._loss_items["loss"].item())

    model = variant(setup=setup, parts=parts, load_state_dict=load_state_dict, train_step=train_step)
    report = check_resume(trainer_maker(), model, Data, stop_at=5, raises=False)
    forgotten = [f"stages[0].meter.{name}" for name in ("total", "span") if name not in kept]
    assert ([] if report.is_exact else [report.difference.component]) == forgotten[:1]
    if forgotten:
        assert report.difference.cause == "not in Model.state_dict"
        target = f"self.stages[0]['meter']{forgotten[0].removeprefix('stages[0].meter')}"
        assert f"{target} = state[{forgotten[0]!r}]" in str(report)


def change_deep_array(value):
    value["inner"][0]["array"] += 1


def draw_of(generator):
    generator.random()


def average(tensors):
    for number, tensor in enumerate(tensors):
        tensor.mul_(0.5).add_(number + 1)


# Of each kind of value: the first one, how a step changes it in place, and lines of the advice.
KINDS = {
    "array": (lambda: np.zeros(3), lambda a: np.add(a, 1, out=a), "torch.as_tensor(self.kept)", ".numpy()"),
    "array of text": (
        lambda: np.array(["a", "b"]),
        lambda a: np.copyto(a, a[::-1].copy()),
        ".tolist()",
        "np.array(",
    ),
    "set": (set, lambda kept: kept.add(len(kept)), "sorted(self.kept)", "set(state['kept'])"),
    "set of several types": (
        lambda: {"a", None},
        lambda kept: kept.add(len(kept)),
        "sorted(self.kept, key=repr)",
        "= set(",
    ),
    "deque": (
        lambda: deque(maxlen=3),
        lambda kept: kept.append(sum(kept) + 1),
        "list(self.kept)",
        "deque(state['kept'], maxlen=3)",
    ),
    "endless deque of tensors": (
        deque,
        lambda kept: kept.append(torch.full((2,), len(kept))),
        "list(self.kept)",
        "deque(state['kept'])",
    ),
    "tensors in a list": (
        lambda: [torch.zeros(2), torch.zeros(3)],
        average,
        "'kept': self.kept,",
        "self.kept = state['kept']",
    ),
    "tensors in a tuple": (
        lambda: (torch.zeros(2), torch.zeros(3)),
        average,
        "'kept': self.kept,",
        "self.kept = state['kept']",
    ),
    "tensors in a dict": (
        lambda: {"a": [torch.zeros(2)]},
        lambda kept: average(kept["a"]),
        "'kept': self.kept,",
        "= state['kept']",
    ),
    "an array deep in": (
        lambda: {"inner": [{"array": np.zeros(2)}]},
        change_deep_array,
        "torch.as_tensor(self.kept['inner'][0]['array'])",
        "self.kept['inner'][0]['array'] =",
    ),
    "legacy generator": (lambda: np.random.RandomState(1), draw_of, "get_state()", "pickle.loads("),
    "Mersenne twister": (
        lambda: np.random.Generator(np.random.MT19937(1)),
        draw_of,
        "bit_generator.state",
        "pickle.loads(",
    ),
}


def follow(model, advice):
    """Return a class like the model that has the lines of the advice in it, as they are printed."""
    lines = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in advice[-2:]}
    body = f"""
class Everything(model):
    def state_dict(self):
        return {{**super().state_dict(), {lines["state_dict"]}}}

    def load_state_dict(self, state, fast_init=False):
        super().load_state_dict(state)
        {lines["load_state_dict"]}
"""
    there = {"model": model, "np": np, "torch": torch, "deque": deque, "pickle": pickle}
    exec(body, there)
    return there["Everything"]


def keeper(first, change):
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.kept = first()

    def train_step(self, batch, state):
        Everything.train_step(self, batch, state)
        change(self.kept)

    return variant(setup=setup, train_step=train_step)


@pytest.mark.parametrize("kind", KINDS)
def test_the_advice_can_be_followed(kind):
    first, change, get, put = KINDS[kind]
    model = keeper(first, change)
    report = check_resume(trainer_maker(), model, Data, stop_at=5, raises=False)
    lost = report.difference
    assert (lost.component.startswith("kept"), lost.cause) == (True, "not in Model.state_dict")
    advice = [line for line in lost.advice if line.startswith("    ")]
    assert len(advice) == 2 and get in advice[0] and put in advice[1]
    good = follow(model, advice)
    assert check_resume(trainer_maker(), good, Data, stop_at=5).is_exact
    # Half of it is told from nothing.
    half = type("Everything", (good,), {"load_state_dict": Everything.load_state_dict})
    assert difference(half).cause == "in Model.state_dict, but not put back by load_state_dict"


def test_the_advice_for_a_bare_parameter_leaves_it_to_its_optimizer():
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.weights = [nn.Parameter(torch.ones(2))]
        self.optimizer.add_param_group({"params": self.weights})

    def train_step(self, batch, state):
        self.weights[0].square().sum().backward()
        Everything.train_step(self, batch, state)

    model = variant(setup=setup, train_step=train_step)
    lost = difference(model)
    assert lost.component == "weights[0]"
    assert "self.weights[0].data.copy_(state['weights[0]'])" in str(lost)
    good = follow(model, [line for line in lost.advice if line.startswith("    ")])
    assert check_resume(trainer_maker(), good, Data, stop_at=5).is_exact


def test_the_advice_for_a_plain_attribute_of_a_module():
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.net[1].calls = 0

    def train_step(self, batch, state):
        Everything.train_step(self, batch, state)
        self.net[1].calls += 1

    model = variant(setup=setup, train_step=train_step)
    lost = difference(model)
    assert lost.component == "net.1.calls"
    assert check_resume(trainer_maker(), follow(model, lost.advice), Data, stop_at=5).is_exact


def test_what_alone_differs_may_be_ignored():
    def count(kept):
        kept["steps"] += 1

    model = keeper(lambda: {"steps": 0}, count)
    lost = difference(model)
    assert 'check_resume(..., ignore=("kept",)).' in str(lost)
    assert check_resume(trainer_maker(), model, Data, stop_at=5, ignore=("kept",)).is_exact

    # Control: it is not said of what the weights depend on, nor of weights.
    def train_step(self, batch, state):
        self.kept["steps"] += 1
        Everything.train_step(self, batch * self.kept["steps"], state)

    lost = difference(type("Everything", (model,), {"train_step": train_step}))
    assert lost.component == "kept.steps" and "net.0.weight" in lost.others
    assert "ignore=" not in str(lost)
    assert "ignore=" not in str(difference(variant(forgotten=("average",))))


@pytest.mark.parametrize("forgotten", [(), ("net",)])
def test_parameters_that_get_their_shape_from_the_first_batch(forgotten):
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.net = nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.average = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)

    def train_step(self, batch, state):
        loss = self.net(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    model = variant(setup=setup, train_step=train_step, forgotten=forgotten)
    report = check_resume(trainer_maker(), model, Data, stop_at=5, raises=False)
    assert report.is_exact is not bool(forgotten)
    if forgotten:
        assert report.difference.component == "net.0.weight"
        assert report.difference.cause == "not in Model.state_dict"


def test_state_in_the_datamodule_is_hinted_at():
    class Levels(Data):
        def __init__(self):
            super().__init__()
            self.level = 0
            made.append(self)

    made = []

    def train_step(self, batch, state):
        made[-1].level += 1  # a model has its datamodule from the script that makes both
        Everything.train_step(self, batch + made[-1].level, state)

    lost = difference(variant(train_step=train_step), data=Levels)
    assert "in the DataModule" in str(lost)


class Hidden:
    """Has a count where nobody looks."""

    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def next(self):
        self.count += 1
        return self.count


def test_state_that_nobody_sees():
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.hidden = Hidden()

    def trained(self, batch, state):
        Everything.train_step(self, batch + 0.1 * self.hidden.next(), state)

    lost = difference(variant(setup=setup, train_step=trained))
    assert (lost.step, lost.cause) == (6, "it was as at the checkpoint when the loop began")
    assert "in no attribute of the model" in str(lost)
    assert "in the DataModule" in str(lost)

    def logged(self, batch, state):
        Everything.train_step(self, batch, state)
        self.log("count", self.hidden.next())

    lost = difference(variant(setup=setup, train_step=logged))
    assert (lost.component, lost.step) == ("scalar count", 6)
    assert (lost.expected, lost.found) == ("6", "1")


def test_early_stop_that_depends_on_what_is_forgotten():
    def setup(self, fast_init=False):
        Everything.setup(self)
        self.hidden = Hidden()

    def have_metrics_improved(self):
        return self.hidden.next() < 3

    make_trainer = trainer_maker(
        TrainingUnit.EPOCH, 6, valid_frequency=1, early_stop_cycles=1, chkpt_frequency=1
    )
    model = variant(setup=setup, have_metrics_improved=have_metrics_improved)
    lost = difference(model, make_trainer=make_trainer)
    assert (lost.component, lost.expected) == ("length of the run", "12 steps, 3 validations")
    assert lost.found == "16 steps, 4 validations"
    assert lost.cause == "the resumed run decides otherwise when to validate or to stop"


def test_a_run_that_is_not_deterministic_is_not_blamed_on_the_resume():
    counter = itertools.count()

    def setup(self, fast_init=False):
        Everything.setup(self)
        self.timer, self.ordinal = {"began_s": 0.0}, next(counter)

    def train_step(self, batch, state):
        Everything.train_step(self, batch, state)
        self.timer["began_s"] = time.perf_counter()

    model = variant(setup=setup, train_step=train_step)
    lost = difference(model)
    assert (lost.component, lost.step, lost.is_by_itself) == ("timer.began_s", 1, True)
    assert "not deterministic by itself" in lost.cause
    assert difference(model, ignore="timer").component == "ordinal"
    report = check_resume(trainer_maker(), model, Data, stop_at=5, ignore=("timer.*", "ordinal"))
    assert report.is_exact


@pytest.mark.parametrize(
    ("lost", "component"),
    [
        ("_resumption.load_rng_state_dict", "RNG torch"),
        ("_resumption.Resumption.restore_loader", "sample order"),
        ("_resumption.restore_tables", "_running_losses.loss"),
        ("_resumption.restore_gradients", "net.0.weight.grad"),
    ],
)
def test_what_the_trainer_itself_would_lose_is_seen(monkeypatch, lost, component):
    class Drawing(Everything):
        def train_step(self, batch, state):
            super().train_step(batch + torch.rand(()), state)

    make_trainer = trainer_maker(TrainingUnit.EPOCH, 2, accumulation_steps=3, chkpt_frequency=1)
    assert check_resume(make_trainer, Drawing, Data, stop_at=4).is_exact
    monkeypatch.setattr(f"helios.trainer.{lost}", lambda *args, **options: None)
    found = difference(Drawing, make_trainer=make_trainer, stop_at=4)
    assert component in (found.component, *found.others)


@pytest.mark.parametrize("name", ["batch", "state"])
def test_attributes_may_have_names_of_the_report(name):
    def setup(self, fast_init=False):
        Everything.setup(self)
        setattr(self, name, {"current_iteration": 0})

    def train_step(self, batch, state):
        Everything.train_step(self, batch, state)
        getattr(self, name)["current_iteration"] += 1

    lost = difference(variant(setup=setup, train_step=train_step))
    assert (lost.component, lost.expected, lost.found) == (f"{name}.current_iteration", "6", "1")
    assert lost.cause == "not in Model.state_dict"


def test_given_steps_are_stopped_and_killed_at():
    report = check_resume(trainer_maker(), Everything, Data, stop_at=[3, 6])
    assert report.interrupted == (
        "asked to stop at step 3",
        "asked to stop at step 6",
        "killed at step 3",
        "killed at step 6",
        "asked to stop at step 3 and then killed at step 6",
    )


def test_networks_may_be_made_in_init():
    def __init__(self):  # noqa: N807
        Everything.__init__(self)
        self.head = nn.Linear(4, 4)

    def parts(self):
        return {**Everything.parts(self), "head": self.head.state_dict()}

    def load_state_dict(self, state, fast_init=False):
        Everything.load_state_dict(self, state)
        if "head" in state:
            self.head.load_state_dict(state["head"])

    model = variant(__init__=__init__, parts=parts, load_state_dict=load_state_dict)
    assert check_resume(trainer_maker(), model, Data, stop_at=5).is_exact
    # Control: what is drawn before fit seeds the generators, and not kept, is seen.
    lost = difference(type("Everything", (model,), {"forgotten": ("head",)}))
    assert (lost.component, lost.cause) == ("head.weight", "not in Model.state_dict")


def test_everything_is_as_before(capsys):
    rng.seed_rngs(4)
    np.random.seed(4)
    drawn = (
        torch.rand(()),
        random.random(),
        np.random.rand(),
        rng.get_default_numpy_rng().generator.random(),
    )
    rng.seed_rngs(4)
    np.random.seed(4)
    filters = logging.getLogger("helios").filters[:]
    check_resume(trainer_maker(enable_progress_bar=True), Everything, Data, stop_at=5)
    again = (
        torch.rand(()),
        random.random(),
        np.random.rand(),
        rng.get_default_numpy_rng().generator.random(),
    )
    assert again == drawn
    assert logging.getLogger("helios").filters == filters
    assert capsys.readouterr() == ("", "")


def test_errors_of_the_model_pass_and_say_in_which_run():
    def load_state_dict(self, state, fast_init=False):
        raise KeyError("optimiser")

    with pytest.raises(RuntimeError, match="optimiser") as caught:
        check_resume(trainer_maker(), variant(load_state_dict=load_state_dict), Data, stop_at=5)
    (note,) = caught.value.__notes__
    assert note == "check_resume: raised in the run that was resumed after being asked to stop at step 5"


def once(make):
    made = make()
    return lambda *ignored: made


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"make_model": once(Everything)}, "make_model returned the same Everything as before"),
        ({"make_datamodule": once(Data)}, "make_datamodule returned the same Data as before"),
        (
            {"make_trainer": trainer_maker(plugin=once(Noise))},
            "make_trainer added to trainer.plugins the same Noise",
        ),
        ({"make_trainer": lambda root: Trainer(use_cpu=True)}, "must pass it on.*found chkpt_root=None"),
        ({"make_trainer": lambda root: Trainer(use_cpu=True, chkpt_root=Path("x"))}, "found chkpt_root=x"),
        ({"make_trainer": trainer_maker(chkpt_frequency=None)}, "chkpt_frequency"),
        ({"make_trainer": trainer_maker(dry_run=1)}, "found dry_run=1"),
        ({"make_model": dict}, "make_model must return a Model, found dict"),
        ({"stop_at": [3, 9]}, "stop_at has 9, but the run has 8 batches"),
        ({"stop_at": []}, "stop_at must be one or more"),
        ({"num_points": -1}, "num_points must be an int, 0 or more, found -1"),
        ({"ignore": (1,)}, "ignore must be patterns"),
    ],
)
def test_misuse_is_named(changed, named):
    arguments = {
        "make_trainer": trainer_maker(),
        "make_model": Everything,
        "make_datamodule": Data,
        "stop_at": 3,
    }
    with pytest.raises((ValueError, TypeError), match=named):
        check_resume(**{**arguments, **changed})
