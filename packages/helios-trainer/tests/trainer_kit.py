"""What the trainer's tests share: a run so small that it takes milliseconds, and everything it does noted.

Loaded by the fixture `kit`, since tests import nothing from one another.
"""

import random
import warnings

import torch
from torch import nn

from helios.core import rng
from helios.data import DataModule
from helios.trainer import Model, Plugin, Trainer, TrainingUnit

EPOCH, ITERATION = TrainingUnit.EPOCH, TrainingUnit.ITERATION


class AbortError(Exception):
    """Raised in a hook, as a stand-in for whatever ends a process."""


class Points(torch.utils.data.Dataset):
    def __init__(self, num_samples, noise=True):
        self.num_samples, self.noise = num_samples, noise

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        x = torch.sin(torch.arange(4.0) * (index + 1))
        if self.noise:
            x = x + 0.1 * torch.randn(4) + 0.01 * random.random()
        return x, index


class Data(DataModule):
    """Splits of so many batches; None has none."""

    def __init__(self, train=3, valid=2, test=2, batch_size=2, **params):
        super().__init__()
        self.lengths = {"_train_dataset": train, "_valid_dataset": valid, "_test_dataset": test}
        self.params = {"batch_size": batch_size, "shuffle": True, **params}
        self.teardowns = 0

    def setup(self):
        for name, num_batches in self.lengths.items():
            if num_batches is not None:
                dataset = Points(num_batches * self.params["batch_size"])
                # What is taken over from an earlier release is the order of training alone.
                order = self.params.get("order") if name == "_train_dataset" else None
                setattr(self, name, self._create_dataset(dataset, {**self.params, "order": order}))

    def teardown(self):
        self.teardowns += 1


class Noting:
    """Notes calls in `trace`, and raises AbortError instead of the call number `abort_at`."""

    def begin_notes(self, abort_at=None, trace=None):
        self.trace = [] if trace is None else trace
        self.abort_at = abort_at

    def note(self, *call):
        if self.abort_at == len(self.trace):
            raise AbortError(f"{len(self.trace)}: {call}")
        self.trace.append(call)


def counters(state):
    return (state.current_iteration, state.global_iteration, state.global_epoch, state.dataset_iter)


class Net(Noting, Model):
    """Trains a line with dropout, Adam, a schedule and draws from every generator.

    Args:
        accumulation: batches whose gradients are accumulated.
        improved: answers of have_metrics_improved by validation cycle, from 1; True where it has none.
        stop: called with the model before should_training_stop answers; true stops.
        abort_at: number of the noted call to raise AbortError at.
    """

    def __init__(
        self, *, accumulation=1, improved=None, stop=None, abort_at=None, trace=None, save_name="net"
    ):
        super().__init__(save_name)
        self.begin_notes(abort_at, trace)
        self.accumulation, self.improved, self.stop = accumulation, improved or {}, stop
        self.state = None
        self.means, self.batches, self.cycle = [], [], 0

    def setup(self, fast_init=False):
        self.note("setup", fast_init)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1)).to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def state_dict(self):
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "cycle": self.cycle,
        }

    def load_state_dict(self, state, fast_init=False):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.cycle = state["cycle"]

    def load_for_testing(self):
        self.note("load_for_testing")

    def train(self):
        self.note("train")
        super().train()

    def eval(self):
        self.note("eval")
        super().eval()

    def on_training_start(self):
        self.note("on_training_start")

    def on_training_epoch_start(self, epoch):
        self.note("on_training_epoch_start", epoch)

    def on_training_batch_start(self, state):
        self.note("on_training_batch_start", counters(state))
        self.state = state
        super().on_training_batch_start(state)

    def train_step(self, batch, state):
        self.note("train_step", counters(state))
        x, index = batch
        self.batches.append((index.tolist(), x.sum().item()))
        noise = 1 + 0.01 * random.random() + 0.01 * rng.get_default_numpy_rng().generator.random()
        loss = self.net(x.to(self.device)).square().mean() * noise
        self._loss_items["loss"] = loss
        loss.backward()
        if state.global_iteration % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def on_training_batch_end(self, state, should_log=False):
        self.note("on_training_batch_end", counters(state), should_log)
        super().on_training_batch_end(state, should_log)

    def on_training_epoch_end(self, epoch):
        self.note("on_training_epoch_end", epoch)
        with warnings.catch_warnings():
            # torch has not seen the optimizer step if this is the first thing that a resumed process does.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.step()

    def on_training_end(self):
        self.note("on_training_end")

    def on_validation_start(self, validation_cycle):
        self.note("on_validation_start", validation_cycle)
        super().on_validation_start(validation_cycle)
        self.cycle = validation_cycle
        self._val_scores["sum"] = torch.zeros(())

    def on_validation_batch_start(self, step):
        self.note("on_validation_batch_start", step)

    def valid_step(self, batch, step):
        self.note("valid_step", step, torch.is_grad_enabled(), self.net.training)
        self._val_scores["sum"] += self.net(batch[0].to(self.device)).sum() + torch.rand(())

    def on_validation_batch_end(self, step):
        self.note("on_validation_batch_end", step)

    def on_validation_end(self, validation_cycle):
        total = self._running_losses.get("loss")
        self.note("on_validation_end", validation_cycle, None if total is None else total.item())
        super().on_validation_end(validation_cycle)

    def have_metrics_improved(self):
        self.note("have_metrics_improved", self._val_scores["sum"].item())
        return self.improved.get(self.cycle, True)

    def should_training_stop(self):
        self.note("should_training_stop")
        return self.stop is not None and self.stop(self)

    def on_testing_start(self):
        self.note("on_testing_start")
        super().on_testing_start()

    def on_testing_batch_start(self, step):
        self.note("on_testing_batch_start", step)

    def test_step(self, batch, step):
        self.note("test_step", step, torch.is_grad_enabled(), self.net.training)
        self._test_scores["sum"] = self._test_scores.get("sum", 0) + self.net(batch[0]).sum().item()

    def on_testing_batch_end(self, step):
        self.note("on_testing_batch_end", step)

    def on_testing_end(self):
        self.note("on_testing_end")


class NotingPlugin(Noting, Plugin):
    """Notes into the model's trace; claims nothing for itself alone."""

    def __init__(self, trace, plug_id="plug"):
        super().__init__(plug_id)
        self.begin_notes(None, trace)
        self.count = 0

    def setup(self):
        self.note(self.plug_id, "setup")

    def configure_trainer(self, trainer):
        self.note(self.plug_id, "configure_trainer")

    def configure_model(self, model):
        self.note(self.plug_id, "configure_model")

    def on_training_start(self):
        self.note(self.plug_id, "on_training_start")

    def on_training_end(self):
        self.note(self.plug_id, "on_training_end")

    def on_validation_start(self, validation_cycle):
        self.note(self.plug_id, "on_validation_start", validation_cycle)

    def on_validation_end(self, validation_cycle):
        self.count += 1
        self.note(self.plug_id, "on_validation_end", validation_cycle)

    def on_testing_start(self):
        self.note(self.plug_id, "on_testing_start")

    def on_testing_end(self):
        self.note(self.plug_id, "on_testing_end")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class ClaimingPlugin(NotingPlugin):
    """Claims everything that one plug-in alone may do."""

    stop = staticmethod(lambda: False)

    def process_training_batch(self, batch, state):
        self.note(self.plug_id, "process_training_batch", counters(state))
        return batch

    def process_validation_batch(self, batch, step):
        self.note(self.plug_id, "process_validation_batch", step)
        return batch

    def process_testing_batch(self, batch, step):
        self.note(self.plug_id, "process_testing_batch", step)
        return batch

    def should_training_stop(self):
        self.note(self.plug_id, "should_training_stop")
        return self.stop()


def trainer(unit=EPOCH, total_steps=2, **options):
    options = {"use_cpu": True, "print_banner": False, "async_chkpt": False, **options}
    made = Trainer(train_unit=unit, total_steps=total_steps, **options)
    made.train_exceptions.append(AbortError)
    made.test_exceptions.append(AbortError)
    return made


def names(trace):
    """The hooks of a trace without their arguments, in short."""
    return [call[0] if call[0] not in ("plug", "plug2") else f"{call[0]}.{call[1]}" for call in trace]


def bits(value):
    """Anything of tensors and plain values, in a form that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def end_of(model):
    """All that must agree at the end of two runs."""
    return bits([model.state_dict(), rng.get_rng_state_dict(), model._running_losses, model._val_scores])


INTERRUPTED = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, helios.trainer as hlt
from helios.data import DataModule
from helios.trainer.logging import get_tensorboard_writer
class M(hlt.Model):
    def setup(self, fast_init=False): pass
    def train_step(self, batch, state):
        get_tensorboard_writer().add_scalar("loss", state.global_iteration, state.global_iteration)
        get_tensorboard_writer().flush()
        if state.global_iteration == int(sys.argv[2]) and sys.argv[1] == "die":
            os._exit(9)
        if state.global_iteration == int(sys.argv[2]) and sys.argv[1] == "fail":
            raise ValueError
class D(DataModule):
    def setup(self): self._train_dataset = self._create_dataset(list(range(4)), {})
hlt.Trainer("r", hlt.TrainingUnit.EPOCH, int(sys.argv[3]), use_cpu=True, chkpt_frequency=1, chkpt_root="c",
    enable_file_logging=True, log_path="l", enable_tensorboard=True, run_path="t").fit(M("m"), D())
"""
"""A run that logs to files. Arguments: "die", "fail" or "live"; in which iteration; the number of epochs."""
