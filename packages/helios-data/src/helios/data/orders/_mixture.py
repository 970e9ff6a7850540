"""Several datasets, mixed with weights."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from helios.core.rng import derive_seed
from helios.data._checks import check_int
from helios.data._hashing import PositionHash
from helios.data._permutation import Indices, Permutation
from helios.data.orders._base import IndicesAt, Order, check_length, in_windows
from helios.data.orders._basic import check_num_positions
from helios.data.orders._weighted import checked_weights, short_digest

MixtureWeights = Sequence[float] | npt.NDArray[Any]


class MixtureOrder(Order):
    """Mixes datasets, for a `torch.utils.data.ConcatDataset` of them.

    Every block of `block_size` positions takes the same whole number of samples from each dataset, in proportion
    to the weights, and shuffles them. Each dataset is gone through again and again, every time in another permutation,
    and goes on in the next epoch where it was in the last one. Going on anywhere costs one block.

    Args:
        sizes: length of each dataset, in the order of the ConcatDataset.
        weights: share of each dataset, 0 or more; they need not add up to 1. Or a function of the epoch that returns
            them: it must return the same for an epoch whenever it is asked, and the state does not know it.
        num_samples: positions in an epoch; None makes as many as all datasets have together.
        block_size: positions in a block. Shares are rounded to multiples of 1 / block_size.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is less than 1; weights are negative, not finite, all 0, or not one for each dataset; a
            weight is so small that a block takes nothing of its dataset.
    """

    algorithm = "helios-mixture-v1"

    def __init__(
        self,
        sizes: Sequence[int],
        weights: MixtureWeights | Callable[[int], MixtureWeights],
        num_samples: int | None = None,
        block_size: int = 1024,
    ) -> None:
        if not hasattr(sizes, "__len__"):
            raise TypeError(f"sizes must be a sequence of ints, found {type(sizes).__name__} {sizes!r}")
        self._sizes = [check_num_positions(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
        self._num_dataset_samples = check_num_positions("the sum of sizes", sum(self._sizes))
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        self.num_samples = check_num_positions(
            "num_samples", self._num_dataset_samples if num_samples is None else num_samples
        )
        self.window = min(check_int("block_size", block_size, 1), self.num_samples)
        # A copy: an order does not change when the user's array does.
        self._weights = weights if callable(weights) else checked_weights("weights", weights)
        quotas = self._quotas_of(0, self.window)  # says what is wrong with the weights
        last_quotas = self._quotas_of(0, self.num_samples % self.window)
        numbers = np.array([*self._sizes, self.window])
        self._digest = (
            short_digest(numbers) if callable(weights) else short_digest(numbers, quotas, last_quotas)
        )

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the function of this epoch; see `Order.of_epoch`."""
        shuffle = PositionHash(seed, self.algorithm, epoch)
        drawn_before = self._drawn_before(epoch)
        seeds = [derive_seed(seed, self.algorithm, number) for number in range(len(self._sizes))]
        num_full, num_rest = divmod(self.num_samples, self.window)
        full_quotas, last_quotas = self._quotas_of(epoch, self.window), self._quotas_of(epoch, num_rest)

        def indices_of(block: int) -> Indices:
            quotas = full_quotas if block < num_full else last_quotas
            in_turn = [
                self._draw(
                    number, seeds[number], drawn_before[number] + block * int(full_quotas[number]), int(quota)
                )
                for number, quota in enumerate(quotas)
            ]
            positions = np.arange(int(quotas.sum()), dtype=np.int64) + block * self.window
            return np.concatenate(in_turn)[np.argsort(shuffle.words(positions), kind="stable")]

        return in_windows(self.num_samples, self.window, indices_of)

    def digest(self) -> str:
        """Return a digest of sizes, block size and weights; a function of the epoch has none."""
        return self._digest

    def check_dataset(self, num_dataset_samples: int) -> None:
        """ValueError unless the dataset is as long as all datasets together."""
        check_length(self, self._num_dataset_samples, num_dataset_samples)

    def _draw(self, number: int, seed: int, first: int, count: int) -> Indices:
        """Return the draws first, first + 1, ... from one dataset, as indices of all together."""
        size, drawn = self._sizes[number], []
        while count > 0:
            number_of_pass, position = divmod(first, size)
            stop = min(position + count, size)
            drawn.append(Permutation(size, seed, number_of_pass).indices(position, stop))
            first, count = first + stop - position, count - (stop - position)
        indices: Indices = np.concatenate([self._starts[:0], *drawn]) + self._starts[number]
        return indices

    def _drawn_before(self, epoch: int) -> list[int]:
        """Return how much of each dataset the epochs before this one took."""
        num_full, num_rest = divmod(self.num_samples, self.window)

        def drawn_in(epoch: int) -> list[int]:
            drawn = num_full * self._quotas_of(epoch, self.window) + self._quotas_of(epoch, num_rest)
            return [int(count) for count in drawn]  # ints that do not overflow after many epochs

        if not callable(self._weights):
            return [epoch * count for count in drawn_in(0)]
        return [
            sum(counts) for counts in zip([0] * len(self._sizes), *map(drawn_in, range(epoch)), strict=True)
        ]

    def _quotas_of(self, epoch: int, num_positions: int) -> Indices:
        """Return how many of so many positions each dataset gets, by the largest remainder."""
        weights = self._weights(epoch) if callable(self._weights) else self._weights
        name = f"weights({epoch})" if callable(self._weights) else "weights"
        values = checked_weights(name, weights)
        if len(values) != len(self._sizes):
            raise ValueError(
                f"{name} must be one for each of {len(self._sizes)} datasets, found {len(values)}"
            )
        # Fractions: rounded, a sum may overflow, and equal remainders are ordered by how a platform adds.
        parts = [Fraction(value) for value in values.tolist()]
        total = sum(parts)
        shares = [num_positions * part / total for part in parts]
        quotas: Indices = np.array([int(share) for share in shares], dtype=np.int64)
        by_remainder = sorted(range(len(shares)), key=lambda i: int(shares[i]) - shares[i])
        quotas[by_remainder[: num_positions - int(quotas.sum())]] += 1
        is_lost = (quotas == 0) & (values > 0) & (num_positions == self.window)
        if is_lost.any():
            lost = int(np.argmax(is_lost))
            raise ValueError(
                f"{name}[{lost}] = {values[lost]} is too small: a block of {num_positions} positions takes no "
                f"sample of that dataset. Raise block_size or num_samples, or set the weight to 0"
            )
        return quotas
