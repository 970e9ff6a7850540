"""Which positions, epochs and seeds of a shuffle are looked at; each suite returns p-values by name.

A shuffle of up to 2**16 samples is looked at whole, a larger one at the start, in the middle and at the end
of the epoch. Pairs never share a position within a test, so that they are as good as independent.
"""

from collections.abc import Callable, Iterable
from math import factorial, isqrt

import numpy as np
from scores import (
    Indices,
    Pairs,
    Shuffle,
    displacement_scores,
    distinct_score,
    kept_differences,
    pair_scores,
    poisson_p,
    position_scores,
    small_scores,
    uniformity_score,
)

MakeShuffle = Callable[[int, int, int], Shuffle]
Scores = dict[str, float]

SEED = 6691
WHOLE_LIMIT = 2**16  # samples
WINDOW = 2**13  # positions
MAX_EPOCHS = 1024  # of a test; making a shuffle costs more than asking it for a few indices
# How the (seed, epoch) is found whose order must be unrelated to that of another.
RELATIVES = {
    "next epoch": lambda seed, epoch: (seed, epoch + 1),
    "next seed": lambda seed, epoch: (seed + 1, epoch),
    "epoch + 2^32": lambda seed, epoch: (seed, epoch + 2**32),
    "swapped": lambda seed, epoch: (epoch, seed),
    "seed + 2^32": lambda seed, epoch: (seed + 2**32, epoch),
    "seed + 2^64": lambda seed, epoch: (seed + 2**64, epoch),
    "minus seed": lambda seed, epoch: (-seed, epoch),
}


def look(shuffles: Iterable[Shuffle], positions: Indices) -> Indices:
    """The indices at the same positions of several shuffles, shape (shuffles, positions)."""
    return np.stack([shuffle.take(positions) for shuffle in shuffles])


def whole(make: MakeShuffle, n: int, keys: Iterable[tuple[int, int]]) -> Indices:
    positions = np.arange(n, dtype=np.int64)
    return look((make(n, seed, epoch) for seed, epoch in keys), positions)


# --- few samples ------------------------------------------------------------------------------------


def tiny_suite(make: MakeShuffle, n: int) -> Scores:
    """All permutations are equally likely, over the epochs of a seed and over the seeds of an epoch."""
    count = 40 * factorial(n)
    by_epoch = whole(make, n, ((SEED, epoch) for epoch in range(count)))
    by_seed = whole(make, n, ((seed, 3) for seed in range(-count // 2, count - count // 2)))
    return {
        "all permutations, by epoch": uniformity_score(by_epoch, factorial(n)),
        "all permutations, by seed": uniformity_score(by_seed, factorial(n)),
    }


def brief_tiny_suite(make: MakeShuffle, n: int) -> Scores:
    """The same, where even a few times as many epochs as there are permutations take long."""
    by_epoch = whole(make, n, ((SEED, epoch) for epoch in range(10 * factorial(n))))
    return {"all permutations, by epoch": uniformity_score(by_epoch, factorial(n))}


def small_suite(make: MakeShuffle, n: int) -> Scores:
    """Every index is equally likely at every position, and every pair of them at some pairs."""
    return small_scores(whole(make, n, ((SEED, epoch) for epoch in range(20 * n * n))))


# --- any number of samples --------------------------------------------------------------------------


def look_at(n: int) -> tuple[Indices, Indices]:
    """The positions to look at, and the part of the epoch, from 0, that each is in."""
    if n <= WHOLE_LIMIT:
        positions = np.arange(n, dtype=np.int64)
        return positions, positions * min(n, 16) // n
    window = np.arange(WINDOW, dtype=np.int64)
    starts = (0, (n - WINDOW) // 2, n - WINDOW)
    return np.concatenate([start + window for start in starts]), np.arange(3 * WINDOW) * 12 // (3 * WINDOW)


def lags_of(n: int) -> dict[str, int]:
    root = isqrt(n)
    named = {"1": 1, "2": 2, "64": 64, "root": root, "root + 1": root + 1, "half": n // 2}
    return {name: lag for name, lag in named.items() if lag < n}


def firsts_of_pairs(n: int, lag: int) -> Indices:
    """Positions that have another one a lag later, no position being in two pairs."""
    if n <= WHOLE_LIMIT:
        firsts = np.arange(n - lag, dtype=np.int64)
        return firsts[firsts // lag % 2 == 0]
    window = np.arange(WINDOW, dtype=np.int64)
    window = window[window // lag % 2 == 0]
    firsts = np.concatenate([start + window for start in (0, (n - WINDOW) // 2, n - WINDOW - lag)])
    return np.unique(firsts[firsts < n - lag])


def prefixed(prefix: str, scores: Scores) -> Scores:
    return {f"{prefix}: {name}": p for name, p in scores.items()}


def full_suite(make: MakeShuffle, n: int, num_indices: int = 2**17) -> Scores:
    """Everything that can be asked of a shuffle of 40 samples or more.

    Args:
        make: the shuffle.
        n: the number of samples.
        num_indices: about how many each test looks at, over all epochs.
    """
    positions, rows = look_at(n)
    num_epochs = min(max(4, num_indices // len(positions)), MAX_EPOCHS)
    epochs = range(0, 2 * num_epochs, 2)  # the odd ones are the next ones
    shuffles = [make(n, SEED, epoch) for epoch in epochs]
    indices = look(shuffles, positions)
    scores = {"distinct": distinct_score(indices, n)}
    scores |= position_scores(rows, indices, n)
    scores |= displacement_scores(positions, indices, n)
    for name, lag in lags_of(n).items():
        firsts = firsts_of_pairs(n, lag)
        x, y = look(shuffles, firsts).ravel(), look(shuffles, firsts + lag).ravel()
        scores |= prefixed(f"lag {name}", pair_scores(Pairs(n, x, y, distinct=True)))
    for name, relative in RELATIVES.items():
        others = look((make(n, *relative(SEED, epoch)) for epoch in epochs), positions)
        pairs = Pairs(n, indices.ravel(), others.ravel(), distinct=False)
        scores |= prefixed(name, pair_scores(pairs))
    return scores | kept_suite(make, n, min(max(1, num_indices // n), MAX_EPOCHS))


def deep_suite(make: MakeShuffle, n: int) -> Scores:
    """The same with sixteen times the epochs."""
    return full_suite(make, n, 2**21)


def kept_suite(make: MakeShuffle, n: int, num_epochs: int = 2**15) -> Scores:
    """Differences of one digit do not pass through; see kept_differences."""
    shuffles = [make(n, SEED, epoch) for epoch in range(num_epochs)]
    # Among so many positions of 2**62, differences of 31 bits collide a few hundred times by chance.
    max_positions = 2**17 if n <= 2**52 else 2**20
    return {
        f"kept differences, {along}": poisson_p(*kept_differences(shuffles, n, along, max_positions))
        for along in ("columns", "rows")
    }
