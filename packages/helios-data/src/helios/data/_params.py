"""The options of a loader, and the function that makes one of them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch.utils.data import IterableDataset

from helios.core.rng import DEFAULT_SEED
from helios.data._checks import check_bool, check_callable, check_int, check_num_samples
from helios.data._loader import ResumableDataLoader
from helios.data._samplers import (
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
    check_tail,
)
from helios.data._sharding import Tail

SampleRNG = Literal["sample", "worker"]
_MAX_FINGERPRINT = 256  # characters: a state stays below 1 KiB


@dataclass
class DataLoaderParams:
    """The options of `create_dataloader`, which see, as an object.

    It may be filled field by field; a DataModule copies it, so changing it later changes nothing.
    """

    random_seed: int = DEFAULT_SEED
    batch_size: int = 1
    shuffle: bool = False
    num_workers: int = 0
    pin_memory: bool = True
    drop_last: bool = False
    debug_mode: bool = False
    is_distributed: bool = False
    sampler: ResumableSampler | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    tail: Tail | str | None = None
    sample_rng: SampleRNG = "sample"
    worker_init_fn: Callable[[int], None] | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    timeout: float = 0
    multiprocessing_context: Any = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; the values are the same objects."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the object from fields by name; fields that are not given have their defaults.

        Raises:
            TypeError: `values` is not a dict.
            ValueError: a name is not a field.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a dict, found {type(values).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name) for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"values has the unknown field {unknown[0]!r}; the fields are {', '.join(names)}"
            )
        return cls(**values)


def create_dataloader(
    dataset: Any,
    *,
    random_seed: int = DEFAULT_SEED,
    batch_size: int = 1,
    shuffle: bool = False,
    num_workers: int = 0,
    pin_memory: bool = True,
    drop_last: bool = False,
    debug_mode: bool = False,
    is_distributed: bool = False,
    sampler: ResumableSampler | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    tail: Tail | str | None = None,
    sample_rng: SampleRNG = "sample",
    worker_init_fn: Callable[[int], None] | None = None,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    timeout: float = 0,
    multiprocessing_context: Any = None,
    fingerprint: str | None = None,
) -> ResumableDataLoader:
    """Make a loader whose epochs continue exactly where they stopped.

    Args:
        dataset: map-style dataset: `__len__` and `__getitem__`.
        random_seed: seed of the order and of the randomness in samples, 0 or more.
        batch_size: samples in a batch of this process, 1 or more.
        shuffle: another order in every epoch; else the order of the dataset.
        num_workers: worker processes; 0 fetches in this one. It does not change what is fetched.
        pin_memory: copy batches to pinned memory, if there is an accelerator.
        drop_last: leave out the samples at the end that do not fill a batch (on every rank).
        debug_mode: fetch in this process, whatever `num_workers` says, so that a debugger can follow.
        is_distributed: deal the samples out to the ranks of torch.distributed.
        sampler: a ResumableSampler to use instead of choosing by `shuffle` and `is_distributed`; its batch
            size becomes `batch_size`.
        collate_fn: merges samples into a batch; None is torch's `default_collate`.
        tail: `Tail.EXACT` or "exact" takes every sample once on any number of ranks, for evaluation. None
            follows `drop_last`. Not with `sampler`, which has its own.
        sample_rng: "sample" re-keys torch's CPU generator, `random` and the default NumPy generator before
            each sample by (seed, epoch, position), so that augmentation does not depend on workers, resume
            or ranks; "worker" seeds each worker once instead, and is not exact after a resume in mid-epoch
            (with persistent workers: after any). Without workers it leaves the generators alone.
        worker_init_fn: called with the worker's id in each worker, after Helios has seeded it.
        prefetch_factor: batches each worker fetches ahead; None is torch's 2. Like the three that concern workers
            below, it has no effect without workers.
        persistent_workers: keep the workers between epochs.
        timeout: seconds to wait for a batch from a worker; 0 waits for ever.
        multiprocessing_context: how workers start, as torch's DataLoader takes it.
        fingerprint: a str of at most 256 characters that identifies the dataset; a state with another one
            is refused.

    Returns:
        The loader. It has `set_epoch`, `state_dict` and `load_state_dict`.

    Raises:
        TypeError: an argument has the wrong type; the dataset has no length; the sampler is not resumable.
        ValueError: an argument is out of range; the dataset is empty; the sampler is for another length.
        RuntimeError: `is_distributed` without a process group.
    """
    num_samples = _check_dataset(dataset)
    random_seed = check_int("random_seed", random_seed, 0)
    batch_size = check_int("batch_size", batch_size, 1)
    num_workers = check_int("num_workers", num_workers, 0)
    options = {"shuffle": shuffle, "drop_last": drop_last, "debug_mode": debug_mode, "pin_memory": pin_memory}
    options |= {"is_distributed": is_distributed, "persistent_workers": persistent_workers}
    for name, value in options.items():
        check_bool(name, value)
    if sample_rng not in ("sample", "worker"):
        raise ValueError(f"sample_rng must be 'sample' or 'worker', found {sample_rng!r}")
    check_callable("collate_fn", collate_fn)
    check_callable("worker_init_fn", worker_init_fn)
    _check_fingerprint(fingerprint)
    if tail is not None and sampler is not None:
        raise ValueError(f"tail must be None beside a sampler, which has its own, found {tail!r}")
    workers = 0 if debug_mode else num_workers
    if sampler is None:
        sampler = _choose_sampler(dataset, shuffle, is_distributed, random_seed, drop_last, tail)
    else:
        _check_sampler(sampler, num_samples)
    return ResumableDataLoader(
        dataset,
        sampler,
        batch_size=batch_size,
        drop_last=drop_last,
        seed=random_seed,
        is_keyed=sample_rng == "sample",
        fingerprint=fingerprint,
        collate_fn=collate_fn,
        worker_init_fn=worker_init_fn,
        pin_memory=pin_memory,
        num_workers=workers,
        # torch refuses these without workers; but a run may go on with fewer workers, or none.
        prefetch_factor=prefetch_factor if workers else None,
        persistent_workers=persistent_workers and workers > 0,
        timeout=timeout if workers else 0,
        multiprocessing_context=multiprocessing_context if workers else None,
    )


def _check_dataset(dataset: Any) -> int:
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"dataset must be map-style (__len__ and __getitem__), found the IterableDataset "
            f"{type(dataset).__name__}: a stream has no positions to come back to"
        )
    if not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be map-style (__len__ and __getitem__), found {type(dataset).__name__}"
        )
    return check_num_samples("dataset", dataset)


def _check_fingerprint(fingerprint: Any) -> None:
    if fingerprint is None:
        return
    if not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint must be a str or None, found {type(fingerprint).__name__}")
    if len(fingerprint) > _MAX_FINGERPRINT:
        raise ValueError(
            f"fingerprint must have at most {_MAX_FINGERPRINT} characters, found {len(fingerprint)}"
        )


def _choose_sampler(
    dataset: Any, shuffle: bool, is_distributed: bool, seed: int, drop_last: bool, tail: Tail | str | None
) -> ResumableSampler:
    # Seed and tail are the same with and without ranks, so that a run may go on with more or fewer: an
    # order that is not shuffled has no seed, and one process has a tail though it leaves nothing over.
    by_default = Tail.DROP if drop_last else Tail.PAD
    tail = by_default if tail is None else check_tail(tail)
    if is_distributed:
        return ResumableDistributedSampler(
            dataset, shuffle=shuffle, seed=seed if shuffle else 0, drop_last=drop_last, tail=tail
        )
    sampler = ResumableRandomSampler(dataset, seed) if shuffle else ResumableSequentialSampler(dataset)
    sampler.sharding = replace(sampler.sharding, tail=tail)
    return sampler


def _check_sampler(sampler: Any, num_samples: int) -> None:
    if not isinstance(sampler, ResumableSampler):
        raise TypeError(
            f"sampler must derive from ResumableSampler or ResumableDistributedSampler, "
            f"found {type(sampler).__name__}, which cannot say where it is"
        )
    if sampler.num_samples != num_samples:
        raise ValueError(
            f"sampler must be for the {num_samples} samples of the dataset, "
            f"found one for {sampler.num_samples}"
        )
