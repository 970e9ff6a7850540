"""Runs that earlier releases of Helios began go on from their files: in that epoch, at that batch, in that order."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from helios.chkpt import find_last_checkpoint, load
from helios.chkpt_migrator import migrate_checkpoints_to_current_version
from helios.core import rng
from helios.data import DataModule
from helios.trainer import Model, Plugin, Trainer, TrainingUnit

LEGACY = Path(__file__).parents[1] / "packages" / "helios-chkpt" / "tests" / "legacy"
FILES = sorted(str(path.relative_to(LEGACY)) for path in LEGACY.rglob("*.pth"))
N, BATCH, SEED = 40, 4, 6691  # as in the fixtures' README


class AbortError(Exception):
    """Stands for whatever ends a process."""


class Points(torch.utils.data.Dataset):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        return torch.sin(torch.arange(4.0) * (index + 1)), index % 3, index


class Data(DataModule):
    def __init__(self, num_workers=0, random_seed=SEED):
        super().__init__()
        self.params = {"batch_size": BATCH, "num_workers": num_workers, "random_seed": random_seed}

    def setup(self):
        self._train_dataset = self._create_dataset(Points(N), {**self.params, "shuffle": True})
        self._valid_dataset = self._create_dataset(Points(8), self.params)


class Tiny(Model):
    """What the fixtures were written with, as far as their README describes it."""

    def __init__(self, accumulation=1, abort_at=None):
        super().__init__("tiny")
        self.accumulation, self.abort_at = accumulation, abort_at
        self.ids, self.checks, self.start = [], 0, None
        self.others = {}

    def setup(self, fast_init=False):
        self.net = nn.Linear(4, 3)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=0.02, betas=(0.8, 0.95), eps=1e-7, weight_decay=1e-3
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 4, 0.5)
        self.best_loss = float("inf")

    def state_dict(self):
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_loss": self.best_loss,
            **self.others,
        }

    def load_state_dict(self, state, fast_init=False):
        own = dict(state)
        self.net.load_state_dict(own.pop("net"))
        self.optimizer.load_state_dict(own.pop("optimizer"))
        self.scheduler.load_state_dict(own.pop("scheduler"))
        self.best_loss = own.pop("best_loss")
        self.others = own

    def look(self, state=None):
        """Note how the run was when its loop began."""
        if self.start is None:
            with rng.preserve_rng_state():
                self.start = {"model": bits(self.state_dict()), "draws": draws()}

    def should_training_stop(self):
        self.look()
        return False

    def on_training_epoch_end(self, epoch):
        self.look()

    def on_training_batch_start(self, state):
        self.look()
        super().on_training_batch_start(state)

    def train_step(self, batch, state):
        if self.abort_at is not None and len(self.ids) == self.abort_at:
            raise AbortError
        x, y, index = batch
        self.ids += index.tolist()
        noise = torch.rand(()) + random.random() + rng.get_default_numpy_rng().generator.random()
        loss = nn.functional.cross_entropy(self.net(x), y) * noise
        self._loss_items["loss"] = loss.detach()
        loss.backward()
        if state.global_iteration % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            with warnings.catch_warnings():  # torch has not seen this process's first step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self.scheduler.step()

    def valid_step(self, batch, step):
        x, y, _ = batch
        self._val_scores["loss"] = nn.functional.cross_entropy(self.net(x), y)

    def have_metrics_improved(self):
        self.checks += 1
        return self._val_scores["loss"].item() < self.best_loss


class Counting(Plugin):
    def __init__(self):
        super().__init__("batch_counter")
        self.state, self.restored = {}, None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state, self.restored = state, bits(state)


def bits(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def draws():
    """What each generator gives next, in the order in which the fixtures have it."""
    numpy = rng.get_default_numpy_rng().generator
    return {
        "torch.rand(3)": torch.rand(3).tolist(),
        "random.gauss(0,1)": random.gauss(0, 1),
        "random.random() x3": [random.random() for _ in range(3)],
        "numpy integers(0, 2**32 - 1, dtype=uint32)": int(numpy.integers(0, 2**32 - 1, dtype="uint32")),
        "numpy random(3)": numpy.random(3).tolist(),
    }


def order_of(epoch, seed=SEED):
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def expected_of(name):
    return json.loads((LEGACY / name).with_suffix(".expected.json").read_text())


@pytest.fixture
def put(tmp_path):
    """Put one old file into a folder of its own, migrate it, and return the folder."""

    def put(name, folder="chkpts"):
        root = tmp_path / folder
        root.mkdir()
        shutil.copy(LEGACY / name, root)
        assert migrate_checkpoints_to_current_version(root).ok
        return root

    return put


def fit(root, name, *, steps, abort_at=None, num_workers=0, seed=SEED, **options):
    """Go on with the run of a fixture for so many steps; return its model and plug-in."""
    fields = expected_of(name)["training_state"]["fields"]
    by_epoch = "/epoch/" in name
    accumulation = 1 if by_epoch else fields["global_iteration"] // fields["current_iteration"]
    done = fields["global_epoch"] if by_epoch else fields["current_iteration"]
    trainer = Trainer(
        train_unit=TrainingUnit.EPOCH if by_epoch else TrainingUnit.ITERATION,
        total_steps=done + steps,
        valid_frequency=1 if by_epoch else 5 if "_keys" in name or "/plugin/" in name else 4,
        chkpt_frequency=1 if by_epoch else 3,
        **{"accumulation_steps": accumulation, "early_stop_cycles": 100, "use_cpu": True, **options},
        chkpt_root=root,
        print_banner=False,
    )
    trainer.train_exceptions.append(AbortError)
    plugin = Counting()
    if expected_of(name)["plugins"]:
        trainer.plugins.append(plugin)
    model = Tiny(accumulation, abort_at)
    if abort_at is None:
        trainer.fit(model, Data(num_workers, seed))
    else:
        with pytest.raises(AbortError):
            trainer.fit(model, Data(num_workers, seed))
    return model, plugin


def seen_from(name, count, seed=SEED):
    """The samples that the run had still to see, from where the file has it on."""
    fields = expected_of(name)["training_state"]["fields"]
    begun, batches = fields["global_epoch"], fields["dataset_iter"]
    epoch = begun - 1 if batches else begun
    ids = order_of(epoch, seed)[batches * BATCH :]
    while len(ids) < count:
        epoch += 1
        ids += order_of(epoch, seed)
    return ids[:count]


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_every_release_goes_on(put, tmp_path, name):
    root = put(name)
    (path,) = root.glob("*.pth")
    saved, expected = load(path), expected_of(name)
    steps = 2 if "/epoch/" in name else 14
    model, plugin = fit(root, name, steps=steps, enable_file_logging=True, log_path=tmp_path / "logs")
    # First of all: everything is as it was when the file was written.
    assert model.start["draws"] == expected["rng"]["next_draws"]
    assert model.start["model"] == bits(saved["model"])
    if expected["plugins"]:
        assert plugin.restored == bits(saved["batch_counter"])
    # Then: the rest of that epoch, and all of the next ones, in the order of that release.
    fields = expected["training_state"]["fields"]
    accumulation = model.accumulation
    batches = steps * (N // BATCH) if "/epoch/" in name else steps * accumulation
    assert len(model.ids) == batches * BATCH
    assert model.ids == seen_from(name, len(model.ids))
    # In the end: the counters are those of a run that was never interrupted, and its file comes last.
    last = find_last_checkpoint(root, "tiny")
    assert last is not None
    end = load(last)
    counters = end["training_state"]
    assert last.name != path.name
    assert counters["global_iteration"] == fields["global_iteration"] + batches
    assert counters["current_iteration"] == fields["current_iteration"] + batches // accumulation
    assert counters["global_epoch"] == -(-counters["global_iteration"] // (N // BATCH))
    assert counters["validation_cycles"] == fields["validation_cycles"] + model.checks
    assert end["data"]["adopted"] is True
    (log,) = (tmp_path / "logs").glob("*.log")
    text = log.read_text()
    assert "an earlier release of Helios began" in text
    assert "random_seed=6691, which the training loader has" in text
    assert ("log file is gone" in text) is bool(expected["log_path"])
    assert ("TensorBoard folder is gone" in text) is bool(expected["run_path"])


SOME = [
    "0.2.0/logging/tiny_epoch_2_iter_6.pth",
    "0.3.0/epoch/tiny_epoch_2_iter_20.pth",
    "1.0.0/user_keys/tiny_epoch_1_iter_6.pth",
    "1.4.1/plugin/tiny_epoch_2_iter_12.pth",
    "2.0.1/amp/tiny_epoch_2_iter_12.pth",
    "2.0.1/migrated_from_0.2.0/tiny_epoch_3_iter_12.pth",
]


@pytest.mark.parametrize("name", SOME)
def test_what_goes_on_can_be_interrupted_again_and_ends_with_the_same_bits(put, name):
    steps = 2 if "/epoch/" in name else 17
    whole, _ = fit(put(name, "whole"), name, steps=steps)
    root = put(name, "bits")
    for abort_at in (8, 60):  # samples that this process saw
        fit(root, name, steps=steps, abort_at=abort_at, num_workers=2)
    rest, _ = fit(root, name, steps=steps)
    assert rest.ids == whole.ids[-len(rest.ids) :]
    ends = [load(find_last_checkpoint(folder, "tiny")) for folder in (root, root.parent / "whole")]
    for end in ends:
        del end["training_state"]["average_iter_time"]
    assert bits(ends[0]) == bits(ends[1])


def test_control_another_seed_of_the_loader_is_another_run(put):
    name = SOME[2]
    whole, _ = fit(put(name, "a"), name, steps=8)
    other, _ = fit(put(name, "b"), name, steps=8, seed=1)
    assert other.ids == seen_from(name, len(other.ids), seed=1)
    assert other.ids != whole.ids


@pytest.mark.parametrize("early_stop_cycles", [1, 2, 3, None])
def test_the_early_stop_counter_is_that_after_the_check(put, early_stop_cycles):
    """It stands at 2 in this file, after 3 validations: the last of them was counted when it was written."""
    name = "1.4.1/iteration/tiny_epoch_2_iter_12.pth"
    model, _ = fit(put(name), name, steps=3, early_stop_cycles=early_stop_cycles)
    assert model.checks == 0  # none before the next validation
    assert len(model.ids) == (0 if early_stop_cycles in (1, 2) else 3 * BATCH)


def test_a_run_that_was_at_its_end_stays_there(put):
    for name in ("2.0.0/epoch/tiny_epoch_4_iter_40.pth", "2.0.1/iteration/tiny_epoch_2_iter_12.pth"):
        root = put(name, name[:5])
        model, _ = fit(root, name, steps=0)
        assert model.ids == []
        (path,) = root.glob("*.pth")
        assert load(path)["training_state"]["trainer"]["stop"] == "TOTAL_STEPS"
        again, _ = fit(root, name, steps=0)
        assert again.ids == []


def test_testing_from_a_file_that_nobody_went_on_with(put):
    class Testing(Tiny):
        def test_step(self, batch, step):
            self._test_scores["sum"] = self.net(batch[0]).sum().item()

    class TestData(Data):
        def setup(self):
            self._test_dataset = self._create_dataset(Points(8), self.params)

    name = "2.0.1/logging/tiny_epoch_2_iter_6.pth"
    root = put(name)
    model = Testing()
    Trainer(total_steps=1, chkpt_root=root, use_cpu=True, print_banner=False).test(model, TestData())
    assert bits(model.state_dict()) == bits(load(root / Path(name).name)["model"])
    assert "sum" in model._test_scores


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (SOME[0], {"accumulation_steps": 1}, "began the run with accumulation_steps=2"),
        (SOME[0], {"accumulation_steps": 3}, "began the run with accumulation_steps=2"),
        (SOME[2], {"accumulation_steps": 2}, "began the run with accumulation_steps=1"),
    ],
)
def test_settings_that_the_counters_contradict_are_refused(put, name, options, message):
    with pytest.raises(RuntimeError, match=message):
        fit(put(name), name, steps=5, **options)


@pytest.mark.parametrize(
    ("name", "message"), [(SOME[2], "6 batches into an epoch"), (SOME[0], "2 batches into an epoch")]
)
def test_a_run_by_iteration_is_not_gone_on_with_by_epoch(put, name, message):
    trainer = Trainer(
        train_unit=TrainingUnit.EPOCH, total_steps=5, chkpt_root=put(name), use_cpu=True, print_banner=False
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.fit(Tiny(), Data())


def test_a_file_that_was_not_migrated_is_refused_with_what_to_do(tmp_path):
    shutil.copy(LEGACY / SOME[2], tmp_path)
    trainer = Trainer(total_steps=5, chkpt_root=tmp_path, use_cpu=True, print_banner=False)
    with pytest.raises(RuntimeError, match=r"python -m helios\.chkpt_migrator"):
        trainer.fit(Tiny(), Data())
