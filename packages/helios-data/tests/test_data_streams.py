"""Iterable-style datasets: whoever iterates them, wherever it stops, the stream goes on bit for bit."""

import copy
import functools
import gc
import hashlib
import io
import json
import random
import re
import weakref
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from helios.core import rng
from helios.data import LoaderStateError, ResumableSequentialSampler, StreamDataLoader, create_dataloader

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("seeded", "no_worker_stays"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12 and later
]

N = 23
BATCH = 4
DTYPE = torch.float64


def draw():
    """Something of every generator, of kinds that set values aside."""
    numpy_rng = rng.get_default_numpy_rng().generator
    integer = float(numpy_rng.integers(0, 2**30, dtype="uint32"))
    return [torch.randn((), dtype=DTYPE).item(), random.gauss(0, 1), numpy_rng.normal(), integer]


class Lines(IterableDataset):
    """The numbers below N, each with noise; of two workers, the first has the first `cut` of them."""

    def __init__(self, cut=12, bad=None):
        self.cut = cut
        self.bad = bad
        self.position = 0
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def share(self):
        info = get_worker_info()
        if info is None or info.num_workers == 1:
            return range(N)
        return range(self.cut) if info.id == 0 else range(self.cut, N)

    def __iter__(self):
        share = self.share()
        while self.position < len(share):
            number = share[self.position]
            self.position += 1
            if number == self.bad:
                raise OSError(f"cannot read line {number}")
            yield torch.tensor([100 * self.epoch + number, *draw()], dtype=DTYPE)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class BeginsAgain(Lines):
    """Its own iterator, which at its end stands at its beginning: it can be iterated twice without a loader."""

    def __iter__(self):
        return self

    def __next__(self):
        share = self.share()
        if self.position == len(share):
            self.position = 0
            raise StopIteration
        self.position += 1
        return torch.tensor([100 * self.epoch + share[self.position - 1], *draw()], dtype=DTYPE)


class ShuffleBuffer(IterableDataset):
    """Hands over one of the last few lines; its state has tensors, and it has no set_epoch."""

    def __init__(self):
        self.lines = Lines()
        self.buffer = torch.empty(0, 5, dtype=DTYPE)

    def __iter__(self):
        for line in self.lines:
            self.buffer = torch.cat([self.buffer, line[None]])
            if len(self.buffer) > 3:
                yield self._pick()
        while len(self.buffer):
            yield self._pick()

    def _pick(self):
        number = random.randrange(len(self.buffer))
        picked = self.buffer[number]
        self.buffer = torch.cat([self.buffer[:number], self.buffer[number + 1 :]])
        return picked

    def state_dict(self):
        return {"lines": self.lines.state_dict(), "buffer": self.buffer}

    def load_state_dict(self, state):
        self.lines.load_state_dict(state["lines"])
        self.buffer = state["buffer"]


class HuggingFaceStyle(Lines):
    """As in `datasets`: no state before the iteration, and a state is of an epoch."""

    state = starting = None

    def __iter__(self):
        self.state = {"epoch": self.epoch, "position": 0}
        if self.starting is not None and self.starting["epoch"] == self.epoch:
            self.state["position"] = self.starting["position"]
        self.position = self.state["position"]
        for sample in super().__iter__():
            self.state["position"] = self.position
            yield sample

    def state_dict(self):
        return copy.deepcopy(self.state)

    def load_state_dict(self, state):
        self.starting = state


class Forgetful(Lines):
    """The control: what it is given, it forgets."""

    def load_state_dict(self, state):
        self.position = 0


KINDS = {
    "two halves": Lines,
    "one ends long before": functools.partial(Lines, 20),
    "the first has little": functools.partial(Lines, 3),
    "the second has nothing": functools.partial(Lines, N),
    "the first has nothing": functools.partial(Lines, 0),
    "begins again": BeginsAgain,
    "buffer": ShuffleBuffer,
    "Hugging Face": HuggingFaceStyle,
}
WORKERS = {
    "no worker": {},
    "1 worker": {"workers": 1},
    "2 workers": {"workers": 2},
    "2 persistent": {"workers": 2, "persistent_workers": True},
}
# With one stream, and with two: how a run that was stopped may go on.
ONE = [{}, {"workers": 1}, {"workers": 1, "prefetch_factor": 1, "persistent_workers": True}]
TWO = [
    {"workers": 2, "prefetch_factor": 1},
    {"workers": 2, "persistent_workers": True},
    {"workers": 2, "prefetch_factor": 5, "persistent_workers": True},
]


def noisy_collate(samples):
    return {"samples": torch.stack(samples), "noise": torch.tensor(draw(), dtype=DTYPE)}


def make(dataset=None, workers=0, **options):
    if workers:
        options = {"multiprocessing_context": "fork", **options}
    options = {"random_seed": 5, "batch_size": BATCH, "collate_fn": noisy_collate, **options}
    return create_dataloader(Lines() if dataset is None else dataset, num_workers=workers, **options)


def epochs(loader, until=2):
    """All batches up to the beginning of epoch `until`."""
    batches = []
    while loader.epoch < until:
        batches += islice(loader, 100)  # no epoch has as many: a stream that does not end is an error
        assert len(batches) < 100
    return batches


def resumed(state, *args, until=2, **options):
    loader = make(*args, **options)
    loader.load_state_dict(state)
    return epochs(loader, until)


def after_restart(state):
    """What a process that was killed has left on disk."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stopped_everywhere(loader, until=2):
    """All batches, and the state after each."""
    batches, states = [], []
    while loader.epoch < until:
        for batch in loader:
            batches.append(batch)
            states.append(after_restart(loader.state_dict()))
    return batches, states


def samples(batches):
    return torch.cat([batch["samples"] for batch in batches])


def numbers(batches):
    return [batch["samples"][:, 0].int().tolist() for batch in batches]


def same(found, expected):
    """Bitwise: the same batches, with the same noise."""
    return len(found) == len(expected) and all(
        torch.equal(a["samples"], b["samples"]) and torch.equal(a["noise"], b["noise"])
        for a, b in zip(found, expected, strict=True)
    )


@functools.cache
def whole(kind="two halves", workers=0, until=2):
    return epochs(make(KINDS[kind](), workers), until)


@pytest.mark.parametrize("kind", ["two halves", "begins again", "buffer", "Hugging Face"])
def test_one_stream_goes_on_bit_for_bit_from_every_stop(kind):
    """A worker, or none: it is the same stream, and the one continues the other."""
    expected = whole(kind)
    for options in ({}, {"workers": 1}):
        batches, states = stopped_everywhere(make(KINDS[kind](), **options))
        assert same(batches, expected)
        assert [state["epoch"] for state in states] == [0] * 5 + [1] * 6 + [2]
        for stop, state in enumerate(states, 1):
            assert same(resumed(state, KINDS[kind](), **ONE[stop % 3 if stop > 8 else 0]), expected[stop:])


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_go_on_bit_for_bit_from_every_stop(kind):
    expected = whole(kind, 2)
    batches, states = stopped_everywhere(make(KINDS[kind](), 2), until=1)
    assert same(batches, expected[: len(batches)])
    for stop, state in enumerate(states, 1):
        is_last = stop == len(states)  # whose state is that of the next epoch
        assert state["epoch"] == is_last
        # What was fetched ahead is not counted.
        assert sum(state["num_samples"]) == (0 if is_last else len(samples(batches[:stop])))
        assert same(resumed(state, KINDS[kind](), **TWO[stop % 3]), expected[stop:])


def test_each_line_comes_once_and_draws_for_itself():
    for workers in (0, 2):
        for epoch in (0, 1):
            found = [
                int(sample[0]) for sample in samples(whole(workers=workers)) if sample[0] // 100 == epoch
            ]
            assert sorted(found) == [100 * epoch + number for number in range(N)]
        for column in samples(whole(workers=workers)).T:
            assert len(column.unique()) == 2 * N
        noise = torch.stack([batch["noise"] for batch in whole(workers=workers)])
        assert all(len(column.unique()) == 12 for column in noise.T)


def test_what_would_not_go_on_is_noticed():
    """The control of the file: a dataset that forgets, a state that is lost, torch's own loader."""
    for options in ({}, {"workers": 2}):
        expected = whole(workers=options.get("workers", 0))
        _, states = stopped_everywhere(make(**options), until=1)
        assert not same(resumed(states[1], Forgetful(), **options), expected[2:])
        assert not same(epochs(make(**options), 2), expected[2:])
        assert not same(resumed(states[2], **options), expected[2:])
        assert not same(epochs(make(random_seed=6, **options), 2), expected)
    by_torch = [
        list(DataLoader(Lines(), BATCH, num_workers=workers, collate_fn=noisy_collate)) for workers in (0, 1)
    ]
    assert numbers(by_torch[0]) == numbers(by_torch[1])
    assert not same(*by_torch)


def test_the_randomness_is_frozen():
    """By the very bytes, since a state does not name them: by (seed, epoch, rank, stream), then by number."""
    for epoch, stream, number in ((0, 0, 1), (0, 1, 1), (1, 1, 2)):
        batch = whole(workers=2)[6 * epoch + 2 * number + stream]
        key = rng.derive_bytes(5, "stream", epoch, 0, stream)  # 0 is the rank
        for position, sample in enumerate(batch["samples"], BATCH * number):
            position = position.to_bytes(8, "little")
            rng.rekey_host_rngs(hashlib.blake2b(position, digest_size=32, key=key).digest())
            assert sample[1:].tolist() == draw()
        end = BATCH * number + len(batch["samples"])
        rng.rekey_host_rngs(rng.derive_bytes(5, "stream collate", epoch, 0, stream, end))
        assert batch["noise"].tolist() == draw()


def test_a_resumed_run_can_be_stopped_and_resumed_again():
    for workers in ((0, 1, 0, 1, 0, 0), (2,) * 5):
        found, state = [], make(workers=workers[0]).state_dict()
        for number, num_batches in zip(workers, (1, 3, 3, 2, 3, 0), strict=False):
            loader = make(workers=number)
            loader.load_state_dict(state)
            last = len(found) + num_batches
            while len(found) < last:
                found += islice(loader, last - len(found))
            state = json.loads(json.dumps(loader.state_dict()))
        assert same(found, whole(workers=workers[0]))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_the_samples_are_the_same_with_another_batch_size(batch_size):
    for workers, stop in ((0, 3), (2, 2)):
        _, states = stopped_everywhere(make(workers=workers), until=1)
        found = resumed(states[stop - 1], workers=workers, batch_size=batch_size, until=1)
        found, expected = samples(found), samples(whole(workers=workers)[stop:6])
        if workers:  # they take turns: it is each stream that goes on
            found, expected = found[found[:, 0].argsort()], expected[expected[:, 0].argsort()]
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "kind", ["two halves", "one ends long before", "the first has little", "begins again"]
)
def test_drop_last_drops_of_every_stream(kind):
    for workers in (0, 2):
        expected = [batch for batch in whole(kind, workers) if len(batch["samples"]) == BATCH]
        batches, states = stopped_everywhere(make(KINDS[kind](), workers, drop_last=True))
        assert same(batches, expected)
        for stop in (1, len(states) // 2):
            found = resumed(states[stop - 1], KINDS[kind](), drop_last=True, workers=workers)
            assert same(found, expected[stop:])


def test_workers_mode_keeps_the_order_only():
    expected = numbers(whole(workers=2))
    loader = make(workers=2, sample_rng="worker")
    batches, states = stopped_everywhere(loader)
    assert numbers(batches) == expected
    assert same(batches, epochs(make(workers=2, sample_rng="worker"), 2))  # a whole run is the same
    found = resumed(states[1], workers=2, sample_rng="worker")
    assert numbers(found) == expected[2:]
    assert not same(found[:4], batches[2:6])
    assert same(found[4:], batches[6:])  # from the next epoch on
    # Without workers, the dataset draws from the generators of the loop.
    before = everything()
    assert numbers(epochs(make(sample_rng="worker"), 2)) == numbers(whole())
    assert everything() != before


# --- the generators of the training loop -----------------------------------------------------------------


def everything():
    state = rng.get_rng_state_dict()
    return state["torch"].tolist(), state["python"], state["numpy"]


class DrawsEverywhere(Lines):
    """In every method that a loader calls in the main process."""

    def __iter__(self):
        draw()
        return super().__iter__()

    def set_epoch(self, epoch):
        draw()
        super().set_epoch(epoch)

    def load_state_dict(self, state):
        draw()
        super().load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_draws_nothing(workers):
    loader = make(DrawsEverywhere(), workers)
    before = everything()
    for _ in range(2):
        for _ in loader:
            assert everything() == before
    it = iter(loader)
    next(it)
    loader.load_state_dict(loader.state_dict())
    next(iter(loader))
    assert everything() == before
    list(DataLoader(Lines(), num_workers=workers))  # the control
    assert everything() != before


def test_what_the_loop_draws_does_not_reach_the_samples():
    found = []
    for batch in make():
        torch.manual_seed(len(found))
        draw()
        found.append(batch)
    assert same(found, whole()[:6])


class ShufflesFirst(Lines):
    """Draws its order before it is asked for a sample; the order is part of its state."""

    order = None

    def __iter__(self):
        if self.order is None:
            self.order = torch.randperm(N).tolist()
        return (torch.tensor([number, *draw()], dtype=DTYPE) for number in self._rest())

    def _rest(self):
        while self.position < N:
            self.position += 1
            yield self.order[self.position - 1]

    def state_dict(self):
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state):
        self.position, self.order = state["position"], state["order"]


def test_an_order_that_is_drawn_first_is_of_seed_epoch_and_stream():
    expected = epochs(make(ShufflesFirst()), 2)
    assert samples(expected[:6])[:, 0].sort().values.tolist() == list(range(N))
    assert numbers(expected[:6]) != numbers(expected[6:])
    draw()  # the loop's generators have no part in it
    for workers in (0, 1):
        batches, states = stopped_everywhere(make(ShufflesFirst(), workers))
        assert same(batches, expected)
        for stop in (3, 8):
            assert same(resumed(states[stop - 1], ShufflesFirst()), expected[stop:])
    assert not same(epochs(make(ShufflesFirst(), random_seed=6), 2), expected)


def test_ranks_draw_otherwise(monkeypatch):
    """Every rank numbers its own samples: the same noise on all of them would be less noise."""
    with pytest.raises(RuntimeError, match="num_replicas is None and there is no process group to ask"):
        make(is_distributed=True)
    noise = []
    for rank in (0, 1):

        class Process:
            is_available = is_initialized = staticmethod(lambda: True)
            get_world_size = staticmethod(lambda: 2)
            get_rank = staticmethod(lambda rank=rank: rank)

        monkeypatch.setattr(torch, "distributed", Process)
        noise.append(samples(list(make(is_distributed=True)))[:, 1:])
    assert not (noise[0] == noise[1]).any()


# --- iterating -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_breaking_off_and_beginning_again(options):
    expected = whole(workers=2 if options.get("workers") == 2 else 0)
    loader = make(**options)
    for num_batches in (0, 1, 3):
        assert same(list(islice(loader, num_batches)), expected[:num_batches])
        assert sum(loader.state_dict()["num_samples"]) == num_batches * BATCH
    assert same(list(loader), expected[:6])
    assert loader.epoch == 1
    loader.set_epoch(1)
    assert same(list(loader), expected[6:])
    loader.set_epoch(0)
    next(iter(loader))
    loader.set_epoch(0)  # changes nothing, a start once used included
    assert same(list(loader), expected[:6])
    state = make(**options).state_dict()
    loader.load_state_dict({**state, "epoch": 1})
    loader.set_epoch(1)
    assert same(list(loader), expected[6:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_may_have_another_loader(workers):
    """Which finds it as the first one did, wherever that stands: without workers too, it is not used up."""
    dataset = Lines()
    loader = make(dataset, workers)
    list(loader)
    assert same(epochs(make(dataset, workers)), whole(workers=workers))
    batches = iter(loader)
    next(batches)
    state, newer = loader.state_dict(), iter(loader)
    found = [next(newer)]
    del batches  # not with what the newer iteration stands on
    assert same(found + list(newer), whole(workers=workers)[6:])
    next(iter(loader))
    assert same(resumed(state, dataset, workers), whole(workers=workers)[7:])
    loader.load_state_dict(state)
    assert same(epochs(loader), whole(workers=workers)[7:])


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_a_resumed_loop_may_set_every_epoch(options):
    expected = whole(workers=2 if options.get("workers") == 2 else 0)
    loader = make(**options)
    list(islice(loader, 3))
    state, loader, found = loader.state_dict(), make(**options), []
    loader.load_state_dict(state)
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += list(loader)
    assert same(found, expected[3:])


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_an_older_iteration_cannot_go_on(options):
    """It would move the streams on under the newer one, or count its batches where that one stands."""
    expected = whole(workers=2 if options.get("workers") == 2 else 0)
    loader = make(**options)

    def refuses(change):
        older = iter(loader)
        assert same([next(older)], expected[:1])
        found = change(loader)
        before = loader.state_dict()
        with pytest.raises(
            RuntimeError, match="this iteration cannot go on: another one was begun on the same"
        ):
            next(older)
        assert loader.state_dict() == before
        return found

    newer = refuses(iter)
    assert same(list(newer), expected[:6])
    loader.set_epoch(0)
    refuses(lambda loader: loader.set_epoch(1))
    assert loader.epoch == 1
    loader.set_epoch(0)
    refuses(lambda loader: loader.load_state_dict(loader.state_dict()))
    assert same(list(loader), expected[1:6])


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_a_loop_by_steps_is_the_same_run(options):
    """One that takes the batches of an epoch and never asks for one more goes on to the next epoch too."""
    loader, found = make(**options), []
    for _ in range(2):
        found += islice(loader, 6)
    assert same(found, whole(workers=2 if options.get("workers") == 2 else 0))
    assert loader.state_dict()["epoch"] == 2


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_a_loader_that_is_let_go_goes_at_once(options):
    """Also after an error. No cycle holds it: torch waits for workers that the garbage collector ends."""
    gc.disable()
    try:
        for dataset in (
            Lines(),
            Lines(bad=8),
            Lines(bad=9),
        ):  # the first of a batch, which is looked for ahead
            loader = make(dataset, **options)
            gone = weakref.ref(loader)
            batches = iter(loader)
            next(batches)
            try:
                list(batches if dataset.bad else islice(batches, 1))
            except OSError:
                assert dataset.bad
            del loader, batches
            assert gone() is None
    finally:
        gc.enable()


class Sized(Lines):
    def __len__(self):
        return BATCH + 1  # too few


def test_len_is_what_the_dataset_says():
    assert type(make()) is StreamDataLoader
    with pytest.raises(TypeError, match="has no len"):
        len(make())
    assert len(make(Sized())) == 2
    assert len(make(Sized(), drop_last=True)) == 1
    # It may be wrong, as a wish; torch's own warns.
    loader = make(Sized())
    assert len(loader) == 2
    assert same(list(loader), whole()[:6])
    by_torch = DataLoader(Sized(), BATCH)
    assert len(by_torch) == 2
    with pytest.warns(UserWarning, match="Length of IterableDataset"):
        list(by_torch)


# --- state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_is_as_plain_as_the_datasets_is(workers):
    loader = make(workers=workers, fingerprint="lines v1")
    for _ in islice(loader, 3):
        state = loader.state_dict()
        assert json.loads(json.dumps(state)) == after_restart(state) == state
    other = make(workers=workers, fingerprint="lines v1")
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_is_a_copy(workers):
    """Nothing that is done to it, or that the loader does then, changes the other."""
    loader = make(ShuffleBuffer(), workers)
    batches = iter(loader)
    found = [next(batches), next(batches)]
    taken, spoilt = loader.state_dict(), loader.state_dict()
    kept = after_restart(taken)
    for each in spoilt["dataset_states"]:
        each["buffer"].zero_()
        each["lines"]["position"] = 0
    spoilt["num_samples"][0] = 0
    found += batches
    assert same(found, whole("buffer", workers)[:6])
    assert torch.equal(taken["dataset_states"][0]["buffer"], kept["dataset_states"][0]["buffer"])
    loader.load_state_dict(taken)
    taken["dataset_states"][0]["buffer"].zero_()
    assert same(epochs(loader, 2), whole("buffer", workers)[2:])


OF_MAP_STYLE = create_dataloader(range(N)).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed: the state has 6, here it is 5. Use the seed"),
        (
            {"fingerprint": "v2"},
            "fingerprint: the state has 'v2', here it is None. It belongs to another dataset",
        ),
        ({"format": 2}, "format: the state has 2, here it is 1. It was written by another release"),
        ({"algorithm": "sequential"}, "algorithm: the state has 'sequential', here it is 'stream'"),
        ({"epoch": -1}, "epoch must be an int of 0 or more, the state has -1"),
        ({"epoch": 1.0}, "epoch must be an int of 0 or more, the state has 1.0"),
        ({"turn": 2}, "turn: the state has 2, here there are 2 streams"),
        ({"turn": True}, "turn must be an int of 0 or more, the state has True"),
        ({"num_samples": 8}, "num_samples must be a list, the state has int"),
        ({"num_samples": [4]}, "num_samples: the state has 1 streams, here there are 2. "),
        ({"num_samples": [4, -4]}, "num_samples must be an int of 0 or more, the state has -4"),
        ({"num_samples": [4, None]}, "num_samples must be an int of 0 or more, the state has None"),
        ({"dataset_states": None}, "dataset_states must be a list, the state has NoneType"),
        ({"dataset_states": [None] * 3}, "dataset_states: the state has 3 streams, here there are 2. "),
        (OF_MAP_STYLE, "algorithm: the state has 'sequential', here it is 'stream'"),
        (make(workers=1).state_dict(), "num_samples: the state has 1 streams, here there are 2. "),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    loader = make(workers=2)
    batches = iter(loader)
    found = [next(batches)]
    before = loader.state_dict()
    with pytest.raises(LoaderStateError, match=f"^{re.escape(message)}"):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before
    assert same(found + list(batches), whole(workers=2)[:6])
    loader.load_state_dict(before)  # the control


def test_a_state_of_something_else_changes_nothing():
    loader = make()
    list(islice(loader, 2))
    before = loader.state_dict()
    bad = [None, [], {}, *({k: v for k, v in before.items() if k != key} for key in before)]
    for state in bad:
        with pytest.raises(LoaderStateError, match=r"state must be a dict|state lacks '"):
            loader.load_state_dict(state)
        assert loader.state_dict() == before
    with pytest.raises(LoaderStateError, match=r"here there are 1\. An iterable-style dataset is divided"):
        loader.load_state_dict(make(workers=2).state_dict())
    with pytest.raises(LoaderStateError, match="algorithm: the state has 'stream', here it is 'sequential'"):
        create_dataloader(range(N)).load_state_dict(before)
    assert same(resumed(before), whole()[2:])


def test_the_state_of_another_rank_is_refused():
    """As when rank 0 saved for all: its samples would be taken twice, and those of the others not at all."""
    loader = make()
    with pytest.raises(LoaderStateError, match=r"rank: the state has 1, here it is 0. Each rank's streams"):
        loader.load_state_dict({**loader.state_dict(), "rank": 1})
    with pytest.raises(LoaderStateError, match=r"num_replicas: the state has 2, here it is 1"):
        loader.load_state_dict({**loader.state_dict(), "num_replicas": 2})


@pytest.mark.parametrize("options", WORKERS.values(), ids=WORKERS.keys())
def test_a_state_is_not_used_up_before_the_first_batch(options):
    """An iteration may be begun and dropped, as libraries do that look at a loader."""
    expected = whole(workers=2 if options.get("workers") == 2 else 0)
    loader = make(**options)
    list(islice(loader, 2))
    state = loader.state_dict()
    other = make(**options)
    other.load_state_dict(state)
    del loader
    iter(other)
    assert other.state_dict() == state
    assert same(epochs(other), expected[2:])


def test_a_state_that_was_not_used_refuses_an_earlier_epoch():
    loader = make()
    list(loader)
    other = make()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match=r"a state of epoch 1 was loaded, and set_epoch\(0\) goes back"):
        other.set_epoch(0)
    assert same(epochs(other), whole()[len(list(make())) :])


def test_a_stream_without_its_datasets_state_is_refused():
    """It would begin again, and none would notice."""
    loader = make()
    list(islice(loader, 2))
    state = loader.state_dict()
    with pytest.raises(LoaderStateError, match="dataset_states"):
        loader.load_state_dict({**state, "dataset_states": [None]})
    assert loader.state_dict() == state


# --- options ---------------------------------------------------------------------------------------------


class OnlySaves(Lines):
    load_state_dict = None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shuffle": True}, ValueError, "shuffle must not be given for an IterableDataset.* found True"),
        ({"order": "torch"}, ValueError, "order must not be given for an IterableDataset.* found 'torch'"),
        ({"tail": "pad"}, ValueError, "tail must not be given for an IterableDataset.* found 'pad'"),
        (
            {"sampler": ResumableSequentialSampler(range(N))},
            ValueError,
            "sampler must not be given for an Iterable",
        ),
        (
            {"sample_rng": "batch"},
            ValueError,
            "sample_rng must be 'sample' or 'worker' for an Iterable.*'batch'",
        ),
        ({"in_order": False}, ValueError, "in_order must be True: .* no state can continue"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, found 0"),
        ({"batch_size": [2, 2]}, TypeError, r"batch_size must be an int, found list \[2, 2\]"),
        ({"batch_size": lambda epoch, cursor: 4}, TypeError, "batch_size must be an int, found function"),
        (
            {"dataset": OnlySaves()},
            TypeError,
            "IterableDataset OnlySaves without .* only the dataset itself can say",
        ),
    ],
)
def test_what_a_stream_cannot_have_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
