"""The p-values of scores.py, against known values and against counting everything there is."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import scores
from scores import Digit


# From SciPy 1.17: chi2.cdf and chi2.sf.
@pytest.mark.parametrize(
    ("statistic", "df", "lower", "upper"),
    [
        (10.8276, 1, 0.9990000182708, 0.0009999817291816),
        (46.3285, 1, 0.99999999999, 9.999878310417e-12),
        (13.8155, 2, 0.998999994721, 0.001000005278996),
        (50.6569, 2, 0.99999999999, 9.999860230322e-12),
        (0.247538, 15, 1.000007369047e-11, 0.99999999999),
        (10.307, 15, 0.2000026920177, 0.7999973079823),
        (37.6973, 15, 0.9990000006041, 0.0009999993958904),
        (84.5936, 15, 0.99999999999, 9.999908457863e-12),
        (131.488, 255, 1.000034173224e-11, 0.99999999999),
        (235.825, 255, 0.1999959154317, 0.8000040845683),
        (330.52, 255, 0.9990000322055, 0.0009999677944859),
        (436.894, 255, 0.99999999999, 9.999786062039e-12),
        (748.325, 1023, 9.999958851477e-12, 0.99999999999),
        (984.75, 1023, 0.2000014101911, 0.7999985898089),
        (1168.5, 1023, 0.9990001932544, 0.0009998067456354),
        (1356.24, 1023, 0.99999999999, 1.000153830853e-11),
        (38443.9, 40319, 9.996174821211e-12, 0.99999999999),
        (40079.8, 40319, 0.1999862753888, 0.8000137246112),
        (41202.2, 40319, 0.998999640283, 0.001000359717022),
        (42252.7, 40319, 0.99999999999, 1.000251054289e-11),
    ],
)
def test_chi_square_tails(statistic, df, lower, upper):
    found = scores.gamma_tails(df / 2, statistic / 2)
    assert min(found) == pytest.approx(min(lower, upper), rel=1e-8, abs=0)
    assert sum(found) == pytest.approx(1, abs=1e-15)


# From SciPy 1.17: twice the smaller of poisson.cdf(count) and poisson.sf(count - 1).
@pytest.mark.parametrize(
    ("count", "mean", "p"),
    [
        (0, 0.001, 1.998000999667),
        (0, 5.0, 0.01347589399817),
        (3, 40.0, 9.777728930362e-14),
        (100, 40.0, 2.412508410617e-15),
        (1, 1e-12, 1.999999999999e-12),
        (9500, 9000.0, 1.795782447589e-07),
    ],
)
def test_poisson(count, mean, p):
    assert scores.poisson_p(count, mean) == pytest.approx(min(p, 1), rel=1e-9)


def test_normal():
    assert scores.normal_p(1.959963984540054) == pytest.approx(0.05)
    assert scores.normal_p(-7) == pytest.approx(2.559625087771670e-12)


def test_scarce_cells_are_counted_together():
    expected = np.array([50.0, 50.0, 4.0, 4.0, 4.0])
    observed = np.array([60, 40, 12, 0, 0])
    assert scores.cells_p(observed, expected) == scores.chi_square_p(4, 2)
    # Too few even together: with the smallest of the others.
    assert scores.cells_p(np.array([60, 40, 4]), np.array([51.0, 49.0, 4.0])) == scores.chi_square_p(
        81 / 51 + 81 / 53, 1
    )


def test_too_even_is_suspicious_unless_there_are_few_cells():
    even = np.full(100, 50)
    assert scores.cells_p(even, even.astype(float)) < 1e-12
    assert scores.cells_p(even[:2], even[:2].astype(float)) == 1


DIGITS = [
    Digit(n, divisor, radix)
    for n, divisor, radix in [
        (37, 1, 37),
        (37, 1, 7),
        (37, 7, 6),
        (36, 6, 6),
        (37, 4, 4),
        (64, 16, 4),
        (5, 1, 8),
    ]
]


@pytest.mark.parametrize("digit", DIGITS, ids=str)
def test_digits_against_counting(digit):
    digits = np.arange(digit.num_samples) // digit.divisor % digit.radix
    assert np.array_equal(digit.of(np.arange(digit.num_samples)), digits)
    counts = np.bincount(digits, minlength=digit.radix)
    assert np.allclose(digit.frequencies() * digit.num_samples, counts)
    assert [digit.below(d) for d in range(digit.radix + 1)] == [0, *np.cumsum(counts)]
    assert digit.sum_of_squares() == (counts**2).sum()
    assert digit.moments() == pytest.approx((digits.mean(), digits.std()))


@pytest.mark.parametrize("n", [2**62 - 1, 2**62, (2**31 - 1) ** 2 + 1])
def test_digits_do_not_overflow(n):
    last = np.array([n - 1])
    fields = scores.bit_fields_of(n, 1024)
    assert len(fields) == 3
    for digit in [*scores.digits_of(n).values(), *fields.values()]:
        assert digit.below(digit.radix) == n
        assert digit.of(last)[0] == (n - 1) // digit.divisor % digit.radix
    for field in fields.values():
        assert field.frequencies().sum() == pytest.approx(1)
        assert field.frequencies()[3] * n == pytest.approx(field.below(4) - field.below(3))


@pytest.mark.parametrize("digit", DIGITS, ids=str)
@pytest.mark.parametrize("distinct", [True, False])
def test_pair_probabilities_against_counting(digit, distinct):
    every = itertools.permutations if distinct else lambda values, _: itertools.product(values, repeat=2)
    x, y = digit.of(np.array(list(every(range(digit.num_samples), 2))).T)
    for width in (1, 3):
        found = scores.difference_probabilities(digit, width, distinct)
        assert np.allclose(found * len(x), np.bincount((y - x) % digit.radix // width, minlength=len(found)))
    if digit.radix & (digit.radix - 1) == 0:
        found = scores.xor_probabilities(digit, distinct)
        assert np.allclose(found * len(x), np.bincount(x ^ y, minlength=digit.radix))


def test_probabilities_of_large_radices_agree_with_exact_ones(monkeypatch):
    digits = [Digit(10**6 + 1, 1, 1001), Digit(5000, 1, 5000)]
    for distinct, digit in itertools.product([True, False], digits):
        monkeypatch.setattr(scores, "EXACT_RADIX", 10**4)
        exact = scores.difference_probabilities.__wrapped__(digit, 7, distinct)
        monkeypatch.setattr(scores, "EXACT_RADIX", 100)
        assert np.allclose(scores.difference_probabilities.__wrapped__(digit, 7, distinct), exact, rtol=3e-4)


class Fixed:
    def __init__(self, order):
        self.order = np.array(order)

    def take(self, positions):
        return self.order[positions]


@pytest.mark.parametrize(("n", "along"), [(6, "columns"), (6, "rows"), (5, "columns"), (8, "columns")])
def test_kept_differences_against_all_permutations(n, along):
    shuffles = [Fixed(order) for order in itertools.permutations(range(n))]
    count, expected = scores.kept_differences(shuffles, n, along, 100)
    assert count == pytest.approx(expected)
    identity, _ = scores.kept_differences([Fixed(range(n))], n, along, 100)
    num_pairs = {(6, "columns"): 3, (6, "rows"): 6, (5, "columns"): 2, (8, "columns"): 7}[n, along]
    assert identity == num_pairs


def test_positions_against_all_permutations(monkeypatch):
    """The chi-square of a table, over all permutations of six, has the mean that its df says."""
    statistics = []
    monkeypatch.setattr(scores, "chi_square_p", lambda statistic, df: statistics.append(statistic / df) or 1)
    for order in itertools.permutations(range(6)):
        scores.position_scores(np.array([0, 0, 1, 1]), np.array([order[:4]]), 6)
    assert np.mean(statistics) == pytest.approx(1)


@pytest.mark.parametrize("n", [97, 2**62])
def test_pairs_of_true_noise_and_of_none(n):
    rng = np.random.default_rng(5)
    x, y = rng.integers(n, size=(2, 20_000))
    found = scores.pair_scores(scores.Pairs(n, x, y, distinct=False))
    assert min(found.values()) > 1e-3
    related = scores.pair_scores(scores.Pairs(n, x, (x + n // 50) % n, distinct=False))
    assert all(p < 1e-9 for name, p in related.items() if name != "coincidences")


def test_small_scores_see_a_pair_that_repeats():
    rng = np.random.default_rng(5)
    orders = rng.permuted(np.tile(np.arange(9), (2000, 1)), axis=1)
    assert min(scores.small_scores(orders).values()) > 1e-3
    orders[:300, :2] = orders[0, :2]
    found = scores.small_scores(orders)
    assert found["every pair, first two"] < 1e-9 and found["every pair, last two"] > 1e-3


def test_indices_out_of_range_or_twice_are_not_distinct():
    assert scores.distinct_score(np.array([[0, 1, 2], [2, 1, 0]]), 3) == 1
    for bad in ([0, 1, 1], [0, 1, 3], [-1, 1, 0]):
        assert scores.distinct_score(np.array([[0, 1, 2], bad]), 3) == 0


def test_coincidences_are_few():
    x = np.arange(10_000)
    y = np.roll(x, 1)
    y[:40] = x[:40]
    found = scores.pair_scores(scores.Pairs(10**4, x, y, distinct=False))
    assert found["coincidences"] == scores.poisson_p(40, 1.0) < 1e-9
