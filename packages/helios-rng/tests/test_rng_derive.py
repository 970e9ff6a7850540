"""derive_seed: frozen, and no two paths alias."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.core import rng

GOLDEN = {
    (0, 1): 14290838711173017141,
    (1, 0): 515762925087543872,
    (6691, "shuffle", 3): 17438549716239026677,
    (-1,): 2940876820882131078,
    (2**70, "é", -5): 3652985175226907152,
}


@pytest.mark.parametrize("path", GOLDEN, ids=str)
def test_golden_values_are_frozen(path):
    assert rng.DERIVATION == "helios-seed-v1"
    assert rng.derive_seed(*path) == GOLDEN[path]


def test_golden_bytes_are_frozen():
    expected = "c2bdf856b82dae5640eafbbd0389a40f3a259d82cdcdb5088110dcf509e87095"
    assert rng.derive_bytes(0, "a").hex() == expected


elements = st.integers() | st.text(max_size=5)
paths = st.tuples(st.integers(), st.lists(elements, max_size=4)).map(lambda t: (t[0], *t[1]))


@settings(deadline=None, derandomize=True)  # no clock, the same examples every time
@given(paths, paths)
def test_no_two_paths_alias(a, b):
    same = [(type(x), x) for x in a] == [(type(x), x) for x in b]
    assert (rng.derive_seed(*a) == rng.derive_seed(*b)) == same


def test_addition_aliases_where_derivation_does_not():
    pairs = list(itertools.product(range(40), repeat=2))
    assert len({s + e for s, e in pairs}) < len(pairs)  # the control: what seed + epoch does
    assert len({rng.derive_seed(s, e) for s, e in pairs}) == len(pairs)
    assert (
        len({rng.derive_seed(0, *p) for p in [(), (0,), (0, 0), ("0",), ("",), ("", ""), (1, 0), (10,)]}) == 8
    )


def test_every_output_bit_depends_on_the_epoch():
    seeds = [rng.derive_seed(7, epoch) for epoch in range(4096)]
    ones = [sum(s >> bit & 1 for s in seeds) for bit in range(64)]
    assert all(abs(n - 2048) < 5 * 32 for n in ones)  # 5 sigma of a fair coin
    assert all(0 <= s < 2**64 for s in seeds)


def test_numpy_integers_count_as_ints():
    import numpy as np

    assert rng.derive_seed(np.int64(3), np.uint8(4)) == rng.derive_seed(3, 4)


@pytest.mark.parametrize(
    "bad", [(1.0,), ("1",), (None,), (True,), (0, 1.5), (0, None), (0, b"x"), (0, False)]
)
def test_wrong_types_are_named(bad):
    with pytest.raises(TypeError, match=r"seed|path\[0\]"):
        rng.derive_seed(*bad)


@pytest.mark.parametrize("num_bytes", [0, 65, -1])
def test_wrong_length_is_named(num_bytes):
    with pytest.raises(ValueError, match=r"num_bytes must be 1 to 64, found"):
        rng.derive_bytes(0, num_bytes=num_bytes)
