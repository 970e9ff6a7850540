"""What runs where an iterable-style dataset is iterated: in each worker, or in the main process."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from helios.core.rng import derive_bytes, rekey_host_rngs
from helios.data._keyed import CollateFn, PositionKeys, draws_nothing, generators_of_the_loop

T = TypeVar("T")


class StreamBatch(NamedTuple):
    """A batch, and where its stream stands after it. A tuple, so that torch can pin the batch's memory.

    Attributes:
        batch: the collated batch.
        stream: number of the stream.
        num_samples: samples of the epoch that the stream has yielded, this batch included.
        dataset_state: the dataset's state, pickled.
        is_last: the stream has no more batches.
        is_real: False for a placeholder: of a stream whose turn in this round was before the resume, or that has
            nothing at all.
    """

    batch: Any
    stream: int
    num_samples: int
    dataset_state: bytes | None
    is_last: bool
    is_real: bool = True


@dataclass(frozen=True, slots=True)
class StreamCursor:
    """Where the streams of an epoch stand.

    Attributes:
        epoch: the epoch, from 0.
        turn: the stream whose batch comes next.
        num_samples: of each stream, samples of the epoch that it has yielded.
        dataset_states: of each stream, its dataset's state, pickled; None at the beginning of the epoch.
        has_ended: of each stream, whether it has no more batches.
    """

    epoch: int
    turn: int
    num_samples: tuple[int, ...]
    dataset_states: tuple[bytes | None, ...]
    has_ended: tuple[bool, ...]

    @classmethod
    def at_beginning(cls, epoch: int, num_streams: int) -> Self:
        """Return the beginning of an epoch."""
        return cls(epoch, 0, (0,) * num_streams, (None,) * num_streams, (False,) * num_streams)

    def of_epoch(self, epoch: int) -> Self:
        """Return the beginning of an epoch, with as many streams."""
        return self.at_beginning(epoch, len(self.num_samples))

    @property
    def is_over(self) -> bool:
        """Whether all streams have ended."""
        return all(self.has_ended)

    def after(self, batch: StreamBatch) -> Self:
        """Return where the streams stand once the loop has received a batch."""
        stream = batch.stream
        ended = replace(self, has_ended=_with(self.has_ended, stream, batch.is_last))
        if not batch.is_real:
            return ended
        return replace(
            ended,
            turn=(stream + 1) % len(self.num_samples),
            num_samples=_with(self.num_samples, stream, batch.num_samples),
            dataset_states=_with(self.dataset_states, stream, batch.dataset_state),
        )

    def settled(self) -> Self:
        """Return the beginning of the next epoch if this one is over; else the same."""
        return self.of_epoch(self.epoch + 1) if self.is_over else self


def _with(values: tuple[T, ...], place: int, value: T) -> tuple[T, ...]:
    return (*values[:place], value, *values[place + 1 :])


class StreamDataset(IterableDataset[StreamBatch]):
    """Iterates the user's dataset in batches that carry its state.

    Args:
        dataset: the user's dataset.
        collate_fn: merges the samples of a batch.
        batch_size: samples in a batch.
        drop_last: leave out the last batch if it is smaller.
        seed: seed of the randomness; None leaves the generators alone.
        rank: this rank, which has randomness of its own.
        initial_state: the dataset's state at the beginning of every epoch, pickled.
        start: where to begin; holds for the epoch it names, once. Other epochs begin at their beginning.

    Attributes:
        epoch: int64 tensor, shape (), in shared memory: how workers that persist get to know the epoch.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: CollateFn,
        batch_size: int,
        drop_last: bool,
        seed: int | None,
        rank: int,
        initial_state: bytes,
        start: StreamCursor,
    ) -> None:
        self.dataset = dataset
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._collate_fn = collate_fn
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._seed = seed
        self._rank = rank
        self._initial_state = initial_state
        self._start: StreamCursor | None = start

    def __iter__(self) -> Iterator[StreamBatch]:
        info = get_worker_info()
        stream = 0 if info is None else info.id
        epoch = int(self.epoch)
        start, self._start = self._start, None  # used once, also by a worker that persists
        num_samples, state = 0, None
        if start is not None and start.epoch == epoch:
            if start.has_ended[stream]:
                return
            num_samples, state = start.num_samples[stream], start.dataset_states[stream]
            if stream < start.turn:
                yield StreamBatch(None, stream, num_samples, None, is_last=False, is_real=False)
        draw = self._begin(epoch, stream, state)
        batch = draw(num_samples, self._batch_size)
        if not self._is_batch(batch):
            yield StreamBatch(None, stream, num_samples, None, is_last=True, is_real=False)
        while self._is_batch(batch):
            num_samples += len(batch)
            after = pickle.dumps(self.dataset.state_dict())
            collated = self._collate(batch, epoch, stream, num_samples)
            # A look ahead, so that the end of the epoch is known with its last batch. Its error waits for its turn.
            ahead, error = [], None
            try:
                ahead = draw(num_samples, self._batch_size if self._drop_last else 1)
            except Exception as caught:
                error = caught
            is_last = error is None and not self._is_batch(ahead)
            yield StreamBatch(collated, stream, num_samples, after, is_last)
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # which holds this frame: a cycle
            num_missing = self._batch_size - len(ahead) if ahead else 0
            batch = ahead + draw(num_samples + len(ahead), num_missing)

    def put_back(self) -> None:
        """Put the dataset back to where it was given to us: where there are no workers, it is the user's own."""
        with generators_of_the_loop():
            self._load(self._initial_state)

    def _is_batch(self, samples: list[Any]) -> bool:
        return len(samples) == self._batch_size or (len(samples) > 0 and not self._drop_last)

    def _begin(self, epoch: int, stream: int, state: bytes | None) -> Callable[[int, int], list[Any]]:
        """Begin to iterate the dataset: return a function that draws the samples from a position on.

        It returns as many as it is asked for; fewer, or none, at the end of the stream.
        """
        # Without keys, and without workers, the dataset draws from the generators of the loop.
        with nullcontext() if self._seed is None else generators_of_the_loop():
            if self._seed is not None:  # what __iter__ draws at once is the same after a resume
                rekey_host_rngs(derive_bytes(self._seed, "stream start", epoch, self._rank, stream))
            self._set_dataset(epoch, state)
            # Once it has ended it stays so: some iterators begin again if they are asked once more.
            samples = chain(iter(self.dataset))
        if self._seed is None:
            return lambda position, count: list(islice(samples, count))
        keys = PositionKeys(self._seed, "stream", epoch, self._rank, stream)

        def draw(position: int, count: int) -> list[Any]:
            drawn: list[Any] = []
            with generators_of_the_loop():
                for number in range(position, position + count):
                    keys.rekey(number)
                    try:
                        drawn.append(next(samples))
                    except StopIteration:
                        break
            return drawn

        return draw

    def _set_dataset(self, epoch: int, state: bytes | None) -> None:
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if state is None:
            self._load(self._initial_state)
        if callable(set_epoch):
            set_epoch(epoch)
        if state is not None:
            self._load(state)

    def _load(self, state: bytes) -> None:
        self.dataset.load_state_dict(pickle.loads(state))  # noqa: S301  # of this run

    def _collate(self, batch: list[Any], epoch: int, stream: int, num_samples: int) -> Any:
        if self._seed is None or draws_nothing(self._collate_fn):
            return self._collate_fn(batch)
        with generators_of_the_loop():
            rekey_host_rngs(
                derive_bytes(self._seed, "stream collate", epoch, self._rank, stream, num_samples)
            )
            return self._collate_fn(batch)
