"""The loader: whatever fetches, wherever it stops, the same samples with the same augmentation, bit for bit."""

import gc
import hashlib
import importlib
import itertools
import json
import random
import re
import sys
import traceback
import tracemalloc
import weakref
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset, get_worker_info

from helios.core import rng
from helios.data import (
    LoaderStateError,
    Permutation,
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSequentialSampler,
    create_dataloader,
)

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12 and later
]

N = 22
BATCH = 4  # 6 batches, the last one of 2
DTYPE = torch.float64


def draw():
    """Something of every generator, of kinds that set values aside."""
    numpy_rng = rng.get_default_numpy_rng().generator
    return [
        torch.rand((), dtype=DTYPE).item(),
        torch.randn((), dtype=DTYPE).item(),
        random.random(),
        random.gauss(0, 1),
        numpy_rng.uniform(),
        numpy_rng.normal(),
        float(numpy_rng.integers(0, 2**30, dtype="uint32")),
    ]


class Noisy(Dataset):
    """Samples of shape (8,): the index and seven random values."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.tensor([index, *draw()], dtype=DTYPE)


def noisy_collate(samples):
    return {"samples": torch.stack(samples), "noise": torch.tensor(draw(), dtype=DTYPE)}


def make(workers=0, dataset=None, **options):
    if workers:
        options = {"multiprocessing_context": "fork", **options}
    options = {"random_seed": 5, "batch_size": BATCH, "shuffle": True, "num_workers": workers, **options}
    return create_dataloader(Noisy() if dataset is None else dataset, **options)


def make_noisy(workers=0, **options):
    return make(workers, collate_fn=noisy_collate, **options)


def epochs(loader, until):
    """All batches up to the beginning of epoch `until`."""
    batches = []
    while loader.epoch < until:
        batches += list(loader)
    return batches


def samples(batches):
    return torch.cat([batch["samples"] for batch in batches])


def same(found, expected):
    """Bitwise: the same batches, with the same noise."""
    return len(found) == len(expected) and all(
        torch.equal(a["samples"], b["samples"]) and torch.equal(a["noise"], b["noise"])
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture(scope="module")
def whole():
    return epochs(make_noisy(), 3)


WORKERS = {
    "no worker": {},
    "1 worker": {"workers": 1},
    "2 workers": {"workers": 2},
    "2 persistent": {"workers": 2, "persistent_workers": True},
}
STOPS = {"first batch": 1, "middle": 3, "last batch": 6, "first of epoch 1": 7, "middle of epoch 1": 9}


def stop_after(loader, num_batches):
    """Train for so many batches and be killed: what is left of the process is its state."""
    batches = []
    while len(batches) < num_batches:
        batches += list(islice(loader, num_batches - len(batches)))
    return batches, json.loads(json.dumps(loader.state_dict()))


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_resumes_bit_for_bit(whole, options, stop):
    before, state = stop_after(make_noisy(**options), stop)
    assert same(before, whole[:stop])
    for other in ({}, {"workers": 2, "prefetch_factor": 5}, {"workers": 1, "persistent_workers": True}):
        loader = make_noisy(**other)
        loader.load_state_dict(state)
        assert same(epochs(loader, 3), whole[stop:]), other
    # Another batch size: the same samples with the same augmentation.
    for other in ({"batch_size": 3}, {"workers": 2, "batch_size": 7}):
        loader = make_noisy(**other)
        loader.load_state_dict(state)
        assert torch.equal(samples(epochs(loader, 3)), samples(whole[stop:])), other
    control = make_noisy(random_seed=6)
    assert not same(epochs(control, 1), whole[:6])
    control = make_noisy()
    control.load_state_dict({**state, "consumed": state["consumed"] + 1})
    assert not torch.equal(samples(epochs(control, 3)), samples(whole[stop:]))


def test_a_resumed_run_can_be_stopped_and_resumed_again(whole):
    found, state = [], make_noisy().state_dict()
    for workers, num_batches in ((0, 2), (2, 1), (1, 5), (2, 4), (0, 6)):
        loader = make_noisy(workers)
        loader.load_state_dict(state)
        batches, state = stop_after(loader, num_batches)
        found += batches
    assert same(found, whole)
    assert (state["epoch"], state["consumed"]) == (3, 0)


@pytest.mark.parametrize("world", [2, 3])
def test_augmentation_does_not_depend_on_the_world_size(whole, world):
    for rank in range(world):
        sampler = ResumableDistributedSampler(Noisy(), world, rank, seed=5)
        loader = make(collate_fn=noisy_collate, sampler=sampler, batch_size=2)
        first = next(iter(loader))["samples"]
        assert torch.equal(first, samples(whole)[2 * rank : 2 * rank + 2])


def test_a_run_goes_on_with_other_world_sizes(whole):
    """1 process, then 3, then 2, with other batch sizes: the samples of the epoch, each augmented the same."""
    loader = make_noisy()
    batches, state = stop_after(loader, 2)
    for world, batch_size, steps in ((3, 1, 2), (2, 3, 10)):
        group = []
        for rank in range(world):
            sampler = ResumableDistributedSampler(Noisy(), world, rank, seed=5)
            group.append(make(collate_fn=noisy_collate, sampler=sampler, batch_size=batch_size))
            group[-1].load_state_dict(state)
        for step in zip(*(islice(loader, steps) for loader in group), strict=True):
            batches += step
        states = [loader.state_dict() for loader in group]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert torch.equal(samples(batches), samples(whole[:6]))
    assert state["epoch"] == 1


def test_with_and_without_ranks_states_are_interchangeable(monkeypatch):
    """What `is_distributed` chooses and what is chosen without it continue each other."""

    class Process:
        is_available = is_initialized = staticmethod(lambda: True)
        get_world_size = staticmethod(lambda: 2)
        get_rank = staticmethod(lambda: 1)

    monkeypatch.setattr(torch, "distributed", Process)
    for shuffle, drop_last, tail in itertools.product((True, False), (True, False), (None, "exact")):
        options = {"shuffle": shuffle, "drop_last": drop_last, "tail": tail}
        alone, in_group = make(**options), make(is_distributed=True, **options)
        assert isinstance(in_group.sampler, ResumableDistributedSampler)
        assert alone.state_dict() == in_group.state_dict()
        in_group.load_state_dict(alone.state_dict())


def test_workers_mode_is_not_exact_and_seeds_the_workers(whole):
    """The control of the whole file: with workers seeded once, who fetches what changes the augmentation."""
    by_worker = [epochs(make_noisy(n, sample_rng="worker"), 1) for n in (1, 2)]
    assert torch.equal(samples(by_worker[0])[:, 0], samples(whole[:6])[:, 0])  # the order is the same
    assert not torch.equal(samples(by_worker[0]), samples(by_worker[1]))
    assert not torch.equal(samples(by_worker[0]), samples(whole[:6]))
    assert same(epochs(make_noisy(2, sample_rng="worker"), 1), by_worker[1])  # but a whole run is the same
    loader = make_noisy(2, sample_rng="worker")
    _, state = stop_after(loader, 3)
    other = make_noisy(2, sample_rng="worker")
    other.load_state_dict(state)
    assert not same(epochs(other, 1), by_worker[1][3:])


def test_workers_mode_draws_otherwise_on_every_rank():
    noise = []
    for rank in (0, 1):
        sampler = ResumableDistributedSampler(Noisy(), 2, rank, seed=5)
        noise.append(next(iter(make(1, sampler=sampler, sample_rng="worker")))[:, 1:])
    assert not torch.equal(*noise)


def test_samples_draw_independently(whole):
    values = samples(whole)[:, 1:]
    assert all(len(torch.unique(column)) == len(column) for column in values.T)
    noise = torch.stack([batch["noise"] for batch in whole])
    assert all(len(torch.unique(column)) == len(column) for column in noise.T)


def test_the_randomness_of_samples_is_frozen(whole):
    """By the very bytes, since a state does not name them: key by (seed, epoch), then by position."""
    for batch, epoch, first in ((whole[1], 0, 4), (whole[8], 1, 8)):
        epoch_key = rng.derive_bytes(5, "sample", epoch)
        for offset, sample in enumerate(batch["samples"]):
            position = (first + offset).to_bytes(8, "little")
            rng.rekey_host_rngs(hashlib.blake2b(position, digest_size=32, key=epoch_key).digest())
            assert sample[1:].tolist() == draw()
        rng.rekey_host_rngs(rng.derive_bytes(5, "collate", epoch, first))
        assert batch["noise"].tolist() == draw()


def test_a_sample_that_pads_is_augmented_anew():
    """It is another position, though the same index."""
    padded = []
    for rank in range(3):
        sampler = ResumableDistributedSampler(Noisy(), 3, rank, seed=5)
        padded.append(list(make(sampler=sampler))[-1])
    first = next(iter(make()))
    last = torch.cat(padded)[-2:]
    assert last[:, 0].tolist() == first[:2, 0].tolist()
    assert not (last[:, 1:] == first[:2, 1:]).any()


# --- the generators of the training loop ----------------------------------------------------------------


def everything():
    state = rng.get_rng_state_dict()
    return state["torch"].tolist(), state["python"], state["numpy"]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_draws_nothing(workers):
    loader = make_noisy(workers)
    before = everything()
    for _ in range(2):
        for _ in loader:
            assert everything() == before
    it = iter(loader)
    next(it)
    del it
    assert everything() == before
    # The control: torch's own takes a base seed at every iteration, and with it the stream shifts.
    context = "fork" if workers else None
    list(DataLoader(range(N), num_workers=workers, multiprocessing_context=context))
    assert everything() != before


def test_no_generator_is_left_behind():
    rng._numpy_default.set_default_numpy_rng(None)
    list(make_noisy())
    assert not rng.has_default_numpy_rng()


def test_what_the_loop_draws_does_not_reach_the_samples(whole):
    found = []
    for batch in make_noisy():
        draw()
        torch.manual_seed(len(found))
        found.append(batch)
    assert same(found, whole[:6])


class Failing(Noisy):
    def __init__(self, bad):
        self.bad = bad

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError(f"cannot read sample {index}")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_that_raises(whole, workers):
    bad = int(samples(whole)[2 * BATCH + 1, 0])  # in the third batch
    loader = make(workers, Failing(bad), collate_fn=noisy_collate)
    before, found = everything(), []
    with pytest.raises(OSError, match=f"cannot read sample {bad}"):
        found.extend(loader)
    assert everything() == before
    found = list(islice(make_noisy(workers), 2))
    state = loader.state_dict()
    assert (state["epoch"], state["consumed"]) == (0, 2 * BATCH)
    other = make_noisy(workers)
    other.load_state_dict(state)
    assert same(found + epochs(other, 3), whole)


# --- iterating -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_breaking_off_and_beginning_again(whole, options):
    loader = make_noisy(**options)
    assert len(loader) == 6
    for num_batches in (0, 1, 3):
        assert same(list(islice(loader, num_batches)), whole[:num_batches])
        assert loader.state_dict()["consumed"] == num_batches * BATCH
    assert same(list(loader), whole[:6])
    assert loader.epoch == 1
    assert same(list(loader), whole[6:12])
    loader.set_epoch(0)
    assert same(list(loader), whole[:6])
    loader.set_epoch(2)
    loader.set_epoch(2)
    assert same(list(loader), whole[12:])
    assert len(loader) == 6


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_a_loop_by_steps_is_the_same_run(whole, options):
    """A loop that takes len(loader) batches and never asks for one more goes on to the next epoch too."""
    loader, found = make_noisy(**options), []
    for epoch in range(3):
        batches = iter(loader)
        for step in range(len(loader)):
            found.append(next(batches))
            ends = step == len(loader) - 1
            assert loader.state_dict()["epoch"] == epoch + ends
            assert loader.epoch == epoch
    assert same(found, whole)


def test_set_epoch_in_and_after_the_last_batch(whole):
    for epoch in (0, 1, 2):  # again, next, and the one after
        loader = make_noisy()
        list(islice(loader, 6))
        loader.set_epoch(epoch)
        assert same(list(loader), whole[6 * epoch : 6 * epoch + 6])
    loader, found = make_noisy(), []
    for epoch in range(3):
        for step, batch in enumerate(loader):
            found.append(batch)
            if step == 5:
                loader.set_epoch(epoch + 1)
        assert loader.epoch == epoch + 1
    assert same(found, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_is_not_used_up_before_the_first_batch(whole, workers):
    """An iteration may be begun and dropped, as libraries do that look at a loader."""
    state = stop_after(make_noisy(), 3)[1]
    loader = make_noisy(workers)
    loader.load_state_dict(state)
    iter(loader)
    assert same(epochs(loader, 3), whole[3:])
    loader.set_epoch(0)
    assert same([next(iter(loader))], whole[:1])  # the control: what was received is used up


def test_a_resumed_loop_may_set_every_epoch(whole):
    _, state = stop_after(make_noisy(), 9)
    loader, found = make_noisy(), []
    loader.load_state_dict(state)
    for epoch in range(loader.epoch, 3):
        loader.set_epoch(epoch)
        found += list(loader)
    assert same(found, whole[9:])


def test_start_iter_of_the_sampler(whole):
    loader = make_noisy()
    loader.sampler.set_epoch(1)
    loader.sampler.start_iter = 2
    assert same(list(loader), whole[8:12])
    assert same(list(loader), whole[12:])
    loader = make_noisy()
    loader.sampler.start_iter = 6
    assert list(loader) == []
    assert loader.epoch == 1


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_an_older_iteration_cannot_go_on(whole, options):
    """It would count what it hands over where another one stands, or go on in another epoch's order."""

    def begin(first=1):
        loader = make_noisy(**options)
        batches = iter(loader)
        assert same(list(islice(batches, first)), whole[:first])
        return loader, batches

    message = "this iteration of epoch 0 cannot go on at sample 4: another one was begun on the same loader"
    loader, batches = begin()
    newer = iter(loader)
    with pytest.raises(RuntimeError, match=message):
        next(batches)
    assert same(list(newer), whole[:6])

    loader, batches = begin()
    loader.set_epoch(2)
    with pytest.raises(RuntimeError, match=message):
        next(batches)
    assert loader.state_dict()["epoch"] == 2

    loader, batches = begin()
    loader.load_state_dict({**loader.state_dict(), "consumed": 8})
    with pytest.raises(RuntimeError, match=message):
        next(batches)
    assert loader.state_dict()["consumed"] == 8
    assert same(list(loader), whole[2:6])

    loader, batches = begin()
    batches.close()
    assert same(list(loader), whole[:6])


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_a_loader_that_is_let_go_goes_at_once(options):
    """No cycle holds it: torch waits ten seconds for persistent workers that the garbage collector ends."""
    gc.disable()
    try:
        loader = make_noisy(**options)
        batches = iter(loader)
        next(batches)
        gone = weakref.ref(loader)
        del loader, batches
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_leaves_no_cycle(workers):
    gc.disable()
    try:
        loader = make(workers, Failing(3))
        gone = weakref.ref(loader)
        try:
            list(loader)
        except OSError as error:
            lines = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        del loader
        assert gone() is None
        assert ("__getitem__" in lines) == (workers == 0)  # a worker's lines are in the message
        assert "_receive" in lines
    finally:
        gc.enable()


# --- state -----------------------------------------------------------------------------------------------


def test_the_state_is_small_and_plain(tmp_path):
    loader = make(fingerprint="f" * 256, random_seed=2**64 - 1)
    next(iter(loader))
    state = loader.state_dict()
    assert len(json.dumps(state)) < 1024
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True) == state
    assert set(state) == {
        *("format", "algorithm", "seed", "order_seed", "epoch"),
        *("consumed", "num_samples", "tail", "fingerprint"),
    }


def test_numpys_integers_do_not_reach_the_state():
    import numpy as np

    loader = make(random_seed=np.int64(5), batch_size=np.int32(BATCH), sampler=None)
    next(iter(loader))
    loader.set_epoch(np.int64(1))
    next(iter(loader))
    state = json.loads(json.dumps(loader.state_dict()))
    other = make()
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"random_seed": 6}, "seed"),
        ({"shuffle": False}, "algorithm"),
        ({"drop_last": True}, "tail"),
        ({"tail": "exact"}, "tail"),
        ({"fingerprint": "v2"}, "fingerprint"),
        ({"dataset": range(N + 1)}, "num_samples"),
        ({"sampler": ResumableRandomSampler(range(N), 6)}, "order_seed"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(options, key):
    _, state = stop_after(make(), 2)
    loader = make(**options)
    loader.set_epoch(3)
    next(iter(loader))
    before = loader.state_dict()
    message = re.escape(f"{key}: the state has {state[key]!r}, here it is {before[key]!r}. ")
    with pytest.raises(LoaderStateError, match=f"^{message}"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before
    for bad in ({}, None, {k: v for k, v in before.items() if k != key}, {**before, "consumed": N + 2}):
        with pytest.raises(LoaderStateError):
            loader.load_state_dict(bad)
        assert loader.state_dict() == before
    loader.load_state_dict(before)  # the control


def test_a_refused_state_does_not_stop_the_iteration(whole):
    loader = make_noisy()
    batches = iter(loader)
    found = [next(batches)]
    with pytest.raises(LoaderStateError):
        loader.load_state_dict({})
    assert same(found + list(batches), whole[:6])


# --- datasets and options --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets_of_all_kinds(workers):
    tensors = TensorDataset(torch.arange(N), torch.arange(N) * 2)
    order = [i for batch in make(dataset=range(N)) for i in batch.tolist()]
    for a, b in make(workers, tensors):
        assert torch.equal(a * 2, b)
    subset = Subset(range(100, 100 + 2 * N), range(0, 2 * N, 2))  # has __getitems__
    for sample_rng in ("sample", "worker"):
        loader = make(workers, subset, sample_rng=sample_rng)
        assert [i for batch in loader for i in batch.tolist()] == [100 + 2 * i for i in order]
    dicts = [{"x": torch.tensor([i]), "name": f"n{i}"} for i in range(N)]
    for batch in make(workers, dicts):
        assert batch["name"] == [f"n{i}" for i in batch["x"].flatten().tolist()]
        assert batch["x"].shape[1:] == (1,)


def test_randomness_of_a_subset_is_that_of_its_positions(whole):
    """__getitems__ must not tie a sample's randomness to the others of its batch."""
    subset = Subset(Noisy(), range(N))
    assert same(epochs(make(dataset=subset, collate_fn=noisy_collate), 3), whole)
    loader = make(dataset=subset, collate_fn=noisy_collate, batch_size=3)
    assert torch.equal(samples(epochs(loader, 3)), samples(whole))


@pytest.mark.parametrize("workers", [0, 2])
def test_drop_last(whole, workers):
    loader = make_noisy(workers, drop_last=True)
    assert len(loader) == 5
    found = list(loader)
    assert same(found, whole[:5])
    assert same(list(loader), whole[6:11])
    _, state = stop_after(make_noisy(workers, drop_last=True), 5)
    assert (state["epoch"], state["consumed"]) == (1, 0)
    # The rest is too small for the other batch size: an empty pass, then the next epoch.
    _, state = stop_after(make_noisy(workers, drop_last=True), 4)
    other = make_noisy(workers, drop_last=True, batch_size=8)
    other.load_state_dict(state)
    assert epochs(other, 1) == []
    assert len(list(other)) == len(other) == 2


@pytest.mark.parametrize(("n", "world"), [(1, 2), (5, 4), (22, 3), (24, 3)])
def test_len_is_what_each_rank_gets(n, world):
    for tail, drop_last in itertools.product(("pad", "drop", "exact"), (True, False)):
        for rank in range(world):
            sampler = ResumableDistributedSampler(range(n), world, rank, tail=tail)
            loader = make(dataset=range(n), sampler=sampler, drop_last=drop_last)
            assert len(loader) == len(list(loader))
            assert loader.epoch == 1
            assert len(loader) == len(list(loader))


def test_a_rank_without_a_last_batch_keeps_up_with_the_others():
    """Tail.EXACT by steps: 9 samples, 2 ranks of 4: only rank 0 has a second batch; both go on to epoch 1."""
    for rank in (0, 1):
        sampler = ResumableDistributedSampler(range(9), 2, rank, tail="exact")
        loader = make(dataset=range(9), sampler=sampler)
        for epoch in range(3):
            assert len(list(islice(loader, len(loader)))) == 2 - rank
            assert loader.epoch == epoch
        assert loader.state_dict()["seed"] == 5


def test_a_real_process_group(whole):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        loader = make_noisy(is_distributed=True)
        assert type(loader.sampler) is ResumableDistributedSampler
        assert same(epochs(loader, 3), whole)
    finally:
        torch.distributed.destroy_process_group()


def test_a_dataset_of_any_size():
    class Huge:
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            return index

    tracemalloc.start()
    loader = make(dataset=Huge(), batch_size=32)
    loader.load_state_dict({**loader.state_dict(), "consumed": 9 * 10**11})
    first = next(iter(loader)).tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first == Permutation(10**12, 5, 0).indices(9 * 10**11, 9 * 10**11 + 32).tolist()
    assert len(loader) == 10**12 // 32
    assert peak < 2**20


def test_selection_of_the_sampler(monkeypatch):
    assert type(make().sampler) is ResumableRandomSampler
    assert type(make(shuffle=False).sampler) is ResumableSequentialSampler
    with pytest.raises(RuntimeError, match="num_replicas is None and there is no process group to ask"):
        make(is_distributed=True)
    sampler = ResumableSequentialSampler(range(N))
    loader = make(sampler=sampler, batch_size=3)
    assert loader.sampler is sampler
    assert sampler.batch_size == loader.batch_size == 3


def test_debug_mode_fetches_here(whole):
    options = {"persistent_workers": True, "prefetch_factor": 3, "timeout": 5}
    here = []

    def collate(samples):
        here.append(get_worker_info())
        return noisy_collate(samples)

    loader = make(2, debug_mode=True, collate_fn=collate, **options)
    assert loader.num_workers == 0
    assert same(list(loader), whole[:6])
    assert here == [None] * 6


class Report:
    """A worker_init_fn that tells of its worker through the dataset."""

    def __call__(self, worker_id):
        info = get_worker_info()
        info.dataset.seen = (worker_id, info.id, type(info.dataset).__name__, torch.initial_seed(), draw())


class Seen:
    seen = None

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.seen


def as_the_quick_reference_says(worker_seed):
    """Its _seed_worker, and then what a worker draws."""
    torch.manual_seed(worker_seed)  # what torch does before it calls worker_init_fn
    rng.seed_rngs(worker_seed % 2**32, skip_torch=True)
    return draw()


@pytest.mark.parametrize("sample_rng", ["sample", "worker"])
def test_worker_init_fn_runs_after_ours(sample_rng):
    """And finds the worker seeded by the words of the quick reference, and the user's own dataset."""
    loader = make(2, Seen(), worker_init_fn=Report(), collate_fn=list, sample_rng=sample_rng)
    seen = [batch[0] for batch in islice(loader, 2)]
    for worker, (worker_id, info_id, dataset, torch_seed, drawn) in enumerate(seen):
        assert worker_id == info_id == worker
        assert dataset == "Seen"
        assert drawn == as_the_quick_reference_says(torch_seed)
        assert drawn != as_the_quick_reference_says(torch_seed + 1)
    assert seen[0][3] >= 2**32  # more bits than ours: torch was left alone
    assert seen[0][3] + 1 == seen[1][3]  # base seed + worker id, as torch has it


def test_an_error_in_worker_init_fn_is_raised():
    def fail(worker_id):
        raise KeyError(f"init of {worker_id}")

    loader = make(1, worker_init_fn=fail)
    with pytest.raises(KeyError, match="init of 0"):
        list(loader)


MODULE = """
import random
import torch

class Spawned:
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item(), random.random()])

def init(worker_id):
    pass
"""


def test_workers_that_are_spawned(tmp_path, monkeypatch):
    """They import the dataset, so it stands in a module of its own."""
    (tmp_path / "helios_spawned_dataset.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module = importlib.import_module("helios_spawned_dataset")
    options = {"dataset": module.Spawned(), "worker_init_fn": module.init}
    expected = list(make(**options))
    found = list(make(1, multiprocessing_context="spawn", **options))
    assert len(found) == len(expected) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    monkeypatch.delitem(sys.modules, "helios_spawned_dataset")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 1


class NoIndex:
    def __len__(self):
        return 1


class NoLength:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dataset": Stream()},
            TypeError,
            "dataset is the IterableDataset Stream without state_dict and load",
        ),
        ({"dataset": NoIndex()}, TypeError, "dataset must be map-style .* found NoIndex"),
        ({"dataset": NoLength()}, TypeError, "dataset must have a length .* found NoLength"),
        ({"dataset": []}, ValueError, "dataset is empty"),
        ({"random_seed": -1}, ValueError, "random_seed must be 0 or more, found -1"),
        ({"random_seed": None}, TypeError, "random_seed must be an int, found NoneType None"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, found 0"),
        ({"batch_size": None}, TypeError, "batch_size must be an int, found NoneType None"),
        ({"batch_size": 2.0}, TypeError, r"batch_size must be an int, found float 2\.0"),
        ({"num_workers": -1}, ValueError, "num_workers must be 0 or more, found -1"),
        ({"num_workers": True}, TypeError, "num_workers must be an int, found the bool True"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False, found int 1"),
        ({"drop_last": None}, TypeError, "drop_last must be True or False, found NoneType None"),
        ({"pin_memory": "yes"}, TypeError, "pin_memory must be True or False, found str 'yes'"),
        ({"debug_mode": 0}, TypeError, "debug_mode must be True or False, found int 0"),
        ({"is_distributed": 0}, TypeError, "is_distributed must be True or False, found int 0"),
        ({"persistent_workers": 1}, TypeError, "persistent_workers must be True or False, found int 1"),
        (
            {"sample_rng": "none"},
            ValueError,
            "sample_rng must be one of 'sample', 'batch', 'worker', found 'none'",
        ),
        ({"fingerprint": 3}, TypeError, "fingerprint must be a str or None, found int"),
        (
            {"fingerprint": "f" * 257},
            ValueError,
            "fingerprint must have at most 256 characters, as JSON writes it, found 257",
        ),
        ({"collate_fn": 3}, TypeError, "collate_fn must be callable or None, found int 3"),
        ({"worker_init_fn": "f"}, TypeError, "worker_init_fn must be callable or None, found str 'f'"),
        ({"tail": "some"}, ValueError, "tail must be one of 'pad', 'drop', 'exact', found 'some'"),
        (
            {"tail": "exact", "sampler": ResumableRandomSampler(range(N))},
            ValueError,
            "tail must be None beside a sampler, which has its own, found 'exact'",
        ),
        (
            {"sampler": RandomSampler(range(N))},
            TypeError,
            "sampler must derive from ResumableSampler or ResumableDistributedSampler, found RandomSampler",
        ),
        ({"sampler": [1, 2]}, TypeError, "sampler must derive from .* found list"),
        (
            {"sampler": ResumableRandomSampler(range(9))},
            ValueError,
            "sampler must be for the 22 samples of the dataset, found one for 9",
        ),
        ({"num_workers": 1, "timeout": -1}, ValueError, "timeout"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_a_length_that_fails_says_why():
    class Broken(NoLength):
        def __len__(self):
            return len(None)

    with pytest.raises(TypeError, match="dataset must have a length") as caught:
        make(dataset=Broken())
    assert "NoneType" in str(caught.value.__cause__)
