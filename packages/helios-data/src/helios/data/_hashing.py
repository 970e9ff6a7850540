"""Uniform words for positions: a keyed hash that can be asked for any of them, in any order.

Two rounds of the 64-bit finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014) with a key before each. Integers that wrap only, so the same on every platform.
"""

import numpy as np
import numpy.typing as npt

from helios.core.rng import derive_bytes

Words = npt.NDArray[np.uint64]

_KEY_WORDS = 3
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_BITS_OF_FLOAT = 53


class PositionHash:
    """Maps positions to uniform words, selected by a seed and a path.

    Args:
        seed: any int.
        *path: says what the words are for, as `helios.core.rng.derive_bytes` takes it.
    """

    def __init__(self, seed: int, *path: int | str) -> None:
        key = derive_bytes(seed, *path, num_bytes=8 * _KEY_WORDS)
        self._keys = np.frombuffer(key, dtype="<u8").astype(np.uint64)

    def words(self, positions: npt.NDArray[np.int64]) -> Words:
        """Return uint64, shape as `positions`, uniform; two positions never share a word."""
        first, second, last = self._keys
        mixed = _finalize(positions.astype(np.uint64) ^ first)
        words: Words = _finalize(mixed ^ second) ^ last
        return words

    def uniforms(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return float64 in [0, 1), shape as `positions`: multiples of 2**-53."""
        words = self.words(positions) >> np.uint64(64 - _BITS_OF_FLOAT)
        return words.astype(np.float64) * 2.0**-_BITS_OF_FLOAT


def _finalize(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIER_2
    return words ^ (words >> np.uint64(31))
