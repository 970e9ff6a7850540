"""Every call by which a save changes files fails once: the error is said, the old file is there, no trace is left."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt import CheckpointStore

BIG = {"x": torch.arange(1 << 18, dtype=torch.float32), "y": torch.zeros(3)}
CODES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES]


def num_calls(kit: Any, folder: Path) -> int:
    with kit.watched(kit.Disk(folder, kit.error(errno.EIO))) as disk:
        chkpt.save(BIG, folder / "count.pth")
    (folder / "count.pth").unlink()
    return len(disk.events)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_an_error_at_every_call(code: int, kit: Any, tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    before = path.read_bytes()
    raised: list[str] = []
    for number in range(num_calls(kit, tmp_path)):
        with (
            kit.watched(kit.Disk(tmp_path, kit.error(code), number)) as disk,
            pytest.raises(OSError) as caught,
        ):
            chkpt.save(BIG, path)
        name = disk.events[number]
        raised.append(name)
        assert caught.value.errno == code, name
        assert str(caught.value.filename).startswith(str(tmp_path)), name
        assert [p.name for p in tmp_path.iterdir()] == ["a.pth"], name
        if name == "fsync folder":
            chkpt.verify(path)  # the name is changed already; the error says that this may not last
            path.write_bytes(before)
        assert path.read_bytes() == before, name
    assert set(raised) == {"open", "flock", "pwrite", "fsync file", "rename", "fsync folder"}


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_at_every_call(after: bool, kit: Any, tmp_path: Path, state: dict[str, object]) -> None:
    name = chkpt.format_name(chkpt.CheckpointName("run", 1, 1))
    path = chkpt.save(state, tmp_path / name)
    before = path.read_bytes()
    for number in range(num_calls(kit, tmp_path)):
        disk = kit.Disk(tmp_path, kit.interrupt, number, after)
        with kit.watched(disk), pytest.raises(KeyboardInterrupt):
            chkpt.save(BIG, path)
        if (disk.events[number], after) == ("open", True):
            CheckpointStore(
                tmp_path, "run"
            ).close()  # nobody knew the file's name yet: it is swept as an orphan
        assert [p.name for p in tmp_path.iterdir()] == [name], disk.events
        if path.read_bytes() != before:
            assert disk.events[number] in ("rename", "fsync folder")
            chkpt.verify(path)
            path.write_bytes(before)


@pytest.mark.parametrize("most", [1, 7, 4097])
def test_short_writes_are_continued(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"x": torch.arange(2000, dtype=torch.int16)}
    whole = chkpt.save(state, tmp_path / "a.pth").read_bytes()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:most], at))
    assert chkpt.save(state, tmp_path / "b.pth").read_bytes() == whole


def test_a_write_of_no_bytes_is_an_error_and_not_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *arguments: 0)
    with pytest.raises(OSError, match="no bytes") as caught:
        chkpt.save(BIG, tmp_path / "a.pth")
    assert caught.value.errno == errno.EIO
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [1, 100])
def test_short_reads_are_continued(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chkpt.save({"x": torch.arange(2000, dtype=torch.int16)}, tmp_path / "a.pth")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, memory, at: preadv(fd, [memory[0][:most]], at))
    chkpt.verify(path)
    chkpt.load(path)


def test_an_error_of_the_disk_while_reading_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chkpt.save(BIG, tmp_path / "a.pth")

    def preadv(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(OSError, match=r"a\.pth") as caught:
            read(path)
        assert caught.value.errno == errno.EIO


def test_a_signal_in_the_middle_disturbs_no_save(tmp_path: Path, kit: Any) -> None:
    """A handler that returns: the interrupted call is made again, or goes on where it was."""
    import signal

    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    try:
        for number in range(num_calls(kit, tmp_path)):
            disk = kit.Disk(tmp_path, lambda name: signal.raise_signal(signal.SIGUSR1), number)
            with kit.watched(disk):
                chkpt.verify(chkpt.save(BIG, tmp_path / "a.pth"))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(calls) >= 10


def test_what_reaches_the_disk_in_which_order(kit: Any, tmp_path: Path, state: dict[str, object]) -> None:
    with kit.watched(kit.Disk(tmp_path, kit.error(0))) as disk:
        chkpt.save(state, tmp_path / "a.pth")
    first, lock, *writes, file, rename, folder = disk.events
    assert (first, lock, set(writes)) == ("open", "flock", {"pwrite"})
    assert (file, rename, folder) == ("fsync file", "rename", "fsync folder")


@pytest.mark.parametrize("method", ["save", "save_async"])
def test_retention_deletes_when_all_else_is_done(
    method: str, kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helios.chkpt import _store

    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        old = store.save(BIG, epoch=1, iteration=1)
        disk = kit.Disk(tmp_path, kit.error(0))
        verify: Callable[..., None] = _store.verify

        def logged(path: Path, **options: Any) -> None:
            verify(path, **options)
            disk.events.append(f"verified {path.name}")

        monkeypatch.setattr(_store, "verify", logged)
        with kit.watched(disk):
            getattr(store, method)(BIG, epoch=1, iteration=2)
            store.wait()
    done = ["fsync file", "rename", "fsync folder", "verified run_epoch_1_iter_2.pth", "unlink"]
    assert disk.events[-5:] == done
    assert not old.exists()


def test_the_disk_fills_up_in_the_background(kit: Any, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("save", {"state": {}, "epoch": 1, "iteration": 3}),
        ("save_async", {"state": {}, "epoch": 1, "iteration": 3}),
        ("wait", {}),
        ("close", {}),
    ]
    for name, arguments in calls:
        store = CheckpointStore(tmp_path / name, "run", keep_last=1)
        good = store.save(BIG, epoch=1, iteration=1)
        with kit.watched(kit.Disk(tmp_path / name, kit.error(errno.ENOSPC), fails=5)):
            store.save_async(BIG, epoch=1, iteration=2)
            with pytest.raises(OSError) as caught:
                getattr(store, name)(**arguments)
        assert caught.value.errno == errno.ENOSPC
        assert list((tmp_path / name).iterdir()) == [good]
        store.close()


def test_an_interrupt_while_a_save_is_waited_for_does_not_let_go_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next save would overwrite what the thread of this one still writes."""
    from helios.chkpt import _store

    go = threading.Event()
    write = _store.write_state

    def slow(*arguments: Any, **options: Any) -> None:
        assert go.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(_store, "write_state", slow)
    store = CheckpointStore(tmp_path, "run")
    first = store.save_async({"x": torch.zeros(1000)}, epoch=1, iteration=1)
    with monkeypatch.context() as patched:
        patched.setattr(_store.SaveJob, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.save_async({"x": torch.ones(1000)}, epoch=1, iteration=2)
    threading.Timer(0, go.set).start()
    second = store.save_async({"x": torch.ones(1000)}, epoch=1, iteration=2)
    store.close()
    zeros, ones = chkpt.load(first)["x"], chkpt.load(second)["x"]
    assert isinstance(zeros, torch.Tensor) and isinstance(ones, torch.Tensor)
    assert not zeros.any() and ones.all()


def test_a_thread_that_cannot_start_is_an_error_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, "run")
    with monkeypatch.context() as patched:

        def start(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="start"):
            store.save_async({"x": 1}, epoch=1, iteration=1)
    chkpt.verify(store.save({"x": 1}, epoch=1, iteration=1))
    store.close()
