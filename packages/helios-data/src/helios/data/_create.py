"""The function that makes a loader: checks the options, and chooses the sampler."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils.data import IterableDataset

from helios.core.rng import DEFAULT_SEED
from helios.data._checks import check_bool, check_callable, check_int, check_num_samples
from helios.data._keyed import BatchKeyedDataset, FetchedDataset, SampleKeyedDataset
from helios.data._loader import ResumableDataLoader
from helios.data._params import DataLoaderParams, SampleRNG
from helios.data._samplers import (
    OrderName,
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
    check_tail,
    choose_order,
)
from helios.data._sharding import BatchSize, Tail
from helios.data._stream_loader import StreamDataLoader
from helios.data.orders import Order

_MAX_FINGERPRINT = 256  # characters: a state stays below 1 KiB
_FETCHING: dict[SampleRNG, type[FetchedDataset]] = {
    "sample": SampleKeyedDataset,
    "batch": BatchKeyedDataset,
    "worker": FetchedDataset,
}


def create_dataloader(
    dataset: Any,
    *,
    random_seed: int = DEFAULT_SEED,
    batch_size: BatchSize = 1,
    shuffle: bool = False,
    num_workers: int = 0,
    pin_memory: bool = True,
    drop_last: bool = False,
    debug_mode: bool = False,
    is_distributed: bool = False,
    sampler: ResumableSampler | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    order: Order | OrderName | None = None,
    tail: Tail | str | None = None,
    sample_rng: SampleRNG = "sample",
    worker_init_fn: Callable[[int], None] | None = None,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    in_order: bool = True,
    timeout: float = 0,
    multiprocessing_context: Any = None,
    fingerprint: str | None = None,
) -> ResumableDataLoader:
    """Make a loader whose epochs continue exactly where they stopped.

    Args:
        dataset: map-style dataset: `__len__` and `__getitem__`; or an IterableDataset with `state_dict` and
            `load_state_dict`, which has an order and ranks of its own: see `StreamDataLoader`.
        random_seed: seed of the order and of the randomness in samples, 0 or more.
        batch_size: samples in a batch of this process, 1 or more. If ranks take different numbers, a sequence with one
            for each rank; if they change in the course of the run, a function of (epoch, cursor) that returns
            either, the same on every rank, where the cursor counts samples of the epoch over all ranks.
        shuffle: another order in every epoch; else the order of the dataset. An Order given as `order` decides itself.
        num_workers: worker processes; 0 fetches in this one. It does not change what is fetched.
        pin_memory: copy batches to pinned memory, if there is an accelerator.
        drop_last: leave out the samples at the end that do not fill a batch (on every rank).
        debug_mode: fetch in this process, whatever `num_workers` says, so that a debugger can follow.
        is_distributed: deal the samples out to the ranks of torch.distributed.
        sampler: a ResumableSampler to use instead of choosing by `shuffle`, `order` and `is_distributed`; its batch
            size becomes `batch_size`.
        collate_fn: merges samples into a batch; None is torch's `default_collate`.
        order: which sample stands where: None or "helios" follows `shuffle`, at the same cost at any size; "torch" is
            the order of PyTorch's DistributedSampler, for runs that were begun with it; or an Order: weighted,
            bucketed by length, a mixture, a subset, your own.
        tail: `Tail.EXACT` or "exact" takes every sample once on any number of ranks, for evaluation. None
            follows `drop_last`. Not with `sampler`, which has its own.
        sample_rng: "sample" re-keys torch's CPU generator, `random` and the default NumPy generator before
            each sample by (seed, epoch, position), so that augmentation does not depend on workers, resume
            or ranks. "batch" does so once for each batch: cheaper, and a dataset's `__getitems__` is used, but
            augmentation depends on the batch size. "worker" seeds each worker once instead, and is not exact
            after a resume in mid-epoch (with persistent workers: after any). Without workers it leaves the
            generators alone.
        worker_init_fn: called with the worker's id in each worker, after Helios has seeded it.
        prefetch_factor: batches each worker fetches ahead; None is torch's 2. Like the next four, it has no effect
            without workers.
        persistent_workers: keep the workers between epochs.
        in_order: must be True: in the order in which workers happen to be ready, no run could be repeated.
        timeout: seconds to wait for a batch from a worker; 0 waits for ever.
        multiprocessing_context: how workers start, as torch's DataLoader takes it.
        fingerprint: a str of at most 256 characters that identifies the dataset; a state with another one
            is refused.

    Returns:
        The loader. It has `set_epoch`, `state_dict` and `load_state_dict`.

    Raises:
        TypeError: an argument has the wrong type; the dataset has no length, or is iterable without a state; the
            sampler is not resumable.
        ValueError: an argument is out of range; the dataset is empty; the sampler or the order is for another
            length; two options exclude each other.
        RuntimeError: `is_distributed` without a process group.
    """
    params = DataLoaderParams(**{name: value for name, value in locals().items() if name != "dataset"})
    params = _checked(params)
    workers = 0 if debug_mode else params.num_workers
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "drop_last": drop_last,
        "seed": params.random_seed,
        "fingerprint": fingerprint,
        "collate_fn": collate_fn,
        "worker_init_fn": worker_init_fn,
        "pin_memory": pin_memory,
        "num_workers": workers,
        # torch refuses these without workers; but a run may go on with fewer workers, or none.
        "prefetch_factor": prefetch_factor if workers else None,
        "persistent_workers": persistent_workers and workers > 0,
        "timeout": timeout if workers else 0,
        "multiprocessing_context": multiprocessing_context if workers else None,
    }
    if isinstance(dataset, IterableDataset):
        _check_stream(dataset, params)
        is_keyed = sample_rng == "sample"
        return StreamDataLoader(dataset, is_distributed=is_distributed, is_keyed=is_keyed, **options)
    sampler = _sampler_for(dataset, params)
    return ResumableDataLoader(dataset, sampler, fetching=_FETCHING[sample_rng], **options)


def _checked(params: DataLoaderParams) -> DataLoaderParams:
    """Return the options with plain ints; TypeError or ValueError if one is wrong."""
    seed = check_int("random_seed", params.random_seed, 0)
    num_workers = check_int("num_workers", params.num_workers, 0)
    for name in ("shuffle", "drop_last", "debug_mode", "pin_memory", "is_distributed", "persistent_workers"):
        check_bool(name, getattr(params, name))
    if not check_bool("in_order", params.in_order):
        raise ValueError(
            "in_order must be True: batches in the order in which workers happen to be ready make another run each "
            "time, which no state can continue"
        )
    if params.sample_rng not in tuple(_FETCHING):
        names = ", ".join(map(repr, _FETCHING))
        raise ValueError(f"sample_rng must be one of {names}, found {params.sample_rng!r}")
    check_callable("collate_fn", params.collate_fn)
    check_callable("worker_init_fn", params.worker_init_fn)
    _check_fingerprint(params.fingerprint)
    for name in ("tail", "order"):
        if getattr(params, name) is not None and params.sampler is not None:
            found = getattr(params, name)
            raise ValueError(f"{name} must be None beside a sampler, which has its own, found {found!r}")
    return replace(params, random_seed=seed, num_workers=num_workers)


def _check_fingerprint(fingerprint: Any) -> None:
    if fingerprint is None:
        return
    if not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint must be a str or None, found {type(fingerprint).__name__}")
    if (length := len(json.dumps(fingerprint)) - len('""')) > _MAX_FINGERPRINT:
        raise ValueError(
            f"fingerprint must have at most {_MAX_FINGERPRINT} characters, as JSON writes it, found {length}"
        )


def _check_stream(dataset: Any, params: DataLoaderParams) -> None:
    if not all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict")):
        raise TypeError(
            f"dataset is the IterableDataset {type(dataset).__name__} without state_dict and load_state_dict: a "
            f"stream has no positions, so only the dataset itself can say where it stands and go on from "
            f"there. Give it both, or use a map-style dataset (__len__ and __getitem__)"
        )
    if params.sample_rng == "batch":
        raise ValueError("sample_rng must be 'sample' or 'worker' for an IterableDataset, found 'batch'")
    for name in ("shuffle", "order", "tail", "sampler"):
        if getattr(params, name) not in (None, False):
            raise ValueError(
                f"{name} must not be given for an IterableDataset, whose order is its own, "
                f"found {getattr(params, name)!r}"
            )


def _sampler_for(dataset: Any, params: DataLoaderParams) -> ResumableSampler:
    if not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be map-style (__len__ and __getitem__) or an IterableDataset, "
            f"found {type(dataset).__name__}"
        )
    num_samples = check_num_samples("dataset", dataset)
    if params.sampler is not None:
        return _checked_sampler(params.sampler, num_samples)
    order = choose_order(params.order, num_samples, params.shuffle)
    # Seed and tail are the same with and without ranks, so that a run may go on with more or fewer: an
    # order that is not shuffled has no seed, and one process has a tail though it leaves nothing over.
    seed = 0 if order.algorithm == "sequential" else params.random_seed
    by_default = Tail.DROP if params.drop_last else Tail.PAD
    tail = by_default if params.tail is None else check_tail(params.tail)
    if params.is_distributed:
        return ResumableDistributedSampler(
            dataset, seed=seed, drop_last=params.drop_last, tail=tail, order=order
        )
    sampler: ResumableSampler
    if params.order not in (None, "helios"):
        sampler = ResumableSampler(dataset, seed, order=order)
    elif params.shuffle:
        sampler = ResumableRandomSampler(dataset, seed)
    else:
        sampler = ResumableSequentialSampler(dataset)
    sampler.sharding = replace(sampler.sharding, tail=tail)
    return sampler


def _checked_sampler(sampler: Any, num_samples: int) -> ResumableSampler:
    if not isinstance(sampler, ResumableSampler):
        raise TypeError(
            f"sampler must derive from ResumableSampler or ResumableDistributedSampler, "
            f"found {type(sampler).__name__}, which cannot say where it is"
        )
    if sampler.num_dataset_samples != num_samples:
        raise ValueError(
            f"sampler must be for the {num_samples} samples of the dataset, "
            f"found one for {sampler.num_dataset_samples}"
        )
    return sampler
