"""Draws with replacement, with weights."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from helios.data._checks import as_numbers, check_positions
from helios.data._hashing import PositionHash
from helios.data._permutation import Indices
from helios.data.orders._base import IndicesAt, Order, check_length
from helios.data.orders._basic import check_num_positions

_DIGEST_BLOCK = 2**16  # numbers


class WeightedOrder(Order):
    """Every position draws a sample, independently and with replacement, in proportion to the weights.

    As `torch.utils.data.WeightedRandomSampler` does, but each draw is a function of (seed, epoch, position), so it
    can be dealt out to ranks and gone on with anywhere. It holds 8 bytes for each weight.

    Args:
        weights: one for each sample of the dataset: finite, 0 or more, not all 0. They need not add up to 1.
        num_samples: draws in an epoch; None makes as many as there are weights.

    Raises:
        TypeError: the weights are not numbers, or `num_samples` is not an int.
        ValueError: a weight is negative or not finite, all are 0 or there are none; `num_samples` is
            out of range.
    """

    algorithm = "helios-weighted-v1"

    def __init__(self, weights: Sequence[float] | npt.NDArray[Any], num_samples: int | None = None) -> None:
        checked = checked_weights("weights", weights)
        self._cumulative = np.cumsum(scaled(checked))
        # What rounds up to the total belongs to the last sample that has a weight.
        self._last = int(np.flatnonzero(checked)[-1])
        self._num_weights = len(checked)
        self.num_samples = check_num_positions(
            "num_samples", self._num_weights if num_samples is None else num_samples
        )
        self._digest = short_digest(self._cumulative)

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the draws of this epoch; see `Order.of_epoch`."""
        draws = PositionHash(seed, self.algorithm, epoch)

        def indices_at(positions: Indices) -> Indices:
            check_positions(positions, self.num_samples)
            targets = draws.uniforms(positions) * self._cumulative[-1]
            found = np.searchsorted(self._cumulative, targets, side="right")
            indices: Indices = np.minimum(found, self._last).astype(np.int64)
            return indices

        return indices_at

    def digest(self) -> str:
        """Return a digest of the weights."""
        return self._digest

    def check_dataset(self, num_dataset_samples: int) -> None:
        """ValueError unless there is a weight for each sample of the dataset."""
        check_length(self, self._num_weights, num_dataset_samples)


def checked_weights(name: str, weights: Any) -> npt.NDArray[np.float64]:
    """Return weights as float64, shape (n,), n > 0, finite, 0 or more, not all 0."""
    values = as_numbers(name, weights).astype(np.float64)
    is_wrong = ~(np.isfinite(values) & (values >= 0))
    if is_wrong.any():
        place = int(np.argmax(is_wrong))
        raise ValueError(f"{name} must be finite and 0 or more, found {values[place]} at {place}")
    if not values.any():
        raise ValueError(f"{name} must not all be 0: nothing could be drawn")
    return values


def scaled(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return weights divided by a power of 2: the same shares, and a sum that neither overflows nor is tiny."""
    _, exponent = np.frexp(weights.max())
    relative: npt.NDArray[np.float64] = np.ldexp(weights, -exponent)
    return relative


def short_digest(*arrays: npt.NDArray[Any]) -> str:
    """Return 16 hexadecimal digits that name the numbers in arrays, whatever their width and byte order."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        for start in range(0, len(array), _DIGEST_BLOCK):  # a memory-mapped array is not copied whole
            block = array[start : start + _DIGEST_BLOCK]
            digest.update(block.astype("<f8" if array.dtype.kind == "f" else "<i8").data)
    return digest.hexdigest()
