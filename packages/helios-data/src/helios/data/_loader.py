"""A DataLoader that can say what the loop has received, and go on from there."""

import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from helios.core.rng import derive_seed
from helios.data._keyed import BatchRequest, KeyedDataset, WorkerInit, pass_through
from helios.data._samplers import ResumableSampler
from helios.data._state import LoaderState, check_state


class _Requests:
    """The sampler that torch's machinery sees: whatever was planned for the current iteration."""

    def __init__(self) -> None:
        self.plan: Iterator[BatchRequest] = iter(())

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.plan


class ResumableDataLoader(DataLoader[Any]):
    """torch's DataLoader over a resumable sampler. Made by `create_dataloader`.

    It counts what the training loop has received: batches that workers fetched ahead are not counted. A
    completed pass goes on to the next epoch by itself; an iteration that was broken off and is begun again
    starts the epoch anew. One iteration at a time: an older one, or one whose epoch or state was changed
    under way, raises RuntimeError when it is asked for more. Iterating draws nothing from the global
    generators.

    Args:
        dataset: map-style dataset.
        sampler: order, share and cursor. Its batch size becomes `batch_size`.
        batch_size: samples in a batch of this process.
        drop_last: leave out a last batch that is smaller.
        seed: seed of the randomness in samples and collation.
        is_keyed: re-key the generators before each sample; else each worker is seeded once.
        fingerprint: identifies the dataset; kept in the state and compared when it is loaded.
        collate_fn: merges samples into a batch; None is torch's `default_collate`.
        worker_init_fn: runs in each worker after Helios has seeded it.
        pin_memory: copy batches to pinned memory; without an accelerator there is nothing to pin for.
        **loader_options: as torch's DataLoader takes them.

    Attributes:
        sampler: the sampler, which owns epoch and cursor.
    """

    sampler: ResumableSampler

    def __init__(
        self,
        dataset: Any,
        sampler: ResumableSampler,
        *,
        batch_size: int,
        drop_last: bool,
        seed: int,
        is_keyed: bool,
        fingerprint: str | None,
        collate_fn: Callable[[list[Any]], Any] | None,
        worker_init_fn: Callable[[int], None] | None,
        pin_memory: bool,
        **loader_options: Any,
    ) -> None:
        collate = default_collate if collate_fn is None else collate_fn
        options = {
            **loader_options,
            "worker_init_fn": WorkerInit(worker_init_fn),
            # Asked to pin memory without an accelerator, torch warns at every iteration.
            "pin_memory": pin_memory and torch.accelerator.is_available(),
        }
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate,
            **options,
        )
        sampler.sharding = replace(sampler.sharding, batch_size=batch_size, drop_partial=drop_last)
        self._seed = seed
        self._fingerprint = fingerprint
        # torch's own machinery does the fetching. It sees whole batches as its samples, and a generator of
        # its own, since it takes a base seed for its workers from the global one otherwise.
        self._requests = _Requests()
        self._base_seeds = torch.Generator()
        self._planned: deque[int] | None = None  # of the current iteration; others are refused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of the options it said above
            self._fetcher: DataLoader[Any] = DataLoader(
                KeyedDataset(dataset, collate, seed if is_keyed else None),
                batch_size=None,
                sampler=self._requests,
                collate_fn=pass_through,
                generator=self._base_seeds,
                **options,
            )

    @property
    def epoch(self) -> int:
        """The epoch in progress or, after a completed pass, to come; from 0."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; see `ResumableSampler.set_epoch`.

        Args:
            epoch: 0 or more.

        Raises:
            TypeError: the epoch is not an int.
            ValueError: the epoch is negative.
        """
        self.sampler.set_epoch(epoch)

    def state_dict(self) -> LoaderState:
        """Return where the epoch stands: the batches that the loop has received count as consumed.

        Returns:
            A small dict of plain values, the same on every rank. After the last batch of an epoch it stands
            at the beginning of the next one.
        """
        return {
            **self.sampler.state_dict(),
            "seed": self._seed,
            "order_seed": self.sampler.seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken.

        The number of workers, the batch size and the number of ranks may differ from those of the loader
        that gave the state.

        Args:
            state: what `state_dict` returned.

        Raises:
            LoaderStateError: the state is malformed, or of another dataset, algorithm, seed or tail;
                nothing was changed.
        """
        self.sampler.restore(check_state(state, self.state_dict()))
        self._planned = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own iterator class
        sampler, planned = self.sampler, deque[int]()
        sampler.settle()
        cursor, epoch = sampler.start, sampler.epoch
        self._planned = planned
        # Only for sample_rng="worker": other streams on every rank, and after a resume no stream twice.
        base_seed = derive_seed(self._seed, "worker", epoch, cursor, sampler.sharding.rank)
        self._base_seeds.manual_seed(base_seed)
        self._requests.plan = _plan(sampler, cursor, iter(sampler), planned)
        sampler.consumed = cursor
        return self._receive(epoch, cursor, iter(self._fetcher), planned)

    def _receive(self, epoch: int, cursor: int, batches: Iterator[Any], planned: deque[int]) -> Iterator[Any]:
        """Hand over the batches, counting each as consumed when the loop gets it."""
        sampler = self.sampler
        while not sampler.sharding.is_over(cursor):
            if not self._is_current(epoch, planned):
                raise RuntimeError(
                    f"this iteration of epoch {epoch} cannot go on at sample {cursor}: another one was begun "
                    f"on the same loader, or its epoch or state was set. Begin a new iteration, or make a "
                    f"second loader"
                )
            try:
                batch = next(batches)
            except Exception as error:
                if self.num_workers:
                    # torch re-raises from a frame that holds the error: a cycle, and workers that the
                    # garbage collector ends are waited for ten seconds. The lines of the traceback stay.
                    traceback.clear_frames(error.__traceback__)
                raise
            cursor = sampler.consumed = planned.popleft()
            yield batch
        next(batches, None)  # there is none: torch stops its workers now
        if self._is_current(epoch, planned):
            sampler.end_epoch()

    def _is_current(self, epoch: int, planned: deque[int]) -> bool:
        return self._planned is planned and self.sampler.epoch == epoch

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        sharding = self.sampler.sharding
        num_steps = sharding.steps_from(0)
        # With Tail.EXACT the last step may have nothing for this rank.
        return num_steps - (num_steps > 0 and sharding.is_over((num_steps - 1) * sharding.samples_per_step))


# A function, since a generator that holds the loader, which holds it, is a cycle: torch's persistent workers
# are then collected in the wrong order, and waited for in vain for ten seconds.
def _plan(
    sampler: ResumableSampler, start: int, indices: Iterator[int], planned: deque[int]
) -> Iterator[BatchRequest]:
    """Plan the batches from `start` on; `planned` tells how far the loop is once it has each."""
    sharding, epoch, cursor = sampler.sharding, sampler.epoch, start
    while (step := sharding.step_at(cursor)) is not None and step.size > 0:
        batch = list(islice(indices, step.size))
        if cursor == start:
            sampler.start = 0  # used, also by a sampler whose own __iter__ is a generator
        if len(batch) < step.size:
            raise RuntimeError(
                f"{type(sampler).__name__} ended early: at sample {cursor} of {sharding.num_samples} "
                f"it was to yield {step.size} indices and yielded {len(batch)}"
            )
        cursor = step.next_cursor
        planned.append(cursor)
        yield BatchRequest(epoch, step.start, batch)
