"""How likely what was seen is: pure functions from the indices that a shuffle gave to p-values.

P-values are two-sided: too even is as suspicious as too uneven. What is expected is exact for drawing
without replacement and for parts that do not divide the number of samples: at most the shape of the
distribution is approximated, never its mean. Only NumPy and math are needed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, exp, isqrt, lgamma, log, sqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

MIN_EXPECTED = 10  # in a cell of a chi-square; scarcer ones are counted together
MIN_DF_TOO_EVEN = 20  # counts are whole numbers: over fewer cells, perfectly even ones are no surprise
MAX_CELLS = 1024
EXACT_RADIX = 4096  # above, a digit is as good as uniform: off by less than 1 / radix**2 of a cell


class Shuffle(Protocol):
    """One permutation of range(num_samples)."""

    def take(self, positions: Indices) -> Indices:
        """Return the indices at any positions."""


# --- tails ------------------------------------------------------------------------------------------


def gamma_tails(shape: float, x: float) -> tuple[float, float]:
    """The regularized incomplete gamma functions P and Q; the smaller one to about 1e-9 of itself."""
    if x <= 0:
        return 0.0, 1.0
    front = exp(shape * log(x) - x - lgamma(shape))
    if x < shape + 1:  # the power series of P
        term = total = 1 / shape
        denominator = shape
        while term > total * 1e-16:
            denominator += 1
            term *= x / denominator
            total += term
        lower = min(front * total, 1.0)
        return lower, 1 - lower
    # The continued fraction of Q, by Lentz's method.
    b = x + 1 - shape
    c, d = 1e300, 1 / b
    fraction, step, number = d, 0.0, 0
    while abs(step - 1) > 1e-15:
        number += 1
        a = -number * (number - shape)
        b += 2
        d = 1 / (a * d + b)
        c = b + a / c
        step = c * d
        fraction *= step
    upper = min(front * fraction, 1.0)
    return 1 - upper, upper


def two_sided(lower: float, upper: float) -> float:
    return min(1.0, 2 * min(lower, upper))


def chi_square_p(statistic: float, df: int) -> float:
    lower, upper = gamma_tails(df / 2, statistic / 2)
    return upper if df < MIN_DF_TOO_EVEN else two_sided(lower, upper)


def poisson_p(count: int, mean: float) -> float:
    at_least = gamma_tails(count, mean)[0] if count else 1.0
    return two_sided(gamma_tails(count + 1, mean)[1], at_least)


def normal_p(z: float) -> float:
    return erfc(abs(z) / sqrt(2))


def cells_p(observed: Indices, expected: Floats) -> float:
    """Pearson's chi-square of cells whose sum is given."""
    scarce = expected < MIN_EXPECTED
    if scarce.any():
        observed = np.append(observed[~scarce], observed[scarce].sum())
        expected = np.append(expected[~scarce], expected[scarce].sum())
        if expected[-1] < MIN_EXPECTED:  # even together: to the smallest of the others
            smallest = int(np.argmin(expected[:-1]))
            observed[smallest] += observed[-1]
            expected[smallest] += expected[-1]
            observed, expected = observed[:-1], expected[:-1]
    if len(expected) < 2:
        return 1.0
    return chi_square_p(float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1)


# --- digits of an index -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Digit:
    """A part of an index: `index // divisor % radix`. The index itself, a digit or a field of bits."""

    num_samples: int
    divisor: int
    radix: int

    def of(self, indices: Indices) -> Indices:
        if self.divisor > 1:
            indices = indices // self.divisor
        return indices % self.radix if self.divisor * self.radix < self.num_samples else indices

    def below(self, digit: int) -> int:
        """How many of range(num_samples) have a smaller digit."""
        periods, rest = divmod(self.num_samples, self.divisor * self.radix)
        return periods * digit * self.divisor + min(rest, digit * self.divisor)

    def frequencies(self) -> Floats:
        """The part of range(num_samples) that has each digit."""
        periods, rest = divmod(self.num_samples, self.divisor * self.radix)
        starts = np.arange(self.radix, dtype=np.int64) * self.divisor
        counts = periods * self.divisor + np.clip(rest - starts, 0, self.divisor)
        return counts / self.num_samples

    def sum_of_squares(self) -> int:
        """The sum over all digits of how many have it, squared; exact."""
        periods, rest = divmod(self.num_samples, self.divisor * self.radix)
        base, (whole, part) = periods * self.divisor, divmod(rest, self.divisor)
        squares = whole * (base + self.divisor) ** 2 + (self.radix - whole) * base**2
        return squares + ((base + part) ** 2 - base**2 if part else 0)

    @functools.cache  # noqa: B019 - a digit is a few ints, and the cache is what makes many tests cheap
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation over range(num_samples)."""
        if self.radix > EXACT_RADIX:
            return (self.radix - 1) / 2, sqrt((self.radix**2 - 1) / 12)
        frequencies, digits = self.frequencies(), np.arange(self.radix)
        mean = float(frequencies @ digits)
        return mean, sqrt(float(frequencies @ (digits - mean) ** 2))

    def standardize(self, indices: Indices) -> Floats:
        mean, deviation = self.moments()
        return (self.of(indices) - mean) / deviation


def digits_of(num_samples: int) -> dict[str, Digit]:
    """The index, and its lower digit in the radix that makes two digits of about the same size."""
    return {
        "index": Digit(num_samples, 1, num_samples),
        "lower digit": Digit(num_samples, 1, isqrt(num_samples - 1) + 1),
    }


def bit_fields_of(num_samples: int, num_cells: int) -> dict[str, Digit]:
    """The lowest, the middle and the highest bits of an index, as many as `num_cells` can count."""
    num_bits = (num_samples - 1).bit_length()
    width = min(num_bits, num_cells.bit_length() - 1)
    shifts = {"low bits": 0, "middle bits": (num_bits - width) // 2, "high bits": num_bits - width}
    fields = {Digit(num_samples, 1 << shift, 1 << width): name for name, shift in shifts.items()}
    return {name: field for field, name in fields.items()}  # of few samples, one field is all of them


# --- pairs of indices -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of indices that should be unrelated: of one epoch, so never equal, or of two."""

    num_samples: int
    first: Indices
    second: Indices
    distinct: bool


@functools.cache
def difference_probabilities(digit: Digit, width: int, distinct: bool) -> Floats:
    """How probable each `width` of differences of a digit, modulo its radix, is for a random pair."""
    starts = np.arange(0, digit.radix, width)
    n = digit.num_samples
    if digit.radix > EXACT_RADIX:
        sizes = np.minimum(digit.radix - starts, width).astype(np.float64)
        if distinct and digit.radix == n:
            sizes[0] -= 1  # no pair has difference 0
        return sizes / sizes.sum()
    spectrum = np.fft.rfft(digit.frequencies())
    probabilities = np.fft.irfft((spectrum * spectrum.conj()).real, digit.radix)
    if distinct:
        probabilities[0] -= 1 / n
        probabilities *= n / (n - 1)
    return np.add.reduceat(probabilities, starts)


@functools.cache
def xor_probabilities(field: Digit, distinct: bool) -> Floats:
    """How probable each XOR of a field of bits is for a random pair."""
    frequencies = field.frequencies()
    values = np.arange(field.radix)
    probabilities = frequencies[values[:, None] ^ values[None, :]] @ frequencies
    if distinct:
        n = field.num_samples
        probabilities[0] -= 1 / n
        probabilities *= n / (n - 1)
    return probabilities


def pair_scores(pairs: Pairs) -> dict[str, float]:
    """Correlation, differences, XOR-differences and coincidences of pairs."""
    n, count = pairs.num_samples, len(pairs.first)
    num_cells = min(MAX_CELLS, max(count // 64, 2))
    scores = {}
    for name, digit in digits_of(n).items():
        first, second = digit.of(pairs.first), digit.of(pairs.second)
        mean, deviation = digit.moments()
        product = float(((first - mean) / deviation) @ ((second - mean) / deviation))
        shift = count / (n - 1) if pairs.distinct else 0.0  # what is drawn is not drawn again
        scores[f"correlation, {name}"] = normal_p((product + shift) / sqrt(count))
        width = -(-digit.radix // num_cells)
        difference = (second - first) % digit.radix // width
        probabilities = difference_probabilities(digit, width, pairs.distinct)
        observed = np.bincount(difference, minlength=len(probabilities))
        scores[f"difference, {name}"] = cells_p(observed, probabilities * count)
    for name, field in bit_fields_of(n, num_cells).items():
        different_bits = field.of(pairs.first) ^ field.of(pairs.second)
        probabilities = xor_probabilities(field, pairs.distinct)
        observed = np.bincount(different_bits, minlength=len(probabilities))
        scores[f"xor, {name}"] = cells_p(observed, probabilities * count)
    if not pairs.distinct:
        scores["coincidences"] = poisson_p(int((pairs.first == pairs.second).sum()), count / n)
    return scores


# --- one epoch --------------------------------------------------------------------------------------


def position_scores(rows: Indices, indices: Indices, num_samples: int) -> dict[str, float]:
    """Where samples go: parts of the epoch times parts of the dataset.

    Args:
        rows: the part of the epoch, from 0, that each position is in.
        indices: shape (epochs, positions).
        num_samples: of the permutation; those at no position here make one more part of the epoch.
    """
    num_epochs, n = len(indices), num_samples
    row_sizes = np.bincount(rows)
    scores = {}
    for name, digit in digits_of(n).items():
        width = -(-digit.radix // 16)
        edges = [digit.below(min(d, digit.radix)) for d in range(0, digit.radix + width, width)]
        column_sizes = np.diff(np.array(edges, dtype=np.int64))
        num_rows, num_columns = len(row_sizes), len(column_sizes)
        cells = rows * num_columns + digit.of(indices) // width
        cells += np.arange(num_epochs)[:, None] * (num_rows * num_columns)
        tables = np.bincount(cells.ravel(), minlength=num_epochs * num_rows * num_columns)
        tables = tables.reshape(num_epochs, num_rows, num_columns)
        rest = n - len(rows)
        sizes = row_sizes
        if rest:
            tables = np.concatenate([tables, column_sizes - tables.sum(axis=1, keepdims=True)], axis=1)
            sizes = np.append(row_sizes, rest)
        expected = np.outer(sizes / n, column_sizes)
        df = (len(sizes) - 1) * (num_columns - 1)
        scale = (n - 1) / n  # both margins are given
        pooled = ((tables.sum(axis=0) - expected * num_epochs) ** 2 / (expected * num_epochs)).sum()
        scores[f"position, {name}"] = chi_square_p(float(pooled) * scale, df)
        if expected.min() >= MIN_EXPECTED:
            each = ((tables - expected) ** 2 / expected).sum()
            scores[f"position by epoch, {name}"] = chi_square_p(float(each) * scale, df * num_epochs)
    return scores


def displacement_scores(positions: Indices, indices: Indices, num_samples: int) -> dict[str, float]:
    """How far samples go, and how many go nowhere; `indices` has shape (epochs, positions)."""
    n, count = num_samples, indices.size
    width = -(-n // min(MAX_CELLS, count // 64))
    displacement = (indices - positions) % n // width
    probabilities = difference_probabilities(Digit(n, 1, n), width, distinct=False)
    observed = np.bincount(displacement.ravel(), minlength=len(probabilities))
    fixed = int((indices == positions).sum())
    return {
        "displacement": cells_p(observed, probabilities * count),
        "fixed points": poisson_p(fixed, count / n),
    }


def distinct_score(indices: Indices, num_samples: int) -> float:
    """1 if the indices of each epoch are in range and never the same, else 0."""
    in_range = indices.min() >= 0 and indices.max() < num_samples
    ordered = np.sort(indices, axis=1)
    return float(in_range and bool((ordered[:, 1:] != ordered[:, :-1]).all()))


def kept_differences(
    shuffles: Sequence[Shuffle], num_samples: int, along: str, max_positions: int
) -> tuple[int, float]:
    """How many pairs that differ in one digit only come out with the same difference in that digit.

    This is what tells a Feistel network of few rounds (Patarin, "Generic attacks on Feistel schemes",
    ASIACRYPT 2001): where the rounds of the other digit collide, a difference passes unchanged. With r
    rounds over digits of radix b, one in b**(r / 2 - 2) of such pairs is there too often.

    Args:
        shuffles: of several epochs.
        num_samples: of each.
        along: "columns" (the lower digit is the same) or "rows" (the upper one is).
        max_positions: how many positions to look at in an epoch.

    Returns:
        How many there are, and how many are expected.
    """
    n = num_samples
    lower_radix = isqrt(n - 1) + 1
    upper_radix = -(-n // lower_radix)
    if along == "columns":
        digit, num_groups = Digit(n, lower_radix, upper_radix), lower_radix
        member_stride, group_stride = lower_radix, 1
    else:
        digit, num_groups = Digit(n, 1, lower_radix), upper_radix
        member_stride, group_stride = 1, lower_radix
    num_members = min(digit.radix, max_positions)
    num_groups_seen = min(num_groups, max(1, max_positions // num_members))
    groups = np.array([i * num_groups // num_groups_seen for i in range(num_groups_seen)], dtype=np.int64)
    members = np.arange(num_members, dtype=np.int64)
    positions = groups[:, None] * group_stride + members * member_stride
    inside = positions < n
    positions, sizes = positions[inside], inside.sum(axis=1)
    offsets = np.broadcast_to(members, inside.shape)[inside]
    bases = np.repeat(np.arange(num_groups_seen) * digit.radix, sizes)  # groups are counted apart
    count = 0
    for shuffle in shuffles:
        moved = bases + (digit.of(shuffle.take(positions)) - offsets) % digit.radix
        if num_groups_seen * digit.radix <= 4 * len(positions):
            times = np.bincount(moved)
        else:
            moved.sort()
            times = np.diff(np.flatnonzero(np.append(moved[1:] != moved[:-1], True)), prepend=-1)
        count += int((times * (times - 1) // 2).sum())
    num_pairs = len(shuffles) * int((sizes * (sizes - 1) // 2).sum())
    probability = (n * n - digit.sum_of_squares()) / ((digit.radix - 1) * n * (n - 1))
    return count, num_pairs * probability


# --- all permutations of a few samples --------------------------------------------------------------


def uniformity_score(indices: Indices, num_permutations: int) -> float:
    """How evenly all permutations of a few samples turn up; `indices` has shape (epochs, samples)."""
    num_epochs, n = indices.shape
    codes = indices @ n ** np.arange(n, dtype=np.int64)
    seen = np.unique(codes, return_counts=True)[1]
    observed = np.zeros(max(num_permutations, len(seen)), dtype=np.int64)
    observed[: len(seen)] = seen
    return cells_p(observed, np.full(len(observed), num_epochs / num_permutations))


def small_scores(indices: Indices) -> dict[str, float]:
    """Every position times every index, and pairs of them; `indices` has shape (epochs, samples)."""
    num_epochs, n = indices.shape
    table = np.bincount((np.arange(n) * n + indices).ravel(), minlength=n * n)
    expected = num_epochs / n
    statistic = float(((table - expected) ** 2 / expected).sum()) * (n - 1) / n
    scores = {"every position": chi_square_p(statistic, (n - 1) ** 2)}
    looked_at = {"first two": (0, 1), "first and middle": (0, n // 2), "last two": (n - 2, n - 1)}
    for name, (first, second) in looked_at.items():
        x, y = indices[:, first], indices[:, second]
        cells = x * (n - 1) + y - (y > x)  # y is one of the n - 1 others
        observed = np.bincount(cells, minlength=n * (n - 1))
        scores[f"every pair, {name}"] = cells_p(observed, np.full(n * (n - 1), num_epochs / (n * (n - 1))))
    return scores
