"""Batches of samples of similar length, so that little of them is padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from helios.data._checks import as_numbers, check_int
from helios.data._hashing import PositionHash
from helios.data._permutation import Indices, Permutation
from helios.data.orders._base import IndicesAt, Order, in_windows
from helios.data.orders._weighted import short_digest


class BucketedOrder(Order):
    """Shuffles, and puts samples of similar length into one batch.

    Every epoch is another permutation. Each window of it, of `window_batches` batches, is sorted by length and cut
    into batches; these are shuffled, and so are the samples in each. Going on anywhere costs one window. The lengths
    are kept as they are given (a memory-mapped array stays on disk).

    Args:
        lengths: one for each sample of the dataset: ints or floats, no NaN.
        batch_size: samples to keep together: what all ranks take in a step, so that they have about the same
            work. A run may go on with other batch sizes: the order stays, and its batches are more mixed.
        window_batches: batches that are sorted together. More gives batches less padding, and less chance.

    Raises:
        TypeError: the lengths are not numbers, or another argument is not an int.
        ValueError: there are no lengths, one is NaN, or another argument is less than 1.
    """

    algorithm = "helios-bucketed-v1"

    def __init__(
        self, lengths: Sequence[float] | npt.NDArray[Any], batch_size: int, window_batches: int = 50
    ) -> None:
        self._lengths = _checked_lengths(lengths)
        self.num_samples = len(self._lengths)
        # More than there is makes no difference, to the order or to the digest.
        self._batch_size = min(check_int("batch_size", batch_size, 1), self.num_samples)
        window = self._batch_size * check_int("window_batches", window_batches, 1)
        self.window = min(window, self.num_samples)
        self._digest = short_digest(np.array([self._batch_size, self.window]), self._lengths)

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the function of this epoch; see `Order.of_epoch`."""
        permutation = Permutation(self.num_samples, seed, epoch)
        shuffle = PositionHash(seed, self.algorithm, epoch)

        def indices_of(window: int) -> Indices:
            start = window * self.window
            indices = permutation.indices(start, min(start + self.window, self.num_samples))
            by_length = np.argsort(self._lengths[indices], kind="stable")
            places = _batches(
                by_length, self._batch_size, shuffle.words(np.arange(start, start + self.window))
            )
            return indices[places]

        return in_windows(self.num_samples, self.window, indices_of)

    def digest(self) -> str:
        """Return a digest of the lengths and the sizes."""
        return self._digest


def _batches(by_length: Indices, batch_size: int, words: npt.NDArray[np.uint64]) -> Indices:
    """Cut what is sorted into batches, shuffle these, and the samples in each; a partial batch comes last.

    The partial one is cut out at a random place: otherwise the longest samples would always be the ones in it, or
    the ones that drop_last drops.
    """
    num_full, num_rest = divmod(len(by_length), batch_size)
    cut = int(words[-1] % np.uint64(num_full * batch_size + 1))
    rest = by_length[cut : cut + num_rest]
    full = np.concatenate([by_length[:cut], by_length[cut + num_rest :]]).reshape(num_full, batch_size)
    # The window's own order is random: in each batch it is taken up again.
    full = np.sort(full[np.argsort(words[:num_full], kind="stable")], axis=1)
    return np.concatenate([full.ravel(), np.sort(rest)])


def _checked_lengths(lengths: Any) -> npt.NDArray[Any]:
    array = as_numbers("lengths", lengths)
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ValueError(f"lengths must not be NaN, found one at {int(np.argmax(np.isnan(array)))}")
    # A copy, since an order does not change when the user's array does; a memory-mapped one stays on disk.
    return array if isinstance(array, np.memmap) else array.copy()
