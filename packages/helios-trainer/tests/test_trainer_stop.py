"""A run that is asked to stop saves, stops after the iteration in progress, and nothing is lost or done again."""

import multiprocessing
import os
import signal
import sys
import threading

import pytest

from helios.chkpt import find_last_checkpoint, load
from helios.trainer._stop_request import StopRequest, listening_to_signals

pytestmark = pytest.mark.long

NUM_START_CALLS = 3  # setup, on_training_start, train


def make_net(kit, ask, at, **options):
    """A model that asks for a stop during its call number `at`."""

    class Asking(kit.Net):
        def note(self, *call):
            if len(self.trace) == at:
                ask(self)
            super().note(*call)

    return Asking(**options)


def run(kit, root, setup, at=None, ask=lambda model: model.trainer.request_stop()):
    options = {"chkpt_root": root, **setup}
    data = kit.Data(**options.pop("data", {}))
    improved = options.pop("improved", None)
    model = make_net(kit, ask, at, accumulation=options.get("accumulation_steps", 1), improved=improved)
    trainer = kit.trainer(**options)
    is_finished = trainer.fit(model, data)
    model.end = kit.end_of(model)
    return model, is_finished


SETUPS = {
    "epochs": {"unit": "EPOCH", "total_steps": 3, "valid_frequency": 2, "chkpt_frequency": 2},
    "epochs, accumulating": {"unit": "EPOCH", "total_steps": 3, "accumulation_steps": 2, "chkpt_frequency": 1},
    "iterations": {"unit": "ITERATION", "total_steps": 7, "valid_frequency": 2, "chkpt_frequency": 3},
    "iterations, accumulating": {
        "unit": "ITERATION", "total_steps": 5, "accumulation_steps": 2, "valid_frequency": 2, "chkpt_frequency": 4,
    },
    "early stop": {
        "unit": "EPOCH", "total_steps": 9, "valid_frequency": 1, "chkpt_frequency": 9, "early_stop_cycles": 2,
        "improved": {1: False, 2: True, 3: False, 4: False}, "data": {"train": 1, "valid": 1},
    },
    "workers": {
        "unit": "ITERATION", "total_steps": 7, "valid_frequency": 3, "chkpt_frequency": 5,
        "data": {"num_workers": 1, "persistent_workers": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_asked_during_any_call(kit, tmp_path, name):
    setup = {**SETUPS[name], "unit": getattr(kit, SETUPS[name]["unit"])}
    whole, is_finished = run(kit, tmp_path / "whole", setup)
    assert is_finished
    num_stopped = 0
    stride = 7 if name == "workers" else 1 if len(whole.trace) < 60 else 2
    for at in range(NUM_START_CALLS, len(whole.trace), stride):
        root = tmp_path / str(at)
        first, is_finished = run(kit, root, setup, at)
        if is_finished:  # it was asked when all batches were done
            assert first.trace == whole.trace
            continue
        num_stopped += 1
        rest, is_finished = run(kit, root, setup)
        assert is_finished
        assert first.trace + rest.trace[NUM_START_CALLS:] == whole.trace
        assert first.batches + rest.batches == whole.batches
        assert rest.end == whole.end
    assert num_stopped > (2 if name == "workers" else 10)


def test_control_the_cut_matters(kit, tmp_path, monkeypatch):
    """Were it taken for a checkpoint after all of the iteration, the validation would be lost."""
    setup = {"unit": kit.ITERATION, "total_steps": 7, "valid_frequency": 2, "chkpt_frequency": 3}
    whole, _ = run(kit, tmp_path / "whole", setup)
    at = whole.trace.index(("train_step", (2, 2, 1, 2)))
    run(kit, tmp_path / "two", setup, at)
    path = find_last_checkpoint(tmp_path / "two")
    state = load(path)
    assert state["training_state"]["trainer"]["cut"] == {"point": "batch", "has_validated": False}
    monkeypatch.setattr(
        "helios.trainer._resumption.cut_from_dict",
        lambda values: sys.modules["helios.trainer._loop"].cut_from_dict({**values, "point": "iteration"}),
    )
    rest, _ = run(kit, tmp_path / "two", setup)
    assert rest.end != whole.end


def test_asked_again_and_again(kit, tmp_path):
    """A start for every iteration: each goes on from the stop before."""
    setup = {"unit": kit.ITERATION, "total_steps": 8, "valid_frequency": 3, "chkpt_frequency": 100}
    whole, _ = run(kit, tmp_path / "whole", setup)
    trace, is_finished, starts = [], False, 0
    while not is_finished:
        last, is_finished = run(kit, tmp_path / "bits", setup, at=NUM_START_CALLS + 3)
        trace += last.trace[NUM_START_CALLS if starts else 0 :]
        starts += 1
    assert trace == whole.trace
    assert starts > 5
    assert last.end == whole.end


def test_the_last_epoch_is_not_taken_for_done(kit, tmp_path):
    setup = {"total_steps": 1, "chkpt_frequency": 1, "data": {"train": 5}}
    whole, _ = run(kit, tmp_path / "whole", setup)
    first, is_finished = run(kit, tmp_path / "two", setup, whole.trace.index(("train_step", (2, 2, 1, 2))))
    assert not is_finished
    assert len(first.batches) == 2
    rest, _ = run(kit, tmp_path / "two", setup)
    assert rest.end == whole.end


@pytest.mark.parametrize("at", [0, 1, 2])
def test_asked_in_start_up(kit, tmp_path, at):
    setup = {"total_steps": 2, "chkpt_frequency": 1}
    first, is_finished = run(kit, tmp_path / "two", setup, at)
    assert not is_finished
    assert len(first.trace) == NUM_START_CALLS
    assert find_last_checkpoint(tmp_path / "two", "net") is None  # there is nothing to save
    rest, _ = run(kit, tmp_path / "two", setup)
    assert rest.end == run(kit, tmp_path / "whole", setup)[0].end


def test_a_resumed_run_asked_in_start_up(kit, tmp_path):
    setup = {"unit": kit.ITERATION, "total_steps": 8, "chkpt_frequency": 2}
    run(kit, tmp_path / "two", setup, at=20)
    before = {path: path.read_bytes() for path in tmp_path.joinpath("two").iterdir()}
    assert not run(kit, tmp_path / "two", setup, at=1)[1]
    assert {path: path.read_bytes() for path in tmp_path.joinpath("two").iterdir()} == before
    assert run(kit, tmp_path / "two", setup)[0].end == run(kit, tmp_path / "whole", setup)[0].end


def test_without_checkpoints(kit, capsys):
    """A hook may stop it all the same; nothing is saved, and the hooks of the end are not called."""
    model, is_finished = run(kit, None, {"total_steps": 3}, at=9)
    assert not is_finished
    assert "on_training_end" not in kit.names(model.trace)
    assert "on_training_epoch_end" not in kit.names(model.trace)
    assert "last checkpoint: none" in capsys.readouterr().out


def test_a_request_before_fit_is_forgotten(kit):
    trainer = kit.trainer()
    trainer.request_stop()
    assert trainer.fit(kit.Net(), kit.Data())


def test_a_finished_run_is_finished_whatever_is_asked(kit, tmp_path):
    setup = {"total_steps": 2, "chkpt_frequency": 1}
    run(kit, tmp_path, setup)
    assert run(kit, tmp_path, setup, at=0)[1]


def kill_workers_and_ask(model):
    """What `kill -TERM` does to a whole job."""
    os.kill(os.getpid(), signal.SIGTERM)
    for pid in children():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("hook", ["train_step", "valid_step"])
@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_workers_that_the_signal_took_too(kit, tmp_path, unit, hook):
    """What is left of the iteration, whose gradients are accumulated, or of the validation, is fetched by others."""
    setup = {
        "unit": getattr(kit, unit), "total_steps": 4, "chkpt_frequency": 100, "valid_frequency": 1,
        "accumulation_steps": 3, "data": {"num_workers": 2, "train": 9, "valid": 8, "prefetch_factor": 1},
    }  # fmt: skip
    whole, _ = run(kit, tmp_path / "whole", setup)
    at = next(i for i, call in enumerate(whole.trace) if call[0] == hook)
    first, is_finished = run(kit, tmp_path / "two", setup, at, kill_workers_and_ask)
    assert not is_finished
    rest, _ = run(kit, tmp_path / "two", setup)
    assert first.trace + rest.trace[NUM_START_CALLS:] == whole.trace
    assert rest.end == whole.end


def children():
    return [child.pid for child in multiprocessing.active_children()]


def test_control_dead_workers_end_a_run_that_nobody_asked_to_stop(kit, tmp_path):
    handlers = [signal.getsignal(signal.SIGCHLD)]

    def kill_workers(model):
        # torch's handler raises wherever the main thread is when it hears of a death, which may be after the test.
        handlers.append(signal.signal(signal.SIGCHLD, lambda number, frame: None))
        for pid in children():
            os.kill(pid, signal.SIGKILL)

    setup = {"total_steps": 4, "chkpt_frequency": 100, "data": {"num_workers": 2, "train": 9}}
    try:
        with pytest.raises(RuntimeError, match=r"training failed: RuntimeError: .*worker"):
            run(kit, tmp_path, setup, 8, kill_workers)
    finally:
        signal.signal(signal.SIGCHLD, handlers[-1])


SCRIPT = """
import os, signal, sys, threading, warnings
import torch, helios.trainer as hlt
from helios.data import DataModule
place, number, unit, workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
signals = [getattr(signal, name) for name in number.split("+") if name]
def here(name):
    if name == place:
        print(name, flush=True)
        for each in signals:
            os.killpg(0, each) if workers else os.kill(os.getpid(), each)
class M(hlt.Model):
    def setup(self, fast_init=False):
        self.seen = torch.zeros(())
        here("setup")
    def state_dict(self):
        here(f"save {self.trainer.done}")
        return {"seen": self.seen}
    def load_state_dict(self, state, fast_init=False): self.seen = state["seen"]
    def train_step(self, batch, state):
        self.trainer.done = state.global_iteration
        self.seen = self.seen * 3 + batch.sum() + torch.rand(())
        here(f"train {state.global_iteration}")
    def valid_step(self, batch, step):
        self.seen = self.seen + torch.rand(())
        here(f"valid {self.trainer.done} {step}")
class D(DataModule):
    def prepare_data(self): here("prepare")
    def setup(self):
        options = {"batch_size": 2, "shuffle": True, "num_workers": workers}
        self._train_dataset = self._create_dataset(torch.arange(12.0), options)
        self._valid_dataset = self._create_dataset(torch.arange(4.0), options)
trainer = hlt.Trainer("r", hlt.TrainingUnit.from_str(unit), 3 if unit == "epoch" else 16, use_cpu=True,
    valid_frequency=1 if unit == "epoch" else 3, chkpt_frequency=2 if unit == "epoch" else 4, chkpt_root="c",
    print_banner=False)
trainer.done = 0
model = M("m")
finished = trainer.fit(model, D())
assert finished or trainer.stopped_by == signals[0]
print("fit", finished, trainer.done, model.seen.item().hex(), torch.rand(()).item().hex(), flush=True)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
"""


@pytest.fixture
def start(scripts):
    """Run the script in a folder; return the status, the lines without those of the log, and stderr."""

    def run(folder, *arguments):
        done = scripts(SCRIPT, *arguments, folder=folder)
        return done.returncode, [line for line in done.stdout.splitlines() if line[0] != "["], done.stderr

    return run


PLACES = [
    ("SIGTERM", "train 5", "epoch", 2),
    ("SIGUSR1", "valid 12 1", "epoch", 0),
    ("SIGINT", "save 12", "epoch", 0),
    ("SIGTERM", "valid 6 0", "iteration", 2),
    ("SIGINT", "train 6", "iteration", 2),
    ("SIGUSR1", "setup", "iteration", 0),
    ("SIGTERM", "prepare", "epoch", 0),
]


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
def test_real_signals_to_real_processes(start, tmp_path, unit):
    (tmp_path / "whole").mkdir()
    status, whole, _ = start(tmp_path / "whole", "nowhere", "", unit, 0)
    assert status == 0
    assert whole[-1].startswith("fit True")
    for name, place, its_unit, workers in PLACES:
        if its_unit != unit:
            continue
        folder = tmp_path / place
        folder.mkdir()
        status, said, errors = start(folder, place, name, unit, workers)
        assert status == 0, errors
        assert said[0] == place
        assert said[-1].startswith("fit False")
        assert f"{name}: the run stops after this iteration" in errors
        saved = find_last_checkpoint(folder / "c", "r")
        done = int(said[-1].split()[2])
        assert (saved is not None) == (done > 0)
        if saved is not None:  # all that was done is in it
            assert load(saved)["training_state"]["global_iteration"] == done
        status, said, errors = start(folder, "nowhere", "", unit, 0)
        assert status == 0, errors
        assert said[-1] == whole[-1]


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(start, tmp_path, second):
    status, said, errors = start(tmp_path, "train 5", f"SIGTERM+{second}", "epoch", 0)
    assert said == ["train 5"]
    if second == "SIGTERM":
        assert status == -signal.SIGTERM
    else:
        assert status in (130, -signal.SIGINT)
        assert "KeyboardInterrupt" in errors
    assert find_last_checkpoint(tmp_path / "c", "r") is None  # none was due yet


def test_handlers_of_the_user_stay():
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *args: calls.append(args))
    try:
        request = StopRequest()
        with listening_to_signals(request.make):
            signal.raise_signal(signal.SIGUSR1)
            assert calls
            assert not request.is_made
            signal.raise_signal(signal.SIGTERM)  # control: this one is ours
            assert request.is_made
            assert request.signal is signal.SIGTERM
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        request = StopRequest()
        with listening_to_signals(request.make):
            signal.raise_signal(signal.SIGINT)
        assert not request.is_made
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_left_alone(kit, tmp_path):
    results = []

    def work():
        trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1)
        model = make_net(kit, lambda m: results.append(signal.getsignal(signal.SIGTERM)), 8)
        results.append(trainer.fit(model, kit.Data()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [signal.SIG_DFL, True]
