"""Spawned processes: what comes back from them, how they end, and that they end together. With real signals."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helios.trainer._launch import _revived
from helios.trainer._rank_process import Failure
from helios.trainer._spawn_queue import SpawnQueue

pytestmark = pytest.mark.long

JOB = Path(__file__).parent / "launch_job.py"


@pytest.fixture
def scenario(tmp_path):
    """Run a scenario of launch_job.py in a process of its own; return what it returns."""

    def run(name):
        command = [sys.executable, "-W", "error", JOB, name, tmp_path / "result.pt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "result.pt"), done.stderr

    return run


def test_what_ranks_put_and_return(scenario):
    result, _ = scenario("queues")
    cores = len(os.sched_getaffinity(0))
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // 2)))
    first = [
        {"rank": rank, "size": 2, "threads": threads, "sigint": True, "shared": torch.full((3,), rank + 1.0)}
        for rank in (0, 1)
    ]
    by_rank = sorted(result["first"], key=lambda found: found["rank"])  # those of two ranks come in any order
    for found, expected in zip(by_rank, first, strict=True):
        assert str(found) == str(expected)  # each rank has a copy of the tensor that was made in the parent
    assert str(result["answer"]) == str(first[0])
    assert torch.equal(result["shared"], torch.zeros(3))
    for rank in (0, 1):
        *numbers, tensor = result[rank]
        assert numbers == list(range(10_000))  # those of a rank in their order, all of them
        assert torch.equal(tensor, torch.full((50_000_000,), rank, dtype=torch.uint8))
    for refused in result["last"]:
        assert "pickle" in refused[0]
        assert refused[1].startswith("RuntimeError: queue.get was called in a spawned process")
        assert refused[2].startswith("RuntimeError: queue.qsize was called in a spawned process")
        assert refused[3] == 7  # put in a forked process raised
    assert result["empty"]


def test_a_rank_that_raises_ends_the_other_one(scenario):
    result, _ = scenario("one_failure")
    (kind, text, notes), items = result
    assert (kind, text) == ("OwnError", "of rank 1")
    assert notes.startswith("Raised in rank 1:\nTraceback") and "in raises" in notes
    assert items == ["from 0", "from 1"]  # what was put before can be read


def test_ranks_that_die_without_an_exception(scenario):
    result, _ = scenario("deaths")
    kind, text, notes = result["killed"]
    assert kind == "RuntimeError"
    assert text.startswith("rank 1 (process ") and text.endswith(" was killed by SIGKILL; out of memory?")
    assert (
        notes == ""
    )  # rank 0 heard of nothing: a child of the dead process kept the connection, so it was killed
    kind, text, _ = result["exit code"]
    assert kind == "RuntimeError" and text.startswith("rank 0 (process ")
    assert text.endswith(" ended with exit code 0, without an exception and before its work was done")
    assert result["sys.exit"][:2] == ["SystemExit", "4"]
    kind, text, _ = result["at exit"]
    assert kind == "RuntimeError" and text.startswith("rank 0 (process ")
    assert text.endswith(
        " ended with exit code 3, not 0: something failed while it ended, after its work was done"
    )
    assert result["items"] == ["from 0", "from 1"]


def test_who_waits_for_a_rank_that_leaves_raises_at_once(scenario):
    result, _ = scenario("leaving")  # else it never ends
    shapes, texts = result
    assert shapes == [[1, 2], [1]]
    assert len(texts) == 2 and all("gloo" in text for text in texts)  # closed, or reset


def test_what_cannot_be_pickled(scenario):
    result, _ = scenario("not_to_be_pickled")
    assert result[0] == "TypeError"
    assert "cannot be pickled" in result[1] and "lambda" in result[1] and "make those in setup" in result[1]


def test_signals_of_the_parent(scenario):
    result, stderr = scenario("signals")
    assert result["once"] == signal.SIGTERM  # the answer is what a rank saw in the flag
    assert result["twice"][0] == "KeyboardInterrupt"
    assert result["alive"] is False
    assert result["are_back"]
    assert stderr.count("SIGTERM: the run stops after this iteration; once more ends it at once") == 2


def is_alive(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends processes when their parent dies")
def test_ranks_die_with_their_parent(tmp_path):
    parent = subprocess.Popen([sys.executable, JOB, "orphans", tmp_path / "id"], stderr=subprocess.DEVNULL)
    try:
        files = [tmp_path / "id.0", tmp_path / "id.1"]
        while not all(file.exists() and file.read_text().endswith("\n") for file in files):
            assert parent.poll() is None
            time.sleep(0.02)
        ids = [int(file.read_text()) for file in files]
        assert all(map(is_alive, ids))  # control
    finally:
        parent.kill()
        parent.wait()
    while any(map(is_alive, ids)):  # ends, or pytest is stopped
        time.sleep(0.02)


IN_NO_FILE = """
import torch
import helios.trainer as hlt
from helios.data import DataModule

class M(hlt.Model):
    def setup(self, fast_init=False): pass
    def train_step(self, batch, state): pass
class D(DataModule):
    def prepare_data(self): print("prepared", flush=True)
    def setup(self): self._train_dataset = self._create_dataset([0, 1], {})
"""
FIT = 'hlt.Trainer("r", total_steps=1, use_cpu=True, nprocs=2).fit(M("m"), D())'


def failing(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    return done


def test_classes_that_are_in_no_file(tmp_path):
    """As in a notebook."""
    done = failing([sys.executable, "-c", IN_NO_FILE + FIT], tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "RuntimeError: training failed: RuntimeError: a spawned process cannot make its own copy"
    )
    assert "a class defined in a notebook" in last and "AttributeError" in last


def test_a_script_without_a_guard(tmp_path):
    (tmp_path / "script.py").write_text(IN_NO_FILE + FIT)
    done = failing([sys.executable, "script.py"], tmp_path)
    assert done.stdout.count("prepared") == 1  # the processes that import the script do not run it
    last = done.stderr.splitlines()[-1]
    assert "ended with exit code 1 before it began" in last and 'if __name__ == "__main__":' in last
    assert "the script is imported by the processes that it spawns" in done.stderr


class DemandingError(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class CodeError(Exception):
    """Would say "code code 3" when it is unpickled."""

    def __init__(self, code):
        super().__init__(f"code {code}")


class ChangingError(Exception):
    """Becomes another exception when it is unpickled."""

    def __reduce__(self):
        return ValueError, ("changed",)


def brought_over(error):
    """What an exception is after its way from another process."""
    try:
        raise error
    except BaseException as raised:
        return _revived(pickle.loads(pickle.dumps(Failure.of(3, raised))))


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        pickle.PicklingError(1, 2),
        DemandingError(1, 2),
        CodeError(3),
        ChangingError("before"),
        SystemExit(4),
        KeyboardInterrupt(),
    ],
)
def test_exceptions_that_keep_their_type(error):
    found = brought_over(error)
    assert type(found) is type(error) and found.args == error.args
    assert found.__notes__[0].startswith("Raised in rank 3:\nTraceback")


def test_exceptions_that_do_not():
    class LocalError(Exception):
        pass

    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    for error, text in [
        (LocalError("x"), f"{LocalError.__qualname__}: x"),
        (MuteError(), f"{MuteError.__qualname__}: (its text raised ValueError)"),
    ]:
        found = brought_over(error)
        assert type(found) is RuntimeError and str(found) == text
        assert "in brought_over\n    raise error\n" in found.__notes__[0]


def test_the_queue_of_the_parent():
    items = SpawnQueue()
    assert items.empty() and items.qsize() == 0
    value = [torch.ones(2)]
    items.put(value)
    value[0] += 1
    items.put_nowait("second")
    assert items.qsize() == 2 and not items.empty()
    assert torch.equal(items.get()[0], torch.ones(2))  # a copy, of when it was put
    assert items.get_nowait() == "second"
