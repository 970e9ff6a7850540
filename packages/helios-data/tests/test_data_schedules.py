"""Loaders that are stopped anywhere and go on with other ranks, batch sizes and workers, in every order.

All ranks run in this process, in step, each with a loader of its own.
"""

import json
from collections import Counter
from itertools import islice, product, zip_longest

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from helios.data import (
    BucketedOrder,
    LoaderStateError,
    MixtureOrder,
    Order,
    RandomOrder,
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    SequentialOrder,
    SubsetOrder,
    TorchOrder,
    WeightedOrder,
    create_dataloader,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12 and later
]
exact = settings(deadline=None, derandomize=True)  # no clock, the same examples every time
N = 37  # samples of the dataset
EPOCHS = 3
ORDERS = {
    "random": RandomOrder(N),
    "torch": "torch",
    "weighted": WeightedOrder(np.arange(N) % 5, 41),
    "bucketed": BucketedOrder(np.arange(N) % 7, 3, 3),
    "mixture": MixtureOrder([30, 7], [1, 1], 40, 12),
    "subset": SubsetOrder([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 36], BucketedOrder([*range(15)], 2, 2)),
    "subset of torch": SubsetOrder(range(0, N, 2), TorchOrder(19)),
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())


class Augmented(Dataset):
    """Samples of an index and 60 random bits: the bits are those of a position, whatever index stands there."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.stack([torch.tensor(index), torch.randint(2**60, ())])


def make(order, world=1, rank=0, batch_size=4, workers=0, tail="exact"):
    sampler = ResumableDistributedSampler(Augmented(), world, rank, seed=3, tail=tail, order=order)
    context = "fork" if workers else None
    return create_dataloader(
        Augmented(),
        random_seed=7,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context=context,
    )


def uninterrupted(order):
    """For each epoch, what each position is: which sample, augmented how."""
    loader = make(order)
    return [[tuple(row) for batch in loader for row in batch.tolist()] for _ in range(EPOCHS)]


def varying(world):
    """Batch sizes of so many ranks that jump about from step to step and epoch to epoch."""
    return lambda epoch, cursor: [1 + (7 * epoch + 5 * cursor + 3 * rank) % 6 for rank in range(world)]


def in_step(loaders, num_steps, records):
    """Take so many global steps over all epochs; all ranks must agree where that is."""
    iterators, epoch = [iter(loader) for loader in loaders], loaders[0].epoch
    while num_steps > 0 and epoch < EPOCHS:
        batches = [next(iterator, None) for iterator in iterators]
        if all(batch is None for batch in batches):
            iterators, epoch = [iter(loader) for loader in loaders], loaders[0].epoch
            continue
        num_steps -= 1
        records[epoch].update(tuple(row) for batch in batches if batch is not None for row in batch.tolist())
    (state,) = {json.dumps(loader.state_dict()) for loader in loaders}
    assert len(state) < 1024
    return json.loads(state)


def train(order, runs, spoil=lambda state: state):
    """Run through a schedule and to the end of the last epoch, each run a new process as far as it knows.

    Args:
        order: the order.
        runs: of each run, (batch sizes of the ranks, how they are given, workers, global steps).
        spoil: what becomes of the state between two runs.
    """
    records, state = [Counter() for _ in range(EPOCHS)], None
    for own, kind, workers, num_steps in [*runs, ([2, 2], "one", 0, 10**9)]:
        world = len(own)
        schedule = varying(world)
        batch_size = {
            "one": own[0],
            "each": own,
            "schedule": schedule,
            "schedule of one": lambda epoch, cursor, schedule=schedule: schedule(epoch, cursor)[0],
        }[kind]
        loaders = [make(order, world, rank, batch_size, workers) for rank in range(world)]
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(spoil(state))
                assert loader.state_dict() == state or spoil(state) != state
        state = in_step(loaders, num_steps, records)
    assert (state["epoch"], state["consumed"]) == (EPOCHS, 0)
    return records


def runs_of(order, workers):
    is_dealt_one_by_one = order == "torch" or (isinstance(order, Order) and order.is_interleaved)
    kinds = ["one", "schedule of one"] + ([] if is_dealt_one_by_one else ["each", "schedule"])
    own = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    return st.lists(
        st.tuples(own, st.sampled_from(kinds), st.sampled_from(workers), st.integers(0, 9)), max_size=5
    )


@every_order
def test_any_schedule_of_stops_takes_every_position_once(order):
    """And augments each as the run that was never stopped."""
    expected = [Counter(epoch) for epoch in uninterrupted(order)]
    assert all(set(epoch.values()) == {1} for epoch in expected)  # the bits tell positions apart

    @settings(exact, max_examples=40)
    @given(runs_of(order, [0]))
    @example([([1], "one", 0, 0)] * 3)
    @example([([9, 9, 9, 9], "one", 0, 1), ([9, 9, 9, 9], "one", 0, 1)])
    @example([([1, 1, 1], "one", 0, 13)])
    def check(runs):
        assert train(order, runs) == expected

    check()


@pytest.mark.parametrize("name", ["torch", "bucketed"])
def test_workers_may_come_and_go(name):
    order = ORDERS[name]
    expected = [Counter(epoch) for epoch in uninterrupted(order)]

    @settings(exact, max_examples=2)  # processes are slow
    @given(runs_of(order, [0, 2]))
    @example([([3, 5], "one", 2, 2), ([4], "schedule of one", 0, 3), ([2], "one", 2, 5)])
    def check(runs):
        assert train(order, runs) == expected

    check()


@pytest.mark.parametrize("order", ["torch", ORDERS["bucketed"]], ids=["torch", "bucketed"])
def test_a_cursor_that_is_one_off_is_noticed(order):
    """The control for the above: a sample more or less, or the augmentation of another epoch."""
    runs, expected = [([4, 4], "one", 0, 2)], [Counter(epoch) for epoch in uninterrupted(order)]
    assert train(order, runs) == expected
    assert train(order, runs, lambda state: {**state, "consumed": 15}) != expected
    assert train(order, runs, lambda state: {**state, "consumed": 17}) != expected
    assert train(order, runs, lambda state: {**state, "consumed": 2}) != expected  # in batches


# --- the order of PyTorch's DistributedSampler ------------------------------------------------------


@settings(exact, max_examples=150)
@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 12),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@example(3, 6, 1, 0, 0, (False, True, False))  # fewer samples than ranks: torch repeats them more than once
@example(3, 6, 1, 0, 0, (True, True, False))
def test_torch_is_torch_batch_by_batch(n, world, batch_size, epoch, stop, options):
    """On every rank, padded or not, partial batch or not; also gone on with from the middle."""
    drop_last, shuffle, drop_partial = options
    for rank in range(world):
        theirs = DistributedSampler(range(n), world, rank, shuffle, 5, drop_last)
        theirs.set_epoch(epoch)
        batches = DataLoader(range(n), batch_size, sampler=theirs, drop_last=drop_partial)
        expected = [batch.tolist() for batch in batches]

        def begin(rank=rank):
            sampler = ResumableDistributedSampler(range(n), world, rank, shuffle, 5, drop_last, order="torch")
            return create_dataloader(range(n), batch_size=batch_size, sampler=sampler, drop_last=drop_partial)

        loader = begin()
        loader.set_epoch(epoch)
        if not drop_partial:
            assert list(loader.sampler) == list(theirs)
        assert len(loader) == len(batches)
        first = [batch.tolist() for batch in islice(loader, stop)]
        other = begin()
        other.load_state_dict(loader.state_dict())
        if other.epoch == epoch:
            assert first + [batch.tolist() for batch in other] == expected
        else:
            assert first == expected


def test_torch_within_a_subset_is_torch_over_the_subset():
    indices = list(range(0, N, 2))
    for rank in range(3):
        theirs = DistributedSampler(indices, 3, rank, seed=5)
        order = SubsetOrder(indices, TorchOrder(len(indices)))
        ours = ResumableDistributedSampler(range(N), 3, rank, seed=5, batch_size=2, order=order)
        assert list(ours) == [indices[i] for i in theirs]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_torch_in_one_process(shuffle, drop_last):
    loader = create_dataloader(
        range(N), random_seed=5, batch_size=4, shuffle=shuffle, drop_last=drop_last, order="torch"
    )
    theirs = DistributedSampler(range(N), 1, 0, shuffle, 5)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        expected = [batch.tolist() for batch in DataLoader(range(N), 4, sampler=theirs, drop_last=drop_last)]
        assert [batch.tolist() for batch in loader] == expected
    assert loader.state_dict()["algorithm"] == f"torch-{'randperm' if shuffle else 'sequential'}-v1"


# --- loaders with schedules -------------------------------------------------------------------------


def indices_of(loader):
    return [batch[:, 0].tolist() for batch in loader]


@pytest.mark.parametrize("tail", ["pad", "drop", "exact"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [[4, 4, 4], [1, 7, 3], varying(3), lambda epoch, cursor: [[6, 1, 1], [1, 1, 6]][epoch % 2]],
    ids=["equal", "unequal", "schedule", "other ranks in other epochs"],
)
def test_the_length_is_what_is_received(tail, drop_last, sizes):
    for n, rank in product(range(31, 38), range(3)):
        sampler = ResumableDistributedSampler(range(n), 3, rank, tail=tail)
        loader = create_dataloader(range(n), batch_size=sizes, sampler=sampler, drop_last=drop_last)
        for epoch in range(3):
            assert loader.epoch == epoch
            expected, num_samples = len(loader), len(sampler)
            found = [len(batch) for batch in loader]
            assert (len(found), sum(found)) == (expected, num_samples)
            if drop_last:
                cursors = [sampler.sharding.cursor_after(k, epoch) for k in range(len(found))]
                assert found == [sampler.sharding.sizes_at(cursor, epoch)[rank] for cursor in cursors]


def test_start_iter_epochs_and_states_with_a_schedule():
    """The last one that is set counts; each is used once."""
    loader, other = (make(ORDERS["bucketed"], 2, 1, varying(2)) for _ in range(2))
    whole = [indices_of(loader) for _ in range(3)]
    assert whole[0] != whole[1] != whole[2]
    loader.set_epoch(0)
    for start in range(len(whole[0]) + 1):
        loader.set_epoch(0)
        loader.sampler.start_iter = start
        loader.set_epoch(0)  # the epoch in progress: nothing changes
        assert loader.sampler.start_iter == start
        assert indices_of(loader) == whole[0][start:]
        assert loader.epoch == 1
    loader.set_epoch(0)
    list(islice(loader, 2))
    state = loader.state_dict()
    other.sampler.start_iter = 5
    other.load_state_dict(state)  # instead of start_iter
    assert indices_of(other) == whole[0][2:]
    other.load_state_dict(state)
    other.sampler.start_iter = 1  # instead of the state
    assert indices_of(other) == whole[0][1:]
    other.load_state_dict(state)
    other.set_epoch(2)  # a restored place belongs to its epoch
    assert indices_of(other) == whole[2]
    other.set_epoch(1)
    assert indices_of(other) == whole[1]


def test_a_schedule_follows_the_epoch_and_the_cursor_of_all_ranks():
    asked = set()

    def schedule(epoch, cursor):
        asked.add((epoch, cursor))
        return [2, 4] if epoch == 0 else [1 + cursor // 10, 5]

    loader = make(RandomOrder(N), 2, 0, schedule)
    assert [[len(batch) for batch in loader] for _ in range(2)] == [[2] * 6 + [1], [1, 1, 2, 2, 3, 2]]
    assert asked <= {(0, c) for c in range(0, 37, 6)} | {(1, c) for c in (0, 6, 12, 19, 26, 34)}


# --- states of other orders -------------------------------------------------------------------------


REFUSED = {
    "weights": (WeightedOrder([1] * N), WeightedOrder([*[1] * (N - 1), 2]), "order_digest"),
    "lengths": (BucketedOrder([1] * N, 2), BucketedOrder([*[1] * (N - 1), 2], 2), "order_digest"),
    "batches": (BucketedOrder([1] * N, 2), BucketedOrder([1] * N, 3), "order_digest"),
    "shares": (MixtureOrder([30, 7], [1, 1]), MixtureOrder([30, 7], [1, 2]), "order_digest"),
    "indices": (SubsetOrder([1, 2, 3]), SubsetOrder([1, 3, 2]), "order_digest"),
    "order within": (SubsetOrder([1, 2, 3]), SubsetOrder([1, 2, 3], SequentialOrder(3)), "algorithm"),
    "draws": (WeightedOrder([1] * N), WeightedOrder([1] * N, N + 1), "num_samples"),
    "kind": (RandomOrder(N), WeightedOrder([1] * N), "algorithm"),
    "torch": (TorchOrder(N), TorchOrder(N, False), "algorithm"),
}


def snapshot(loader):
    sampler = loader.sampler
    return loader.state_dict(), sampler.start, sampler.start_iter, sampler.consumed, sampler.epoch


@pytest.mark.parametrize(("here", "there", "key"), REFUSED.values(), ids=REFUSED.keys())
def test_a_state_of_another_order_changes_nothing(here, there, key):
    loader, other = make(here, 2, 1), make(there, 2, 1)
    next(iter(other))
    loader.set_epoch(1)
    loader.sampler.start_iter = 1
    before, state = snapshot(loader), other.state_dict()
    with pytest.raises(LoaderStateError, match=f"^{key}: the state has .*, here it is "):
        loader.load_state_dict(state)
    assert snapshot(loader) == before
    if "order_digest" in loader.state_dict():
        lacking = {name: value for name, value in loader.state_dict().items() if name != "order_digest"}
        with pytest.raises(LoaderStateError, match="state lacks 'order_digest'"):
            loader.load_state_dict(lacking)
    assert snapshot(loader) == before
    same = make(there, 2, 0)
    same.load_state_dict(state)  # the control
    assert same.state_dict() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: the state has 2, here it is 1"),
        ({"seed": 8}, "seed: the state has 8, here it is 7"),
        ({"order_seed": 4}, "order_seed: the state has 4, here it is 3"),
        ({"num_samples": 41}, "num_samples: the state has 41, here it is 37"),
        ({"order_digest": None}, "order_digest: the state has None, here it is '"),
        ({"tail": "pad"}, "tail: the state has 'pad', here it is 'exact'"),
        ({"consumed": 38}, "consumed: the state has 38, more than the 37 samples"),
        ({"consumed": -1}, "consumed must be an int of 0 or more, the state has -1"),
        ({"consumed": np.int64(4)}, r"consumed must be an int of 0 or more, the state has np.int64\(4\)"),
        ({"epoch": 1.0}, r"epoch must be an int of 0 or more, the state has 1\.0"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    loader = make(BucketedOrder([1] * N, 2), 3, 2, varying(3))
    loader.sampler.start_iter = 2
    before = snapshot(loader)
    with pytest.raises(LoaderStateError, match=f"^{message}"):
        loader.load_state_dict({**loader.state_dict(), "epoch": 5, **change})
    assert snapshot(loader) == before


# --- orders that do not fit -------------------------------------------------------------------------

WRONG = {
    "random": RandomOrder(5),
    "sequential": SequentialOrder(5),
    "torch": TorchOrder(5),
    "weighted": WeightedOrder([1] * 5, N),
    "bucketed": BucketedOrder([1] * 5, 2),
    "mixture": MixtureOrder([2, 3], [1, 1], N),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_order_for_another_dataset_is_refused(name):
    message = f"order must be for the {N} samples of the dataset, found a {type(WRONG[name]).__name__} for 5"
    for use in (
        lambda order: create_dataloader(range(N), order=order),
        lambda order: create_dataloader(range(N), order=order, shuffle=True),
        lambda order: ResumableSampler(range(N), order=order),
        lambda order: ResumableDistributedSampler(range(N), 1, 0, order=order),
    ):
        with pytest.raises(ValueError, match=message):
            use(WRONG[name])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"order": "random"}, ValueError, "order must be 'helios', 'torch' or an Order, found 'random'"),
        ({"order": ""}, ValueError, "order must be 'helios', 'torch' or an Order, found ''"),
        ({"order": [2, 1]}, TypeError, "order must be 'helios', 'torch' or an Order, found list"),
        ({"order": np.array([2, 1])}, TypeError, "order must be 'helios', .* or an Order, found ndarray"),
        ({"order": RandomOrder}, TypeError, "order must be 'helios', 'torch' or an Order, found "),
        (
            {"order": SubsetOrder([3, N])},
            ValueError,
            f"indices must be less than the {N} samples .* found {N}",
        ),
        (
            {"order": "torch", "sampler": ResumableRandomSampler(range(N))},
            ValueError,
            "order must be None beside",
        ),
        (
            {"order": RandomOrder(N), "sampler": ResumableRandomSampler(range(N))},
            ValueError,
            "order must be None beside a sampler, which has its own, found <helios",
        ),
        ({"batch_size": [2, 3]}, ValueError, "batch_size must be one int, or one for each of the 1 ranks"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        create_dataloader(range(N), **options)
    if "sampler" not in options and "batch_size" not in options:
        with pytest.raises(error, match=message):
            ResumableDistributedSampler(range(N), 1, 0, **options)


def test_samplers_refuse_wrong_places():
    with pytest.raises(TypeError, match="order must be an Order or None, found str 'torch'"):
        ResumableSampler(range(N), order="torch")
    for order in (RandomOrder(N), TorchOrder(N), ORDERS["weighted"]):
        with pytest.raises(ValueError, match=r"rank must be in range\(num_replicas\) = range\(2\), found 2"):
            ResumableDistributedSampler(range(N), 2, 2, order=order)
        with pytest.raises(ValueError, match="dataset is empty"):
            ResumableDistributedSampler([], 2, 1, order=order)


# --- a user's own -----------------------------------------------------------------------------------


class Backwards(RandomOrder):
    """A user's order that happens to derive from one of ours."""

    algorithm = "backwards-v1"

    def of_epoch(self, seed, epoch):
        return lambda positions: self.num_samples - 1 - positions


class BackwardsSampler(ResumableDistributedSampler):
    algorithm = "backwards-v2"

    def indices_at(self, positions):
        return self.num_samples - 1 - positions


class Nameless(ResumableDistributedSampler):
    def indices_at(self, positions):
        return self.num_samples - 1 - positions


def test_an_order_of_the_users_is_used_as_it_is():
    for order in (
        Backwards(N),
        type("Sequence", (SequentialOrder, Backwards), {"of_epoch": Backwards.of_epoch})(N),
    ):
        loader = create_dataloader(range(N), order=order, batch_size=N)
        assert next(iter(loader)).tolist() == list(range(N))[::-1]
        assert loader.state_dict()["algorithm"] == order.algorithm


def test_a_subclass_with_its_own_indices_goes_on_anywhere():
    received, state = [], None
    for own, num_steps in (([3, 5], 2), ([7], 2), ([2, 2, 2], 10**9)):
        samplers = [BackwardsSampler(range(N), len(own), rank, tail="exact") for rank in range(len(own))]
        loaders = [create_dataloader(range(N), batch_size=own, sampler=sampler) for sampler in samplers]
        for loader in loaders if state else []:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for batches in islice(zip_longest(*loaders, fillvalue=torch.tensor([])), num_steps):
            received += torch.cat(batches).int().tolist()
        state = loaders[0].state_dict()
        assert state["algorithm"] == "backwards-v2"
    assert received == list(range(N))[::-1]


def test_a_subclass_without_a_name_is_not_taken_for_ours():
    ours, theirs = ResumableDistributedSampler(range(N), 1, 0), Nameless(range(N), 1, 0)
    assert theirs.state_dict()["algorithm"] == "Nameless"
    with pytest.raises(
        LoaderStateError, match=r"algorithm: the state has 'helios-.*', here it is 'Nameless'"
    ):
        theirs.load_state_dict(ours.state_dict())
