"""A small training run that kills itself where it is told to. Run by fork_server.py, one process a job.

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
from helios.core import rng
from helios.data import DataModule
from helios.trainer import Model, Trainer, TrainingState, TrainingUnit

NUM_SAMPLES = 37
BATCH_SIZE = 5
BATCHES_PER_EPOCH = 8


@dataclass(frozen=True)
class Job:
    """What to train, and where to die.

    Attributes:
        root: folder of the run.
        unit: "epoch" or "iteration".
        total_steps: of the Trainer.
        accumulation: batches whose gradients are accumulated.
        frequency: of checkpoints and validations.
        validates: whether there are validations.
        workers: loader processes; -2 means 2 that persist.
        is_async: write checkpoints in the background.
        kill: [hook, number]: SIGKILL itself when that hook is called with that number; None lives on.
    """

    root: str
    unit: str
    total_steps: int
    accumulation: int
    frequency: int
    validates: bool
    workers: int = 0
    is_async: bool = False
    kill: tuple[str, int] | None = None

    def die_at(self, hook: str, number: int) -> None:
        """Die if this is the place."""
        if self.kill is not None and tuple(self.kill) == (hook, number):
            os.kill(os.getpid(), signal.SIGKILL)


class Points(torch.utils.data.Dataset[Any]):
    """Vectors with noise from all generators."""

    def __len__(self) -> int:
        return NUM_SAMPLES

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
        self._valid_dataset = self._create_dataset(Points(), {"batch_size": 16, "shuffle": True})


class PointsModel(Model):
    """A network that draws from all generators in the main process too."""

    def __init__(self, job: Job) -> None:
        super().__init__("points")
        self._job = job

    def setup(self, fast_init: bool = False) -> None:
        self._job.die_at("setup", 0)
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
        )
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.9)
        self.best = float("inf")
        self._cycle = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        self.net.load_state_dict(state["net"])
        self._job.die_at("load_state_dict", 0)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.best = state["best"]

    def on_training_start(self) -> None:
        torch.rand(3)  # what is drawn here must not matter on resume
        random.random()
        hl_logging.get_tensorboard_writer().add_scalar("start", 1.0, 0)  # and what is logged is there once

    def on_training_epoch_start(self, epoch: int) -> None:
        self._job.die_at("on_training_epoch_start", epoch)
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
        self._job.die_at("train_step", state.global_iteration)

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
        self._job.die_at("on_training_batch_end", state.global_iteration)

    def on_training_epoch_end(self, epoch: int) -> None:
        random.random()
        self._job.die_at("on_training_epoch_end", epoch)

    def on_training_end(self) -> None:
        self._job.die_at("on_training_end", 0)

    def valid_step(self, batch: Any, step: int) -> None:
        x, y, _ = batch
        loss = nn.functional.cross_entropy(self.net(x), y, reduction="sum") + torch.rand(())
        self._val_scores["loss"] = self._val_scores.get("loss", 0.0) + float(loss)
        self._job.die_at("valid_step", self._cycle * 10 + step)

    def on_validation_start(self, validation_cycle: int) -> None:
        super().on_validation_start(validation_cycle)
        self._cycle = validation_cycle

    def on_validation_end(self, validation_cycle: int) -> None:
        super().on_validation_end(validation_cycle)
        writer = hl_logging.get_tensorboard_writer()
        writer.add_scalar("valid", self._val_scores["loss"], validation_cycle)

    def have_metrics_improved(self) -> bool:
        self._job.die_at("have_metrics_improved", self._cycle)
        improved = self._val_scores["loss"] < self.best
        self.best = min(self.best, self._val_scores["loss"])
        return improved


def die_in_save(job: Job) -> None:
    """Die right before or right after the n-th time that a file takes its final name."""
    replace, count = os.replace, 0

    def counting_replace(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        job.die_at("before_replace", count)
        replace(*args, **kwargs)
        job.die_at("after_replace", count)

    os.replace = counting_replace


def run(job: Job) -> None:
    """Train, or go on training."""
    torch.set_num_threads(1)
    root = Path(job.root)
    root.mkdir(parents=True, exist_ok=True)
    die_in_save(job)
    trainer = Trainer(
        run_name="points",
        train_unit=TrainingUnit.from_str(job.unit),
        total_steps=job.total_steps,
        valid_frequency=job.frequency if job.validates else None,
        chkpt_frequency=job.frequency,
        accumulation_steps=job.accumulation,
        early_stop_cycles=100 if job.validates else None,
        enable_deterministic=True,
        enable_tensorboard=True,
        run_path=root / "tensorboard",
        enable_file_logging=True,
        log_path=root / "logs",
        chkpt_root=root / "checkpoints",
        print_banner=False,
        async_chkpt=job.is_async,
    )
    trainer.fit(PointsModel(job), PointsData(job.workers))
