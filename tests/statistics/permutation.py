"""Slow: is the permutation random? `pytest -s tests/statistics/permutation.py` (not found by its name alone).

Thousands of p-values for 1 to 2**62 samples, all seeds fixed, judged together: a shuffle is rejected if one
of them is below FAMILY_ERROR / (how many ours has), so that a true shuffle is rejected once in a million. A
true shuffle must pass, and controls must be rejected, with the same bound. The last test prints the numbers.
"""

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from math import isqrt
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import shuffles
from scores import Indices
from suites import (
    MakeShuffle,
    Scores,
    brief_tiny_suite,
    deep_suite,
    full_suite,
    kept_suite,
    small_suite,
    tiny_suite,
)

FAMILY_ERROR = 1e-6
Suite = Callable[[MakeShuffle, int], Scores]

POWERS = [2**k + d for k in range(6, 63) for d in (-1, 0, 1) if 2**k + d <= 2**62]
ROOTS = [10, 31, 65, 100, 255, 257, 1000, 1023, 46341, 65535, 65537, 10**6, 3 * 2**29, 2**31 - 1]
SQUARES = [k * k + d for k in ROOTS for d in (-1, 0, 1)]
OTHERS = [1000, 10007, 10**9 + 7, 10**12 + 39]
SIZES = sorted({*POWERS, *SQUARES, *OTHERS})
DEEP_SIZES = [4097, 4225]  # the smallest ones that no table is used for: what a network does shows most
FAMILY: list[tuple[Suite, list[int]]] = [
    (tiny_suite, list(range(2, 8))),
    (brief_tiny_suite, [8]),
    (small_suite, list(range(9, 41))),
    (kept_suite, [100]),
    (full_suite, SIZES),
    (deep_suite, DEEP_SIZES),
]
# Drawing a random permutation of many samples piece by piece takes long.
IDEAL_FAMILY: list[tuple[Suite, list[int]]] = [
    (tiny_suite, list(range(2, 7))),
    (small_suite, list(range(9, 41))),
    (full_suite, [n for n in SIZES if n <= 2**17] + [n for n in SIZES if n > 2**17][::6]),
    (deep_suite, DEEP_SIZES),
]

Results = dict[tuple[Suite, int, str], float]  # p-values by suite, number of samples and test


def run(make: MakeShuffle, family: list[tuple[Suite, list[int]]]) -> Results:
    results = {}
    for suite, sizes in family:
        start = time.process_time()
        for n in sizes:
            for test, p in suite(make, n).items():
                results[suite, n, test] = p
        seconds = time.process_time() - start
        print(
            f"{make.__name__:15} {suite.__name__:16} {len(sizes):4} sizes {seconds:6.1f} s of one core",
            flush=True,
        )
    return results


@functools.cache
def ours() -> Results:
    return run(shuffles.ours, FAMILY)


@functools.cache
def ideal() -> Results:
    return run(shuffles.Ideal, IDEAL_FAMILY)


def bound() -> float:
    """Bonferroni's: as many tests as were run share the error."""
    return FAMILY_ERROR / len(ours())


def rejected(results: Results) -> dict[str, float]:
    return {f"{suite.__name__}, n = {n}, {test}": p for (suite, n, test), p in results.items() if p < bound()}


# --- verdicts ---------------------------------------------------------------------------------------


def test_ours_is_not_rejected():
    assert not rejected(ours())


def test_a_true_shuffle_is_not_rejected():
    assert not rejected(ideal())


@pytest.mark.parametrize("results", [ours, ideal], ids=["ours", "ideal"])
def test_p_values_are_what_they_say(results):
    """One in a hundred is below 0.01, and so on: the tests are neither blind nor alarmist."""
    discrete = ("distinct", "fixed points", "coincidences")
    p_values = np.array([p for (_, _, test), p in results().items() if not test.endswith(discrete)])
    for level, tolerance in ((0.01, 0.003), (0.1, 0.01), (0.5, 0.02)):
        assert abs((p_values < level).mean() - level) < tolerance, level


NETWORK_SIZES = [100, 4097, 4225, 65537, 10**6, 2**32 + 1, 10**12, 2**62]
CONTROLS: list[tuple[MakeShuffle, Suite, list[int]]] = [
    (shuffles.Affine, tiny_suite, [4, 5, 6]),  # three samples have no permutation that is not affine
    (shuffles.Affine, full_suite, [64, 4097, 65537, 2**32 + 1, 2**62]),
    (shuffles.LinearCongruential, full_suite, [64, 4096, 65537, 10**6]),
    (shuffles.Sattolo, full_suite, [100]),
    (shuffles.Network(3), full_suite, NETWORK_SIZES),
    (shuffles.Network(4), full_suite, NETWORK_SIZES),
    (shuffles.Network(6), full_suite, [100]),
    (shuffles.Network(6), deep_suite, [4097]),
    (shuffles.Network(8), kept_suite, [100]),  # why a few samples have a table, and others 12 rounds
    (shuffles.Network(12), brief_tiny_suite, [7]),  # 3 x 3 digits: nearly all orders have one parity
    (shuffles.Shifted, full_suite, [100, 4097, 10**6, 2**62]),
    (shuffles.seed_plus_epoch, full_suite, [100, 4097, 10**6, 2**62]),
    (shuffles.seed_of_32_bits, full_suite, [100, 4097, 10**6, 2**62]),
    (shuffles.epoch_of_32_bits, full_suite, [100, 4097, 10**6, 2**62]),
    (shuffles.Positions32Bits, full_suite, [2**32 + 1, 2**33, 2**62]),
    (shuffles.Indices32Bits, full_suite, [2**33, 2**62]),
    (shuffles.Lossy, full_suite, [65, 4097, 65537]),
]


@functools.cache
def rejections() -> list[tuple[str, str, int, list[str], int]]:
    """For each control and size: by which tests it is rejected, the surest first, and of how many."""
    table = []
    for make, suite, sizes in CONTROLS:
        for n in sizes:
            scores = suite(make, n)
            by = sorted((p, test) for test, p in scores.items() if p < bound())
            table.append((make.__name__, suite.__name__, n, [test for _, test in by], len(scores)))
    return table


def test_controls_are_rejected():
    accepted = [row[:3] for row in rejections() if not row[3]]
    assert not accepted


def test_every_kind_of_test_rejects_some_control():
    """Those that see nothing in bad shuffles say nothing of a good one."""
    rejecting = {part for row in rejections() for test in row[3] for part in test.split(": ")}
    kinds = {part for suite, _, test in ours() if suite != small_suite for part in test.split(": ")}
    assert not kinds - rejecting


# --- what is not a matter of chance -----------------------------------------------------------------


def is_bijection(indices: Indices, n: int) -> bool:
    if len(indices) != n or indices.min() < 0 or indices.max() >= n:
        return False
    seen = np.zeros(n, dtype=bool)
    seen[indices] = True
    return bool(seen.all())


def whole_epoch(make: MakeShuffle, n: int) -> Indices:
    return make(n, n, 1).take(np.arange(n, dtype=np.int64))


def test_every_size_up_to_4400_is_a_bijection():
    failed = [n for n in range(1, 4401) if not is_bijection(whole_epoch(shuffles.ours, n), n)]
    assert not failed


BIJECTION_SIZES = sorted(
    {2**k + d for k in range(12, 23) for d in (-1, 0, 1)}  # 2**(2k) + 1 is where a library loses an index
    | {k * k + d for k in (67, 100, 257, 1000, 1023, 1449, 2047) for d in (-1, 0, 1)}
    | {k * k + k + d for k in (67, 256, 1000, 2047) for d in (-1, 0, 1)}  # where the other radix grows
)


def test_larger_sizes_are_bijections():
    failed = [n for n in BIJECTION_SIZES if not is_bijection(whole_epoch(shuffles.ours, n), n)]
    assert not failed
    for n in (65537, 262145, 1048577):  # the control
        assert not is_bijection(whole_epoch(shuffles.Lossy, n), n)


def is_even(indices: Indices) -> bool:
    """Whether the permutation is made of an even number of swaps."""
    after, seen, num_cycles = indices.tolist(), bytearray(len(indices)), 0
    for start in range(len(after)):
        if not seen[start]:
            num_cycles += 1
            while not seen[start]:
                seen[start] = 1
                start = after[start]
    return (len(after) - num_cycles) % 2 == 0


@pytest.mark.parametrize("n", [100, 4096, 4097, 4160, 4161, 4225, 10201])
def test_parity_is_the_known_limit(n):
    """An even or an odd number of swaps? A coin; but above 4096 samples, with two odd radices, always the same.

    A round of such a network shifts digits, and a shift modulo an odd radix is an even permutation. Whoever
    has not seen the whole epoch cannot tell.
    """
    num_epochs = 40
    num_even = sum(is_even(shuffles.ours(n, 5, epoch).indices(0, n)) for epoch in range(num_epochs))
    lower_radix = isqrt(n - 1) + 1
    upper_radix = -(-n // lower_radix)
    if n > 4096 and lower_radix % 2 == upper_radix % 2 == 1:
        assert num_even in (0, num_epochs)
    else:
        assert 4 <= num_even <= num_epochs - 4  # a coin does not once in 5e7


# --- the numbers ------------------------------------------------------------------------------------


def worst_by(
    results: Results, key: Callable[[int, str], object]
) -> dict[object, tuple[float, int, str, int]]:
    """For each key, the smallest p-value, where it is, and out of how many."""
    groups = defaultdict(list)
    for (_, n, test), p in results.items():
        groups[key(n, test)].append((p, n, test))
    return {group: (*min(values), len(values)) for group, values in groups.items()}


def test_report():
    print(f"\n{len(ours())} p-values of ours, {len(ideal())} of NumPy's, bound {bound():.1e} each")
    print("\nworst p-value by test            ours of   at n                    NumPy's of   at n")
    others = worst_by(ideal(), lambda n, test: test.split(": ")[-1])
    nothing = (1.0, 0, "", 0)
    for kind, (p, n, _, count) in worst_by(ours(), lambda n, test: test.split(": ")[-1]).items():
        q, m, _, other_count = others.get(kind, nothing)
        print(f"{kind:30} {p:7.1e} {count:4} {n:<20} {q:10.1e} {other_count:4} {m}")
    print("\nworst p-value by the bits of n: ours")
    for bits, (p, n, test, count) in sorted(worst_by(ours(), lambda n, test: n.bit_length()).items()):
        print(f"{bits:2} bits: {p:7.1e} of {count:4}, n = {n}, {test}")
    print("\ncontrols: rejected by how many tests, and the surest")
    for name, suite, n, tests, count in rejections():
        print(f"{name:18} {suite:16} n = {n:<20} {len(tests):2} of {count:3}: {'; '.join(tests[:3])}")
