"""A part of a dataset, in any order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from helios.data._checks import as_array
from helios.data._permutation import Indices
from helios.data.orders._base import IndicesAt, Order
from helios.data.orders._basic import RandomOrder
from helios.data.orders._weighted import short_digest


class SubsetOrder(Order):
    """Takes some samples of the dataset, in an order of their own. It holds 8 bytes for each.

    Args:
        indices: which samples, 0 or more each; one that is given twice is taken twice.
        order: order of the subset, whose positions it counts from 0, with one for each of `indices`; None shuffles.

    Raises:
        TypeError: the indices are not ints, or the order is not an Order.
        ValueError: there are no indices, one is negative, or the order is for another number of samples.
    """

    def __init__(self, indices: Sequence[int] | npt.NDArray[Any], order: Order | None = None) -> None:
        self._indices = _checked_indices(indices)
        self._order = RandomOrder(len(self._indices)) if order is None else order
        if not isinstance(self._order, Order):
            raise TypeError(f"order must be an Order or None, found {type(order).__name__}")
        self._order.check_dataset(len(self._indices))
        self.algorithm = f"subset+{self._order.algorithm}"
        self.num_samples = self._order.num_samples
        self.window = self._order.window
        self.is_interleaved = self._order.is_interleaved
        inner = np.frombuffer((self._order.digest() or "").encode(), dtype=np.uint8)
        self._digest = short_digest(self._indices, inner)

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the function of this epoch; see `Order.of_epoch`."""
        in_subset = self._order.of_epoch(seed, epoch)

        def indices_at(positions: Indices) -> Indices:
            return self._indices[in_subset(positions)]

        return indices_at

    def digest(self) -> str:
        """Return a digest of the indices, and of what the order of the subset was made of."""
        return self._digest

    def check_dataset(self, num_dataset_samples: int) -> None:
        """ValueError unless the dataset has all the samples."""
        last = int(self._indices.max())
        if last >= num_dataset_samples:
            raise ValueError(
                f"indices must be less than the {num_dataset_samples} samples of the dataset, found {last}"
            )


def _checked_indices(indices: Any) -> Indices:
    array = as_array("indices", indices)
    if array.size == 0:
        raise ValueError("indices is empty: there is nothing to sample")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"indices must be a 1-d array of ints, found {array.dtype}, shape {array.shape}")
    if array.min() < 0 or array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"indices must be 0 or more, and fit int64, found {array.min()} to {array.max()}")
    return array.astype(np.int64)
