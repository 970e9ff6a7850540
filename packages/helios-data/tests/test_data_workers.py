"""Workers that die, hang and fail, loaders that are copied, batches of every kind: the run goes on bit for bit."""

import collections
import copy
import dataclasses
import functools
import importlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from helios.core import rng
from helios.data import Permutation, ResumableDistributedSampler, ResumableRandomSampler, create_dataloader
from helios.data._orphans import end_with_parent, has_parent

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("seeded", "no_worker_stays"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # on a machine with one core
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # Python 3.12 and later
]

N = 22
BATCH = 4  # 6 batches; of two streams of 11 samples, 3 each
FATAL = 13
DTYPE = torch.float64


def sample(number):
    noise = torch.randn((), dtype=DTYPE).item(), rng.get_default_numpy_rng().generator.uniform()
    return torch.tensor([number, *noise], dtype=DTYPE)


class Map(Dataset):
    def __init__(self, fault=None):
        self.fault = fault

    def __len__(self):
        return N

    def __getitem__(self, index):
        if self.fault is not None:
            self.fault(index)
        return sample(index)


class Stream(IterableDataset):
    def __init__(self, fault=None):
        self.fault = fault
        self.position = 0

    def __iter__(self):
        info = get_worker_info()
        share = range(N) if info is None else range(info.id, N, info.num_workers)
        while self.position < len(share):
            number = share[self.position]
            self.position += 1
            if self.fault is not None:
                self.fault(number)
            yield sample(number)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


STYLES = {"map": Map, "stream": Stream}
WORKERS = {
    "no worker": {},
    "1 worker": {"workers": 1},
    "2 workers": {"workers": 2},
    "2 persistent": {"workers": 2, "persistent_workers": True},
}
of_both_styles = pytest.mark.parametrize("style", STYLES)


def with_options(*names):
    return pytest.mark.parametrize("options", [WORKERS[name] for name in names], ids=names)


def noisy_collate(samples):
    return {"samples": torch.stack(samples), "noise": torch.rand(3)}


def make(dataset, workers=0, **options):
    dataset = STYLES[dataset]() if isinstance(dataset, str) else dataset
    if workers:
        options = {"multiprocessing_context": "fork", **options}
    options = {"shuffle": not isinstance(dataset, IterableDataset), "collate_fn": noisy_collate, **options}
    return create_dataloader(
        dataset, **{"random_seed": 5, "batch_size": BATCH, "num_workers": workers, **options}
    )


def epochs(loader, until=2):
    """All batches up to the beginning of epoch `until`."""
    batches = []
    while loader.epoch < until:
        batches += list(loader)
    return batches


@functools.cache
def whole(style, workers=0):
    """Two epochs; of a stream, the batches depend on how many there are."""
    return epochs(make(style, workers if style == "stream" else 0))


def same(found, expected):
    """Bitwise: the same batches, with the same noise."""
    return len(found) == len(expected) and all(
        torch.equal(a["samples"], b["samples"]) and torch.equal(a["noise"], b["noise"])
        for a, b in zip(found, expected, strict=True)
    )


def received(loader):
    """Batches that the state counts."""
    state = loader.state_dict()
    return sum(state["num_samples"]) // BATCH if "turn" in state else state["consumed"] // BATCH


def resumed(state, *args, **options):
    loader = make(*args, **options)
    loader.load_state_dict(state)
    return epochs(loader)


# --- what goes wrong -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Once:
    """Goes wrong at one sample, the first time; a file remembers, since it may be in another process."""

    flag: Path
    action: collections.abc.Callable[[], None]

    def __call__(self, number):
        if number == FATAL and not self.flag.exists():
            self.flag.touch()
            self.action()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error=OSError):
    raise error("cannot read it")


# torch's handler of the signal may raise where torch has just opened a file, to see whether it still can.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@of_both_styles
@with_options("1 worker", "2 workers", "2 persistent")
def test_a_worker_that_dies(tmp_path, style, options):
    expected = whole(style, options["workers"])
    loader = make(STYLES[style](Once(tmp_path / "dead", die)), **options)
    found, told = [], ""
    try:
        for batch in loader:
            found.append(batch)
    except RuntimeError as error:  # kept, it would keep the workers
        told = f"{error} {error.__cause__}"
    # At once: it was the signal or the broken pipe that told, not the look that torch takes every five seconds.
    assert re.search(r"DataLoader worker \(pid.* (is killed by signal|exited unexpectedly .*\w)", told)
    stop, state = received(loader), loader.state_dict()
    assert stop - len(found) in (0, 1)  # the signal may come as the batch is handed over
    assert same(found, expected[: len(found)])
    assert same(resumed(state, style, **options), expected[stop:])
    assert same(list(loader), expected[:6])  # with other workers
    loader.load_state_dict(state)
    assert same(epochs(loader), expected[stop:])


@of_both_styles
def test_a_worker_that_hangs(style):
    read, write = os.pipe()

    def wait(number):
        if number == FATAL:
            os.read(read, 1)

    expected = whole(style, 1)
    loader = make(STYLES[style](wait), 1, timeout=0.5)
    found, told = [], ""
    try:
        for batch in loader:
            found.append(batch)
    except RuntimeError as error:
        os.write(write, b"go on")  # while the error still keeps the worker, or it would be waited for
        told = str(error)
    assert "DataLoader timed out after 0.5 seconds" in told
    assert received(loader) == len(found) < 6
    assert same(found + resumed(loader.state_dict(), style, 1), expected)
    assert same(list(make(STYLES[style](wait), 1, timeout=60)), expected[:6])  # the control: nothing hangs
    os.close(read)
    os.close(write)


class ComplicatedError(Exception):
    """It cannot be made from a message alone."""

    def __init__(self, text, code=None):
        super().__init__(f"{text}, code {code:d}")


@of_both_styles
@pytest.mark.parametrize("place", ["dataset", "collate"])
@with_options("no worker", "2 persistent")
def test_what_raises_can_be_mended(tmp_path, style, place, options):
    fault, expected = Once(tmp_path / "failed", fail), whole(style, options.get("workers", 0))

    def collate(samples):
        for each in samples:
            fault(int(each[0]))
        return noisy_collate(samples)

    dataset = STYLES[style](fault if place == "dataset" else None)
    loader = make(dataset, collate_fn=collate if place == "collate" else noisy_collate, **options)
    found = []
    with pytest.raises(OSError, match="cannot read it"):
        found.extend(loader)
    stop, state = received(loader), loader.state_dict()
    assert same(found, expected[:stop])
    assert same(resumed(state, style, **options), expected[stop:])
    assert same(list(loader), expected[:6])
    loader.load_state_dict(state)
    assert same(epochs(loader), expected[stop:])


@of_both_styles
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_mid_batch_loses_nothing(tmp_path, style, error):
    loader = make(STYLES[style](Once(tmp_path / "interrupted", functools.partial(fail, error))))
    with pytest.raises(error):
        list(loader)
    assert same(resumed(loader.state_dict(), style), whole(style)[received(loader) :])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_iteration_is_not_the_end_of_the_epoch(tmp_path, workers):
    """As torch's own loader takes it, which ends the epoch early and says nothing."""
    stop = functools.partial(fail, StopIteration)
    loader = make(Map(Once(tmp_path / "ours", stop)), workers)
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(loader)
    assert same(resumed(loader.state_dict(), "map"), whole("map")[received(loader) :])
    assert len(list(DataLoader(Map(Once(tmp_path / "torch's", stop)), BATCH))) == FATAL // BATCH


def test_an_error_that_cannot_be_made_again_is_told(tmp_path):
    loader = make(
        Map(Once(tmp_path / "failed", functools.partial(fail, functools.partial(ComplicatedError, code=7)))),
        1,
    )
    with pytest.raises(RuntimeError, match=r"(?s)worker process 0.*ComplicatedError: cannot read it, code 7"):
        list(loader)


AT_EXIT = """
import sys
import torch
from torch.utils.data import IterableDataset
from helios.data import create_dataloader

class Numbers(IterableDataset):
    position = 0

    def __iter__(self):
        while self.position < 100:
            self.position += 1
            yield self.position

    def state_dict(self):
        return self.position

    def load_state_dict(self, position):
        self.position = position

left = []
for dataset in (range(100), Numbers()):
    for workers, persistent in ((0, False), (1, False), (1, True)):
        loader = create_dataloader(
            dataset, num_workers=workers, persistent_workers=persistent, multiprocessing_context="fork"
        )
        batches = iter(loader)
        next(batches)
        left.append((loader, batches))
print(*(p.pid for p in torch.multiprocessing.active_children()))
"""


def test_a_program_may_end_in_mid_epoch(tmp_path):
    """Nobody waits for a worker, and none stays."""
    script = tmp_path / "script.py"
    script.write_text(AT_EXIT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# --- copies ----------------------------------------------------------------------------------------------


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@of_both_styles
@with_options("no worker", "2 workers", "2 persistent")
def test_a_copy_goes_on_where_the_original_stands(style, options):
    expected = whole(style, options.get("workers", 0))
    loader = make(style, **options)
    copies = [pickled(loader)]
    batches = iter(loader)
    found = [next(batches), next(batches)]
    copies += [copy.deepcopy(loader), pickled(copy.deepcopy(loader)), copy.copy(loader)]
    assert copies[1].state_dict() == loader.state_dict() != copies[0].state_dict()
    found += batches  # the original does not notice
    copies.append(copy.deepcopy(loader))
    assert same(found + list(loader), expected)
    for twin, start in zip(copies, (0, 2, 2, 2, 6), strict=True):
        assert same(epochs(twin), expected[start:])
    assert loader.epoch == 2


def test_a_copy_begins_where_the_original_was_told_to():
    """Also in another epoch, if that was said of the next one and not of the one in progress."""
    loader = make("map")
    loader.sampler.start_iter = 2
    for twin in (pickled(loader), copy.deepcopy(loader), loader):
        twin.set_epoch(1)
        assert same(list(twin), whole("map")[8:])


@of_both_styles
def test_a_copy_of_a_loaded_loader_goes_on_from_the_state(style):
    loader = make(style)
    list(islice(loader, 3))
    state = loader.state_dict()
    loader = make(style)
    loader.load_state_dict(state)
    assert same(epochs(pickled(loader)), whole(style)[3:])
    assert same(epochs(loader), whole(style)[3:])


def test_a_copy_of_a_sampler_is_of_the_same_order_and_position():
    for sampler in (ResumableRandomSampler(range(N), 5), ResumableDistributedSampler(range(N), 2, 1, seed=5)):
        sampler.set_epoch(3)
        order = list(sampler)
        sampler.start_iter = 4
        for twin in (pickled(sampler), copy.deepcopy(sampler)):
            assert twin.state_dict() == sampler.state_dict()
            assert list(twin) == order[4:]
            assert list(twin) == order
        assert list(sampler) == order[4:]
        assert len(pickle.dumps(sampler)) < 4096  # not the order itself


SPAWNED = """
import torch
from torch.utils.data import IterableDataset

class Spawned(IterableDataset):
    position = 0

    def __iter__(self):
        while self.position < 6:
            self.position += 1
            yield torch.tensor([self.position, torch.rand(()).item()])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
"""


def test_a_copy_with_a_context_spawns_a_stream(tmp_path, monkeypatch):
    """Also that a worker which imports everything anew learns of the next epoch."""
    (tmp_path / "helios_spawned_stream.py").write_text(SPAWNED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    dataset = importlib.import_module("helios_spawned_stream").Spawned()
    expected = epochs(make(copy.copy(dataset), collate_fn=None))
    context = multiprocessing.get_context("spawn")
    loader = make(dataset, 1, collate_fn=None, multiprocessing_context=context, persistent_workers=True)
    twin = copy.deepcopy(pickled(loader))
    of_map_style = pickled(make("map", 1, multiprocessing_context=context))
    assert of_map_style.multiprocessing_context.get_start_method() == "spawn"
    assert twin.multiprocessing_context.get_start_method() == "spawn"
    found = epochs(twin)
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    monkeypatch.delitem(sys.modules, "helios_spawned_stream")


# --- requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch_factor", [1, 2, 7])
def test_what_was_fetched_ahead_is_not_counted(prefetch_factor):
    loader = make("map", 2, prefetch_factor=prefetch_factor)
    found, stops = [], [0]
    for stop, batch in enumerate(islice(loader, 3), 1):
        found.append(batch)
        stops.append(received(loader))
        assert stops[-1] == stop
    assert same(found + resumed(loader.state_dict(), "map", 2, prefetch_factor=prefetch_factor), whole("map"))


def growing(epoch, cursor):
    return 1 + epoch + cursor // 4


def test_batches_that_grow_come_alike_from_workers():
    expected = epochs(make("map", batch_size=growing))
    sizes, cursor = [], 0
    while cursor < N:
        sizes.append(min(growing(0, cursor), N - cursor))
        cursor += sizes[-1]
    loader = make("map", 2, batch_size=growing)
    assert [len(batch["samples"]) for batch in expected[: len(loader)]] == sizes
    found, states = [], []
    while loader.epoch < 2:
        for batch in loader:
            found.append(batch)
            states.append(loader.state_dict())
    assert same(found, expected)
    for stop in range(1, len(states), 4):
        assert same(resumed(states[stop - 1], "map", 2, batch_size=growing), expected[stop:])
    by_four = resumed(states[2], "map")
    samples = torch.cat([batch["samples"] for batch in expected[3:]])
    assert torch.equal(torch.cat([batch["samples"] for batch in by_four]), samples)


class Asked(Map):
    """Tells how it was asked: for one index, or for those of a batch."""

    def __getitem__(self, index):
        return torch.cat([sample(index), torch.tensor([1.0])])

    def __getitems__(self, indices):
        return [torch.cat([sample(index), torch.tensor([float(len(indices))])]) for index in indices]


def test_whole_batches_are_asked_for_where_randomness_permits():
    for sample_rng, sizes in (("sample", [1] * 6), ("batch", [4] * 5 + [2]), ("worker", [4] * 5 + [2])):
        for workers in (0, 1):
            batches = list(make(Asked(), workers, sample_rng=sample_rng))
            assert [int(batch["samples"][0, 3]) for batch in batches] == sizes
    one_by_one = Asked()
    one_by_one.__getitems__ = None
    assert next(iter(make(one_by_one, sample_rng="batch")))["samples"][0, 3] == 1


def test_batch_mode_is_exact_with_the_same_batch_size():
    expected = epochs(make(Asked(), sample_rng="batch"))
    found, states, state_of_loop = [], [], torch.get_rng_state()
    for batch in make(Asked(), 2, sample_rng="batch"):
        found.append(batch)
        states.append(None)
    assert same(found, expected[:6])
    for workers, stop in ((0, 2), (2, 3), (1, 6)):
        loader = make(Asked(), workers, sample_rng="batch")
        list(islice(loader, stop))
        for others in (0, 2):
            assert same(resumed(loader.state_dict(), Asked(), others, sample_rng="batch"), expected[stop:])
    assert torch.equal(torch.get_rng_state(), state_of_loop)
    # The controls: with another batch size the samples are other ones, as without the mode they would not be.
    indices_and_noise = []
    for sample_rng in ("batch", "sample"):
        by_size = [epochs(make(Asked(), sample_rng=sample_rng, batch_size=size), 1) for size in (4, 2)]
        a, b = (torch.cat([batch["samples"] for batch in batches]) for batches in by_size)
        indices_and_noise.append((torch.equal(a[:, 0], b[:, 0]), torch.equal(a[:, 1:3], b[:, 1:3])))
    assert indices_and_noise == [(True, False), (True, True)]
    assert not same(epochs(make(Asked(), sample_rng="batch", random_seed=6)), expected)


class Everything:
    def __len__(self):
        return 200_000

    def __getitem__(self, index):
        return index

    def __getitems__(self, indices):
        return torch.tensor(indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_request_may_be_very_large(workers):
    loader = make(Everything(), workers, batch_size=150_000, collate_fn=torch.clone, sample_rng="batch")
    found = list(loader)
    assert [len(batch) for batch in found] == [150_000, 50_000]
    assert torch.equal(torch.cat(found), torch.from_numpy(Permutation(200_000, 5, 0).indices(0, 200_000)))


@of_both_styles
def test_batches_must_come_in_order(style):
    with pytest.raises(
        ValueError, match="in_order must be True: batches in the order in which workers happen"
    ):
        make(style, 2, in_order=False)


# --- batches ---------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["name", "value"])


class Nested(Map):
    def __getitem__(self, index):
        x = sample(index)
        return {"views": ([x, x + 1], (x * 2,)), "name": f"n{index}", "pair": Pair("p", index), "number": 0.5}


@dataclasses.dataclass
class Record:
    samples: torch.Tensor
    label: str | None
    pinned: bool = False

    def pin_memory(self):
        return dataclasses.replace(self, pinned=True)


def into_records(samples):
    return Record(torch.stack(samples), None if int(samples[0][0]) % 2 else "even")


def flat(value):
    """The leaves of nested containers, with their types; tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, value.shape, value.numpy().tobytes()]
    if isinstance(value, dict):
        return [dict, *(leaf for key in value for leaf in (key, *flat(value[key])))]
    if dataclasses.is_dataclass(value):
        return [type(value), *flat(vars(value))]
    if isinstance(value, (list, tuple)):
        return [type(value), *(leaf for each in value for leaf in flat(each))]
    return [value]


def test_batches_of_all_shapes_come_alike_from_workers():
    for dataset, collate in (
        (Nested(), None),
        (Nested(), default_collate),
        (Nested(), list),
        (Map(), into_records),
    ):
        expected = flat(epochs(make(dataset, collate_fn=collate)))
        loader = make(dataset, 2, collate_fn=collate)
        found = list(islice(loader, 2))
        found += resumed(loader.state_dict(), dataset, 1, collate_fn=collate)
        assert flat(found) == expected
        assert flat(epochs(make(dataset, collate_fn=collate, random_seed=6))) != expected
    batch = next(iter(make(Nested(), 1, collate_fn=None)))
    assert batch["views"][0][1].shape == (BATCH, 3)
    assert type(batch["pair"]) is Pair
    assert len(batch["name"]) == BATCH


@of_both_styles
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_can_pin_itself_is_asked_to(monkeypatch, style, workers):
    """With an accelerator, of which nothing but this is asked."""
    assert not any(batch.pinned for batch in make(style, workers, collate_fn=into_records))
    expected = torch.cat([batch["samples"] for batch in whole(style)])  # while nothing is pinned
    for name, value in {
        "is_available": True,
        "current_accelerator": torch.device("cpu"),
        "current_device_index": 0,
        "set_device_index": None,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *args, value=value: value)
    loader = make(style, workers, collate_fn=into_records)
    batches = list(islice(loader, 2))
    assert all(batch.pinned for batch in batches)
    batches += resumed(loader.state_dict(), style, workers, collate_fn=into_records)
    assert torch.equal(torch.cat([batch.samples for batch in batches]), expected)
    assert not any(batch.pinned for batch in make(style, workers, collate_fn=into_records, pin_memory=False))


ORPHANS = """
import multiprocessing, os, sys
import torch
from helios.data import create_dataloader

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 100
    def __getitem__(self, index):
        return index

if __name__ == "__main__":
    options = {"multiprocessing_context": sys.argv[1], "persistent_workers": True}
    loader = create_dataloader(Data(), num_workers=2, **options)
    batches = iter(loader)
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_end_when_their_process_is_killed(tmp_path, start):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    done = subprocess.run([sys.executable, script, start], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    while any(map(is_running, workers)):  # the test hangs if one does not end
        time.sleep(0.05)


def is_running(process_id):
    try:
        return "(zombie)" not in Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def started_by(monkeypatch):
    """Take this process for a worker, which a process of this number has started."""

    def take(process_id):
        parent = SimpleNamespace(pid=process_id)
        monkeypatch.setattr("helios.data._orphans.multiprocessing.parent_process", lambda: parent)

    return take


def test_a_worker_whose_process_was_dead_before_it_began_ends(monkeypatch, started_by):
    """torch takes whoever has adopted it for its parent, and waits for that one's death."""
    ended = threading.Event()
    monkeypatch.setattr("helios.data._orphans.os._exit", lambda status: ended.set())
    started_by(2**30)
    end_with_parent()
    assert ended.wait(60)


def test_control_the_worker_of_a_living_process_goes_on(started_by):
    started_by(os.getppid())
    assert has_parent()
    started_by(2**30)
    assert not has_parent()
