"""A keyed permutation of range(num_samples): any part of it, anywhere, without ever holding the whole.

Above 4096 samples it is a generalised Feistel network over two digits of mixed radix with cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002), with 12 rounds of a 64-bit
multiply / xor-shift mix. Below, such a network is measurably not uniform, and the permutation is the
argsort of hashed keys. What is left of that above: where both radices are odd (a quarter of all sizes), the
permutation of every epoch is an even one, which takes all but two of its indices to see. Only integer
arithmetic that wraps and hashlib are used, so that the order is the same on every platform and with every
release of NumPy; `ALGORITHM` names it and the tests freeze it.
"""

import hashlib
from math import isqrt

import numpy as np
import numpy.typing as npt

from helios.core.rng import derive_bytes
from helios.data._checks import check_int, check_positions

ALGORITHM = "helios-feistel12-v1"
BLOCK_SIZE = 8192  # indices; work in blocks that stay in the cache: smaller ones pay NumPy's call overhead
MAX_NUM_SAMPLES = 2**62

_TABLE_LIMIT = 4096
_NUM_ROUNDS = 12
# Constants are arrays without dimensions: NumPy begins an operation with one in half the time that it takes
# with a scalar, and there are 132 operations to a block.
_MULTIPLIER_1 = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)
_MULTIPLIER_2 = np.array(0xD6E8FEB86659FD93, dtype=np.uint64)
_HALF_WORD = np.array(32, dtype=np.uint64)

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


class Permutation:
    """A permutation of range(num_samples), selected by (seed, epoch).

    Position p maps to `permutation[p]`. Asking for a range costs time in proportion to its length, wherever
    it is, and the object's size does not depend on `num_samples`.

    Args:
        num_samples: 1 to 2**62.
        seed: any int.
        epoch: 0 or more. Two epochs, or two seeds, give unrelated permutations.

    Raises:
        TypeError: an argument is not an int.
        ValueError: `num_samples` or `epoch` is out of range.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples = check_int("num_samples", num_samples)
        self.seed = check_int("seed", seed)
        self.epoch = check_int("epoch", epoch, 0)
        if not 1 <= self.num_samples <= MAX_NUM_SAMPLES:
            raise ValueError(f"num_samples must be 1 to 2**62, found {num_samples}")
        path = ("permutation", ALGORITHM, self.num_samples, self.epoch)
        key = hashlib.shake_128(derive_bytes(self.seed, *path, num_bytes=32))
        self._table: Indices | None = None
        if self.num_samples <= _TABLE_LIMIT:
            hashes = np.frombuffer(key.digest(8 * self.num_samples), dtype="<u8")
            self._table = np.argsort(hashes, kind="stable").astype(np.int64)
        keys = np.frombuffer(key.digest(8 * _NUM_ROUNDS), dtype="<u8").astype(np.uint64)
        self._keys = [keys[number, ...] for number in range(_NUM_ROUNDS)]
        # The two digits of a position: position = left * right_radix + right.
        self._right_radix = isqrt(self.num_samples - 1) + 1
        self._left_radix = -(-self.num_samples // self._right_radix)

    def indices(self, start: int, stop: int) -> Indices:
        """Return the indices at the positions start, start + 1, ..., stop - 1.

        Args:
            start: the first position, 0 to `num_samples`.
            stop: the position after the last, `start` to `num_samples`.

        Returns:
            int64 array, shape (stop - start,).

        Raises:
            TypeError: a position is not an int.
            ValueError: the positions are negative, too large or in the wrong order.
        """
        start, stop = check_int("start", start), check_int("stop", stop)
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(
                f"positions must be 0 <= start <= stop <= {self.num_samples}, found [{start}, {stop})"
            )
        if self._table is not None:
            return self._table[start:stop].copy()
        out = np.empty(stop - start, dtype=np.int64)
        for begin in range(
            start, stop, BLOCK_SIZE
        ):  # not all positions at once: a large array costs page faults
            end = min(begin + BLOCK_SIZE, stop)
            out[begin - start : end - start] = self._permute(np.arange(begin, end, dtype=np.uint64))
        return out

    def take(self, positions: Indices) -> Indices:
        """Return the indices at any positions.

        Args:
            positions: int64 array, shape (n,), each in range(num_samples).

        Returns:
            int64 array, shape (n,).

        Raises:
            TypeError: the positions are not an array of integers with one dimension.
            ValueError: a position is out of range.
        """
        check_positions(positions, self.num_samples)
        return self._take(positions)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, position: int) -> int:
        index = check_int("position", position)
        if index < 0:
            index += self.num_samples
        if not 0 <= index < self.num_samples:
            raise IndexError(f"position must be in range({self.num_samples}), found {position}")
        return int(self._take(np.array([index], dtype=np.int64))[0])

    def _take(self, positions: Indices) -> Indices:
        if self._table is not None:
            return self._table[positions]
        out = np.empty(len(positions), dtype=np.int64)
        for begin in range(0, len(positions), BLOCK_SIZE):
            block = slice(begin, begin + BLOCK_SIZE)
            out[block] = self._permute(positions[block].astype(np.uint64))
        return out

    def _permute(self, values: _Words) -> _Words:
        """Walk along the cycle of the network until the value is one of ours again."""
        values = self._network(values)
        limit = np.uint64(self.num_samples)
        while (outside := np.flatnonzero(values >= limit)).size:
            values[outside] = self._network(values[outside])
        return values

    def _network(self, values: _Words) -> _Words:
        right_radix = np.array(self._right_radix, dtype=np.uint64)
        left_radix = np.array(self._left_radix, dtype=np.uint64)
        left = values // right_radix
        mixed, scratch = left * right_radix, np.empty_like(left)
        right = values - mixed
        for number, key in enumerate(self._keys):
            source, target, radix = (
                (right, left, left_radix) if number % 2 == 0 else (left, right, right_radix)
            )
            np.bitwise_xor(source, key, out=mixed)
            np.multiply(mixed, _MULTIPLIER_1, out=mixed)
            np.right_shift(mixed, _HALF_WORD, out=scratch)
            np.bitwise_xor(mixed, scratch, out=mixed)
            np.multiply(mixed, _MULTIPLIER_2, out=mixed)
            # The upper 32 bits, scaled to [0, radix) by a multiplication instead of a division.
            np.right_shift(mixed, _HALF_WORD, out=mixed)
            np.multiply(mixed, radix, out=mixed)
            np.right_shift(mixed, _HALF_WORD, out=mixed)
            # Addition modulo the radix: where nothing is to be subtracted, the subtraction wraps to a
            # huge number and the minimum keeps the sum.
            np.add(target, mixed, out=target)
            np.subtract(target, radix, out=scratch)
            np.minimum(target, scratch, out=target)
        np.multiply(left, right_radix, out=left)
        np.add(left, right, out=left)
        return left
