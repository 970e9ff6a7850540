"""Links, names, modes, and others who are at work in the same folder at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helios import chkpt
from helios.chkpt import CheckpointStore


def number(path: Path) -> object:
    return chkpt.load(path)["x"]


def test_chains_of_links_are_followed_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    end = tmp_path / "far" / "away" / "real.pth"
    (tmp_path / "far" / "second.pth").symlink_to(Path("away") / "real.pth")
    (tmp_path / "first.pth").symlink_to(Path("far") / "second.pth")
    for value in (1, 2):
        chkpt.save({"x": value}, tmp_path / "first.pth")
        assert number(end) == number(tmp_path / "first.pth") == value
    assert not end.is_symlink() and (tmp_path / "first.pth").is_symlink()
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["first.pth", "real.pth", "second.pth"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "no" / "folder.pth")
    with pytest.raises(FileNotFoundError, match="No such folder"):
        chkpt.save({}, tmp_path / "dangling.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(OSError) as caught:
        chkpt.save({}, tmp_path / "loop.pth")
    assert caught.value.errno == errno.ELOOP
    (tmp_path / "folder.pth").symlink_to(tmp_path)
    with pytest.raises(IsADirectoryError):
        chkpt.save({}, tmp_path / "folder.pth")
    assert len(list(tmp_path.iterdir())) == 3


def test_an_orphan_is_where_the_link_leads(tmp_path: Path, kit: Any) -> None:
    """The temporary file is beside the real one, else the rename could cross file systems."""
    (tmp_path / "real").mkdir()
    (tmp_path / "a.pth").symlink_to(Path("real") / "a.pth")
    seen: list[str] = []
    disk = kit.Disk(
        tmp_path, lambda name: seen.extend(p.parent.name for p in tmp_path.rglob("*.tmp")), fails=3
    )
    with kit.watched(disk):
        chkpt.save({"x": 1}, tmp_path / "a.pth")
    assert seen == ["real"]


def test_other_names_of_a_file_keep_what_it_was(tmp_path: Path) -> None:
    path = chkpt.save({"x": 1}, tmp_path / "a.pth")
    (tmp_path / "b.pth").hardlink_to(path)
    chkpt.save({"x": 2}, tmp_path / "b.pth")
    assert (number(path), number(tmp_path / "b.pth")) == (1, 2)


def test_retention_never_leaves_a_link_without_its_file(tmp_path: Path) -> None:
    """Somebody marked an old file as the newest: then it is the newest, and what it leads to stays."""
    with CheckpointStore(tmp_path, "run") as store:
        paths = [store.save({"x": i}, epoch=1, iteration=i) for i in range(3)]
    link = tmp_path / "run_epoch_9_iter_9.pth"
    link.symlink_to(paths[0].name)
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        assert store.prune() == paths[1:]
        assert number(link) == 0 and store.last() == link


def test_retention_deletes_a_link_and_not_its_file(tmp_path: Path) -> None:
    other = chkpt.save({"x": 0}, tmp_path / "mine.pth")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_epoch_1_iter_1.pth").symlink_to(other)
    with CheckpointStore(run, "run", keep_last=1) as store:
        path = store.save({"x": 1}, epoch=1, iteration=2)
    assert list(run.iterdir()) == [path] and number(other) == 0


def test_a_read_only_file_is_replaced_as_any_other(tmp_path: Path) -> None:
    """Whether a file may be replaced is the folder's affair; the mode is that of a new file."""
    path = chkpt.save({"x": 1}, tmp_path / "a.pth")
    path.chmod(0o400)
    mask = os.umask(0o027)
    try:
        chkpt.save({"x": 2}, path)
    finally:
        os.umask(mask)
    assert number(path) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_names_up_to_the_limit(tmp_path: Path) -> None:
    for name in ("a" * 251 + ".pth", "é" * 125 + "a.pth", ".pth", " ", "a\nb.pth", "-rf", "x.tmp"):
        assert number(chkpt.save({"x": 1}, tmp_path / name)) == 1
    with pytest.raises(OSError) as caught:
        chkpt.save({}, tmp_path / ("a" * 252 + ".pth"))
    assert caught.value.errno == errno.ENAMETOOLONG
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("length", [1, 100])
def test_names_that_are_no_utf8(length: int, tmp_path: Path) -> None:
    run = os.fsdecode(b"r\xff\xfe") * length
    chkpt.format_name(chkpt.CheckpointName(run[:200], 1, 1))
    run = run[:200]
    with CheckpointStore(tmp_path, run, keep_last=1) as store:
        store.save({"x": 1}, epoch=1, iteration=1)
        path = store.save({"x": 2}, epoch=1, iteration=2)
        assert store.last() == path and number(path) == 2
        assert list(tmp_path.iterdir()) == [path]


def test_orphans_of_a_run_whose_name_is_no_utf8_are_swept(tmp_path: Path, kit: Any) -> None:
    run = os.fsdecode(b"r\xff")
    orphans: list[bytes] = []

    def copy(name: str) -> None:
        (temp,) = tmp_path.glob(".*.tmp")
        orphans.append(os.fsencode(temp.name).replace(b".tmp", b"")[:-16] + b"0" * 16 + b".tmp")

    with kit.watched(kit.Disk(tmp_path, copy, fails=3)):
        chkpt.save({"x": 1}, tmp_path / chkpt.format_name(chkpt.CheckpointName(run, 1, 1)))
    orphan = tmp_path / os.fsdecode(orphans[0])
    orphan.write_bytes(b"x")
    CheckpointStore(tmp_path, run).close()
    assert not orphan.exists()


def test_a_relative_path_is_where_it_was_at_the_call(
    tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    for number_of_call in range(6):
        monkeypatch.chdir(tmp_path / "here")
        move = kit.Disk(tmp_path / "here", lambda name: os.chdir(tmp_path / "there"), fails=number_of_call)
        with kit.watched(move):
            assert chkpt.save({"x": 1}, "a.pth") == Path("a.pth")
        assert [p.name for p in (tmp_path / "here").iterdir()] == ["a.pth"]
        assert list((tmp_path / "there").iterdir()) == []


def test_a_folder_that_may_be_written_but_not_listed_fails_before_anything_changes() -> None:
    """What cannot be opened cannot be synced, and then a new name may be gone after a power cut."""
    with tempfile.TemporaryDirectory() as name:  # a place that others may enter
        folder = Path(name)
        path = chkpt.save({"x": 1}, folder / "a.pth")
        folder.chmod(0o333)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may list anything
        try:
            with pytest.raises(PermissionError):
                chkpt.save({"x": 2}, path)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert number(path) == 1 and list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_listed_any_more_does_not_make_a_save_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, "run")

    def iterdir(self: Path) -> Iterator[Path]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", iterdir)
        path = store.save({"x": 1}, epoch=1, iteration=1)  # sweeping is a courtesy
    chkpt.verify(path)
    store.close()


def test_sweeping_deletes_nothing_but_orphans(tmp_path: Path) -> None:
    """A folder, a pipe and a link of such a name are somebody's."""
    token = "0123456789abcdef"
    (tmp_path / f".run_epoch_1_iter_1.pth.{token}.tmp").mkdir()
    os.mkfifo(tmp_path / f".run_epoch_1_iter_2.pth.{token}.tmp")
    target = tmp_path / "precious"
    target.write_text("x")
    (tmp_path / f".run_epoch_1_iter_3.pth.{token}.tmp").symlink_to(target)
    locked = tmp_path / f".run_epoch_1_iter_4.pth.{token}.tmp"
    locked.write_text("x")
    with locked.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        CheckpointStore(tmp_path, "run").close()
        assert locked.exists() and target.read_text() == "x"
        assert (tmp_path / f".run_epoch_1_iter_1.pth.{token}.tmp").is_dir()
        assert (tmp_path / f".run_epoch_1_iter_3.pth.{token}.tmp").is_symlink()
