"""What the quick reference says, word for word: its examples, and sentences that no other test proves."""

import inspect
import random
from contextlib import suppress

import numpy as np
import pytest
import torch

import helios.trainer as hlt
from helios.chkpt import __version__ as chkpt_version
from helios.chkpt import load
from helios.core import rng
from helios.data import DataLoaderParams, ResumableSequentialSampler
from helios.trainer import Model, Trainer, TrainingState, TrainingUnit


class Bare(Model):
    """Only what must be there."""

    def setup(self, fast_init=False):
        pass

    def train_step(self, batch, state):
        pass


ARGUMENTS = {
    "run_name": "",
    "train_unit": TrainingUnit.EPOCH,
    "total_steps": 0,
    "valid_frequency": None,
    "chkpt_frequency": None,
    "print_frequency": None,
    "accumulation_steps": 1,
    "enable_cudnn_benchmark": False,
    "enable_deterministic": False,
    "early_stop_cycles": None,
    "use_cpu": None,
    "gpus": None,
    "random_seed": None,
    "enable_tensorboard": False,
    "enable_file_logging": False,
    "capture_warnings": False,
    "enable_progress_bar": False,
    "chkpt_root": None,
    "log_path": None,
    "run_path": None,
}


def test_names_and_defaults_of_the_arguments():
    parameters = inspect.signature(Trainer).parameters
    assert {name: parameters[name].default for name in ARGUMENTS} == ARGUMENTS
    assert list(parameters)[: len(ARGUMENTS)] == list(ARGUMENTS)


def test_names_and_signatures_of_the_callbacks():
    expected = {
        "setup": ["fast_init"],
        "load_for_testing": [],
        "state_dict": [],
        "load_state_dict": ["state", "fast_init"],
        "append_metadata_to_chkpt_name": ["chkpt_name"],
        "train": [],
        "eval": [],
        "on_training_start": [],
        "on_training_epoch_start": ["epoch"],
        "on_training_batch_start": ["state"],
        "train_step": ["batch", "state"],
        "on_training_batch_end": ["state", "should_log"],
        "on_training_epoch_end": ["epoch"],
        "on_training_end": [],
        "on_validation_start": ["validation_cycle"],
        "on_validation_batch_start": ["step"],
        "valid_step": ["batch", "step"],
        "on_validation_batch_end": ["step"],
        "on_validation_end": ["validation_cycle"],
        "have_metrics_improved": [],
        "should_training_stop": [],
        "on_testing_start": [],
        "on_testing_batch_start": ["step"],
        "test_step": ["batch", "step"],
        "on_testing_batch_end": ["step"],
        "on_testing_end": [],
    }
    found = {name: list(inspect.signature(getattr(Model, name)).parameters)[1:] for name in expected}
    assert found == expected
    assert inspect.signature(Model.on_training_batch_end).parameters["should_log"].default is False
    counters = [
        "current_iteration", "global_iteration", "global_epoch", "validation_cycles", "dataset_iter",
        "early_stop_count", "average_iter_time", "running_iter",
    ]  # fmt: skip
    assert {name: getattr(TrainingState(), name) for name in counters} == dict.fromkeys(counters, 0)


def test_a_model_with_nothing_but_setup_and_train_step(kit, tmp_path):
    model = Bare("bare")
    trainer = kit.trainer(valid_frequency=1, early_stop_cycles=1, chkpt_root=tmp_path, chkpt_frequency=1)
    assert trainer.fit(model, kit.Data()) is True  # improved by default, and never asking to stop
    assert trainer.test(model, kit.Data()) is True
    checkpoint = load(tmp_path / "bare_epoch_2_iter_6.pth")
    assert checkpoint["model"] == {}
    assert checkpoint["version"] == chkpt_version
    assert checkpoint["training_state"]["early_stop_count"] == 0


def test_the_example_of_the_numpy_generator(kit):
    drawn = []

    class Drawing(Bare):
        def on_training_start(self):
            generator = rng.get_default_numpy_rng().generator

            # Use the generator as necessary. For example, we can retrieve a uniform random float
            # between 0 and 1.
            drawn.append(generator.uniform(0, 1))

    kit.trainer().fit(Drawing("m"), kit.Data())
    assert drawn == [np.random.default_rng(6691).uniform(0, 1)]
    assert 0 <= drawn[0] < 1


def draws():
    return (
        torch.rand(()).item(),
        random.random(),
        rng.get_default_numpy_rng().generator.random(),
    )


@pytest.mark.parametrize("activity", ["fit", "test"])
@pytest.mark.parametrize("seed", [None, 6691, 5])
def test_start_up_seeds_every_generator(kit, seed, activity):
    """Before anything of the user is called, and by the functions of the libraries themselves."""
    drawn = []

    class Drawing(kit.Data):
        def prepare_data(self):
            drawn.append(draws())

    rng.seed_rngs(77)  # whatever came before
    getattr(kit.trainer(random_seed=seed), activity)(Bare("m"), Drawing())
    number = 6691 if seed is None else seed
    torch.manual_seed(number)
    expected = (torch.rand(()).item(), random.Random(number).random(), np.random.default_rng(number).random())
    assert drawn == [expected]
    torch.manual_seed(number + 1)
    assert torch.rand(()).item() != expected[0]  # control: the seed matters


def test_numpys_legacy_generator_is_left_alone(kit, tmp_path):
    np.random.seed(3)  # noqa: NPY002  # the point
    before = np.random.get_state()  # noqa: NPY002
    for total_steps in (1, 2):  # the second is resumed
        trainer = kit.trainer(
            total_steps=total_steps, valid_frequency=1, chkpt_root=tmp_path, chkpt_frequency=1
        )
        model, data = kit.Net(), kit.Data(num_workers=1)
        trainer.fit(model, data)
        trainer.test(model, data)
    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0] and np.array_equal(before[1], after[1]) and before[2:] == after[2:]


class Backwards(ResumableSequentialSampler):
    """A sampler of the user's own."""

    def indices_at(self, positions):
        return self.num_dataset_samples - 1 - super().indices_at(positions)


def test_the_sampler_may_be_overridden(kit, tmp_path):
    class WithSampler(kit.Data):
        def setup(self):
            dataset = kit.Points(6)
            params = DataLoaderParams(batch_size=2, sampler=Backwards(dataset))
            self._train_dataset = self._create_dataset(dataset, params)

    def fit(abort_at=None):
        model = kit.Net(abort_at=abort_at)
        trainer = kit.trainer(kit.ITERATION, 6, chkpt_root=tmp_path, chkpt_frequency=1)
        with suppress(kit.AbortError):
            trainer.fit(model, WithSampler())
        return [index for index, _ in model.batches]

    backwards = [[5, 4], [3, 2], [1, 0]]
    assert fit(abort_at=23) == [*backwards, backwards[0]]
    assert fit() == backwards[1:]  # and it goes on in that order


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_the_checkpoint_comes_before_the_early_stop_check(kit, tmp_path, unit):
    """With the same frequency there is a file of this very step when the metrics are asked for."""
    seen = []

    class Looking(kit.Net):
        def look(self, where):
            path = tmp_path / f"net_epoch_{self.state.global_epoch}_iter_{self.state.global_iteration}.pth"
            seen.append((where, path.exists()))

        def on_validation_end(self, validation_cycle):
            self.look("validated")
            super().on_validation_end(validation_cycle)

        def have_metrics_improved(self):
            self.look("asked")
            return False

    options = {"valid_frequency": 2, "chkpt_frequency": 2, "early_stop_cycles": 2}
    trainer = kit.trainer(getattr(kit, unit), 50, chkpt_root=tmp_path, **options)
    trainer.fit(Looking(), kit.Data())
    assert seen == [("validated", False), ("asked", True)] * 2


@pytest.mark.parametrize(("unit", "counter"), [("EPOCH", "current"), ("ITERATION", "global")])
def test_the_examples_of_gradient_accumulation(kit, unit, counter):
    """Both as they stand, with the backward pass where the reference has only the condition."""
    passes = []

    class Accumulating(kit.Net):
        _accumulation_steps = 2

        def train_step(self, batch, state):
            self._loss_items["loss"] = self.net(batch[0]).mean()

        def backward(self, state):
            self._loss_items["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            passes.append(state.global_iteration)

    class ByEpoch(Accumulating):
        def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
            # Suppose that our loss tensor is stored in self._loss_items and the number of
            # accumulation steps is stored in self._accumulation_steps
            if state.current_iteration % self._accumulation_steps == 0:
                self.backward(state)

    class ByIteration(Accumulating):
        def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
            # Suppose that our loss tensor is stored in self._loss_items and the number of
            # accumulation steps is stored in self._accumulation_steps
            if state.global_iteration % self._accumulation_steps == 0:
                self.backward(state)

    model = {"current": ByEpoch, "global": ByIteration}[counter]()
    steps = 2 if unit == "EPOCH" else 10  # 2 epochs of 10 batches, or 10 iterations of 2
    kit.trainer(getattr(kit, unit), steps, accumulation_steps=2).fit(model, kit.Data(train=10))
    assert passes == list(range(2, 21, 2))


@pytest.mark.parametrize(
    ("is_formatted", "ending"), [(False, "accuracy_{accuracy}"), (True, "accuracy_0.8765")]
)
def test_the_example_of_metadata(kit, tmp_path, is_formatted, ending):
    """Run cifar10 on iteration 100 of epoch 3; the reference's own text lacks the f that was surely meant."""

    class Scored(Bare):
        def valid_step(self, batch, step):
            self._val_scores["accuracy"] = 0.876543

    class AsItStands(Scored):
        def append_metadata_to_chkpt_name(self, chkpt_name: str) -> str:
            # Suppose the accuracy is stored in self._val_scores
            accuracy = round(self._val_scores["accuracy"], 4)  # noqa: F841
            return "accuracy_{accuracy}"

    class AsMeant(Scored):
        def append_metadata_to_chkpt_name(self, chkpt_name: str) -> str:
            accuracy = round(self._val_scores["accuracy"], 4)
            return f"accuracy_{accuracy}"

    every = {"valid_frequency": 100, "chkpt_frequency": 100}
    trainer = kit.trainer(kit.ITERATION, 100, run_name="cifar10", chkpt_root=tmp_path, **every)
    trainer.fit((AsMeant if is_formatted else AsItStands)("net"), kit.Data(train=40, batch_size=1))
    assert [path.name for path in tmp_path.iterdir()] == [f"cifar10_epoch_3_iter_100_{ending}.pth"]


class MyException(Exception):  # noqa: N818  # the reference's name
    pass


@pytest.mark.parametrize("activity", ["fit", "test"])
def test_the_example_of_exceptions(kit, activity):
    class Raising(Bare):
        def train_step(self, batch, state):
            raise MyException("mine")

        def test_step(self, batch, step):
            raise MyException("mine")

    trainer = hlt.Trainer(total_steps=1, use_cpu=True)
    with pytest.raises(RuntimeError) as caught:  # by default
        getattr(trainer, activity)(Raising("m"), kit.Data())
    assert type(caught.value) is RuntimeError and isinstance(caught.value.__cause__, MyException)

    {"fit": trainer.train_exceptions, "test": trainer.test_exceptions}[activity].append(MyException)
    handled = None
    try:
        getattr(trainer, activity)(Raising("m"), kit.Data())
    except MyException as e:
        handled = e
    assert str(handled) == "mine" and handled.__cause__ is None


def test_model_data_and_plug_ins_reach_the_trainer(kit):
    """By which they would reach its queue, of which there is none in one process."""
    seen = []

    class Looking(Bare):
        def train_step(self, batch, state):
            seen.append((self.trainer, data.trainer, plugin.trainer))

    trainer, data, plugin = kit.trainer(total_steps=1), kit.Data(train=1), hlt.Plugin("p")
    trainer.plugins.append(plugin)
    trainer.fit(Looking("m"), data)
    assert seen == [(trainer, trainer, trainer)]
    assert trainer.queue is None


@pytest.mark.parametrize("flag", ["log_path", "run_path", "chkpt_root"])
def test_folders_are_made(kit, tmp_path, flag):
    folder = tmp_path / "not" / "there" / "yet"
    options = {
        "log_path": {"enable_file_logging": True, "log_path": folder},
        "run_path": {"enable_tensorboard": True, "run_path": folder},
        "chkpt_root": {"chkpt_frequency": 1, "chkpt_root": folder},
    }[flag]
    kit.trainer(total_steps=1, **options).fit(Bare("m"), kit.Data())
    assert len(list(folder.iterdir())) == 1


def test_a_path_without_its_flag_writes_nothing(kit, tmp_path):
    kit.trainer(total_steps=1, log_path=tmp_path / "l", run_path=tmp_path / "r").fit(Bare("m"), kit.Data())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_loss_that_is_no_number_may_stop_training(kit, tmp_path, unit, value):
    class Diverging(kit.Net):
        def train_step(self, batch, state):
            self._loss_items["loss"] = torch.tensor(value if state.global_iteration == 5 else 1.0)

        def should_training_stop(self):
            loss = self._loss_items.get("loss")
            return loss is not None and not torch.isfinite(loss).item()

    steps = 4 if unit == "EPOCH" else 12
    trainer, model = (
        kit.trainer(getattr(kit, unit), steps, chkpt_root=tmp_path, chkpt_frequency=2),
        Diverging(),
    )
    assert trainer.fit(model, kit.Data()) is True
    is_stopped = value != 1.0  # control: a loss like any other stops nothing
    assert model.trace[-1] == ("on_training_end",)
    end = load(tmp_path / f"net_epoch_{2 if is_stopped else 4}_iter_{5 if is_stopped else 12}.pth")
    assert end["training_state"]["trainer"]["stop"] == ("REQUESTED" if is_stopped else "TOTAL_STEPS")


def test_a_score_that_is_good_enough_may_stop_training(kit):
    class Scored(Bare):
        cycles = 0

        def on_validation_end(self, validation_cycle):
            self.cycles = validation_cycle
            super().on_validation_end(validation_cycle)

        def valid_step(self, batch, step):
            self._val_scores["accuracy"] = 0.3 * (self.cycles + 1)

        def should_training_stop(self):
            return self._val_scores.get("accuracy", 0) > 0.8

    model = Scored("m")
    kit.trainer(total_steps=9, valid_frequency=2).fit(model, kit.Data())
    assert model.cycles == 3
