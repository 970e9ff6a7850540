"""Sharded checkpoints of a store, if something goes wrong after they are saved, or somebody else prunes them."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt import CheckpointStore
from helios.chkpt._sharded import folder as folder_module
from helios.chkpt._sharded.folder import sweep_inside


def saved(path: Path) -> Path:
    return chkpt.save_sharded({"x": torch.arange(3)}, path)


def shards_of(path: Path) -> Path:
    (shards,) = path.glob("shards-*")
    return shards


@pytest.fixture
def unlistable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one that cannot be listed; what is in it can still be opened by its name."""
    real = Path.iterdir

    def refuse(folder: Path) -> None:
        def iterdir(path: Path) -> Iterator[Path]:
            if path == folder:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path)

        monkeypatch.setattr(Path, "iterdir", iterdir)

    return refuse


def test_a_save_that_counts_does_not_fail_because_nothing_can_be_swept(
    tmp_path: Path, unlistable: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = chkpt.save_sharded({"n": 1}, tmp_path / "a.dcp")
    unlistable(path)
    with pytest.raises(OSError, match="Input/output error"):
        sweep_inside(path)
    assert chkpt.save_sharded({"n": 2}, path) == path
    assert chkpt.load(path)["n"] == 2
    monkeypatch.undo()
    assert len(list(path.glob("shards-*"))) == 2
    sweep_inside(path)
    assert len(list(path.iterdir())) == 2
    chkpt.verify(path)


def test_what_is_no_checkpoint_any_more_was_deleted(
    tmp_path: Path,
    unlistable: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = saved(tmp_path / "run_epoch_1_iter_1.dcp")
    new = saved(tmp_path / "run_epoch_1_iter_2.dcp")
    store = CheckpointStore(tmp_path, "run", keep_last=1)
    unlistable(old)
    assert store.prune() == [old]
    assert store.list() == [new] and caplog.messages == []
    monkeypatch.undo()
    assert old.exists()  # what is left of it, until the next sweep
    store.close()
    assert list(tmp_path.iterdir()) == [new]


def test_a_sweep_reads_no_main_file_of_a_folder_with_nothing_to_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [saved(tmp_path / f"run_epoch_1_iter_{number}.dcp") for number in range(3)]
    more = paths[1] / "shards-0000000000000001"
    more.mkdir()
    read: list[Path] = []
    real = folder_module.open_file

    def open_file(path: Path) -> Any:
        read.append(path.parent)
        return real(path)

    monkeypatch.setattr(folder_module, "open_file", open_file)
    store = CheckpointStore(tmp_path, "run")
    assert set(read) == {paths[1]} and not more.exists()
    read.clear()
    store.save_sharded({}, epoch=1, iteration=9)
    assert read == []
    (shards_of(paths[2]).with_name(f".{shards_of(paths[2]).name}.lock")).touch()  # its writer was killed
    store.close()
    assert read == [paths[2]] and len(list(paths[2].iterdir())) == 2
    for path in paths:
        chkpt.verify(path)


@pytest.mark.parametrize(
    "moment",
    [
        "_sharded.write.read_main",
        "_sharded.write.chunks_of",
        "_sharded.write.check_digests",
        "_store.identity",
    ],
)
def test_a_folder_that_somebody_else_prunes_at_once_is_not_a_damaged_one(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, "run", keep_last=1)
    other = CheckpointStore(tmp_path, "run", keep_last=2)
    newer: list[Path] = []

    def prune() -> None:
        newer.extend(other.save_sharded({}, epoch=2, iteration=number) for number in (1, 2))

    before(moment, prune, monkeypatch)
    path = tmp_path / "run_epoch_1_iter_2.dcp"
    assert store.save_sharded({"x": torch.arange(3)}, epoch=1, iteration=2) == path
    assert (
        store.list() == newer and len(newer) == 2
    )  # no reason for this store, which keeps one, to delete one
    assert caplog.messages == [f"{path} was deleted by somebody else as soon as it was saved"]


@pytest.mark.parametrize("moment", ["_sharded.write.read_main", "_sharded.write.chunks_of"])
def test_shards_that_are_missing_though_the_main_file_is_there_are_damage(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    store = CheckpointStore(tmp_path, "run", keep_last=1)
    old = store.save_sharded({}, epoch=1, iteration=1)
    path = tmp_path / "run_epoch_1_iter_2.dcp"
    before(moment, lambda: shutil.rmtree(shards_of(path)), monkeypatch)
    with pytest.raises(chkpt.TruncatedError, match="no such folder"):
        store.save_sharded({}, epoch=1, iteration=2)
    assert store.list() == [old, path]


def before(moment: str, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, right before a function of the package is called: <module>.<function>."""
    module = importlib.import_module(f"helios.chkpt.{moment.rpartition('.')[0]}")
    name = moment.rpartition(".")[2]
    real = getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(module, name, real)
        act()
        return real(*args, **options)

    monkeypatch.setattr(module, name, call)
