"""How the positions of an epoch are dealt out to ranks and batches: pure arithmetic.

One global step takes the next `batch_size * num_replicas` positions of the epoch; rank r takes the r-th
part of them. So the cursor of an epoch is one number, the same on every rank, and a run may go on with
another number of ranks or another batch size from any cursor.
"""

from dataclasses import dataclass
from enum import Enum


class Tail(Enum):
    """What becomes of the samples at the end of an epoch that do not fill a global step.

    Attributes:
        PAD: the ranks share them evenly; the first samples of the epoch are taken again where it does not
            come out even (PyTorch's drop_last=False). In one process nothing is repeated.
        DROP: the ranks share them evenly; what does not come out even is left out.
        EXACT: every sample once; some ranks may have one sample less, or no last batch at all.
    """

    PAD = "pad"
    DROP = "drop"
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's part of a global step.

    Attributes:
        start: the first position of this rank; positions of num_samples and beyond wrap to the beginning.
        size: how many positions this rank takes, 0 or more.
        next_cursor: the epoch's cursor after this step: samples consumed by all ranks together.
    """

    start: int
    size: int
    next_cursor: int


@dataclass(frozen=True, slots=True)
class Sharding:
    """The settings that deal out an epoch.

    Attributes:
        num_samples: samples in the dataset.
        batch_size: samples a rank takes in a step.
        rank: this rank.
        num_replicas: how many ranks there are.
        tail: see `Tail`.
        drop_partial: leave out a last batch that is smaller than `batch_size`.
    """

    num_samples: int
    batch_size: int
    rank: int = 0
    num_replicas: int = 1
    tail: Tail = Tail.PAD
    drop_partial: bool = False

    @property
    def samples_per_step(self) -> int:
        """Samples that all ranks take together in a full step."""
        return self.batch_size * self.num_replicas

    def step_at(self, cursor: int) -> Step | None:
        """Return this rank's part of the step at `cursor`, or None at the end of the epoch."""
        remaining = self.num_samples - cursor
        if remaining >= self.samples_per_step:
            start = cursor + self.rank * self.batch_size
            return Step(start, self.batch_size, cursor + self.samples_per_step)
        if remaining <= 0:
            return None
        each, left_over = divmod(remaining, self.num_replicas)
        if self.tail is Tail.EXACT:
            size = each + (self.rank < left_over)
            start = cursor + self.rank * each + min(self.rank, left_over)
            ends = self.drop_partial
        else:
            size = each + (1 if left_over and self.tail is Tail.PAD else 0)
            start = cursor + self.rank * size
            ends = size == 0 or (self.drop_partial and size < self.batch_size)
        return None if ends else Step(start, size, self.num_samples)

    def is_over(self, cursor: int) -> bool:
        """Say whether this rank takes nothing more at `cursor`; with Tail.EXACT another rank still may."""
        step = self.step_at(cursor)
        return step is None or step.size == 0

    def steps_from(self, cursor: int) -> int:
        """Return how many global steps are left at `cursor`."""
        full = max(self.num_samples - cursor, 0) // self.samples_per_step
        return full + (self.step_at(cursor + full * self.samples_per_step) is not None)

    def samples_from(self, cursor: int) -> int:
        """Return how many samples this rank still takes at `cursor`."""
        full = max(self.num_samples - cursor, 0) // self.samples_per_step
        last = self.step_at(cursor + full * self.samples_per_step)
        return full * self.batch_size + (last.size if last is not None else 0)
