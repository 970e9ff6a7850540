"""Going on with runs that earlier releases began: in their order, at their batch, with the loader's seed."""

import copy
import pickle

import pytest
import torch

from helios.data import (
    LoaderStateError,
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
    WeightedOrder,
    create_dataloader,
)

N, BATCH, SEED = 42, 4, 6691


def earlier(epoch, batches):
    return {"format": 0, "algorithm": "torch-randperm-v1", "epoch": epoch, "batches": batches}


def order_of(epoch, n=N, seed=SEED):
    """What earlier releases did, as the description of their files has it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def batches_of(order, drop_last=False, batch=BATCH):
    whole = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [b for b in whole if len(b) == batch] if drop_last else whole


def make(n=N, **options):
    return create_dataloader(range(n), **{"batch_size": BATCH, "shuffle": True, **options})


def take(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True},
        {"random_seed": 5},
        {"order": "torch"},
    ],
    ids=str,
)
def test_it_goes_on_in_that_epoch_at_that_batch_in_that_order(options, drop_last):
    loader = make(drop_last=drop_last, **options)
    seed = options.get("random_seed", SEED)
    loader.load_state_dict(earlier(3, 6))
    assert loader.epoch == 3
    passes = [take(loader) for _ in range(3)]
    expected = [batches_of(order_of(epoch, seed=seed), drop_last) for epoch in (3, 4, 5)]
    assert passes == [expected[0][6:], *expected[1:]]


def test_control_the_own_order_is_another():
    loader = make()
    loader.set_epoch(3)
    assert take(loader) != batches_of(order_of(3))


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_batch_of_an_epoch(drop_last):
    whole = batches_of(order_of(1), drop_last)
    for at in range(len(whole)):
        loader = make(drop_last=drop_last)
        loader.load_state_dict(earlier(1, at))
        assert take(loader) == whole[at:]
    loader.load_state_dict(earlier(1, len(whole)))
    assert loader.epoch == 2
    assert take(loader) == batches_of(order_of(2), drop_last)
    with pytest.raises(
        LoaderStateError, match=rf"batches: the state has {len(whole) + 1}, here an epoch of 42"
    ):
        loader.load_state_dict(earlier(1, len(whole) + 1))


def test_set_epoch_of_the_restored_epoch_changes_nothing():
    loader = make()
    loader.load_state_dict(earlier(2, 3))
    loader.set_epoch(2)
    assert take(loader) == batches_of(order_of(2))[3:]
    loader.set_epoch(3)
    assert take(loader) == batches_of(order_of(3))


def test_the_states_it_gives_go_on_in_that_order():
    """Also in a loader of the default order, again and again, with another batch size and workers."""
    first = make()
    first.load_state_dict(earlier(2, 3))
    iterator = iter(first)
    next(iterator)
    state = first.state_dict()
    assert state == {
        **make().state_dict(), "algorithm": "torch-randperm-v1", "epoch": 2, "consumed": 16, "adopted": True
    }  # fmt: skip
    for options in ({}, {"num_workers": 2}, {"batch_size": 3}, {"order": "torch"}):
        loader = make(**options)
        loader.load_state_dict(state)
        batch = options.get("batch_size", BATCH)
        assert take(loader) == batches_of(order_of(2)[16:], batch=batch)
        assert loader.state_dict().get("adopted") is (None if "order" in options else True)
        assert take(loader) == batches_of(order_of(3), batch=batch)
        again = make(**options)
        again.load_state_dict(loader.state_dict())
        assert take(again) == batches_of(order_of(4), batch=batch)


def test_a_copy_has_the_order_too():
    loader = make()
    loader.load_state_dict(earlier(2, 3))
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert take(other) == batches_of(order_of(2))[3:]
        assert other.state_dict()["adopted"] is True


def test_a_state_of_the_own_order_brings_it_back():
    loader, own = make(), make()
    own.set_epoch(1)
    state = own.state_dict()
    loader.load_state_dict(earlier(2, 3))
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    assert take(loader) == take(own)


def test_without_the_mark_the_order_is_refused_as_ever():
    state = make(order="torch").state_dict()
    for mark in ({}, {"adopted": False}, {"adopted": 1}):
        with pytest.raises(LoaderStateError, match="algorithm: the state has 'torch-randperm-v1'"):
            make().load_state_dict({**state, **mark})
    adopting = make()
    adopting.load_state_dict(earlier(0, 1))
    with pytest.raises(LoaderStateError, match="algorithm"):
        adopting.load_state_dict(state)


def test_what_must_agree_still_must():
    loader = make(random_seed=3)
    loader.load_state_dict(earlier(2, 3))
    state = loader.state_dict()
    for options, message in (
        ({}, "seed: the state has 3"),
        ({"random_seed": 3, "n": 41}, "num_samples"),
        ({"random_seed": 3, "drop_last": True}, "tail"),
        ({"random_seed": 3, "fingerprint": "x"}, "fingerprint"),
        ({"random_seed": 3, "shuffle": False}, "algorithm: the state has 'torch-randperm-v1'"),
    ):
        other = make(**options)
        before = other.state_dict()
        with pytest.raises(LoaderStateError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before


def test_a_sequential_loader_stays_sequential():
    loader = make(shuffle=False)
    loader.load_state_dict(earlier(3, 6))
    assert loader.state_dict() == {**make(shuffle=False).state_dict(), "epoch": 3, "consumed": 24}
    assert take(loader) == batches_of(list(range(N)))[6:]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [48, 42, 45])
def test_on_several_ranks_it_is_what_the_distributed_sampler_of_torch_yields(shuffle, drop_last, n):
    for rank in range(3):
        theirs = torch.utils.data.DistributedSampler(range(n), 3, rank, shuffle, 7, drop_last)
        loaders = []
        for state in (earlier(2, 2), None):
            sampler = ResumableDistributedSampler(range(n), 3, rank, shuffle, 7, drop_last)
            loader = create_dataloader(range(n), batch_size=BATCH, sampler=sampler, drop_last=drop_last)
            loader.load_state_dict(state or loaders[0].state_dict())
            assert loader.state_dict()["adopted"] is True
            loaders.append(loader)
        for loader in loaders:
            for epoch, start in ((2, 2), (3, 0)):
                theirs.set_epoch(epoch)
                whole = batches_of(list(theirs), drop_last)
                assert take(loader) == whole[start:]


def test_samplers_alone_do_the_same():
    sampler = ResumableRandomSampler(range(N), 9, BATCH)
    sampler.load_state_dict(earlier(2, 3))
    assert list(sampler) == order_of(2, seed=9)[12:]
    sampler.set_epoch(3)
    assert list(sampler) == order_of(3, seed=9)
    again = ResumableRandomSampler(range(N), 9, BATCH)
    again.load_state_dict(sampler.state_dict())
    again.set_epoch(5)
    assert list(again) == order_of(5, seed=9)
    plain = ResumableSequentialSampler(range(N), BATCH)
    plain.load_state_dict(earlier(2, 3))
    assert list(plain) == list(range(12, N))


class Backwards(ResumableSampler):
    algorithm = "backwards-v1"

    def indices_at(self, positions):
        return self.num_samples - 1 - positions


class Renamed(ResumableRandomSampler):
    algorithm = "renamed-v1"


class Iterating(ResumableRandomSampler):
    def __iter__(self):
        return iter(range(self.start, self.num_samples))


@pytest.mark.parametrize(
    "options",
    [
        {"order": WeightedOrder([1.0] * N)},
        {"sampler": Backwards(range(N))},
        {"sampler": Renamed(range(N))},
        {"sampler": Iterating(range(N))},
        {"sampler": ResumableSampler(range(N), order=WeightedOrder([1.0] * N))},
    ],
    ids=lambda options: type(next(iter(options.values()))).__name__,
)
def test_orders_that_earlier_releases_did_not_have_are_refused(options):
    loader = make(**{"shuffle": False, **options})
    before = loader.state_dict()
    with pytest.raises(LoaderStateError, match=r"begun by an earlier release.*Go on with shuffle=True"):
        loader.load_state_dict(earlier(0, 1))
    assert loader.state_dict() == before
    loader.load_state_dict(before)  # a state of their own is loaded as ever


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(N))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_streams_are_refused():
    loader = create_dataloader(Stream(), batch_size=BATCH)
    with pytest.raises(LoaderStateError, match="do not say where the streams"):
        loader.load_state_dict(earlier(0, 1))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"format": 0}, "state lacks 'algorithm'"),
        ({**earlier(0, 1), "algorithm": "other"}, "algorithm: the state has 'other'"),
        (earlier(-1, 1), "epoch must be an int of 0 or more"),
        (earlier(0, 1.0), "batches must be an int of 0 or more"),
        (earlier(0, True), "batches must be an int of 0 or more"),
        ({**earlier(0, 1), "format": False}, "format: the state has False"),
        ({**earlier(0, 1), "format": 2}, "format: the state has 2"),
    ],
)
def test_malformed_states_change_nothing(state, message):
    loader = make()
    before = loader.state_dict()
    with pytest.raises(LoaderStateError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


def test_batch_sizes_that_differ_between_ranks_cannot_be_dealt_out_one_by_one():
    sampler = ResumableDistributedSampler(range(N), 2, 0)
    loader = create_dataloader(range(N), batch_size=[4, 2], sampler=sampler)
    with pytest.raises(LoaderStateError, match=r"batch_size: .*must be the same on every rank"):
        loader.load_state_dict(earlier(0, 1))


def test_the_state_stays_small_and_plain():
    loader = make()
    loader.load_state_dict(earlier(2, 3))
    assert len(pickle.dumps(loader.state_dict())) < 1024
    assert {type(value) for value in loader.state_dict().values()} <= {int, str, bool, type(None)}
