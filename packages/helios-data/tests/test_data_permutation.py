"""The permutation: a bijection, frozen, uniform, and of constant size."""

import hashlib
import tracemalloc
from math import factorial, isqrt, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.data import ALGORITHM, Permutation
from helios.data._permutation import BLOCK_SIZE, MAX_NUM_SAMPLES

exact = settings(deadline=None, derandomize=True)  # no clock, the same examples every time
MASK = 2**64 - 1
SIZES = sorted(
    {2**k + d for k in (12, 13, 16) for d in (-1, 0, 1)}
    | {k * k + d for k in (65, 100, 256) for d in (-1, 0, 1)}
    | {65537, 262145, 1048577}  # 2**(2k) + 1, where a library's shuffle loses an index
)

# Frozen: what each of these maps its first four positions, the middle and the last one to.
GOLDEN = {
    (1, 0, 0): [0, 0, 0],
    (2, 0, 0): [0, 1, 1, 1],
    (10, 6691, 0): [6, 8, 3, 5, 0, 1],
    (4096, 6691, 3): [3652, 3362, 1941, 1804, 3712, 1362],
    (4097, 6691, 3): [963, 3789, 3419, 2523, 3067, 2018],
    (10**6, 6691, 0): [798340, 130279, 526251, 735734, 443026, 62357],
    (10**6, 6691, 1): [679420, 59281, 794291, 913738, 261354, 162863],
    (10**12, -5, 7): [457973346971, 196974260947, 872309916603, 932113198368, 648926004771, 849125021560],
    (2**62, 2**70, 2**40): [
        4298800560424176922,
        3525948038334431478,
        1677960035718806421,
        3759004987039872849,
        1095349916782982695,
        1710425575608033402,
    ],
}


def probes(n):
    return [p for p in (0, 1, 2, 3) if p < n] + [n // 2, n - 1]


class Reference:
    """The same algorithm, written once more with Python's ints only."""

    def __init__(self, n, seed, epoch, num_rounds=12):
        def encode(element):
            if isinstance(element, str):
                tag, body = b"s", element.encode()
            else:
                tag, body = b"i", element.to_bytes(element.bit_length() // 8 + 1, "little", signed=True)
            return tag + len(body).to_bytes(8, "little") + body

        message = b"".join(map(encode, (seed, "permutation", "helios-feistel12-v1", n, epoch)))
        stream = hashlib.shake_128(
            hashlib.blake2b(message, digest_size=32, person=b"helios-seed-v1").digest()
        )

        def words(count):
            digest = stream.digest(8 * count)
            return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]

        self.n = n
        self.table = None
        if n <= 4096:
            hashes = words(n)
            self.table = sorted(range(n), key=lambda i: (hashes[i], i))
        self.keys = words(num_rounds)
        self.b = isqrt(n - 1) + 1
        self.a = (n + self.b - 1) // self.b

    def once(self, value):
        left, right = divmod(value, self.b)
        for number, key in enumerate(self.keys):
            mixed = ((right if number % 2 == 0 else left) ^ key) * 0x9E3779B97F4A7C15 & MASK
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & MASK
            if number % 2 == 0:
                left = (left + ((mixed >> 32) * self.a >> 32)) % self.a
            else:
                right = (right + ((mixed >> 32) * self.b >> 32)) % self.b
        return left * self.b + right

    def __getitem__(self, position):
        if self.table is not None:
            return self.table[position]
        value = self.once(position)
        while value >= self.n:
            value = self.once(value)
        return value


@pytest.mark.parametrize("selector", GOLDEN, ids=str)
def test_golden_values_are_frozen(selector):
    assert ALGORITHM == "helios-feistel12-v1"
    permutation, reference = Permutation(*selector), Reference(*selector)
    assert [permutation[p] for p in probes(selector[0])] == GOLDEN[selector]
    assert [reference[p] for p in probes(selector[0])] == GOLDEN[selector]


@pytest.mark.parametrize("n", [1, 2, 5, 4095, 4096, 4097, 4224, 4225, 4226, 65537, 10**9, 2**53 + 1, 2**62])
def test_agrees_with_plain_python(n):
    start = max(n - 500, 0)
    reference = Reference(n, 11, 5)
    expected = [reference[p] for p in range(start, n)]
    assert Permutation(n, 11, 5).indices(start, n).tolist() == expected
    fewer_rounds = Reference(n, 11, 5, num_rounds=11)  # the control: the reference can tell
    assert n <= 4096 or expected != [fewer_rounds[p] for p in range(start, n)]


def is_bijection(indices, n):
    return len(indices) == n and np.array_equal(np.sort(indices), np.arange(n))


def test_every_small_size_is_a_bijection():
    for n in range(1, 700):
        assert is_bijection(Permutation(n, n, 0).indices(0, n), n), n


@pytest.mark.parametrize("n", SIZES)
def test_is_a_bijection(n):
    indices = Permutation(n, 3, 1).indices(0, n)
    assert is_bijection(indices, n)
    indices[5] = indices[6]  # the control: one index twice, one lost
    assert not is_bijection(indices, n)


@pytest.mark.parametrize("n", [10**9 + 7, 10**12, 2**53 + 1, 2**62 - 1, 2**62])
def test_large_sizes_stay_in_range_without_repeating(n):
    permutation = Permutation(n, 0, 0)
    for start in (0, n // 2 - 10000, n - 20000):
        indices = permutation.indices(start, start + 20000)
        assert indices.dtype == np.int64
        assert indices.min() >= 0 and indices.max() < n
        assert len(np.unique(indices)) == 20000


@settings(exact, max_examples=60)
@given(st.data())
def test_every_way_of_asking_gives_the_same(data):
    """Block boundaries leave no trace: a range is its parts, and its positions one by one."""
    n = data.draw(st.sampled_from([7, 4096, 4097, 3 * BLOCK_SIZE + 5, 10**6, 10**12, 2**62]))
    permutation = Permutation(n, data.draw(st.integers()), data.draw(st.integers(0, 2**40)))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, min(n, start + 2 * BLOCK_SIZE + 3)))
    whole = permutation.indices(start, stop)
    cut = data.draw(st.integers(start, stop))
    parts = np.concatenate([permutation.indices(start, cut), permutation.indices(cut, stop)])
    assert np.array_equal(parts, whole)
    positions = np.arange(start, stop)
    assert np.array_equal(permutation.take(positions[::-1].copy())[::-1], whole)
    for p in data.draw(st.lists(st.integers(0, max(stop - start - 1, 0)), max_size=3)):
        if p < len(whole):
            assert permutation[start + p] == whole[p] == permutation[start + p - n]


def test_is_a_sequence():
    permutation = Permutation(10, 1, 0)
    assert len(permutation) == 10
    assert list(permutation) == permutation.indices(0, 10).tolist()
    assert permutation.indices(4, 4).shape == (0,)
    assert Permutation(np.int64(10), np.int64(1), np.uint8(0))[np.int64(3)] == permutation[3]


# --- uniformity -------------------------------------------------------------------------------------


def z_score(counts, df):
    """How many sigmas a chi-square of equally likely cells lies off (Wilson and Hilferty)."""
    counts = np.asarray(counts, dtype=np.float64)
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2).sum() / expected
    spread = 2 / (9 * df)
    return ((chi_square / df) ** (1 / 3) - (1 - spread)) / sqrt(spread)


# About 25 statistics are looked at in this file, each on both sides: with 4.5 sigmas for each, one file
# in 6000 would fail by chance; the seeds are fixed, so it is this one or none.
BOUND = 4.5


def affine(n, seed, epoch):
    """The control: an affine shuffle, a bijection that is anything but random."""
    rng = np.random.default_rng([seed, epoch])
    factor = int(rng.choice([f for f in range(1, min(n, 5000)) if np.gcd(f, n) == 1]))
    return (np.arange(n) * factor + int(rng.integers(n))) % n


def ours(n, seed, epoch):
    return Permutation(n, seed, epoch).indices(0, n)


def three_rounds(n, seed, epoch):
    """The control: our own network with too few rounds."""
    permutation = Permutation(n, seed, epoch)
    permutation._keys = permutation._keys[:3]
    return permutation.indices(0, n)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_is_equally_likely(n):
    def score(shuffle):
        cells = {}
        for epoch in range(100 * factorial(n)):
            drawn = tuple(shuffle(n, 17, epoch).tolist())
            cells[drawn] = cells.get(drawn, 0) + 1
        counts = list(cells.values()) + [0] * (factorial(n) - len(cells))
        return z_score(counts, factorial(n) - 1)

    assert abs(score(ours)) < BOUND
    if n > 3:  # three samples have no permutation that is not affine
        assert score(affine) > 20


def position_score(shuffle, n, num_epochs, bins=16):
    """Where do samples go: 16 parts of the epoch times 16 parts of the dataset."""
    table = np.zeros((bins, bins))
    rows = np.arange(n) * bins // n
    weights = np.bincount(rows, minlength=bins)
    for epoch in range(num_epochs):
        np.add.at(table, (rows, shuffle(n, 5, epoch) * bins // n), 1)
    # Parts differ by one sample in size; scale to equal ones. Both margins are fixed.
    scaled = table / np.outer(weights, weights) * n
    return z_score(scaled * n / bins**2, (bins - 1) ** 2)


def difference_score(shuffle, n, num_epochs, lag):
    """How far apart do neighbours go: the difference at a lag, by its lower digit."""
    bins = isqrt(n - 1) + 1
    counts = np.zeros(bins)
    for epoch in range(num_epochs):
        indices = shuffle(n, 5, epoch)
        lower = indices % bins
        counts += np.bincount((lower[lag:] - lower[:-lag]) % bins, minlength=bins)
    return z_score(counts, bins - 1)


LARGE = [4097, 4225, 8191, 10007, 65537]


@pytest.mark.parametrize("n", LARGE)
def test_positions_are_uniform(n):
    assert abs(position_score(ours, n, 40)) < BOUND
    assert abs(position_score(affine, n, 40)) > BOUND


@pytest.mark.parametrize("n", LARGE)
def test_differences_are_uniform(n):
    root = isqrt(n - 1) + 1
    assert abs(difference_score(ours, n, 10, 1)) < BOUND
    assert abs(difference_score(ours, n, 10, root)) < BOUND
    assert abs(difference_score(affine, n, 10, 1)) > 20
    assert abs(difference_score(three_rounds, n, 10, root)) > 20


def correlation(x, y):
    return abs(np.corrcoef(x, y)[0, 1]) * sqrt(len(x))


@pytest.mark.parametrize("n", [1000, 10007, 65537])
def test_epochs_and_seeds_are_unrelated(n):
    base = ours(n, 0, 1)
    others = [ours(n, 0, 2), ours(n, 1, 1), ours(n, 1, 0), ours(n, -1, 1), ours(n, 2**64, 1)]
    for other in others:
        assert correlation(base, other) < BOUND
        assert (base == other).sum() < 10  # Poisson with mean 1
    for lag in (1, 2, 64, isqrt(n)):
        assert correlation(base[lag:], base[:-lag]) < BOUND
    assert (base == np.arange(n)).sum() < 10
    drift = (np.arange(n) + n // 10) % n  # the controls: an epoch that only rotates the one before
    assert correlation(base, drift[base]) > 10
    assert correlation(drift[1:], drift[:-1]) > 10


# --- size and errors --------------------------------------------------------------------------------


def peak_bytes(make):
    tracemalloc.start()
    make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("n", [10**6, 10**12, 2**62])
def test_memory_does_not_grow_with_n(n):
    def seek():
        permutation = Permutation(n, 0, 0)
        permutation.indices(n // 10 * 9, n // 10 * 9 + BLOCK_SIZE)

    assert peak_bytes(seek) < 2**20
    assert peak_bytes(lambda: np.random.default_rng(0).permutation(10**6)) > 2**20  # the control


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((0, 0, 0), ValueError, r"num_samples must be 1 to 2\*\*62, found 0"),
        (
            (MAX_NUM_SAMPLES + 1, 0, 0),
            ValueError,
            r"num_samples must be 1 to 2\*\*62, found 4611686018427387905",
        ),
        ((10, 0, -1), ValueError, r"epoch must be 0 or more, found -1"),
        ((10.0, 0, 0), TypeError, r"num_samples must be an int, found float 10\.0"),
        ((10, "a", 0), TypeError, r"seed must be an int, found str 'a'"),
        ((10, 0, None), TypeError, r"epoch must be an int, found NoneType None"),
        ((True, 0, 0), TypeError, r"num_samples must be an int, found the bool True"),
    ],
)
def test_wrong_arguments_are_named(args, error, message):
    with pytest.raises(error, match=message):
        Permutation(*args)


@pytest.mark.parametrize("n", [10, 5000])
def test_wrong_positions_are_named(n):
    permutation = Permutation(n, 0, 0)
    for start, stop in [(-1, 3), (0, n + 1), (3, 2), (n + 1, n + 1)]:
        with pytest.raises(ValueError, match=rf"0 <= start <= stop <= {n}, found \[{start}, {stop}\)"):
            permutation.indices(start, stop)
    with pytest.raises(TypeError, match=r"start must be an int, found float 0\.5"):
        permutation.indices(0.5, 3)
    for bad in ([-1], [n]):
        with pytest.raises(ValueError, match=rf"positions must be in range\({n}\), found {bad[0]} to"):
            permutation.take(np.array(bad))
    for bad in ([1, 2], np.array([0.5]), np.array([[1]]), np.array([True])):
        with pytest.raises(TypeError, match="positions must be a 1-d array of integers, found"):
            permutation.take(bad)
    for bad in (n, -n - 1):
        with pytest.raises(IndexError, match=rf"position must be in range\({n}\), found {bad}"):
            permutation[bad]
    with pytest.raises(TypeError, match="position must be an int, found slice"):
        permutation[0:3]
