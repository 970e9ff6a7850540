"""Samplers: an order that is a pure function, a start that is used once, a state that is believed only if it fits."""

import json
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helios.data import (
    ALGORITHM,
    LoaderStateError,
    Permutation,
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
    Tail,
    create_dataloader,
)

exact = settings(deadline=None, derandomize=True)  # no clock, the same examples every time
N = 50


class Reversed(ResumableSampler):
    """What the documentation asks of a user's sampler, and no more."""

    algorithm = "reversed-v1"

    def indices_at(self, positions):
        return self.num_samples - 1 - positions


class Rotating(ResumableSampler):
    """The other way: `__iter__` as a generator function that honours `start_iter`."""

    algorithm = "rotating-v1"

    def __iter__(self):
        first = self.start_iter * self.batch_size
        for position in range(first, self.num_samples):
            yield (position + 7 * self.epoch) % self.num_samples


KINDS = {
    "random": lambda n=N, bs=4: ResumableRandomSampler(range(n), 3, bs),
    "sequential": lambda n=N, bs=4: ResumableSequentialSampler(range(n), bs),
    "distributed": lambda n=N, bs=4: ResumableDistributedSampler(range(n), 3, 1, seed=3, batch_size=bs),
    "in order": lambda n=N, bs=4: ResumableDistributedSampler(range(n), 3, 1, False, 3, batch_size=bs),
    "exact": lambda n=N, bs=4: ResumableDistributedSampler(range(n), 3, 1, batch_size=bs, tail="exact"),
    "own indices_at": lambda n=N, bs=4: Reversed(range(n), 3, bs),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def test_the_order_is_the_permutation():
    sampler = ResumableRandomSampler(range(N), 3)
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        assert list(sampler) == Permutation(N, 3, epoch).indices(0, N).tolist()
    assert list(ResumableSequentialSampler(range(N))) == list(range(N))
    assert list(Reversed(range(N))) == list(range(N))[::-1]


def test_samples_are_ints():
    assert {type(i) for make in KINDS.values() for i in make()} == {int}


@every_kind
def test_same_in_the_first_and_in_another_block(make):
    """More samples than one block of work holds, from the start and from the middle."""
    sampler = make(30_000, 4)
    whole = list(sampler)
    assert len(whole) == len(sampler)
    sampler.start_iter = 1500
    assert list(sampler) == whole[6000:]
    sampler.start_iter = 1501
    assert list(sampler) != whole[6000:]  # the control


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("tail", [None, "exact", Tail.DROP])
def test_ranks_share_one_order(world, tail):
    order = Permutation(N, 3, 2).indices(0, N).tolist()
    group = [
        ResumableDistributedSampler(range(N), world, r, seed=3, batch_size=4, tail=tail) for r in range(world)
    ]
    for sampler in group:
        sampler.set_epoch(2)
    shares = [list(sampler) for sampler in group]
    assert [len(share) for share in shares] == [len(sampler) for sampler in group]
    steps = max(-(-len(share) // 4) for share in shares)
    dealt = [i for s in range(steps) for share in shares for i in share[4 * s : 4 * s + 4]]
    if tail is Tail.DROP:
        order = order[: N - N % world]
    assert dealt[: len(order)] == order
    padding = dealt[len(order) :]
    assert padding == (order[: -N % world] if tail is None else [])


@every_kind
def test_start_iter_is_used_once(make):
    sampler = make()
    whole = list(sampler)
    sampler.start_iter = 2
    assert sampler.start_iter == 2
    assert list(sampler) == whole[8:]
    assert sampler.start_iter == 0
    assert list(sampler) == whole


@every_kind
def test_every_start_iter(make):
    sampler = make()
    whole = list(sampler)
    num_batches = sampler.sharding.steps_from(0)
    for batch in range(num_batches + 1):
        sampler.start_iter = batch
        assert list(sampler) == whole[4 * batch :], batch
    with pytest.raises(
        ValueError, match=f"start_iter must be at most the {num_batches} batches of an epoch, found"
    ):
        sampler.start_iter = num_batches + 1
    with pytest.raises(ValueError, match="start_iter must be 0 or more, found -1"):
        sampler.start_iter = -1
    with pytest.raises(TypeError, match=r"start_iter must be an int, found float 1\.5"):
        sampler.start_iter = 1.5
    assert list(sampler) == whole


def test_set_epoch():
    sampler = ResumableRandomSampler(range(N), 3, 4)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    # start_iter, then the epoch, as the quick reference describes, and the other way round
    sampler.start_iter = 3
    sampler.set_epoch(1)
    assert list(sampler) == second[12:]
    assert list(sampler) == second
    sampler.set_epoch(0)
    sampler.start_iter = 3
    assert list(sampler) == first[12:]
    # the epoch that is in progress: nothing changes
    sampler.start_iter = 3
    sampler.set_epoch(0)
    assert sampler.start_iter == 3
    # a restored position belongs to its epoch
    state = sampler.state_dict()
    sampler.load_state_dict(state)
    sampler.set_epoch(1)
    assert (sampler.start_iter, sampler.state_dict()["consumed"]) == (0, 0)
    assert list(sampler) == second
    for bad, error in ((-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match="epoch must be"):
            sampler.set_epoch(bad)
    assert sampler.epoch == 1


@every_kind
def test_state_round_trip(make):
    sampler = make()
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.start_iter = 2
    text = json.dumps(sampler.state_dict())
    assert len(text) < 1024
    other = make()
    other.load_state_dict(json.loads(text))
    assert other.state_dict() == sampler.state_dict()
    assert other.epoch == 4
    assert list(other) == whole[8:]
    assert list(other) == whole  # used once


@every_kind
def test_the_end_of_an_epoch_is_the_start_of_the_next(make):
    sampler = make()
    sampler.start_iter = sampler.sharding.steps_from(0)
    ended = sampler.state_dict()
    assert (ended["epoch"], ended["consumed"]) == (1, 0)
    other = make()
    other.load_state_dict(ended)
    expected = make()
    expected.set_epoch(1)
    assert list(other) == list(expected)


@exact
@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 80))
def test_another_batch_size_and_world_continue(n, batch_size, other_batch_size, world, stop):
    sampler = ResumableRandomSampler(range(n), 1, batch_size)
    sampler.start_iter = min(stop, sampler.sharding.steps_from(0))
    rest = (
        Permutation(n, 1, sampler.state_dict()["epoch"]).indices(sampler.state_dict()["consumed"], n).tolist()
    )
    group = [
        ResumableDistributedSampler(range(n), world, rank, seed=1, batch_size=other_batch_size)
        for rank in range(world)
    ]
    shares = []
    for other in group:
        other.load_state_dict(sampler.state_dict())
        shares.append(list(other))
    assert len({len(share) for share in shares}) == 1
    union = sorted(i for share in shares for i in share)
    padding = len(union) - len(rest)
    assert 0 <= padding < world
    for i in rest:
        union.remove(i)
    assert len(union) == padding


MUST_AGREE = {
    "format": 2,
    "algorithm": "helios-feistel12-v0",
    "seed": 4,
    "num_samples": N + 1,
    "tail": "drop",
    "fingerprint": "other",
}


def snapshot(sampler):
    return sampler.state_dict(), sampler.start, sampler.start_iter, sampler.epoch, sampler.consumed


def refused(sampler, state, message):
    before = snapshot(sampler)
    with pytest.raises(LoaderStateError, match=message):
        sampler.load_state_dict(state)
    assert snapshot(sampler) == before


@pytest.fixture
def under_way():
    sampler = ResumableRandomSampler(range(N), 3, 4)
    sampler.set_epoch(2)
    sampler.start_iter = 5
    return sampler


@pytest.fixture
def state():
    sampler = ResumableRandomSampler(range(N), 3, 4)
    sampler.set_epoch(1)
    sampler.start_iter = 3
    return sampler.state_dict()


@pytest.mark.parametrize("key", MUST_AGREE)
def test_a_state_that_does_not_fit_changes_nothing(under_way, state, key):
    found, here = MUST_AGREE[key], state[key]
    refused(under_way, {**state, key: found}, f"^{key}: the state has {found!r}, here it is {here!r}. ")
    under_way.load_state_dict(state)  # the control
    assert under_way.state_dict() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch must be an int of 0 or more, the state has -1"),
        ({"epoch": "1"}, "epoch must be an int of 0 or more, the state has '1'"),
        ({"epoch": True}, "epoch must be an int of 0 or more, the state has True"),
        ({"consumed": 1.0}, r"consumed must be an int of 0 or more, the state has 1\.0"),
        ({"consumed": None}, "consumed must be an int of 0 or more, the state has None"),
        ({"consumed": -4}, "consumed must be an int of 0 or more, the state has -4"),
        ({"consumed": N + 1}, f"consumed: the state has {N + 1}, more than the {N} samples"),
        ({"seed": 3.0}, r"seed: the state has 3\.0, here it is 3"),
        ({"num_samples": torch.tensor(N)}, r"num_samples: the state has tensor\(50\), here it is 50"),
        ({"format": True}, "format: the state has True, here it is 1"),
    ],
)
def test_malformed_values_change_nothing(under_way, state, change, message):
    refused(under_way, {**state, **change}, message)


def test_malformed_states_change_nothing(under_way, state):
    for bad in (None, [], "state", 7, [("epoch", 1)]):
        refused(under_way, bad, f"state must be a dict as state_dict.. gives it, found {type(bad).__name__}")
    for key in state:
        refused(under_way, {k: v for k, v in state.items() if k != key}, f"state lacks '{key}'; it has ")
    refused(under_way, {}, "state lacks 'format'")
    # A later format may have other keys: the format is what is said to be wrong.
    refused(under_way, {"format": 2, "where": 5}, "^format: the state has 2, here it is 1")


def test_states_of_other_orders_are_refused_by_name():
    states = {name: make().state_dict() for name, make in KINDS.items()}
    refused(
        KINDS["random"](),
        states["sequential"],
        f"algorithm: the state has 'sequential', here it is '{ALGORITHM}'",
    )
    refused(KINDS["own indices_at"](), states["random"], f"algorithm: the state has '{ALGORITHM}'")
    refused(
        KINDS["exact"](),
        {**states["distributed"], "seed": 0},
        "tail: the state has 'pad', here it is 'exact'",
    )


def test_a_sampler_without_a_name_has_that_of_its_class():
    class Odd(ResumableSampler):
        def indices_at(self, positions):
            return positions

    assert Odd(range(N)).state_dict()["algorithm"] == "Odd"
    refused(
        ResumableSequentialSampler(range(N)), Odd(range(N)).state_dict(), "algorithm: the state has 'Odd'"
    )


@every_kind
def test_in_torchs_own_dataloader(make):
    sampler = make()
    loader = DataLoader(range(N), batch_size=4, sampler=sampler)
    whole = [batch.tolist() for batch in loader]
    assert [i for batch in whole for i in batch] == list(make())
    sampler.start_iter = 2
    assert [batch.tolist() for batch in loader] == whole[2:]
    assert [batch.tolist() for batch in loader] == whole


# --- a user's own -----------------------------------------------------------------------------------


def batches_of(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("kind", [Reversed, Rotating])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 6, 13])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_own_samplers_resume_exactly(kind, workers, stop):
    def make(num_workers):
        context = "fork" if num_workers else None
        sampler = kind(range(N), 3)
        return create_dataloader(
            range(N), batch_size=4, sampler=sampler, num_workers=num_workers, multiprocessing_context=context
        )

    loader = make(0)
    whole = [batches_of(loader) for _ in range(3)]
    if kind is Rotating:
        assert whole[0] != whole[1]
    loader = make(workers)
    first = [batch.tolist() for batch in islice(loader, stop)]
    assert first == whole[0][:stop]
    other = make(2 - workers)
    other.load_state_dict(loader.state_dict())
    rest = whole[0][stop:] + whole[1] + whole[2]
    found = []
    while other.epoch < 3:
        found += batches_of(other)
    assert found == rest


@pytest.mark.parametrize("kind", [Reversed, Rotating])
def test_own_samplers_use_a_start_once(kind):
    loader = create_dataloader(range(N), batch_size=4, sampler=kind(range(N)))
    whole = batches_of(loader)
    loader.set_epoch(0)
    loader.sampler.start_iter = 3
    assert next(iter(loader)).tolist() == whole[3]
    assert loader.sampler.start_iter == 0
    assert next(iter(loader)).tolist() == whole[0]  # broken off and begun again


def test_only_indices_at_can_begin_within_a_batch():
    """A sampler that is told its start in batches must not be started in the middle of one."""
    for kind in (Reversed, Rotating):
        loader = create_dataloader(range(N), batch_size=4, sampler=kind(range(N)))
        whole = [i for batch in batches_of(loader) for i in batch]
        loader.set_epoch(0)
        list(islice(loader, 3))
        state = loader.state_dict()
        other = create_dataloader(range(N), batch_size=5, sampler=kind(range(N)))
        if kind is Rotating:
            with pytest.raises(
                LoaderStateError,
                match=r"consumed: the state has 12, which is within a batch here, and Rotating",
            ):
                other.load_state_dict(state)
            assert other.state_dict()["consumed"] == 0
            other = create_dataloader(range(N), batch_size=6, sampler=kind(range(N)))
        other.load_state_dict(state)
        assert [i for batch in batches_of(other) for i in batch] == whole[12:]


def test_a_sampler_that_ends_early_is_named():
    class Short(ResumableSampler):
        def __iter__(self):
            yield from range(10)

    loader = create_dataloader(range(N), batch_size=4, sampler=Short(range(N)))
    with pytest.raises(
        RuntimeError, match=r"Short ended early: at sample 8 of 50 it was to yield 4 .* yielded 2"
    ):
        list(loader)
    with pytest.raises(NotImplementedError, match="ResumableSampler must be given an order, or override"):
        list(ResumableSampler(range(N)))


# --- size, arguments --------------------------------------------------------------------------------


class Huge:
    def __len__(self):
        return 10**12


@pytest.mark.parametrize("kind", [ResumableRandomSampler, ResumableSequentialSampler])
def test_seeking_holds_no_list_of_indices(kind):
    tracemalloc.start()
    sampler = kind(Huge(), batch_size=32)
    sampler.start_iter = 28 * 10**9
    first = next(iter(sampler))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    positions = np.array([28 * 32 * 10**9])
    assert first == int(kind(Huge()).indices_at(positions)[0])


class Process:
    """torch.distributed as rank 1 of 3 sees it."""

    is_available = is_initialized = staticmethod(lambda: True)
    get_world_size = staticmethod(lambda: 3)
    get_rank = staticmethod(lambda: 1)


def test_rank_and_world_are_asked_of_the_process_group(monkeypatch):
    with pytest.raises(
        RuntimeError, match="num_replicas is None and there is no process group to ask: pass it"
    ):
        ResumableDistributedSampler(range(N))
    with pytest.raises(RuntimeError, match="rank is None and there is no process group"):
        ResumableDistributedSampler(range(N), num_replicas=2)
    monkeypatch.setattr(torch, "distributed", Process)
    sharding = ResumableDistributedSampler(range(N)).sharding
    assert (sharding.rank, sharding.num_replicas) == (1, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ResumableRandomSampler([]), ValueError, "data_source is empty: there is nothing to sample"),
        (lambda: ResumableRandomSampler(iter([1])), TypeError, "data_source must have a length"),
        (lambda: ResumableRandomSampler(range(3), -1), ValueError, "seed must be 0 or more, found -1"),
        (lambda: ResumableRandomSampler(range(3), "1"), TypeError, "seed must be an int, found str '1'"),
        (
            lambda: ResumableSequentialSampler(range(3), 0),
            ValueError,
            "batch_size must be 1 or more, found 0",
        ),
        (
            lambda: ResumableSequentialSampler(range(3), None),
            TypeError,
            "batch_size must be an int, found None",
        ),
        (
            lambda: ResumableDistributedSampler(range(3), 2, 2),
            ValueError,
            r"rank must be in .* = range\(2\), found 2",
        ),
        (
            lambda: ResumableDistributedSampler(range(3), 0, 0),
            ValueError,
            "num_replicas must be 1 or more, found 0",
        ),
        (
            lambda: ResumableDistributedSampler(range(3), 2, -1),
            ValueError,
            "rank must be 0 or more, found -1",
        ),
        (
            lambda: ResumableDistributedSampler(range(3), 2, 0, 1),
            TypeError,
            "shuffle must be True or False, found int 1",
        ),
        (
            lambda: ResumableDistributedSampler(range(3), 2, 0, drop_last="no"),
            TypeError,
            "drop_last must be True or False, found str 'no'",
        ),
        (
            lambda: ResumableDistributedSampler(range(3), 2, 0, tail="some"),
            ValueError,
            "tail must be one of 'pad', 'drop', 'exact', found 'some'",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
