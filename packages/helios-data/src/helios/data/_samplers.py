"""Resumable samplers: an order, a share of it for this rank, and a cursor.

The order is a pure function from positions to dataset indices, so the cursor is all there is to save, and going on
from it costs the same at any position.
"""

import copy
from collections.abc import Iterator, Mapping, Sized
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, Self

import torch

from helios.data._checks import check_bool, check_int, check_num_samples
from helios.data._earlier import restore_sampler
from helios.data._permutation import BLOCK_SIZE, Indices
from helios.data._sharding import BatchSize, Sharding, Tail, checked_sizes
from helios.data._state import FORMAT_VERSION, LoaderState, LoaderStateError
from helios.data.orders import IndicesAt, Order, RandomOrder, SequentialOrder, TorchOrder

_FIRST_BLOCK_SIZE = 256  # indices: whoever waits for the first one does not wait for a whole block
_INTS_AT_ONCE = 1024  # as ints, indices take four times as much memory

OrderName = Literal["helios", "torch"]


class ResumableSampler(torch.utils.data.Sampler[int]):
    """Base of all resumable samplers. Yields dataset indices (ints).

    It takes any `Order`. To write a sampler without one, give `algorithm` a name of its own and override
    `indices_at`, a function of (`self.seed`, `self.epoch`, positions) only. Overriding `__iter__` works too: it must
    yield this rank's indices from batch `start_iter` on; such a sampler cannot go on with another batch size in
    mid-epoch. A sampler belongs to one loader.

    Args:
        data_source: the dataset; only its length is used.
        seed: seed of the order.
        batch_size: samples that a rank takes in one step. A loader sets it to its own.
        order: which sample stands where; None if `indices_at` or `__iter__` is overridden.

    Attributes:
        algorithm: name of the order, kept in the state; the name of the class if none is given.
        num_samples: positions in an epoch: the length of the dataset, unless the order has another.
        num_dataset_samples: length of the dataset.
        order: as given, or that of an earlier release that began the run; None if there is none.
        given_order: as given.
        has_own_algorithm: the class orders the samples itself, or has another name for its order.
        seed: as given.
        epoch: epoch in progress, from 0.
        start: position at which the next iteration begins, in samples of all ranks; used once, then 0.
        consumed: samples of the epoch consumed by all ranks together, as far as is known here: under a
            ResumableDataLoader what the loop received; under torch's own DataLoader, which fetches ahead,
            where the last iteration began.

    Raises:
        TypeError: an argument has the wrong type, or the dataset has no length.
        ValueError: the dataset is empty, the order is for another one, or the batch size less than 1.
    """

    algorithm: str = ""

    def __init__(
        self,
        data_source: Sized,
        seed: int = 0,
        batch_size: BatchSize = 1,
        order: Order | None = None,
    ) -> None:
        self.num_dataset_samples = self.num_samples = check_num_samples("data_source", data_source)
        self.seed = check_int("seed", seed, 0)
        self.order = order
        if order is not None:
            if not isinstance(order, Order):
                raise TypeError(f"order must be an Order or None, found {type(order).__name__} {order!r}")
            order.check_dataset(self.num_dataset_samples)
            is_overridden = (
                type(self).indices_at is not ResumableSampler.indices_at
                or type(self).__iter__ is not ResumableSampler.__iter__
            )
            self.algorithm = type(self).algorithm or ("" if is_overridden else order.algorithm)
            self.num_samples = order.num_samples
        self.given_order = order
        self.has_own_algorithm = order is None or self.algorithm != order.algorithm
        self._indices_of_epoch: tuple[int, IndicesAt] | None = None
        self.sharding = Sharding(
            self.num_samples, 1, is_interleaved=order is not None and order.is_interleaved
        )
        self.set_batch_size(batch_size)
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
        if self.order is None:
            raise NotImplementedError(
                f"{type(self).__name__} must be given an order, or override indices_at or __iter__"
            )
        if self._indices_of_epoch is None or self._indices_of_epoch[0] != self.epoch:
            self._indices_of_epoch = self.epoch, self.order.of_epoch(self.seed, self.epoch)
        indices = self._indices_of_epoch[1](positions)
        if getattr(indices, "shape", None) != positions.shape or indices.dtype.kind not in "iu":
            found = getattr(indices, "dtype", type(indices).__name__), getattr(indices, "shape", None)
            raise TypeError(
                f"{type(self.order).__name__} must return an int64 array of shape {positions.shape}, found {found}"
            )
        return indices

    @property
    def batch_size(self) -> int:
        """Samples that this rank takes in the next step, if that is a full one."""
        return self.sharding.sizes_at(self.start, self.epoch)[self.sharding.rank]

    def set_batch_size(self, batch_size: BatchSize, drop_partial: bool = False) -> None:
        """Deal out with another batch size from now on, as a loader does that takes this sampler.

        Args:
            batch_size: an int for all ranks, a sequence with one for each rank, or a function of (epoch, cursor)
                that returns either, where the cursor counts samples of the epoch over all ranks.
            drop_partial: leave out a last batch that is smaller.

        Raises:
            TypeError: a batch size is not an int.
            ValueError: it is less than 1, or there is not one for each rank.
        """
        sharding = self.sharding
        if not callable(batch_size):
            sizes = checked_sizes(batch_size, sharding.num_replicas, sharding.is_interleaved)
            batch_size = sizes[0] if len(set(sizes)) == 1 else sizes
        changed = replace(sharding, batch_size=batch_size, drop_partial=drop_partial)
        changed.sizes_at(0)  # says what is wrong with a function, before anything is changed
        self.sharding = changed

    @property
    def start_iter(self) -> int:
        """The batch at which the next iteration begins; used once, then 0 again.

        A state of another batch size may begin within a batch; this is the next one then.
        """
        return self.sharding.steps_before(self.start, self.epoch)

    @start_iter.setter
    def start_iter(self, batch: int) -> None:
        num_batches = self.sharding.steps_from(0, self.epoch)
        if check_int("start_iter", batch, 0) > num_batches:
            raise ValueError(
                f"start_iter must be at most the {num_batches} batches of an epoch, found {batch}"
            )
        self.start = self.consumed = self.sharding.cursor_after(batch, self.epoch)
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
        if self.consumed > 0 and self.start == 0 and self.sharding.is_over(self.consumed, self.epoch):
            self.end_epoch()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the function of the epoch, which is made again when it is needed."""
        return {**self.__dict__, "_indices_of_epoch": None}

    def __iter__(self) -> Iterator[int]:
        self.consumed, self.start = self.start, 0
        return self._indices_from(self.consumed)

    def _indices_from(self, cursor: int) -> Iterator[int]:
        return chain.from_iterable(self._lists_from(cursor))  # no generator is resumed for each index

    def _lists_from(self, cursor: int) -> Iterator[list[int]]:
        # A window at once where the order computes whole ones: more would make the first index wait.
        window = 1 if self.order is None else self.order.window
        replicas = self.sharding.num_replicas
        sizes = (BLOCK_SIZE * replicas, _FIRST_BLOCK_SIZE * replicas) if window == 1 else (window, None)
        epoch = self.epoch
        for positions in self.sharding.positions_from(cursor, epoch, *sizes):
            if self.epoch != epoch:
                raise RuntimeError(
                    f"this iteration of epoch {epoch} cannot go on: the epoch was set to {self.epoch} meanwhile"
                )
            indices = self.indices_at(positions)
            for begin in range(0, len(indices), _INTS_AT_ONCE):
                yield indices[begin : begin + _INTS_AT_ONCE].tolist()
            del positions, indices  # not beside the next ones

    def __len__(self) -> int:
        """Samples that this rank takes in a whole epoch."""
        return self.sharding.samples_from(0, self.epoch)

    def state_dict(self) -> LoaderState:
        """Return where the epoch stands. The end of an epoch is the beginning of the next one."""
        ended = self.sharding.step_at(self.consumed, self.epoch) is None
        state: LoaderState = {
            "format": FORMAT_VERSION,
            "algorithm": self.algorithm or type(self).__name__,
            "seed": self.seed,
            "epoch": self.epoch + ended,
            "consumed": 0 if ended else self.consumed,
            "num_samples": self.num_samples,
            "tail": self.sharding.tail.value + ("+full" if self.sharding.drop_partial else ""),
            "fingerprint": None,
        }
        if self.order is not None and (digest := self.order.digest()) is not None:
            state["order_digest"] = digest
        if self.order is not self.given_order:
            state["adopted"] = True
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken, with any batch size and number of ranks.

        A state of a run that an earlier release began makes the sampler go on in the order of that release.

        Raises:
            LoaderStateError: the state is malformed, or of another dataset size, algorithm, seed or tail;
                nothing was changed.
        """
        restore_sampler(self, state, {})

    def in_order(self, order: Order | None) -> Self:
        """Return a copy that stands where this sampler does and takes the same samples in another order.

        Raises:
            LoaderStateError: the order deals its positions out one by one, and the batch sizes of the ranks differ.
        """
        other = copy.copy(self)
        other.order = order
        if order is not None and not self.has_own_algorithm:
            other.algorithm = order.algorithm
        is_interleaved = order is not None and order.is_interleaved
        other.sharding = replace(self.sharding, is_interleaved=is_interleaved)
        try:
            other.sharding.sizes_at(0)
        except ValueError as error:
            raise LoaderStateError(f"batch_size: {error}") from error
        return other

    def restore(self, state: LoaderState) -> None:
        """Apply a state that `check_state` returned.

        Raises:
            LoaderStateError: the state begins within a batch, and this sampler overrides `__iter__`, which
                can begin at whole batches only; nothing was changed.
        """
        epoch, consumed = state["epoch"], state["consumed"]
        # Counting steps walks through a schedule: only a sampler that begins at whole batches needs it.
        if type(self).__iter__ is not ResumableSampler.__iter__ and consumed != self.sharding.cursor_after(
            self.sharding.steps_before(consumed, epoch), epoch
        ):
            raise LoaderStateError(
                f"consumed: the state has {consumed}, which is within a batch here, and "
                f"{type(self).__name__}.__iter__ can only begin at whole batches. Use the batch size that the run "
                f"began with, or override indices_at instead."
            )
        self.epoch = epoch
        self.consumed = self.start = consumed
        self._start_is_of_epoch = True


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

    def __init__(self, data_source: Sized, seed: int = 0, batch_size: BatchSize = 1) -> None:
        order = RandomOrder(check_num_samples("data_source", data_source))
        super().__init__(data_source, seed, batch_size, order)


class ResumableSequentialSampler(ResumableSampler):
    """Takes the samples in the order of the dataset.

    Args:
        data_source: the dataset; only its length is used.
        batch_size: samples in a batch, for `start_iter`. A loader sets it to its own.

    Raises:
        TypeError: an argument has the wrong type, or the dataset has no length.
        ValueError: the dataset is empty, or the batch size less than 1.
    """

    def __init__(self, data_source: Sized, batch_size: BatchSize = 1) -> None:
        order = SequentialOrder(check_num_samples("data_source", data_source))
        super().__init__(data_source, 0, batch_size, order)


# torch's class does nothing here. Lightning puts a sampler of its own into loaders whose sampler is not of it.
class ResumableDistributedSampler(ResumableSampler, torch.utils.data.DistributedSampler[int]):
    """Deals one global order out to the ranks: rank r takes the r-th batch of every global step.

    Args:
        dataset: the dataset; only its length is used.
        num_replicas: how many ranks; None asks torch.distributed.
        rank: this rank; None asks torch.distributed.
        shuffle: shuffle every epoch; else the order of the dataset. An Order given as `order` decides itself.
        seed: seed of the order, the same on every rank.
        drop_last: leave out what the ranks cannot share evenly, instead of repeating the first samples.
        batch_size: samples that this rank takes in one step; or one for each rank; or a function of (epoch, cursor)
            that returns either. A loader sets it to its own.
        tail: for evaluation, `Tail.EXACT` or "exact": every sample once, ranks may be uneven. None follows
            `drop_last`.
        order: None or "helios" is the order of this library; "torch" that of PyTorch's DistributedSampler, position
            by position, see `TorchOrder`; or any Order, such as a WeightedOrder.

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
        batch_size: BatchSize = 1,
        tail: Tail | str | None = None,
        order: Order | OrderName | None = None,
    ) -> None:
        num_samples = check_num_samples("dataset", dataset)
        super().__init__(dataset, seed, order=choose_order(order, num_samples, shuffle))
        rank, replicas = rank_and_world(rank, num_replicas)
        if rank >= replicas:
            raise ValueError(f"rank must be in range(num_replicas) = range({replicas}), found {rank}")
        by_default = Tail.DROP if check_bool("drop_last", drop_last) else Tail.PAD
        tail = by_default if tail is None else check_tail(tail)
        self.rank, self.num_replicas = rank, replicas
        self.sharding = replace(self.sharding, rank=rank, num_replicas=replicas, tail=tail)
        self.set_batch_size(batch_size)


def choose_order(order: Order | OrderName | None, num_samples: int, shuffle: bool) -> Order:
    """Return the order that is meant, for a dataset of so many samples.

    Raises:
        TypeError: `order` is something else, or `shuffle` is not a bool.
        ValueError: `order` is another name.
    """
    check_bool("shuffle", shuffle)
    if isinstance(order, Order):
        return order
    if order is not None and not isinstance(order, str):
        raise TypeError(f"order must be 'helios', 'torch' or an Order, found {type(order).__name__}")
    if order is None or order == "helios":
        return RandomOrder(num_samples) if shuffle else SequentialOrder(num_samples)
    if order == "torch":
        return TorchOrder(num_samples, shuffle)
    raise ValueError(f"order must be 'helios', 'torch' or an Order, found {order!r}")


def check_tail(tail: Tail | str) -> Tail:
    """Return the Tail that is meant; ValueError otherwise."""
    try:
        return Tail(tail)
    except ValueError:
        names = ", ".join(repr(t.value) for t in Tail)
        raise ValueError(f"tail must be one of {names}, found {tail!r}") from None


def rank_and_world(rank: int | None = None, num_replicas: int | None = None) -> tuple[int, int]:
    """Return this rank and how many there are, asked of torch.distributed where they are None.

    Raises:
        RuntimeError: there is no process group to ask.
    """
    world = check_int("num_replicas", _from_group("num_replicas", num_replicas), 1)
    return check_int("rank", _from_group("rank", rank), 0), world


def _from_group(name: str, value: int | None) -> int:
    if value is not None:
        return value
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            f"{name} is None and there is no process group to ask: pass it, or init torch.distributed first"
        )
    return distributed.get_world_size() if name == "num_replicas" else distributed.get_rank()
