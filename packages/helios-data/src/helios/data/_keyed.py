"""Fetching a batch with its own randomness: a function of (seed, epoch, position) and nothing else.

Before each sample the generators are re-keyed, so what a dataset draws for a sample does not depend on
which process fetches it, when, or what was fetched before.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from helios.core.rng import derive_bytes, preserve_host_rng_state, rekey_host_rngs, seed_rngs
from helios.data._orphans import end_with_parent

CollateFn = Callable[[list[Any]], Any]
WorkerInitFn = Callable[[int], None]


# What a worker is asked for: (epoch, start, indices, stride), the samples at `indices`, which stand at `start`,
# `start + stride`, ... A plain tuple, since one is pickled for every batch: for a named one the worker looks up its
# class, and a batch of one sample takes 5% longer; for a dataclass 8%.
BatchRequest = tuple[int, int, list[int], int]


class PositionKeys:
    """Re-keys torch's CPU generator, `random` and the default NumPy generator by position.

    Args:
        seed: seed of the randomness.
        *path: says what the keys are for, as `helios.core.rng.derive_bytes` takes it.
    """

    def __init__(self, seed: int, *path: int | str) -> None:
        self._hash = hashlib.blake2b(digest_size=32, key=derive_bytes(seed, *path))

    def rekey(self, position: int) -> None:
        """Put the generators at the place that belongs to a position."""
        key = self._hash.copy()
        key.update(position.to_bytes(8, "little"))
        rekey_host_rngs(key.digest())


def generators_of_the_loop() -> AbstractContextManager[None]:
    """Return a scope that leaves the generators of the main process alone: they belong to the training loop."""
    return preserve_host_rng_state() if get_worker_info() is None else nullcontext()


def draws_nothing(collate_fn: CollateFn) -> bool:
    """Say whether a collate function is known to draw no random numbers: re-keying would be for nothing."""
    return collate_fn is default_collate


class FetchedDataset(Dataset[Any]):
    """Maps a BatchRequest to a collated batch: the loader's view of the user's dataset.

    This one leaves the generators as the worker was seeded.

    Args:
        dataset: the user's map-style dataset.
        collate_fn: merges the samples of a batch.
        seed: seed of the randomness.
    """

    def __init__(self, dataset: Any, collate_fn: CollateFn, seed: int) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.seed = seed

    def __getitem__(self, request: BatchRequest) -> Any:
        _epoch, _start, indices, _stride = request
        return self.collate_fn(self._fetch_all(indices))

    def _fetch_all(self, indices: list[int]) -> list[Any]:
        if getattr(self.dataset, "__getitems__", None) is not None:
            samples: list[Any] = self.dataset.__getitems__(indices)
            return samples
        return [self.dataset[index] for index in indices]


class BatchKeyedDataset(FetchedDataset):
    """Re-keys the generators once for each batch: the samples are a function of the batch they are in."""

    def __getitem__(self, request: BatchRequest) -> Any:
        with generators_of_the_loop():
            epoch, start, _indices, _stride = request
            PositionKeys(self.seed, "batch", epoch).rekey(start)
            return super().__getitem__(request)


class SampleKeyedDataset(FetchedDataset):
    """Re-keys the generators before each sample: a sample is a function of its position.

    It takes one sample at a time even where the dataset has `__getitems__`: the randomness of a sample
    must not depend on which others are in its batch.
    """

    _keys: tuple[int, PositionKeys] | None = None  # of an epoch, which has many batches

    def _keys_of(self, epoch: int) -> PositionKeys:
        if self._keys is None or self._keys[0] != epoch:
            self._keys = epoch, PositionKeys(self.seed, "sample", epoch)
        return self._keys[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": None}  # a hash cannot be pickled, as workers that are spawned need

    def __getitem__(self, request: BatchRequest) -> Any:
        with generators_of_the_loop():
            epoch, position, indices, stride = request
            keys, samples = self._keys_of(epoch), []
            for index in indices:
                keys.rekey(position)
                samples.append(self.dataset[index])
                position += stride
            if not draws_nothing(self.collate_fn):
                rekey_host_rngs(derive_bytes(self.seed, "collate", epoch, request[1]))
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
        end_with_parent()
        seed_worker(worker_id)
        info: Any = get_worker_info()
        # What get_worker_info().dataset is for: the user's own dataset. WorkerInfo refuses setattr.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.user_init is not None:
            self.user_init(worker_id)


def pass_through(batch: Any) -> Any:
    """Return the batch, which was collated already."""
    return batch
