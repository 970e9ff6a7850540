"""Orders: pure functions of (seed, epoch, position), frozen, cheap to seek in, each with the property it is for."""

import pickle
import tracemalloc
from bisect import bisect_right
from collections import Counter
from fractions import Fraction
from itertools import accumulate, count, islice
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.core.rng import derive_bytes, derive_seed
from helios.data import (
    BucketedOrder,
    MixtureOrder,
    Permutation,
    RandomOrder,
    ResumableDistributedSampler,
    ResumableSampler,
    SequentialOrder,
    SubsetOrder,
    TorchOrder,
    WeightedOrder,
)

pytestmark = pytest.mark.long

exact = settings(deadline=None, derandomize=True)  # no clock, the same examples every time
MASK = 2**64 - 1
LENGTHS = [37 * i % 23 for i in range(50)]  # each length twice or more: the sort has ties
WEIGHTS = [0.0, 3, 0, 1, 0.5, 0, 2, 1e-3, 9, 0]


def by_epoch(epoch):
    return [1, 2.6 + epoch, 0 if epoch == 1 else 1.3]


def whole(order, seed, epoch):
    return order.of_epoch(seed, epoch)(np.arange(order.num_samples)).tolist()


# --- the same algorithms, written once more from their descriptions ---------------------------------


def word_of(algorithm, seed, epoch):
    """Two rounds of SplitMix64's finalizer, with Python's ints only."""
    key = derive_bytes(seed, algorithm, epoch, num_bytes=24)
    first, second, last = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8, 16))

    def finalize(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    return lambda position: finalize(finalize(position ^ first) ^ second) ^ last


def torch_reference(n, shuffle, seed, epoch):
    sampler = torch.utils.data.DistributedSampler(range(n), 1, 0, shuffle, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def weighted_reference(weights, n, seed, epoch):
    word, cumulative = word_of("helios-weighted-v1", seed, epoch), list(accumulate(map(float, weights)))
    return [bisect_right(cumulative, (word(p) >> 11) / 2**53 * cumulative[-1]) for p in range(n)]


def bucketed_reference(lengths, batch_size, window_batches, seed, epoch):
    n, word = len(lengths), word_of("helios-bucketed-v1", seed, epoch)
    permutation, size, order = Permutation(n, seed, epoch), min(batch_size * window_batches, n), []
    for start in range(0, n, size):
        window = [permutation[p] for p in range(start, min(start + size, n))]
        ranked = sorted(range(len(window)), key=lambda i: lengths[window[i]])
        num_full, rest = divmod(len(window), batch_size)
        cut = word(start + size - 1) % (num_full * batch_size + 1)
        full, last = ranked[:cut] + ranked[cut + rest :], ranked[cut : cut + rest]
        batches = [full[i * batch_size :][:batch_size] for i in range(num_full)]
        batches = [batches[i] for i in sorted(range(num_full), key=lambda i: word(start + i))]
        order += [window[i] for batch in [*batches, last] for i in sorted(batch)]
    return order


def quotas_of(weights, n):
    """The largest remainder, with fractions."""
    shares = [Fraction(w) * n / sum(map(Fraction, weights)) for w in weights]
    by_remainder = sorted(range(len(shares)), key=lambda i: int(shares[i]) - shares[i])
    extra = by_remainder[: n - sum(map(int, shares))]
    return [int(share) + (i in extra) for i, share in enumerate(shares)]


def mixture_reference(sizes, weights, n, block_size, seed, epoch):
    """Draws from the first epoch on: a block's place is known only by what was drawn before."""

    def draws(number):
        size, first = sizes[number], sum(sizes[:number])
        for number_of_pass in count():
            permutation = Permutation(size, derive_seed(seed, "helios-mixture-v1", number), number_of_pass)
            yield from (first + permutation[p] for p in range(size))

    streams, block_size = [draws(number) for number in range(len(sizes))], min(block_size, n)
    for each in range(epoch + 1):
        order, word = [], word_of("helios-mixture-v1", seed, each)
        for start in range(0, n, block_size):
            quotas = quotas_of(weights(each) if callable(weights) else weights, min(block_size, n - start))
            drawn = [i for stream, quota in zip(streams, quotas, strict=True) for i in islice(stream, quota)]
            order += [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: word(start + i))]
    return order


def bucketed(*args):
    return BucketedOrder(LENGTHS, *args), lambda *at: bucketed_reference(LENGTHS, *args, *at)


def weighted(weights, n):
    return WeightedOrder(weights, n), lambda *at: weighted_reference(weights, n, *at)


def mixture(*args):
    return MixtureOrder(*args), lambda *at: mixture_reference(*args, *at)


def of_torch(n, shuffle):
    return TorchOrder(n, shuffle), lambda *at: torch_reference(n, shuffle, *at)


def random(n):
    return RandomOrder(n), lambda *at: [Permutation(n, *at)[p] for p in range(n)]


def subset(indices, inner):
    return SubsetOrder(indices, inner[0]), lambda *at: [indices[i] for i in inner[1](*at)]


# Windows that end within, at, and beyond the end of the epoch; windows and epochs of one position.
ORDERS = {
    "random": random(50),
    "random, one": random(1),
    "sequential": (SequentialOrder(50), lambda *at: list(range(50))),
    "torch": of_torch(50, True),
    "torch, in sequence": of_torch(50, False),
    "weighted": weighted(WEIGHTS, 10),
    "weighted, more draws": weighted(WEIGHTS, 77),
    "weighted, one": weighted([0.1], 1),
    "bucketed": bucketed(4, 3),
    "bucketed, full windows": bucketed(5, 2),
    "bucketed, one window": bucketed(4, 50),
    "bucketed, one batch": bucketed(51, 1),
    "bucketed, batches of one": bucketed(1, 7),
    "bucketed, windows of one": bucketed(1, 1),
    "mixture": mixture([20, 3, 1], [5, 2, 1], 50, 16),
    "mixture, full blocks": mixture([20, 3, 1], [5, 2, 1], 48, 16),
    "mixture, small epoch": mixture([20, 3, 1], [5, 2, 0], 9, 1024),
    "mixture by epoch": mixture([20, 3, 5], by_epoch, 50, 16),
    "mixture of one": mixture([7], [0.3], 7, 1),
}
ORDERS |= {
    f"subset, {name}": subset([i * i % 83 for i in range(50)], ORDERS[name])
    for name in ("random", "sequential", "torch", "bucketed")
}
ORDERS["subset, weighted"] = subset(list(range(9, -1, -1)), ORDERS["weighted, more draws"])
ORDERS["subset, mixture"] = subset([*range(24)], ORDERS["mixture"])
ORDERS["subset, subset"] = subset([*range(83)][::-1], ORDERS["subset, random"])
every_order = pytest.mark.parametrize(("order", "reference"), ORDERS.values(), ids=ORDERS.keys())


@every_order
def test_plain_python_agrees(order, reference):
    for seed, epoch in ((0, 0), (6691, 1), (3, 4)):
        assert whole(order, seed, epoch) == reference(seed, epoch)
    assert order.num_samples == len(reference(0, 0))


@every_order
def test_an_order_is_a_pure_function(order, reference):
    """Any positions, in any order and any blocks, twice, from another instance: as the whole says."""
    copied = pickle.loads(pickle.dumps(order))
    assert copied.digest() == order.digest()

    @settings(exact, max_examples=20)
    @given(
        st.lists(st.lists(st.integers(0, order.num_samples - 1)), max_size=4),
        st.sampled_from([(0, 0), (5, 1), (5, 2)]),
    )
    def check(blocks, at):
        expected, function = whole(copied, *at), order.of_epoch(*at)
        assert function(np.arange(order.num_samples)).dtype == np.int64
        for block in blocks:
            for dtype in (np.int64, np.uint64, np.int16):  # positions may come from anywhere
                assert function(np.array(block, dtype=dtype)).tolist() == [expected[p] for p in block]

    check()


@every_order
def test_positions_outside_the_epoch_are_refused(order, reference):
    n, function = order.num_samples, order.of_epoch(3, 1)
    for bad in ([-1], [n], [0, n], [2**62], [0, -1]):
        with pytest.raises(
            ValueError, match=rf"positions must be in range\({n}\), found {min(bad)} to {max(bad)}"
        ):
            function(np.array(bad))
    assert function(np.arange(n)).tolist() == reference(3, 1)


@pytest.mark.parametrize("name", [name for name in ORDERS if "one" not in name and "sequen" not in name])
def test_other_seeds_and_epochs_give_other_orders(name):
    order = ORDERS[name][0]
    orders = [whole(order, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (0, 2), (9, 0), (9, 3))]
    assert len(set(map(tuple, orders))) == 5


BIG = {
    "random": RandomOrder(10**12),
    "torch": TorchOrder(10**5),
    "weighted": WeightedOrder(np.arange(10**5) % 11, 10**15),
    "bucketed": BucketedOrder(np.arange(10**5) ** 2 % 997, 32),
    "mixture": MixtureOrder([10**12, 5, 10**6], [3, 0.01, 1], 10**12),
}
# Frozen: where positions 0, 1, 2, the middle and the last one lead, for (6691, 0) and (6691, 3).
GOLDEN = {
    "random": [
        [488956285825, 812101908318, 314095890758, 282291224859, 737664997882],
        [790025426370, 119876712953, 816026397878, 372507201003, 513935548615],
    ],
    "torch": [[77980, 68785, 23398, 35941, 51007], [32049, 25936, 69249, 63701, 80154]],
    "weighted": [[25881, 99765, 94246, 12484, 3222], [12890, 55401, 95149, 60902, 52584]],
    "bucketed": [[38325, 72872, 85725, 35828, 45530], [11736, 66030, 50158, 6038, 74266]],
    "mixture": [
        [786314855295, 689733878137, 1000000702885, 1000000634545, 317514294719],
        [418513166717, 914061517057, 141950456504, 611414613873, 499529751901],
    ],
}
SMALL = {
    "random": [10, 44, 28, 6, 9, 5, 12, 38, 23, 25, 18, 7],
    "torch": [11, 34, 33, 43, 30, 4, 6, 45, 20, 24, 49, 38],
    "weighted": [8, 8, 8, 6, 8, 8, 8, 8, 8, 8],
    "bucketed": [10, 28, 5, 23, 44, 6, 9, 18, 12, 38, 25, 7],
    "bucketed, full windows": [10, 28, 5, 38, 23, 44, 6, 9, 12, 25, 7, 0],
    "mixture": [5, 21, 15, 22, 23, 20, 13, 21, 14, 6, 9, 18],
    "mixture by epoch": [20, 21, 21, 20, 23, 20, 22, 21, 22, 13, 20, 19],
    "subset, bucketed": [17, 37, 25, 31, 27, 36, 81, 75, 61, 33, 44, 49],
    "subset, weighted": [1, 1, 1, 3, 1, 1, 1, 1, 1, 1, 3, 1],
    "subset, mixture": [5, 21, 15, 22, 23, 20, 13, 21, 14, 6, 9, 18],
}


@pytest.mark.parametrize("name", BIG)
def test_orders_are_frozen(name):
    order = BIG[name]
    probes = np.array([0, 1, 2, order.num_samples // 2, order.num_samples - 1])
    assert [order.of_epoch(6691, epoch)(probes).tolist() for epoch in (0, 3)] == GOLDEN[name]
    if order.num_samples == 10**5:
        within = SubsetOrder(np.arange(10**5) * 3 + 1, order)
        assert (within.of_epoch(6691, 3)(probes) == 3 * np.array(GOLDEN[name][1]) + 1).all()


@pytest.mark.parametrize("name", SMALL)
def test_small_orders_are_frozen(name):
    assert whole(ORDERS[name][0], 0, 5)[:12] == SMALL[name]


def test_digests_are_frozen():
    """They are kept in states, which later releases must not refuse."""
    assert [BIG[name].digest() for name in ("weighted", "bucketed", "mixture")] == [
        "37127b76aeb115d8",
        "4e2d233aa8dd1ec8",
        "fea61c217df8ed59",
    ]
    assert [SubsetOrder([3, 1, 2], order).digest() for order in (None, WeightedOrder([1, 2, 3]))] == [
        "9b18effffe2e9216",
        "799cdde5c7698935",
    ]
    assert MixtureOrder([4, 5], lambda epoch: [1, 2]).digest() == "3f891ff8f1d511bd"
    assert RandomOrder(9).digest() is SequentialOrder(9).digest() is TorchOrder(9).digest() is None


# --- cost, sharing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "weighted", "mixture"])
def test_seeking_takes_no_memory_in_proportion_to_the_epoch(name):
    order = BIG[name]
    tracemalloc.start()
    for position in (0, order.num_samples // 2, order.num_samples - 1):
        order.of_epoch(1, 10**6)(np.array([position]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


class Counting(np.ndarray):
    """Lengths that count how often they are looked up."""

    looked_up = 0

    def __getitem__(self, key):
        found = np.asarray(super().__getitem__(key))
        Counting.looked_up += found.size
        return found


@pytest.mark.parametrize("is_subset", [False, True])
@pytest.mark.parametrize("sizes", [[20, 20], [1, 99], [99, 1]])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_index_costs_two_windows_at_most(is_subset, sizes, rank):
    """Also on a rank whose batches are few and far between."""
    n, order = 20_000, BucketedOrder(np.arange(20_000).view(Counting), 40, 10)
    sampler = ResumableDistributedSampler(
        range(n), 2, rank, batch_size=sizes, order=SubsetOrder(range(n), order) if is_subset else order
    )
    sampler.start = 7777
    Counting.looked_up = 0
    next(iter(sampler))
    assert 0 < Counting.looked_up <= 2 * order.window
    list(sampler)  # begun anew
    assert Counting.looked_up <= n + 3 * order.window  # each window is sorted once


@every_order
def test_one_order_serves_many_samplers(order, reference):
    """Taken in turn, epochs there and back: no sampler is given what another one cached."""
    n = next(n for n in range(1, 99) if accepts(order, n))
    samplers = [ResumableSampler(range(n), seed, order=order) for seed in (0, 1)]
    for epoch in (0, 2, 1, 0):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        in_turn = list(zip(*samplers, strict=True))
        assert in_turn == list(zip(*(reference(seed, epoch) for seed in (0, 1)), strict=True))


def accepts(order, n):
    try:
        order.check_dataset(n)
    except ValueError:
        return False
    return True


@every_order
@pytest.mark.parametrize("sizes", [[4], [3, 3, 3], [1, 5, 2]], ids=str)
def test_ranks_deal_out_one_order(order, reference, sizes):
    """Any world and batch sizes: each position on one rank once, with what stands there."""
    if order.is_interleaved:
        sizes = sizes[:1] * len(sizes)  # equal batches, or they are refused
    n, dealt = next(n for n in range(1, 99) if accepts(order, n)), []
    for rank in range(len(sizes)):
        sampler = ResumableDistributedSampler(
            range(n), len(sizes), rank, seed=2, batch_size=sizes, tail="exact", order=order
        )
        positions = [p for step in sampler.sharding.steps(0) for p in step.positions().tolist()]
        dealt += zip(positions, sampler, strict=True)
    assert sorted(dealt) == list(enumerate(reference(2, 0)))


# --- weighted ---------------------------------------------------------------------------------------


def deviation(counts, weights):
    """How many standard deviations the chi-square of counts is above what weights let expect."""
    expected = np.array([Fraction(w) * sum(counts) / sum(map(Fraction, weights)) for w in weights], float)
    drawn = expected > 0
    chi_square = ((np.array(counts)[drawn] - expected[drawn]) ** 2 / expected[drawn]).sum()
    return (chi_square - drawn.sum() + 1) / sqrt(2 * max(drawn.sum() - 1, 1))


@pytest.mark.parametrize(
    "weights",
    [
        [0, 1, 0, 2, 3, 0, 0.5, 7, 0],
        list(range(200)),
        [1e308, 0, 1e308, 1.5e308],  # more than a float holds, together
        [5e-324, 1e-323, 0, 5e-324],  # the smallest floats there are
        [1e-3, 1, 1e-3],
        [4],
    ],
    ids=lambda weights: str(weights[:4]),
)
def test_counts_follow_the_weights(weights):
    n = 200_000
    for seed, epoch in ((0, 0), (0, 1), (6691, 12)):
        drawn = whole(WeightedOrder(weights, n), seed, epoch)
        counts = np.bincount(drawn, minlength=len(weights)).tolist()
        assert deviation(counts, weights) < 5
        assert all(count == 0 for count, weight in zip(counts, weights, strict=True) if weight == 0)
    if len(weights) == 200:  # the control: weights that are a tenth off are noticed
        assert deviation(counts, [w * (1.1 if w < 100 else 1) for w in weights]) > 5


def test_draws_on_a_border_take_no_sample_without_weight(monkeypatch):
    """A draw of 0, one right between two samples, and the largest one: too rare to wait for."""
    draws = np.array([0, 0.5, 1 - 2**-53])
    monkeypatch.setattr("helios.data._hashing.PositionHash.uniforms", lambda self, positions: draws)
    assert whole(WeightedOrder([0, 1, 0, 0, 1, 0], 3), 0, 0) == [1, 4, 4]


def test_draws_of_neighbours_epochs_and_seeds_are_independent():
    n, num_weights = 100_000, 50
    order = WeightedOrder([1] * num_weights, n)
    first = np.array(whole(order, 0, 0))

    def deviates(other):
        matches = (first[: len(other)] == other).sum()
        return abs(matches - len(other) / num_weights) / sqrt(len(other) / num_weights)

    for seed, epoch in ((0, 1), (1, 0), (0, 2**40), (2**70, 0)):
        assert deviates(np.array(whole(order, seed, epoch))) < 5
    for lag in (1, 2, 64, 4096):
        assert deviates(first[lag:]) < 5
    assert deviates(first) > 100  # the control


# --- bucketed ---------------------------------------------------------------------------------------


@exact
@given(st.integers(1, 90), st.integers(1, 100), st.integers(1, 8), st.integers(0, 3), st.data())
def test_every_sample_once_whatever_the_buckets(n, batch_size, window_batches, epoch, data):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    order = BucketedOrder(lengths, batch_size, window_batches)
    assert sorted(whole(order, 1, epoch)) == list(range(n))


def padding(indices, lengths, batch_size):
    """Padding in proportion to what is not padding, every batch as long as its longest sample."""
    batches = [lengths[indices[i : i + batch_size]] for i in range(0, len(indices), batch_size)]
    return sum((batch.max() - batch).sum() for batch in batches) / lengths.sum()


def test_batches_have_little_padding():
    lengths = np.random.default_rng(1).integers(1, 500, 20_000)
    bucketed = padding(whole(BucketedOrder(lengths, 16), 0, 1), lengths, 16)
    assert bucketed < 0.05
    assert padding(whole(BucketedOrder(lengths, 16, 200), 0, 1), lengths, 16) < bucketed
    assert padding(whole(RandomOrder(20_000), 0, 1), lengths, 16) > 10 * bucketed  # the control


def test_batches_and_their_samples_are_shuffled():
    """Neither do epochs begin with short batches, nor batches with short samples; nobody is always last."""
    n, batch_size, lengths = 42, 4, np.arange(42)
    orders = [np.array(whole(BucketedOrder(lengths, batch_size), 0, epoch)) for epoch in range(200)]
    firsts = [order[0] for order in orders]
    assert len(set(firsts)) > n / 2
    rising = [(np.diff(order[i : i + 4]) > 0).all() for order in orders for i in range(0, 40, 4)]
    assert 0.5 < np.mean(rising) * 24 < 2  # of 24 orders of a batch, one rises
    last = Counter(order[-2:].max() for order in orders)  # the partial batch
    assert len(last) > 8
    assert last[n - 1] < 50


# --- mixture ----------------------------------------------------------------------------------------


@settings(exact, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(1, 70),
    st.integers(20, 40),
    st.booleans(),
)
def test_quotas_are_exact_and_passes_go_on_across_blocks_and_epochs(datasets, n, block, is_function):
    """After every block, no sample of a dataset was taken twice more than another one."""
    sizes, weights = zip(*datasets, strict=True)
    weights = [*weights[:-1], weights[-1] or 1]
    n = max(n, 20)
    weights_at = (lambda epoch: weights[epoch % 2 :] + weights[: epoch % 2]) if is_function else weights
    order = MixtureOrder(sizes, weights_at, n, block)
    dataset_of = np.repeat(np.arange(len(sizes)), sizes)
    taken = np.zeros(sum(sizes), int)
    for epoch in range(4):
        expected = quotas_of(weights_at(epoch) if is_function else weights, min(block, n))
        indices = np.array(whole(order, 3, epoch))
        for start in range(0, n, order.window):
            drawn = indices[start : start + order.window]
            if len(drawn) == order.window:
                quotas = np.bincount(dataset_of[drawn], minlength=len(sizes))
                assert quotas.tolist() == expected
            taken += np.bincount(drawn, minlength=len(taken))
            for number in range(len(sizes)):
                assert np.ptp(taken[dataset_of == number]) <= 1


def test_passes_are_in_different_orders():
    order = MixtureOrder([40], [1], 120, 40)
    passes = [tuple(whole(order, 0, epoch)[i : i + 40]) for epoch in (0, 1) for i in (0, 40, 80)]
    assert len(set(passes)) == 6
    assert {len(set(each)) for each in passes} == {40}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 4, 1], [3, 11, 2]),  # equal remainders: the first ones, not as rounding has it
        ([1e308, 1e308, 0], [8, 8, 0]),
        ([5e-324, 1e-323, 5e-324], [4, 8, 4]),
        (torch.tensor([1, 0, 1]), [8, 0, 8]),
    ],
)
def test_quotas_of_odd_weights(weights, expected):
    indices = whole(MixtureOrder([100] * 3, weights, 32, 16), 0, 0)
    assert [np.bincount(np.array(indices[i : i + 16]) // 100, minlength=3).tolist() for i in (0, 16)] == [
        expected
    ] * 2


def test_a_mixture_goes_on_after_more_draws_than_a_word_counts():
    n, half = 2**62 - 1, 500
    order = MixtureOrder([10**6, 10], [1, 1], n, 2 * half)
    key = derive_seed(0, "helios-mixture-v1", 1)
    for epoch in (1, 5, 999_999):
        before = epoch * (n // 1000 * half + n % 1000 // 2)
        expected = Counter(
            10**6 + Permutation(10, key, p // 10)[p % 10] for p in range(before, before + half)
        )
        found = order.of_epoch(0, epoch)(np.arange(2 * half)).tolist()
        assert Counter(i for i in found if i >= 10**6) == expected


# --- what is given ----------------------------------------------------------------------------------


def test_numbers_may_come_in_any_container(tmp_path):
    """The same order and digest from a list, a tensor, a narrow array, and one that stays on disk."""
    np.save(tmp_path / "numbers.npy", np.array(LENGTHS, dtype=np.uint8))
    on_disk = np.load(tmp_path / "numbers.npy", mmap_mode="r")
    makes = (WeightedOrder, lambda x: BucketedOrder(x, 4), SubsetOrder, lambda x: MixtureOrder([9] * 50, x))
    for make in makes:
        given = [LENGTHS, tuple(LENGTHS), torch.tensor(LENGTHS), np.array(LENGTHS, dtype=np.uint64), on_disk]
        orders = [make(numbers) for numbers in given]
        assert len({(order.digest(), *whole(order, 1, 1)) for order in orders}) == 1
    big = [2**63, 1, 2**64 - 1]
    assert whole(BucketedOrder(big, 1, 3), 0, 0) == whole(BucketedOrder([1, 0, 2], 1, 3), 0, 0)
    assert whole(WeightedOrder(big, 20), 0, 0) == whole(WeightedOrder([0.5, 0, 1], 20), 0, 0)
    n = np.uint64(50)
    assert whole(RandomOrder(n), np.int64(3), np.uint8(2)) == whole(RandomOrder(50), 3, 2)
    assert MixtureOrder(np.array([100, 100], dtype=np.int8), [1, 1]).num_samples == 200


def test_an_order_does_not_change_with_what_it_was_made_of():
    numbers = np.array([1, 2, 3])
    orders = [WeightedOrder(numbers, 60), SubsetOrder(numbers), MixtureOrder([9, 9, 9], numbers)]
    before = [whole(order, 0, 0) for order in orders]
    numbers[:] = [3, 1, 0]
    assert [whole(order, 0, 0) for order in orders] == before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WeightedOrder([1, 2, 3]), WeightedOrder([1, 3, 2])),
        (BucketedOrder([1, 2, 3], 2, 1), BucketedOrder([1, 2, 4], 2, 1)),
        (BucketedOrder([1] * 9, 2, 1), BucketedOrder([1] * 9, 3, 1)),
        (BucketedOrder([1] * 9, 2, 1), BucketedOrder([1] * 9, 2, 2)),
        (MixtureOrder([4, 5], [1, 1]), MixtureOrder([4, 5], [2, 1])),
        (MixtureOrder([4, 5], [1, 1]), MixtureOrder([5, 4], [1, 1])),
        (MixtureOrder([4, 5], [1, 1], 9, 2), MixtureOrder([4, 5], [1, 1], 9, 4)),
        (
            MixtureOrder([10, 10], [6, 4], 3, 2),
            MixtureOrder([10, 10], [4, 6], 3, 2),
        ),  # in the last block only
        (SubsetOrder([1, 2]), SubsetOrder([2, 1])),
        (SubsetOrder([1, 2]), SubsetOrder([1, 2, 2])),
        (SubsetOrder([1, 2], WeightedOrder([1, 2])), SubsetOrder([1, 2], WeightedOrder([2, 1]))),
    ],
)
def test_the_digest_tells_orders_apart(one, other):
    assert one.digest() != other.digest()
    assert one.digest() == pickle.loads(pickle.dumps(one)).digest()


@pytest.mark.parametrize("batch_size", [2**31, 2**62, 2**80])
def test_batches_larger_than_anything(batch_size):
    expected = BucketedOrder(LENGTHS, 50)
    order = BucketedOrder(LENGTHS, batch_size, batch_size)
    assert (order.digest(), whole(order, 0, 0)) == (expected.digest(), whole(expected, 0, 0))


ARRAYS = {
    "weights": WeightedOrder,
    "lengths": lambda x: BucketedOrder(x, 4),
    "indices": SubsetOrder,
    r"weights\(0\)": lambda x: MixtureOrder([3, 3], lambda epoch: x),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ([], ValueError, "is empty: there is nothing to sample"),
        ([[1, 2]], TypeError, r"must be a 1-d array of (numbers|ints), found int64, shape \(1, 2\)"),
        (7, TypeError, r"must be a 1-d array of (numbers|ints), found int64, shape \(\)"),
        (["a"], TypeError, "must be a 1-d array of (numbers|ints), found <U1"),
        ("ab", TypeError, "must be a 1-d array of (numbers|ints), found <U2"),
        (None, TypeError, "must be a 1-d array of (numbers|ints), found object"),
        ([True, False], TypeError, "must be a 1-d array of (numbers|ints), found bool"),
        ([1j, 1], TypeError, "must be a 1-d array of (numbers|ints), found complex128"),
        ([[1], [1, 2]], TypeError, "must be a 1-d array of (numbers|ints), found a list"),
        (
            torch.ones(2, requires_grad=True),
            TypeError,
            "must be a 1-d array .* found a Tensor .* requires grad",
        ),
    ],
    ids=str,
)
def test_arrays_that_are_none_are_refused_by_name(name, numbers, error, message):
    with pytest.raises(error, match=f"^{name} {message}"):
        ARRAYS[name](numbers)


def mix(weights, sizes=(3, 3), **options):
    return MixtureOrder(sizes, weights, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: WeightedOrder([1, -1]),
            ValueError,
            r"weights must be finite and 0 or more, found -1\.0 at 1",
        ),
        (lambda: WeightedOrder([float("nan")]), ValueError, "weights must be finite and .*, found nan at 0"),
        (lambda: WeightedOrder([1, float("inf")]), ValueError, "weights must be finite .*, found inf at 1"),
        (lambda: WeightedOrder([0, 0]), ValueError, "weights must not all be 0"),
        (lambda: WeightedOrder([1], 0), ValueError, "num_samples must be 1 or more, found 0"),
        (lambda: WeightedOrder([1], True), TypeError, "num_samples must be an int, found the bool True"),
        (lambda: BucketedOrder([1, float("nan")], 2), ValueError, "lengths must not be NaN, found one at 1"),
        (lambda: BucketedOrder([1], 0), ValueError, "batch_size must be 1 or more, found 0"),
        (lambda: BucketedOrder([1], 2, -1), ValueError, "window_batches must be 1 or more, found -1"),
        (lambda: BucketedOrder([1], 1.5), TypeError, r"batch_size must be an int, found float 1\.5"),
        (lambda: mix([1]), ValueError, "weights must be one for each of 2 datasets, found 1"),
        (lambda: mix([1, 1e-9]), ValueError, r"weights\[1\] = 1e-09 is too small: a block of 6 positions"),
        (lambda: mix([0, 0]), ValueError, "weights must not all be 0"),
        (lambda: mix([1, -1]), ValueError, "weights must be finite and 0 or more, found -1"),
        (lambda: mix([1, 1], block_size=0), ValueError, "block_size must be 1 or more, found 0"),
        (lambda: mix([1, 1], num_samples=2**62 + 1), ValueError, r"num_samples must be 1 to 2\*\*62, found"),
        (lambda: mix([1, 1], [3, 0]), ValueError, r"sizes\[1\] must be 1 or more, found 0"),
        (lambda: mix([1, 1], [3, 2.0]), TypeError, r"sizes\[1\] must be an int, found float 2\.0"),
        (lambda: mix([1, 1], [2**62, 1]), ValueError, r"the sum of sizes must be 1 to 2\*\*62, found"),
        (lambda: mix([1], 3), TypeError, "sizes must be a sequence of ints, found int 3"),
        (lambda: SubsetOrder([3, -1]), ValueError, "indices must be 0 or more, and fit int64, found -1 to 3"),
        (lambda: SubsetOrder([2**63]), ValueError, "indices must be 0 or more, and fit int64"),
        (lambda: SubsetOrder([0.0]), TypeError, "indices must be a 1-d array of ints, found float64"),
        (lambda: SubsetOrder([0], "random"), TypeError, "order must be an Order or None, found str"),
        (lambda: SubsetOrder([0, 1], RandomOrder(3)), ValueError, "order must be for the 2 samples .* for 3"),
        (lambda: RandomOrder(0), ValueError, "num_samples must be 1 or more, found 0"),
        (lambda: SequentialOrder(2**62 + 1), ValueError, r"num_samples must be 1 to 2\*\*62, found"),
        (lambda: TorchOrder(3.0), TypeError, r"num_samples must be an int, found float 3\.0"),
        (lambda: TorchOrder(3, 1), TypeError, "shuffle must be True or False, found int 1"),
        (
            lambda: TorchOrder(3).of_epoch(2**64 - 1, 1),
            ValueError,
            r"seed \+ epoch must be less than 2\*\*64",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_weights_of_a_later_epoch_are_refused_by_its_number():
    order = mix(lambda epoch: [1, 1] if epoch < 2 else [1])
    whole(order, 0, 1)
    with pytest.raises(ValueError, match=r"weights\(2\) must be one for each of 2 datasets, found 1"):
        whole(order, 0, 2)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda positions: positions.tolist(), "'list', None"),
        (lambda positions: positions[:-1], r"dtype\('int64'\), \(4,\)"),
        (lambda positions: positions / 2, r"dtype\('float64'\), \(5,\)"),
    ],
    ids=["a list", "too few", "floats"],
)
def test_an_order_of_the_users_must_return_an_index_for_each_position(wrong, found):
    class Own(RandomOrder):
        def of_epoch(self, seed, epoch):
            return wrong

    with pytest.raises(
        TypeError, match=rf"Own must return an int64 array of shape \(5,\), found \({found}\)"
    ):
        list(ResumableSampler(range(5), batch_size=5, order=Own(5)))
