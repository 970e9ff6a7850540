"""Others at work in the same folder at the same time: nothing is torn, nothing of theirs is taken, all is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helios import chkpt
from helios.chkpt import CheckpointStore, _atomic, _find

pytestmark = pytest.mark.long

WRITER = """
import sys
import torch
from helios import chkpt
torch.set_num_threads(1)
folder, run, who, how = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
if how == "one name":
    for i in range(60):
        chkpt.save({"x": torch.full((20_000,), float(who)), "who": who}, folder + "/a.pth")
else:
    with chkpt.CheckpointStore(folder, run, keep_last=2) as store:
        for i in range(40):
            save = store.save_async if i % 2 else store.save
            save({"x": torch.full((20_000,), float(i)), "i": i}, epoch=1, iteration=i)
"""


@contextmanager
def writers(folder: Path, how: str, runs: tuple[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that begin at the same time."""
    children = []
    for who, run in enumerate(runs):
        command = [sys.executable, "-c", WRITER, str(folder), run, str(who), how]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(command, **pipes))  # type: ignore[call-overload]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    yield children
    for child in children:
        with child:
            assert child.wait(120) == 0


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    seen = set()
    with writers(tmp_path, "one name", ("a", "a")) as children:
        while any(child.poll() is None for child in children):
            if (tmp_path / "a.pth").exists():
                found = chkpt.load(tmp_path / "a.pth")
                x, who = found["x"], found["who"]
                assert isinstance(x, torch.Tensor) and bool((x == float(str(who))).all())
                seen.add(who)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    assert seen <= {"0", "1"} and seen


@pytest.mark.parametrize("runs", [("a", "b"), ("a", "a")], ids=["two runs", "one run"])
def test_two_stores_in_one_folder_while_others_look_for_the_last(
    runs: tuple[str, str], tmp_path: Path
) -> None:
    """Each sweeps and prunes all the time; none takes the other's file, and a reader always finds a whole one."""
    num_found = 0
    with writers(tmp_path, "stores", runs) as children:
        while any(child.poll() is None for child in children):
            path = chkpt.find_last_checkpoint(tmp_path, "a")
            if path is None:
                assert num_found == 0, "there was one already"
                continue
            num_found += 1
            try:
                found = chkpt.load(path)
            except FileNotFoundError:
                continue  # pruned in between, since there is a newer one
            x = found["x"]
            assert isinstance(x, torch.Tensor) and bool((x == found["i"]).all())
    for run in set(runs):
        last = chkpt.find_last_checkpoint(tmp_path, run)
        assert last is not None and chkpt.load(last)["i"] == 39
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("find", [chkpt.find_last_checkpoint, chkpt.load_last_checkpoint])
def test_what_was_pruned_while_the_last_was_looked_for_is_looked_for_again(
    find: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that is alive would seem to have no checkpoint, and be started again from nothing."""
    names = [chkpt.format_name(chkpt.CheckpointName("run", 1, i)) for i in range(3)]
    chkpt.save({"x": 0}, tmp_path / names[0])
    chkpt.save({"x": 1}, tmp_path / names[1])
    listed = _find.listed

    def prune_after_listing(folder: Path, run_name: str | None) -> list[_find.Found]:
        found = listed(folder, run_name)
        if (tmp_path / names[0]).exists():
            chkpt.save({"x": 2}, tmp_path / names[2])
            for name in names[:2]:
                (tmp_path / name).unlink()
        return found

    monkeypatch.setattr(_find, "listed", prune_after_listing)
    found = find(tmp_path, "run")
    assert (found[0] if isinstance(found, tuple) else found) == tmp_path / names[2]


def test_a_reader_by_mmap_keeps_its_bits_while_the_file_is_replaced_and_pruned(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        path = store.save({"x": torch.zeros(1 << 16)}, epoch=1, iteration=1)
        mapped = chkpt.load(path, mmap=True)["x"]
        store.save({"x": torch.ones(1 << 16)}, epoch=1, iteration=1)
        again = chkpt.load(path, mmap=True)["x"]
        store.save({"x": torch.ones(1 << 16)}, epoch=1, iteration=2)
        assert not path.exists()
    assert isinstance(mapped, torch.Tensor) and isinstance(again, torch.Tensor)
    assert not mapped.any() and bool(again.all())


def test_control_a_file_that_is_written_in_place_changes_under_its_reader(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(1 << 16)}, tmp_path / "a.pth")
    other = chkpt.save({"x": torch.ones(1 << 16)}, tmp_path / "b.pth").read_bytes()
    mapped = chkpt.load(path, mmap=True)["x"]
    with path.open("r+b") as file:
        file.write(other)
    assert isinstance(mapped, torch.Tensor) and mapped.any()


LIVE = """
import os, sys
from pathlib import Path
from helios.chkpt import _atomic
def write(file):
    os.pwrite(file.fileno(), b"half", 0)
    print("writing", flush=True)
    sys.stdin.readline()
_atomic.write_atomically(Path(sys.argv[1]), write)
"""


def test_the_file_of_a_living_writer_in_another_process_is_not_swept(tmp_path: Path) -> None:
    path = tmp_path / "run_epoch_1_iter_1.pth"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LIVE, str(path)], **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "writing\n"
        for _ in range(3):
            with CheckpointStore(tmp_path, "run") as store:
                store.save({"x": 1}, epoch=1, iteration=2)
        assert len(list(_atomic.orphans(tmp_path))) == 1
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.wait(60) == 0
    assert path.read_bytes() == b"half"


def test_what_a_killed_writer_left_is_swept_by_the_next_store(tmp_path: Path) -> None:
    path = tmp_path / "run_epoch_1_iter_1.pth"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LIVE, str(path)], **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "writing\n"
        child.kill()
        child.wait(60)
    assert len(list(tmp_path.iterdir())) == 1
    CheckpointStore(tmp_path, "run").close()
    assert list(tmp_path.iterdir()) == []
