"""Train a small convolutional network on scikit-learn's handwritten digits.

    python examples/digits.py --root runs/digits

Kill it whenever you like and start it again with the same command: it goes on where its last checkpoint
stands, and ends with the same weights, logs and accuracy as if nothing had happened.
`examples/prove_resume.py` does just that and shows the proof.
"""

import argparse
import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import helios.trainer.logging as hl_logging
from helios.core import rng
from helios.data import DataLoaderParams, DataModule
from helios.trainer import Model, Plugin, Trainer, TrainingState, TrainingUnit

Sample = tuple[torch.Tensor, torch.Tensor, int]


class Digits(torch.utils.data.Dataset[Sample]):
    """8 x 8 images of digits, randomly shifted and disturbed when `augment` is set.

    Every random number is drawn from one of the three generators that Helios keeps: torch's, Python's and
    its NumPy generator. Each sample's draws depend on seed, epoch and position only.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool) -> None:
        self._images = torch.from_numpy(images.astype(np.float32) / 16).unsqueeze(1)
        self._labels = torch.from_numpy(labels)
        self._augment = augment

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        image = self._images[index]
        if self._augment:
            if random.random() < 0.8:
                down, right = torch.randint(-1, 2, (2,)).tolist()
                image = functional.pad(image, (1, 1, 1, 1))[:, 1 + down : 9 + down, 1 + right : 9 + right]
            noise = rng.get_default_numpy_rng().generator.normal(0, 0.05, size=(1, 8, 8))
            image = image + torch.from_numpy(noise.astype(np.float32))
        return image, self._labels[index], index


class DigitsData(DataModule):
    """Three fifths of the digits to train on, a fifth to validate and a fifth to test."""

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._num_workers = num_workers

    def setup(self) -> None:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
        fifth = np.arange(len(labels)) % 5

        def split(chosen: np.ndarray, augment: bool) -> Digits:
            return Digits(images[chosen], labels[chosen], augment)

        params = DataLoaderParams(batch_size=32, shuffle=True, num_workers=self._num_workers)
        self._train_dataset = self._create_dataset(split(fifth < 3, augment=True), params)
        self._valid_dataset = self._create_dataset(split(fifth == 3, augment=False), {"batch_size": 128})
        self._test_dataset = self._create_dataset(split(fifth == 4, augment=False), {"batch_size": 128})


class DigitsModel(Model):
    """A convolutional classifier with batch norm, dropout, AdamW and a cosine schedule."""

    def __init__(self, total_batches: int) -> None:
        super().__init__("digits")
        self._total_batches = total_batches

    def setup(self, fast_init: bool = False) -> None:
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(64, 10),
        ).to(self.device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=1e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self._total_batches)

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def train_step(self, batch: Any, state: TrainingState) -> None:
        images, labels, _ = (part.to(self.device) for part in batch)
        loss = functional.cross_entropy(self.net(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # after the step, not before: a checkpoint then holds no used gradients
        self.scheduler.step()
        self._loss_items["loss"] = loss

    def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
        super().on_training_batch_end(state, should_log)
        writer = hl_logging.get_tensorboard_writer()
        if writer is not None:
            writer.add_scalar("train/loss", self._loss_items["loss"], state.global_iteration)

    def on_validation_start(self, validation_cycle: int) -> None:
        super().on_validation_start(validation_cycle)
        self._val_scores["correct"] = self._val_scores["seen"] = 0

    def valid_step(self, batch: Any, step: int) -> None:
        self._count(batch, self._val_scores)

    def on_validation_end(self, validation_cycle: int) -> None:
        self._val_scores["accuracy"] = self._val_scores["correct"] / self._val_scores["seen"]
        writer = hl_logging.get_tensorboard_writer()
        if writer is not None:
            writer.add_scalar("valid/accuracy", self._val_scores["accuracy"], validation_cycle)
            running = float(self._running_losses["loss"])
            writer.add_scalar("valid/train loss since the last validation", running, validation_cycle)
        super().on_validation_end(validation_cycle)

    def on_testing_start(self) -> None:
        super().on_testing_start()
        self._test_scores["correct"] = self._test_scores["seen"] = 0

    def test_step(self, batch: Any, step: int) -> None:
        self._count(batch, self._test_scores)

    def on_testing_end(self) -> None:
        print(f"test accuracy: {self._test_scores['correct'] / self._test_scores['seen']:.4f}")

    def _count(self, batch: Any, scores: dict[str, Any]) -> None:
        images, labels, _ = (part.to(self.device) for part in batch)
        scores["correct"] += int((self.net(images).argmax(1) == labels).sum())
        scores["seen"] += len(labels)


class Trace(Plugin):
    """Appends a line for every batch to a file: its number, and digests of what is in it."""

    def __init__(self, path: Path) -> None:
        super().__init__("trace")
        self._path = path

    def process_training_batch(self, batch: Any, state: TrainingState) -> Any:
        images, _, indices = batch
        order, augmented = (hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (indices, images))
        with self._path.open("a") as file:
            file.write(f"{state.global_epoch} {state.global_iteration} {order} {augmented}\n")
        return batch


def main() -> None:
    """Train, or go on training, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/digits"), help="folder of the run")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="loader processes; may differ at a restart")
    parser.add_argument("--unit", choices=["epoch", "iteration"], default="epoch")
    parser.add_argument("--trace", type=Path, help="file that gets a line for every batch")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the images are tiny; the other cores are for the workers
    batches_per_epoch = 34
    by_epoch = arguments.unit == "epoch"
    trainer = Trainer(
        run_name="digits",
        train_unit=TrainingUnit.from_str(arguments.unit),
        total_steps=arguments.epochs if by_epoch else arguments.epochs * batches_per_epoch,
        valid_frequency=1 if by_epoch else batches_per_epoch,
        chkpt_frequency=1 if by_epoch else 10,
        enable_deterministic=True,
        enable_progress_bar=True,
        enable_tensorboard=True,
        enable_file_logging=True,
        chkpt_root=arguments.root / "checkpoints",
        run_path=arguments.root / "tensorboard",
        log_path=arguments.root / "logs",
    )
    if arguments.trace is not None:
        trainer.plugins.append(Trace(arguments.trace))
    model = DigitsModel(arguments.epochs * batches_per_epoch)
    data = DigitsData(arguments.workers)
    if trainer.fit(model, data):  # else a signal stopped it: start it again, and it goes on
        trainer.test(model, data)


if __name__ == "__main__":
    main()
