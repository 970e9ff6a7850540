"""How the positions of an epoch are dealt out to ranks and batches: pure arithmetic.

One global step takes the next positions of the epoch, as many as the batch sizes of all ranks together; rank r
takes those behind the ranks before it. So the cursor of an epoch is one number, the same on every rank, and
a run may go on with another number of ranks or other batch sizes from any cursor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from helios.data._checks import check_int

BatchSizes = int | Sequence[int]
BatchSize = BatchSizes | Callable[[int, int], BatchSizes]


class Tail(Enum):
    """What becomes of the samples at the end of an epoch that do not fill a global step.

    The ranks share them in proportion to their batch sizes, evenly if these are equal.

    Attributes:
        PAD: where that does not come out even, the first samples of the epoch are taken again (PyTorch's
            drop_last=False). In one process nothing is repeated.
        DROP: where that does not come out even, samples are left out.
        EXACT: every sample once; some ranks may have one sample less, or no last batch at all.
    """

    PAD = "pad"
    DROP = "drop"
    EXACT = "exact"


class Step(NamedTuple):
    """One rank's part of a global step.

    Attributes:
        start: the first position of this rank; positions of num_samples and beyond wrap to the beginning.
        size: how many positions this rank takes, 0 or more.
        next_cursor: the epoch's cursor after this step: samples consumed by all ranks together.
        stride: from one position of this rank to its next.
    """

    start: int
    size: int
    next_cursor: int
    stride: int = 1

    def positions(self) -> npt.NDArray[np.int64]:
        """Return the positions, int64, shape (size,); those of num_samples and beyond do not wrap yet."""
        return np.arange(self.start, self.start + self.size * self.stride, self.stride, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Sharding:
    """The settings that deal out an epoch.

    Attributes:
        num_samples: positions in an epoch.
        batch_size: samples a rank takes in a step: an int for all ranks, a sequence with one for each rank, or a
            function of (epoch, cursor) that returns either.
        rank: this rank.
        num_replicas: how many ranks there are.
        tail: see `Tail`.
        drop_partial: leave out a last batch that is smaller than `batch_size`.
        is_interleaved: deal the positions of a step out one by one instead of batch by batch, as PyTorch's
            DistributedSampler does. For equal batch sizes.
    """

    num_samples: int
    batch_size: BatchSize
    rank: int = 0
    num_replicas: int = 1
    tail: Tail = Tail.PAD
    drop_partial: bool = False
    is_interleaved: bool = False

    @property
    def has_schedule(self) -> bool:
        """Whether the batch sizes depend on epoch and cursor."""
        return callable(self.batch_size)

    def sizes_at(self, cursor: int, epoch: int = 0) -> list[int]:
        """Return the batch size of every rank in a full step at `cursor`.

        Raises:
            TypeError: a batch size is not an int.
            ValueError: a batch size is less than 1, there is not one for each rank, or they differ where positions
                are dealt out one by one.
        """
        sizes = self.batch_size(epoch, cursor) if callable(self.batch_size) else self.batch_size
        return checked_sizes(sizes, self.num_replicas, self.is_interleaved)

    def step_at(self, cursor: int, epoch: int = 0) -> Step | None:
        """Return this rank's part of the step at `cursor`, or None at the end of the epoch."""
        remaining = self.num_samples - cursor
        if remaining <= 0:
            return None
        if isinstance(self.batch_size, int):  # spares building a list in the common case
            own, before, total = self.batch_size, self.rank * self.batch_size, self._constant_total()
        else:
            sizes = self.sizes_at(cursor, epoch)
            own, before, total = sizes[self.rank], sum(sizes[: self.rank]), sum(sizes)
        if remaining >= total:
            return self._step(cursor, before, own, cursor + total)
        return self._last_step(cursor, self.sizes_at(cursor, epoch))

    def is_over(self, cursor: int, epoch: int = 0) -> bool:
        """Say whether this rank takes nothing more at `cursor`; with Tail.EXACT another rank still may."""
        step = self.step_at(cursor, epoch)
        return step is None or step.size == 0

    def cursor_after(self, num_steps: int, epoch: int = 0) -> int:
        """Return the cursor after so many steps of an epoch, at most `num_samples`."""
        if not self.has_schedule:
            return min(num_steps * self._constant_total(), self.num_samples)
        cursor = 0
        for _ in range(num_steps):
            if (step := self.step_at(cursor, epoch)) is None:
                return self.num_samples
            cursor = step.next_cursor
        return cursor

    def steps_before(self, cursor: int, epoch: int = 0) -> int:
        """Return how many steps of an epoch it takes to come to `cursor` or beyond."""
        if not self.has_schedule:
            return -(-cursor // self._constant_total())
        num_steps = reached = 0
        while reached < cursor and (step := self.step_at(reached, epoch)) is not None:
            num_steps, reached = num_steps + 1, step.next_cursor
        return num_steps

    def steps_from(self, cursor: int, epoch: int = 0) -> int:
        """Return how many global steps are left at `cursor`."""
        if self.has_schedule:
            return sum(1 for _ in self.steps(cursor, epoch))
        total = self._constant_total()
        full = max(self.num_samples - cursor, 0) // total
        return full + (self.step_at(cursor + full * total) is not None)

    def samples_from(self, cursor: int, epoch: int = 0) -> int:
        """Return how many samples this rank still takes at `cursor`."""
        if self.has_schedule:
            return sum(step.size for step in self.steps(cursor, epoch))
        total = self._constant_total()
        full = max(self.num_samples - cursor, 0) // total
        last = self.step_at(cursor + full * total)
        return full * self.sizes_at(cursor)[self.rank] + (last.size if last is not None else 0)

    def steps(self, cursor: int, epoch: int = 0) -> Iterator[Step]:
        """Yield this rank's steps from `cursor` to the end of the epoch."""
        while (step := self.step_at(cursor, epoch)) is not None:
            yield step
            cursor = step.next_cursor

    def positions_from(
        self, cursor: int, epoch: int, at_once: int, at_first: int | None = None
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Yield this rank's positions from `cursor` on, in blocks.

        Args:
            cursor: where to begin.
            epoch: the epoch.
            at_once: positions of all ranks in a block, roughly.
            at_first: in the first block, and four times as many in each after it, up to `at_once`; None is `at_once`.

        Yields:
            int64 arrays, each in range(num_samples).
        """
        if not self.has_schedule:
            sizes = self.sizes_at(cursor)
            own, total = sizes[self.rank], sum(sizes)
            most_steps = max(at_once // total, 1)
            steps_at_once = most_steps if at_first is None else min(max(at_first // total, 1), most_steps)
            while (num_full := min((self.num_samples - cursor) // total, steps_at_once)) > 0:
                first = self._step(0, sum(sizes[: self.rank]), own, total).positions()
                yield (cursor + total * np.arange(num_full, dtype=np.int64)[:, None] + first).ravel()
                cursor += num_full * total
                steps_at_once = min(4 * steps_at_once, most_steps)
        for step in self.steps(cursor, epoch):
            yield step.positions() % self.num_samples

    def _constant_total(self) -> int:
        if isinstance(self.batch_size, int):
            return self.batch_size * self.num_replicas
        return sum(self.sizes_at(0))

    def _step(self, cursor: int, before: int, size: int, next_cursor: int) -> Step:
        if self.is_interleaved:
            return Step(cursor + self.rank, size, next_cursor, self.num_replicas)
        return Step(cursor + before, size, next_cursor)

    def _last_step(self, cursor: int, sizes: list[int]) -> Step | None:
        """Share out what does not fill a step."""
        remaining, total = self.num_samples - cursor, sum(sizes)
        if self.tail is Tail.PAD:
            shares = [-(-remaining * size // total) for size in sizes]
        else:
            shares = [remaining * size // total for size in sizes]
        if self.tail is Tail.EXACT:
            left_over = remaining - sum(shares)
            shares = [share + (rank < left_over) for rank, share in enumerate(shares)]
            ends = self.drop_partial
        else:
            is_partial = any(share < size for share, size in zip(shares, sizes, strict=True))
            ends = min(shares) == 0 or (self.drop_partial and is_partial)
        if ends:
            return None
        return self._step(cursor, sum(shares[: self.rank]), shares[self.rank], self.num_samples)


def checked_sizes(sizes: BatchSizes, num_replicas: int, must_be_equal: bool) -> list[int]:
    """Return a batch size for every rank; TypeError or ValueError if there is not one, of 1 or more."""
    if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
        return [check_int("batch_size", sizes, 1)] * num_replicas
    if len(sizes) != num_replicas:
        raise ValueError(
            f"batch_size must be one int, or one for each of the {num_replicas} ranks, found {len(sizes)}: "
            f"{list(sizes)}"
        )
    checked = [check_int(f"batch_size[{rank}]", size, 1) for rank, size in enumerate(sizes)]
    if must_be_equal and len(set(checked)) > 1:
        raise ValueError(
            f"batch_size must be the same on every rank, since this order deals its positions out one by "
            f"one, found {checked}"
        )
    return checked
