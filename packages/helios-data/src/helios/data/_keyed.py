"""Fetching a batch with its own randomness: a function of (seed, epoch, position) and nothing else.

Before each sample the generators are re-keyed, so what a dataset draws for a sample does not depend on
which process fetches it, when, or what was fetched before.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from helios.core.rng import derive_bytes, preserve_host_rng_state, rekey_host_rngs, seed_rngs

CollateFn = Callable[[list[Any]], Any]
WorkerInitFn = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a worker is asked for: the samples at `indices`, which stand at `start`, `start + 1`, ..."""

    epoch: int
    start: int
    indices: list[int]


class KeyedDataset(Dataset[Any]):
    """Maps a BatchRequest to a collated batch; the loader's view of the user's dataset.

    Args:
        dataset: the user's map-style dataset.
        collate_fn: merges the samples of a batch.
        seed: seed of the randomness; None leaves the generators as the worker was seeded.
    """

    def __init__(self, dataset: Any, collate_fn: CollateFn, seed: int | None) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.seed = seed

    def __getitem__(self, request: BatchRequest) -> Any:
        if self.seed is None:
            return self.collate_fn(self._fetch_all(request.indices))
        if get_worker_info() is not None:
            return self._fetch_keyed(request, self.seed)
        with preserve_host_rng_state():  # in the main process the generators belong to the training loop
            return self._fetch_keyed(request, self.seed)

    def _fetch_all(self, indices: list[int]) -> list[Any]:
        if getattr(self.dataset, "__getitems__", None) is not None:
            samples: list[Any] = self.dataset.__getitems__(indices)
            return samples
        return [self.dataset[index] for index in indices]

    def _fetch_keyed(self, request: BatchRequest, seed: int) -> Any:
        # One by one even where the dataset has __getitems__: the randomness of a sample must not depend
        # on which others are in its batch.
        keys = hashlib.blake2b(digest_size=32, key=derive_bytes(seed, "sample", request.epoch))
        samples = []
        for position, index in enumerate(request.indices, request.start):
            key = keys.copy()
            key.update(position.to_bytes(8, "little"))
            rekey_host_rngs(key.digest())
            samples.append(self.dataset[index])
        rekey_host_rngs(derive_bytes(seed, "collate", request.epoch, request.start))
        return self.collate_fn(samples)


def seed_worker(worker_id: int) -> None:
    """Seed `random` and the default NumPy generator of a worker process; torch has seeded itself."""
    worker_seed = torch.initial_seed() % 2**32
    seed_rngs(worker_seed, skip_torch=True)


@dataclass(frozen=True)
class WorkerInit:
    """Runs in every worker process: our seeding, then the user's function."""

    user_init: WorkerInitFn | None

    def __call__(self, worker_id: int) -> None:
        seed_worker(worker_id)
        info: Any = get_worker_info()
        if isinstance(info.dataset, KeyedDataset):
            # What get_worker_info().dataset is for: the user's own dataset. WorkerInfo refuses setattr.
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.user_init is not None:
            self.user_init(worker_id)


def pass_through(batch: Any) -> Any:
    """Return the batch, which KeyedDataset has collated already."""
    return batch
