"""The shuffle under test, one that is random beyond doubt, and those that the tests must reject.

Each is called with (num_samples, seed, epoch) and has `take(positions)`.
"""

from math import gcd

import numpy as np
import numpy.typing as npt

from helios.data import Permutation

Indices = npt.NDArray[np.int64]


def ours(num_samples: int, seed: int, epoch: int) -> Permutation:
    return Permutation(num_samples, seed, epoch)


def without_repeats(values: Indices) -> Indices:
    """Sort; np.unique hashes, which is slower for values that hardly ever repeat."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if ordered.size else ordered


def not_in(values: Indices, ordered: Indices) -> Indices:
    """Those of the values that are not in a sorted array."""
    if not ordered.size:
        return values
    places = np.minimum(np.searchsorted(ordered, values), ordered.size - 1)
    return values[ordered[places] != values]


class Ideal:
    """NumPy's permutation; of very many samples, only what is asked for is drawn, and remembered."""

    TABLE_LIMIT = 2**20

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples = num_samples
        self.rng = np.random.Generator(np.random.PCG64([num_samples, abs(seed), int(seed < 0), epoch]))
        self.table = self.rng.permutation(num_samples) if num_samples <= self.TABLE_LIMIT else None
        self.positions = np.empty(0, dtype=np.int64)  # those drawn so far, sorted
        self.indices = np.empty(0, dtype=np.int64)  # at those positions
        self.drawn = np.empty(0, dtype=np.int64)  # the same, sorted

    def take(self, positions: Indices) -> Indices:
        if self.table is not None:
            return self.table[positions]
        unseen = not_in(without_repeats(positions), self.positions)
        if unseen.size:
            indices = self.draw(unseen.size)
            positions_known = np.concatenate([self.positions, unseen])
            order = np.argsort(positions_known, kind="stable")
            self.positions = positions_known[order]
            self.indices = np.concatenate([self.indices, indices])[order]
        return self.indices[np.searchsorted(self.positions, positions)]

    def draw(self, count: int) -> Indices:
        """Draw distinct indices that were not drawn before: what repeats is drawn again."""
        fresh = np.empty(0, dtype=np.int64)
        while fresh.size < count:
            more = self.rng.integers(self.num_samples, size=count - fresh.size)
            fresh = without_repeats(np.concatenate([fresh, not_in(more, self.drawn)]))
        self.drawn = np.sort(np.concatenate([self.drawn, fresh]), kind="stable")
        return self.rng.permutation(fresh)


# --- controls ---------------------------------------------------------------------------------------


class Network:
    """Our own network with another number of rounds, and of few samples too, where we use a table."""

    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds
        self.__name__ = f"{num_rounds} rounds"

    def __call__(self, num_samples: int, seed: int, epoch: int) -> Permutation:
        permutation = Permutation(num_samples, seed, epoch)
        permutation._table = None
        permutation._keys = permutation._keys[: self.num_rounds]
        return permutation


class Affine:
    """position * factor + offset."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([num_samples, abs(seed), epoch])
        self.num_samples = num_samples
        self.offset, self.factor = (int(rng.integers(num_samples)) for _ in range(2))
        while gcd(self.factor, num_samples) != 1:
            self.factor = int(rng.integers(num_samples))

    def take(self, positions: Indices) -> Indices:
        exact = positions.astype(object)  # Python's ints, which do not overflow
        return ((exact * self.factor + self.offset) % self.num_samples).astype(np.int64)


class LinearCongruential:
    """The states of x -> x * factor + offset modulo a power of two, without those that are too large."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([num_samples, abs(seed), epoch])
        modulus = 1 << (num_samples - 1).bit_length()
        factor, offset = int(rng.integers(modulus)) & ~3 | 1, int(rng.integers(modulus)) | 1
        states = np.array([int(rng.integers(modulus))], dtype=np.int64)
        while len(states) < modulus:  # all states, by jumps of twice the length each time
            states = np.concatenate([states, (states * factor + offset) % modulus])
            factor, offset = factor * factor % modulus, (factor * offset + offset) % modulus
        self.states = states[states < num_samples]

    def take(self, positions: Indices) -> Indices:
        return self.states[positions]


class Sattolo:
    """Fisher and Yates's shuffle, off by one: all orders are a single cycle, so that no sample stays."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        rng = np.random.default_rng([num_samples, abs(seed), epoch])
        self.table = np.arange(num_samples)
        last = np.arange(num_samples - 1, 0, -1)
        for i, j in zip(last.tolist(), rng.integers(last).tolist(), strict=True):  # j below i, never i
            self.table[i], self.table[j] = self.table[j], self.table[i]

    def take(self, positions: Indices) -> Indices:
        return self.table[positions]


class Shifted:
    """One good order for all epochs, shifted a little by each."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples, self.shift = num_samples, epoch * (num_samples // 100) % num_samples
        self.base = Permutation(num_samples, seed, 0)

    def take(self, positions: Indices) -> Indices:
        return (self.base.take(positions) + self.shift) % self.num_samples


def seed_plus_epoch(num_samples: int, seed: int, epoch: int) -> Permutation:
    """Good orders, but the next epoch of one seed is the first of the next."""
    return Permutation(num_samples, seed + epoch, 0)


def seed_of_32_bits(num_samples: int, seed: int, epoch: int) -> Permutation:
    """Good orders, for seeds that fit a C int."""
    return Permutation(num_samples, seed % 2**32, epoch)


def epoch_of_32_bits(num_samples: int, seed: int, epoch: int) -> Permutation:
    """Good orders, but the epoch wraps."""
    return Permutation(num_samples, seed, epoch % 2**32)


class Positions32Bits:
    """A good order, but of the lower 32 bits of the position."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.base = Permutation(num_samples, seed, epoch)

    def take(self, positions: Indices) -> Indices:
        return self.base.take(positions % 2**32)


class Indices32Bits:
    """A good order whose indices lost their upper bits on the way."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.base = Permutation(num_samples, seed, epoch)

    def take(self, positions: Indices) -> Indices:
        return self.base.take(positions) % 2**32


class Lossy:
    """A bijection of all 2**num_bits values, cut down to our range instead of walked back into it."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self.num_samples = num_samples
        self.base = Permutation(1 << (num_samples - 1).bit_length(), seed, epoch)

    def take(self, positions: Indices) -> Indices:
        return self.base.take(positions) % self.num_samples
