"""Datasets and loaders that are measured, and one turn of iterating them."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset[torch.Tensor]):
    """Cheap samples: a row of a tensor, so that what is measured is the loader.

    Args:
        num_samples: length of the dataset.
        work: iterations of a Python loop that each sample takes besides; see `calibrate`.
    """

    def __init__(self, num_samples: int, work: int = 0) -> None:
        self.num_samples = num_samples
        self.work = work
        self.rows = torch.zeros(64, 8)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.work:
            sum(range(self.work))
        return self.rows[index & 63]


def calibrate(microseconds: float) -> int:
    """Return how much work of a `Rows` takes about so long on this machine."""
    work, best = 10_000, float("inf")
    for _ in range(200):  # the best of many: the machine may be busy
        begin = time.perf_counter()
        sum(range(work))
        best = min(best, time.perf_counter() - begin)
    return round(work * microseconds / (best * 1e6))


def torch_loader(dataset: Any, batch_size: int, num_workers: int) -> Iterable[Any]:
    """Make torch's loader as one would; its workers stay, since their start is not what is measured."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def helios_loader(dataset: Any, batch_size: int, num_workers: int, sample_rng: Any) -> Iterable[Any]:
    """Make our loader with the same options."""
    from helios.data import create_dataloader  # not in the interpreter of helios-ml

    return create_dataloader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        sample_rng=sample_rng,
    )


def stateful_loader(dataset: Any, batch_size: int, num_workers: int) -> Iterable[Any]:
    """Make torchdata's loader with the same options."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader: Iterable[Any] = StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return loader


class Turn(NamedTuple):
    """Microseconds a batch: what a clock shows, and of processor time in this process."""

    wall: float
    cpu: float


def epoch_of(loader: Iterable[Any]) -> Callable[[], Turn]:
    """Return what iterates a whole epoch and returns how long it took."""

    def one_turn() -> Turn:
        num_batches = 0
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for _ in loader:
            num_batches += 1
        scale = 1e6 / num_batches
        return Turn((time.perf_counter() - begin) * scale, (time.process_time() - cpu_begin) * scale)

    return one_turn


def num_batches_for(seconds: float, work: int, batch_size: int, num_workers: int) -> int:
    """Return how many batches torch's loader gives in about so many seconds, at least 8."""
    probe = epoch_of(torch_loader(Rows(batch_size * 20, work), batch_size, num_workers))
    probe()
    return max(int(seconds * 1e6 / probe().wall), 8)
