"""A small training run that kills itself or asks itself to stop where it is told to. Run by fork_server.py.

Everything that can go wrong on resume is in it: a shuffled dataset that the batch size does not divide,
augmentation and a model that draw from all three generators, dropout, batch norm, Adam, a schedule, gradient
accumulation, running means, scalars under two kinds of steps.
"""

import hashlib
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import helios.trainer.logging as hl_logging
from helios.chkpt import parse_name
from helios.core import rng
from helios.data import DataModule
from helios.trainer import Model, Trainer, TrainingState, TrainingUnit

NUM_SAMPLES = 23
BATCH_SIZE = 5
BATCHES_PER_EPOCH = 5
VALID_BATCH_SIZE = 8
BATCHES_PER_VALIDATION = 3

Place = tuple[str, int]


@dataclass(frozen=True)
class Job:
    """What to train, and where to die.

    Attributes:
        root: folder of the run.
        unit: "epoch" or "iteration".
        total_steps: of the Trainer.
        accumulation: batches whose gradients are accumulated.
        valid_frequency: of the Trainer; None never validates.
        chkpt_frequency: of the Trainer.
        early_stop_cycles: of the Trainer.
        worse_from: validation from which on the metrics improve no more, from 1; None leaves it to the losses.
        workers: loader processes; -2 means 2 that persist.
        is_async: write checkpoints in the background.
        signal: name of the signal that it sends itself.
        to_workers: the signal goes to the loader's workers too, as from a terminal or a batch system.
        num_signals: how often it sends itself the signal, one right after the other.
        kill: (hook, number): the signal is sent when that hook is called with that number; None sends none. It is
            that of the batch, epoch or validation, from 1; in a validation step ten times the validation plus the
            step; when a file takes its name the batch in the name, 0 for the note that a run begins with; else 0.
    """

    root: str
    unit: str
    total_steps: int
    accumulation: int
    valid_frequency: int | None
    chkpt_frequency: int
    early_stop_cycles: int | None = None
    worse_from: int | None = None
    workers: int = 0
    is_async: bool = False
    signal: str = "SIGKILL"
    to_workers: bool = False
    num_signals: int = 1
    kill: Place | None = None

    def reach(self, hook: str, number: int = 0) -> None:
        """Note the place, and send the signal if it is the one."""
        with Path(self.root, "places.txt").open("a") as file:
            file.write(f"{hook} {number}\n")
        if self.kill is not None and tuple(self.kill) == (hook, number):
            with Path(self.root, "kills.txt").open("a") as file:
                file.write(f"{hook} {number}\n")
            self._meet_its_fate()

    def _meet_its_fate(self) -> None:
        number = signal.Signals[self.signal]
        if not self.to_workers:
            for _ in range(self.num_signals):
                os.kill(os.getpid(), number)
            return
        # A stranger sends it: workers go quietly if it is their parent who does.
        stranger = os.fork()
        if stranger == 0:
            os.killpg(0, number)
            os._exit(0)
        os.waitpid(stranger, 0)


class Points(torch.utils.data.Dataset[Any]):
    """Vectors with noise from all generators."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Any:
        noise = rng.get_default_numpy_rng().generator.normal() + random.gauss(0, 1)
        x = torch.sin(torch.arange(6.0) * (index + 1)) + 0.1 * torch.randn(6) + 0.1 * noise
        return x, index % 3, index


class PointsData(DataModule):
    """Train and validate on the same points, with noise."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self._options = {"num_workers": abs(workers), "persistent_workers": workers < 0}

    def setup(self) -> None:
        params = {"batch_size": BATCH_SIZE, "shuffle": True, **self._options}
        self._train_dataset = self._create_dataset(Points(), params)
        self._valid_dataset = self._create_dataset(
            Points(), {"batch_size": VALID_BATCH_SIZE, "shuffle": True}
        )


class PointsModel(Model):
    """A network that draws from all generators in the main process too."""

    def __init__(self, job: Job) -> None:
        super().__init__("points")
        self._job = job
        self._has_trained = False

    def setup(self, fast_init: bool = False) -> None:
        self._job.reach("setup")
        self.net = self.distribute(self._network())
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.9)
        self.best = float("inf")
        self._cycle = 0

    def _network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), self._norm(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))

    def _norm(self) -> nn.Module:
        return nn.BatchNorm1d(12)

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best": self.best,
            "cycle": self._cycle,  # have_metrics_improved may be asked by another process
        }

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        self.net.load_state_dict(state["net"])
        self._job.reach("load_state_dict")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.best = state["best"]
        self._cycle = state["cycle"]

    def on_training_start(self) -> None:
        torch.rand(3)  # what is drawn here must not matter on resume
        random.random()
        hl_logging.get_tensorboard_writer().add_scalar("start", 1.0, 0)  # and what is logged is there once

    def on_training_epoch_start(self, epoch: int) -> None:
        self._job.reach("on_training_epoch_start", epoch)
        random.random()

    def train_step(self, batch: Any, state: TrainingState) -> None:
        x, y, indices = batch
        order, augmented = (hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (indices, x))
        with Path(self._job.root, "trace.txt").open("a") as file:
            file.write(f"{state.global_epoch} {state.global_iteration} {order} {augmented}\n")
        weight = 1 + 0.1 * random.random() + 0.1 * rng.get_default_numpy_rng().generator.random()
        loss = nn.functional.cross_entropy(self.net(x), y) * weight
        loss.backward()
        self._loss_items["loss"] = loss
        if not self._has_trained:  # by this process
            self._has_trained = True
            self._job.reach("first_batch")
        self._job.reach("train_step", state.global_iteration)

    def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
        super().on_training_batch_end(state, should_log)
        if state.global_iteration % self._job.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        writer = hl_logging.get_tensorboard_writer()
        writer.add_scalar("loss", self._loss_items["loss"], state.global_iteration)
        writer.add_scalar(
            "running", self._running_losses["loss"] / max(state.running_iter, 1), state.global_iteration
        )
        self._job.reach("on_training_batch_end", state.global_iteration)

    def on_training_epoch_end(self, epoch: int) -> None:
        random.random()
        self._job.reach("on_training_epoch_end", epoch)

    def on_training_end(self) -> None:
        self._job.reach("on_training_end")

    def valid_step(self, batch: Any, step: int) -> None:
        x, y, _ = batch
        loss = nn.functional.cross_entropy(self.net(x), y, reduction="sum") + torch.rand(())
        self._val_scores["loss"] = self._val_scores.get("loss", 0.0) + float(loss)
        self._job.reach("valid_step", self._cycle * 10 + step)

    def on_validation_start(self, validation_cycle: int) -> None:
        super().on_validation_start(validation_cycle)
        self._cycle = validation_cycle
        self._job.reach("on_validation_start", validation_cycle)

    def on_validation_end(self, validation_cycle: int) -> None:
        super().on_validation_end(validation_cycle)
        writer = hl_logging.get_tensorboard_writer()
        writer.add_scalar("valid", self._val_scores["loss"], validation_cycle)
        self._job.reach("on_validation_end", validation_cycle)

    def have_metrics_improved(self) -> bool:
        self._job.reach("have_metrics_improved", self._cycle)
        improved = self._val_scores["loss"] < self.best
        self.best = min(self.best, self._val_scores["loss"])
        return improved if self._job.worse_from is None else self._cycle < self._job.worse_from


def reach_in_save(job: Job) -> None:
    """Make places of the moments right before and right after a file takes its final name."""
    replace = os.replace

    def observed_replace(source: Any, target: Any, **kwargs: Any) -> None:
        # Of one that is a folder, its main file.
        name = parse_name(Path(target).name) or parse_name(Path(target).parent.name)
        number = 0 if name is None else name.iteration
        job.reach("before_replace", number)
        replace(source, target, **kwargs)
        job.reach("after_replace", number)

    os.replace = observed_replace


def run(job: Job) -> bool:
    """Train, or go on training, and say whether that is finished."""
    torch.set_num_threads(1)
    root = Path(job.root)
    root.mkdir(parents=True, exist_ok=True)
    reach_in_save(job)
    trainer = Trainer(
        run_name="points",
        train_unit=TrainingUnit.from_str(job.unit),
        total_steps=job.total_steps,
        valid_frequency=job.valid_frequency,
        chkpt_frequency=job.chkpt_frequency,
        accumulation_steps=job.accumulation,
        early_stop_cycles=job.early_stop_cycles,
        enable_deterministic=True,
        enable_tensorboard=True,
        run_path=root / "tensorboard",
        enable_file_logging=True,
        log_path=root / "logs",
        chkpt_root=root / "checkpoints",
        print_banner=False,
        async_chkpt=job.is_async,
    )
    return trainer.fit(PointsModel(job), PointsData(job.workers))
