"""Resumable samplers: an order, a share of it for this rank, and a cursor.

The order is a pure function from positions to dataset indices (`indices_at`), so the cursor is all there is
to save, and going on from it costs the same at any position.
"""

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch

from helios.data._checks import check_bool, check_int, check_num_samples
from helios.data._permutation import ALGORITHM, BLOCK_SIZE, Indices, Permutation
from helios.data._sharding import Sharding, Tail
from helios.data._state import FORMAT_VERSION, LoaderState, LoaderStateError, check_state


class ResumableSampler(torch.utils.data.Sampler[int]):
    """Base of all resumable samplers. Yields dataset indices (ints).

    To write one, give `algorithm` a name of its own and override `indices_at`, a function of
    (`self.seed`, `self.epoch`, positions) only. Overriding `__iter__` works too: it must yield this rank's
    indices from batch `start_iter` on; such a sampler cannot go on with another batch size in mid-epoch.
    A sampler belongs to one loader.

    Args:
        data_source: the dataset; only its length is used.
        seed: seed of the order.
        batch_size: samples that a rank takes in one step. A loader sets it to its own.

    Attributes:
        algorithm: name of the order, kept in the state; the name of the class if none is given.
        num_samples: length of the dataset.
        seed: as given.
        epoch: epoch in progress, from 0.
        start: position at which the next iteration begins, in samples of all ranks; used once, then 0.
        consumed: samples of the epoch consumed by all ranks together, as far as is known here: under a
            ResumableDataLoader what the loop received; under torch's own DataLoader, which fetches ahead,
            where the last iteration began.

    Raises:
        TypeError: an argument has the wrong type, or the dataset has no length.
        ValueError: the dataset is empty, or the batch size less than 1.
    """

    algorithm: str = ""

    def __init__(self, data_source: Sized, seed: int = 0, batch_size: int = 1) -> None:
        self.num_samples = check_num_samples("data_source", data_source)
        self.seed = check_int("seed", seed, 0)
        self.sharding = Sharding(self.num_samples, check_int("batch_size", batch_size, 1))
        self.epoch = 0
        self.consumed = 0
        self.start = 0
        self._start_is_of_epoch = False

    def indices_at(self, positions: Indices) -> Indices:
        """Return the dataset indices at positions of the current epoch.

        Args:
            positions: int64 array, shape (n,), each in range(num_samples).

        Returns:
            int64 array, shape (n,).
        """
        raise NotImplementedError(f"{type(self).__name__} must override indices_at or __iter__")

    @property
    def batch_size(self) -> int:
        """Samples that a rank takes in one step."""
        return self.sharding.batch_size

    @property
    def start_iter(self) -> int:
        """The batch at which the next iteration begins; used once, then 0 again.

        A state of another batch size may begin within a batch; this is the next one then.
        """
        return -(-self.start // self.sharding.samples_per_step)

    @start_iter.setter
    def start_iter(self, batch: int) -> None:
        num_batches = self.sharding.steps_from(0)
        if check_int("start_iter", batch, 0) > num_batches:
            raise ValueError(
                f"start_iter must be at most the {num_batches} batches of an epoch, found {batch}"
            )
        self.start = self.consumed = min(batch * self.sharding.samples_per_step, self.num_samples)
        self._start_is_of_epoch = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        Choosing the epoch that is in progress changes nothing, so a loop may call this for every epoch,
        the resumed one included. Another epoch begins at its first batch, unless `start_iter` was set.

        Args:
            epoch: 0 or more.

        Raises:
            TypeError: the epoch is not an int.
            ValueError: the epoch is negative.
        """
        number = check_int("epoch", epoch, 0)
        self.settle()
        if number == self.epoch:
            return
        if self._start_is_of_epoch:
            self.start = 0
        self.epoch = number
        self.consumed = self.start

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch, as a loader does when the loop has received everything."""
        self.epoch += 1
        self.consumed = self.start = 0

    def settle(self) -> None:
        """End the epoch if its last batch was received by a loop that then asked for no other."""
        if self.consumed > 0 and self.start == 0 and self.sharding.is_over(self.consumed):
            self.end_epoch()

    def __iter__(self) -> Iterator[int]:
        self.consumed, self.start = self.start, 0
        return self._indices_from(self.consumed)

    def _indices_from(self, cursor: int) -> Iterator[int]:
        for positions in _positions_from(self.sharding, cursor):
            yield from self.indices_at(positions).tolist()

    def __len__(self) -> int:
        """Samples that this rank takes in a whole epoch."""
        return self.sharding.samples_from(0)

    def state_dict(self) -> LoaderState:
        """Return where the epoch stands. The end of an epoch is the beginning of the next one."""
        ended = self.sharding.step_at(self.consumed) is None
        return {
            "format": FORMAT_VERSION,
            "algorithm": self.algorithm or type(self).__name__,
            "seed": self.seed,
            "epoch": self.epoch + ended,
            "consumed": 0 if ended else self.consumed,
            "num_samples": self.num_samples,
            "tail": self.sharding.tail.value + ("+full" if self.sharding.drop_partial else ""),
            "fingerprint": None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken, with any batch size and number of ranks.

        Raises:
            LoaderStateError: the state is malformed, or of another dataset size, algorithm, seed or tail;
                nothing was changed.
        """
        self.restore(check_state(state, self.state_dict()))

    def restore(self, state: LoaderState) -> None:
        """Apply a state that `check_state` returned.

        Raises:
            LoaderStateError: the state begins within a batch, and this sampler overrides `__iter__`, which
                can begin at whole batches only; nothing was changed.
        """
        step = self.sharding.samples_per_step
        if type(self).__iter__ is not ResumableSampler.__iter__ and state["consumed"] % step:
            raise LoaderStateError(
                f"consumed: the state has {state['consumed']}, no multiple of the {step} samples of a step here, "
                f"and {type(self).__name__}.__iter__ can only begin at whole batches. Use the batch size that "
                f"the run began with, or override indices_at instead."
            )
        self.epoch = state["epoch"]
        self.consumed = self.start = state["consumed"]
        self._start_is_of_epoch = True


def _positions_from(sharding: Sharding, cursor: int) -> Iterator[Indices]:
    """Yield this rank's positions from a cursor on, in blocks of about BLOCK_SIZE."""
    stride = sharding.samples_per_step
    steps_per_block = max(BLOCK_SIZE // sharding.batch_size, 1)
    within_batch = np.arange(sharding.batch_size, dtype=np.int64)
    while (num_full := min((sharding.num_samples - cursor) // stride, steps_per_block)) > 0:
        first = cursor + sharding.rank * sharding.batch_size
        starts = first + stride * np.arange(num_full, dtype=np.int64)
        yield (starts[:, None] + within_batch).ravel()
        cursor += num_full * stride
    if (last := sharding.step_at(cursor)) is not None:
        yield np.arange(last.start, last.start + last.size, dtype=np.int64) % sharding.num_samples


class ResumableRandomSampler(ResumableSampler):
    """Shuffles: every epoch is another permutation, a pure function of (seed, epoch).

    Args:
        data_source: the dataset; only its length is used.
        seed: seed of the order.
        batch_size: samples in a batch, for `start_iter`. A loader sets it to its own.

    Raises:
        TypeError: an argument has the wrong type, or the dataset has no length.
        ValueError: the dataset is empty, or the batch size less than 1.
    """

    algorithm = ALGORITHM

    def __init__(self, data_source: Sized, seed: int = 0, batch_size: int = 1) -> None:
        super().__init__(data_source, seed, batch_size)
        self._permutation = Permutation(self.num_samples, self.seed, self.epoch)

    def indices_at(self, positions: Indices) -> Indices:
        """Return the dataset indices at positions of the current epoch's permutation."""
        if self._permutation.epoch != self.epoch:
            self._permutation = Permutation(self.num_samples, self.seed, self.epoch)
        return self._permutation.take(positions)


class ResumableSequentialSampler(ResumableSampler):
    """Takes the samples in the order of the dataset.

    Args:
        data_source: the dataset; only its length is used.
        batch_size: samples in a batch, for `start_iter`. A loader sets it to its own.

    Raises:
        TypeError: an argument has the wrong type, or the dataset has no length.
        ValueError: the dataset is empty, or the batch size less than 1.
    """

    algorithm = "sequential"

    def __init__(self, data_source: Sized, batch_size: int = 1) -> None:
        super().__init__(data_source, 0, batch_size)

    def indices_at(self, positions: Indices) -> Indices:
        """Return the positions themselves."""
        return positions


class ResumableDistributedSampler(ResumableRandomSampler):
    """Deals one global order out to the ranks: rank r takes the r-th batch of every global step.

    Args:
        dataset: the dataset; only its length is used.
        num_replicas: how many ranks; None asks torch.distributed.
        rank: this rank; None asks torch.distributed.
        shuffle: shuffle every epoch; else the order of the dataset.
        seed: seed of the order, the same on every rank.
        drop_last: leave out what the ranks cannot share evenly, instead of repeating the first samples.
        batch_size: samples that this rank takes in one step. A loader sets it to its own.
        tail: for evaluation, `Tail.EXACT` or "exact": every sample once, ranks may be uneven. None follows
            `drop_last`.

    Raises:
        TypeError: an argument has the wrong type, or the dataset has no length.
        ValueError: the rank is not in range(num_replicas), the dataset is empty, ...
        RuntimeError: num_replicas or rank is None and there is no process group.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        batch_size: int = 1,
        tail: Tail | str | None = None,
    ) -> None:
        self.shuffle = check_bool("shuffle", shuffle)
        super().__init__(dataset, seed, batch_size)
        self.algorithm = ALGORITHM if shuffle else ResumableSequentialSampler.algorithm
        replicas = check_int("num_replicas", _from_group("num_replicas", num_replicas), 1)
        rank = check_int("rank", _from_group("rank", rank), 0)
        if rank >= replicas:
            raise ValueError(f"rank must be in range(num_replicas) = range({replicas}), found {rank}")
        by_default = Tail.DROP if check_bool("drop_last", drop_last) else Tail.PAD
        tail = by_default if tail is None else check_tail(tail)
        self.sharding = Sharding(self.num_samples, self.batch_size, rank, replicas, tail)

    def indices_at(self, positions: Indices) -> Indices:
        """Return the dataset indices at positions of the current epoch."""
        return super().indices_at(positions) if self.shuffle else positions


def check_tail(tail: Tail | str) -> Tail:
    """Return the Tail that is meant; ValueError otherwise."""
    try:
        return Tail(tail)
    except ValueError:
        names = ", ".join(repr(t.value) for t in Tail)
        raise ValueError(f"tail must be one of {names}, found {tail!r}") from None


def _from_group(name: str, value: int | None) -> int:
    if value is not None:
        return value
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            f"{name} is None and there is no process group to ask: pass it, or init torch.distributed first"
        )
    return distributed.get_world_size() if name == "num_replicas" else distributed.get_rank()
