"""What runs where an iterable-style dataset is iterated: in each worker, or in the main process."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Self

import torch
from torch.utils.data import IterableDataset, get_worker_info

from helios.core.rng import derive_bytes, rekey_host_rngs
from helios.data._keyed import CollateFn, PositionKeys, draws_nothing, generators_of_the_loop


class StreamBatch(NamedTuple):
    """A batch, and where its stream stands after it. A tuple, so that torch can pin the batch's memory.

    Attributes:
        batch: the collated batch.
        stream: number of the stream.
        num_samples: samples of the epoch that the stream has yielded, this batch included.
        dataset_state: the dataset's state, pickled; None where the dataset itself can be asked.
        is_real: False for a placeholder of a stream whose turn in this round was before the resume.
    """

    batch: Any
    stream: int
    num_samples: int
    dataset_state: bytes | None
    is_real: bool = True


@dataclass(frozen=True, slots=True)
class StreamCursor:
    """Where the streams of an epoch stand.

    Attributes:
        epoch: the epoch, from 0.
        turn: the stream whose batch comes next.
        num_samples: of each stream, samples of the epoch that it has yielded.
        dataset_states: of each stream, its dataset's state, pickled; None at the beginning of the epoch, and where
            the dataset itself can be asked.
    """

    epoch: int
    turn: int
    num_samples: tuple[int, ...]
    dataset_states: tuple[bytes | None, ...]

    @classmethod
    def at_beginning(cls, epoch: int, num_streams: int) -> Self:
        """Return the beginning of an epoch."""
        return cls(epoch, 0, (0,) * num_streams, (None,) * num_streams)

    def after(self, batch: StreamBatch) -> Self:
        """Return where the streams stand once the loop has received a batch."""
        num_samples, states = list(self.num_samples), list(self.dataset_states)
        num_samples[batch.stream], states[batch.stream] = batch.num_samples, batch.dataset_state
        turn = (batch.stream + 1) % len(num_samples)
        return replace(self, turn=turn, num_samples=tuple(num_samples), dataset_states=tuple(states))


class StreamDataset(IterableDataset[StreamBatch]):
    """Iterates the user's dataset in batches that carry its state.

    Args:
        dataset: the user's dataset.
        collate_fn: merges the samples of a batch.
        batch_size: samples in a batch.
        drop_last: leave out the last batch if it is smaller.
        seed: seed of the randomness; None leaves the generators alone.
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
        self._initial_state = initial_state
        self._start: StreamCursor | None = start

    def __iter__(self) -> Iterator[StreamBatch]:
        info = get_worker_info()
        stream = 0 if info is None else info.id
        epoch = int(self.epoch)
        start, self._start = self._start, None  # used once, also by a worker that persists
        num_samples, state = 0, None
        if start is not None and start.epoch == epoch:
            num_samples, state = start.num_samples[stream], start.dataset_states[stream]
            if stream < start.turn:
                yield StreamBatch(None, stream, num_samples, None, is_real=False)
        self._set_dataset(epoch, state)
        with generators_of_the_loop():
            samples = iter(self.dataset)
        while batch := self._draw(samples, epoch, stream, num_samples):
            num_samples += len(batch)
            if len(batch) < self._batch_size and self._drop_last:
                return
            collated = self._collate(batch, epoch, stream, num_samples)
            # Without workers the dataset stands where the loop does, and is asked when it is needed.
            after = None if info is None else pickle.dumps(self.dataset.state_dict())
            yield StreamBatch(collated, stream, num_samples, after)

    def _set_dataset(self, epoch: int, state: bytes | None) -> None:
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if state is None:
            self.dataset.load_state_dict(pickle.loads(self._initial_state))  # noqa: S301  # of this run
        if callable(set_epoch):
            set_epoch(epoch)
        if state is not None:
            self.dataset.load_state_dict(pickle.loads(state))  # noqa: S301  # of this run

    def _draw(self, samples: Iterator[Any], epoch: int, stream: int, position: int) -> list[Any]:
        """Return the samples of the next batch; fewer, or none, at the end of the stream."""
        if self._seed is None:
            return list(islice(samples, self._batch_size))
        batch: list[Any] = []
        with generators_of_the_loop():
            keys = PositionKeys(self._seed, "stream", epoch, stream)
            for number in range(position, position + self._batch_size):
                keys.rekey(number)
                try:
                    batch.append(next(samples))
                except StopIteration:
                    break
        return batch

    def _collate(self, batch: list[Any], epoch: int, stream: int, num_samples: int) -> Any:
        if self._seed is None or draws_nothing(self._collate_fn):
            return self._collate_fn(batch)
        with generators_of_the_loop():
            rekey_host_rngs(derive_bytes(self._seed, "stream collate", epoch, stream, num_samples))
            return self._collate_fn(batch)
