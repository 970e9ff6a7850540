"""A save that fails says why and changes nothing; one that succeeds is there as a whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from helios import chkpt
from helios.chkpt import _atomic

BIG = {"x": torch.arange(1 << 18, dtype=torch.float32)}  # 1 MiB


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at `folder`; the test is skipped where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def check_failure(path: Path, code: int) -> None:
    before = path.read_bytes()
    with pytest.raises(OSError) as caught:
        chkpt.save(BIG, path)
    assert caught.value.errno == code
    assert caught.value.filename is not None
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk(tmp_path: Path, state: dict[str, object]) -> None:
    with mounted(tmp_path / "disk", "size=256k"):
        check_failure(chkpt.save(state, tmp_path / "disk" / "a.pth"), errno.ENOSPC)


def test_a_full_disk_costs_no_time(tmp_path: Path, state: dict[str, object], kit: Any) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=256k"):
        path = chkpt.save(state, disk / "a.pth")
        with kit.watched(kit.Disk(disk, kit.error(0))) as calls:
            check_failure(path, errno.ENOSPC)
        assert "pwrite" not in calls.events  # it was asked before how much is free


@pytest.mark.parametrize("method", ["save", "save_async"])
def test_a_disk_that_somebody_fills_during_the_save(method: str, tmp_path: Path, kit: Any) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=2m"):

        def fill(name: str) -> None:
            with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass

        with chkpt.CheckpointStore(disk, "run") as store:
            path = store.save({"x": 1}, epoch=1, iteration=1)
            before = path.read_bytes()
            with pytest.raises(OSError) as caught, kit.watched(kit.Disk(disk, fill, fails=4)):
                getattr(store, method)(BIG, epoch=1, iteration=1)
                store.wait()
        assert caught.value.errno == errno.ENOSPC and caught.value.filename is not None
        assert sorted(p.name for p in disk.iterdir()) == ["other", path.name]
        assert path.read_bytes() == before


def test_control_on_a_full_disk_torch_destroys_the_old_file(tmp_path: Path, state: dict[str, object]) -> None:
    with mounted(tmp_path / "disk", "size=256k"):
        path = tmp_path / "disk" / "a.pth"
        torch.save(state, path)
        with pytest.raises(RuntimeError):
            torch.save(BIG, path)
        with pytest.raises(RuntimeError):
            torch.load(path, weights_only=True)


def test_a_read_only_file_system(tmp_path: Path, state: dict[str, object]) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=4m"):
        path = chkpt.save(state, disk / "a.pth")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        check_failure(path, errno.EROFS)


def test_the_limit_of_file_sizes(tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        check_failure(path, errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_one_may_not_write_to(state: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = chkpt.save(state, folder / "a.pth")
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            check_failure(path, errno.EACCES)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0])
def test_the_mode_is_that_of_a_new_file(mask: int, tmp_path: Path, state: dict[str, object]) -> None:
    old = os.umask(mask)
    try:
        path = chkpt.save(state, tmp_path / "a.pth")
        path.chmod(0o600)
        chkpt.save(state, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_links_are_followed_and_kept(tmp_path: Path, state: dict[str, object]) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a.pth"
    link = tmp_path / "link.pth"
    link.symlink_to(Path("real") / "a.pth")
    assert chkpt.save(state, link) == link  # pointing to nothing yet
    assert chkpt.save({"x": 2}, link) == link
    assert link.is_symlink() and not target.is_symlink()
    assert chkpt.load(target)["x"] == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.pth", "link.pth", "real"]


def test_hard_links_keep_the_old_file(tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save({"x": 1}, tmp_path / "a.pth")
    (tmp_path / "b.pth").hardlink_to(path)
    chkpt.save({"x": 2}, path)
    assert chkpt.load(tmp_path / "b.pth")["x"] == 1


def test_a_reader_by_mmap_keeps_its_file(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(1 << 16)}, tmp_path / "a.pth")
    old = chkpt.load(path, mmap=True)["x"]
    chkpt.save({"x": torch.ones(1 << 16)}, path)
    assert isinstance(old, torch.Tensor) and not old.any()


def test_nothing_is_touched_if_the_state_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*arguments: object) -> None:
        raise AssertionError("opened a file")

    monkeypatch.setattr(os, "open", no)
    with pytest.raises(TypeError, match=r"^x: set"):
        chkpt.save({"x": set()}, tmp_path / "a.pth")


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such folder"):
        chkpt.save({}, tmp_path / "no" / "a.pth")
    with pytest.raises(IsADirectoryError):
        chkpt.save({}, tmp_path)
    fifo = tmp_path / "fifo.pth"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="no regular file"):
        chkpt.save({}, fifo)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError) as caught:
        chkpt.save({}, tmp_path / "a")
    assert caught.value.errno == errno.ELOOP
    for bad in ("", "a\0b"):
        with pytest.raises(ValueError, match="path"):
            chkpt.save({}, bad)
    for wrong in (None, 3, b"x"):
        with pytest.raises(TypeError, match="path"):
            chkpt.save({}, wrong)  # type: ignore[arg-type]


def test_a_name_of_255_bytes(tmp_path: Path) -> None:
    path = chkpt.save({"x": 1}, tmp_path / ("é" * 125 + "a.pth"))
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_hidden_and_no_checkpoint(
    tmp_path: Path, state: dict[str, object], kit: Any
) -> None:
    seen: list[str] = []
    disk = kit.Disk(tmp_path, lambda name: seen.extend(p.name for p in tmp_path.iterdir()), fails=3)
    with kit.watched(disk):
        chkpt.save(state, tmp_path / "a.pth")
    (temp,) = seen
    assert temp.startswith(".a.pth.") and temp.endswith(".tmp")
    assert chkpt.parse_name(temp) is None
    assert [target for _, target in _atomic.orphans(tmp_path)] == []


def test_a_living_writer_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[bool] = []

    def write(file: IO[bytes]) -> None:
        file.write(b"x")
        swept.extend(_atomic.sweep(temp) for temp, _ in _atomic.orphans(tmp_path))
        chkpt.CheckpointStore(tmp_path, "run").close()

    _atomic.write_atomically(tmp_path / "run_epoch_1_iter_1.pth", write)
    assert swept == [False]
    assert (tmp_path / "run_epoch_1_iter_1.pth").read_bytes() == b"x"


def test_a_writer_that_was_swept_before_it_had_its_lock_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[[int, int], None] = fcntl.flock
    swept: list[Path] = []

    def flock(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and len(swept) < 2:
            ((temp, _),) = _atomic.orphans(tmp_path)
            swept.append(temp)
            assert _atomic.sweep(temp)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    chkpt.verify(chkpt.save({"x": 1}, tmp_path / "a.pth"))
    assert len(swept) == 2 and len(list(tmp_path.iterdir())) == 1


def test_without_locks_files_are_written_and_none_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    orphan = tmp_path / ".run_epoch_1_iter_1.pth.0123456789abcdef.tmp"
    orphan.write_bytes(b"x")
    monkeypatch.setattr(fcntl, "flock", flock)
    with chkpt.CheckpointStore(tmp_path, "run") as store:
        chkpt.verify(store.save({}, epoch=1, iteration=1))
    assert orphan.exists()


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    chkpt.verify(chkpt.save({"x": 1}, tmp_path / "a.pth"))


def test_check_state_says_what_save_would_say(tmp_path):
    good = {"model": {"w": torch.ones(3)}, "n": 1}
    assert chkpt.check_state(good) is None
    for bad in ({"model": {"path": tmp_path}}, {"version": "1"}, {3: 1}, {"f": print}):
        with pytest.raises((TypeError, ValueError)) as of_save:
            chkpt.save(bad, tmp_path / "x.pth")
        with pytest.raises(type(of_save.value)) as of_check:
            chkpt.check_state(bad)
        assert str(of_check.value) == str(of_save.value)
    assert list(tmp_path.iterdir()) == []
