"""A DataLoader that can say what the loop has received, and go on from there."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from helios.core.rng import derive_seed
from helios.data._earlier import restore_sampler
from helios.data._keyed import BatchRequest, FetchedDataset
from helios.data._machinery import Fetcher, torch_options
from helios.data._samplers import ResumableSampler
from helios.data._sharding import BatchSize
from helios.data._state import LoaderState

Planned = tuple[int, list[int]]
"""Of a batch that was asked for: the cursor after it, and its dataset indices."""


class _Requests:
    """The sampler that torch's machinery sees: whatever was planned for the current iteration."""

    def __init__(self) -> None:
        self.plan: Iterator[BatchRequest] = iter(())

    def __iter__(self) -> Iterator[BatchRequest]:
        return self.plan


class _NotForOthers(BatchSampler):
    """What libraries find that take the loader apart to make another one of its parts."""

    def __iter__(self) -> Iterator[list[int]]:
        raise RuntimeError(
            "the batches of a ResumableDataLoader cannot be taken from its batch_sampler: nobody would count what the "
            "loop receives, nor re-key the randomness of samples. Iterate the loader itself"
        )


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
        batch_size: samples in a batch of this process; or one for each rank; or a function of (epoch, cursor) that
            returns either.
        drop_last: leave out a last batch that is smaller.
        seed: seed of the randomness in samples and collation.
        fetching: how samples are fetched and made random.
        fingerprint: identifies the dataset; kept in the state and compared when it is loaded.
        collate_fn: merges samples into a batch; None is torch's `default_collate`.
        worker_init_fn: runs in each worker after Helios has seeded it.
        pin_memory: copy batches to pinned memory; without an accelerator there is nothing to pin for.
        **loader_options: as torch's DataLoader takes them.

    Attributes:
        sampler: the sampler, which owns epoch and cursor.
        last_indices: dataset indices of the batch that was handed over last, in its order; None before the first, and
            for streams.
    """

    last_indices: list[int] | None = None

    sampler: ResumableSampler
    # Accelerate's save_state and load_state take the state of a prepared loader only if it has this.
    use_stateful_dataloader = True

    def __init__(
        self,
        dataset: Any,
        sampler: ResumableSampler,
        *,
        batch_size: BatchSize,
        drop_last: bool,
        seed: int,
        fetching: type[FetchedDataset],
        fingerprint: str | None,
        collate_fn: Callable[[list[Any]], Any] | None,
        worker_init_fn: Callable[[int], None] | None,
        pin_memory: bool,
        **loader_options: Any,
    ) -> None:
        sampler.set_batch_size(batch_size, drop_partial=drop_last)
        self._options = torch_options(pin_memory, worker_init_fn, loader_options)
        super().__init__(
            dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=collate_fn,
            **self._options,
        )
        # torch's DataLoader refuses plain setattr.
        object.__setattr__(self, "batch_sampler", _NotForOthers(sampler, sampler.batch_size, drop_last))
        self._restored_epoch: int | None = None  # of a loaded state that no batch was taken from yet
        self._seed = seed
        self._fingerprint = fingerprint
        self._fetching = fetching
        self._prepare_fetching()

    def _prepare_fetching(self) -> None:
        self._requests = _Requests()
        self._planned: deque[Planned] | None = None  # of the current iteration; others are refused
        fetched = self._fetching(self.dataset, self.collate_fn, self._seed)
        self._fetcher = Fetcher(fetched, self._options, self._requests)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the iteration under way, workers and what they fetched."""
        under_way = ("_requests", "_planned", "_fetcher")
        return {name: value for name, value in self.__dict__.items() if name not in under_way}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin the next iteration where the original stood when it was pickled or copied."""
        self.__dict__.update(state)
        # A shallow copy has the original's, which belongs to that loader.
        sampler = copy.deepcopy(self.sampler)
        self.__dict__["sampler"] = sampler
        self._prepare_fetching()
        if sampler.start != sampler.consumed:  # else it begins there anyway
            sampler.restore(sampler.state_dict())

    @property
    def _is_accelerate_prepared(self) -> bool:
        """What `Accelerator.prepare` asks, to leave alone what it has prepared.

        It would make a DataLoader of its own from our parts otherwise, without our count and randomness.

        Raises:
            RuntimeError: there are several ranks, and the loader does not deal its samples out to them.
        """
        self._check_ranks()
        return True

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        """Accelerate marks all that it has seen."""

    def _check_ranks(self) -> None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if (num_ranks := distributed.get_world_size()) > 1 and not self._is_for_all_ranks():
            raise RuntimeError(
                f"each of the {num_ranks} ranks would take all samples: make the loader with is_distributed=True, "
                f"after the Accelerator, which begins the process group"
            )

    def _is_for_all_ranks(self) -> bool:
        return self.sampler.sharding.num_replicas > 1

    @property
    def epoch(self) -> int:
        """The epoch in progress or, after a completed pass, to come; from 0."""
        return self.sampler.epoch

    @property
    def is_epoch_over(self) -> bool:
        """Whether the batch that was handed over last is the last one of its epoch, for this process."""
        return self.sampler.sharding.is_over(self.sampler.consumed, self.sampler.epoch)

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
        return {**self.sampler.state_dict(), **self._own_state()}  # type: ignore[typeddict-item]

    def _own_state(self) -> dict[str, Any]:
        return {"seed": self._seed, "order_seed": self.sampler.seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken.

        The number of workers, the batch size and the number of ranks may differ from those of the loader
        that gave the state.

        A state of a run that an earlier release of Helios began (`EarlierState`) makes the loader go on in the order of
        that release, with the loader's own seed, in this epoch and those that follow. It says so in its states
        (`adopted`), and a loader that is given one of them does the same.

        Args:
            state: what `state_dict` returned, or an `EarlierState`.

        Raises:
            LoaderStateError: the state is malformed, or of another dataset, algorithm, seed or tail;
                nothing was changed.
        """
        restore_sampler(self.sampler, state, self._own_state())
        self._planned = None
        self._restored_epoch = self.sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own iterator class
        return self._receive(*self._begin())

    def _begin(self) -> tuple[int, int, Iterator[Any], deque[Planned]]:
        """Begin an iteration: return its epoch, its cursor, its batches, and what each of them will be."""
        sampler, planned = self.sampler, deque[Planned]()
        sampler.settle()
        if self._restored_epoch == sampler.epoch:  # and no batch was handed over since: it is not used up
            sampler.start = sampler.consumed
        cursor, epoch = sampler.start, sampler.epoch
        self._planned = planned
        # Only for sample_rng="worker": other streams on every rank, and after a resume no stream twice.
        base_seed = derive_seed(self._seed, "worker", epoch, cursor, sampler.sharding.rank)
        self._requests.plan = _plan(sampler, cursor, iter(sampler), planned)
        sampler.consumed = cursor
        return epoch, cursor, self._fetcher.begin(base_seed), planned

    def _receive(
        self, epoch: int, cursor: int, batches: Iterator[Any], planned: deque[Planned]
    ) -> Iterator[Any]:
        """Hand over the batches, counting each as consumed when the loop gets it."""
        sampler, next_batch = self.sampler, self._fetcher.next_batch
        if self._planned is planned and sampler.epoch != epoch:
            # Nothing was handed over, so the epoch may still be chosen: Lightning calls iter(), then set_epoch().
            sampler.consumed = sampler.start = 0  # a start_iter was for the other epoch
            del batches  # ends its workers before others begin
            epoch, cursor, batches, planned = self._begin()
        if self._restored_epoch is not None and sampler.epoch < self._restored_epoch:
            raise RuntimeError(
                f"a state of epoch {self._restored_epoch} was loaded, and set_epoch({sampler.epoch}) went back "
                f"before it was used. Begin the loop over epochs at loader.epoch, or set no epochs: a completed "
                f"pass goes on to the next one"
            )
        while True:
            if not self._is_current(epoch, planned) and not sampler.sharding.is_over(cursor, epoch):
                raise RuntimeError(
                    f"this iteration of epoch {epoch} cannot go on at sample {cursor}: another one was begun "
                    f"on the same loader, or its epoch or state was set. Begin a new iteration, or make a "
                    f"second loader"
                )
            try:
                batch = next_batch(batches)
            except StopIteration:
                if not sampler.sharding.is_over(cursor, epoch):  # not ours: it would end the epoch unnoticed
                    raise RuntimeError(
                        f"the dataset raised StopIteration at sample {cursor} of epoch {epoch}"
                    ) from None
                break
            cursor, self.last_indices = planned.popleft()
            sampler.consumed = cursor
            self._restored_epoch = None
            yield batch
        if self._is_current(epoch, planned):
            sampler.end_epoch()

    def _is_current(self, epoch: int, planned: deque[Planned]) -> bool:
        return self._planned is planned and self.sampler.epoch == epoch

    def __len__(self) -> int:
        """Batches of this process in a whole epoch."""
        sharding, epoch = self.sampler.sharding, self.sampler.epoch
        num_steps = sharding.steps_from(0, epoch)
        # With Tail.EXACT the last step may have nothing for this rank.
        return num_steps - (
            num_steps > 0 and sharding.is_over(sharding.cursor_after(num_steps - 1, epoch), epoch)
        )


# A function, since a generator that holds the loader, which holds it, is a cycle: torch's persistent workers
# are then collected in the wrong order, and waited for in vain for ten seconds.
def _plan(
    sampler: ResumableSampler, start: int, indices: Iterator[int], planned: deque[Planned]
) -> Iterator[BatchRequest]:
    """Plan the batches from `start` on; `planned` tells how far the loop is once it has each."""
    sharding, epoch, cursor = sampler.sharding, sampler.epoch, start
    while (step := sharding.step_at(cursor, epoch)) is not None and step.size > 0:
        batch = list(islice(indices, step.size))
        if cursor == start:
            sampler.start = 0  # used, also by a sampler whose own __iter__ is a generator
        if len(batch) < step.size:
            raise RuntimeError(
                f"{type(sampler).__name__} ended early: at sample {cursor} of {sharding.num_samples} "
                f"it was to yield {step.size} indices and yielded {len(batch)}"
            )
        cursor = step.next_cursor
        planned.append((cursor, batch))
        yield epoch, step.start, batch, step.stride
