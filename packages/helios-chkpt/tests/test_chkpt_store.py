"""The checkpoints of a run: found by number if they verify, saved in the background, pruned with care."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt import CheckpointStore, _store, find_last_checkpoint, load_last_checkpoint
from helios.chkpt._memory import State


def put(folder: Path, *names: str) -> None:
    for name in names:
        chkpt.save({"name": name}, folder / name)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_the_highest_numbers_win_as_numbers(tmp_path: Path) -> None:
    names = [
        "r_epoch_2_iter_9.pth",
        "r_epoch_10_iter_8.pth",
        "r_epoch_10_iter_80.pth",
        "r_epoch_9_iter_900.pth",
    ]
    put(tmp_path, *names)
    assert find_last_checkpoint(tmp_path, "r") == tmp_path / "r_epoch_10_iter_80.pth"
    assert find_last_checkpoint(str(tmp_path)) == tmp_path / "r_epoch_10_iter_80.pth"


def test_the_very_first_counts(tmp_path: Path) -> None:
    put(tmp_path, "r_epoch_0_iter_0.pth")
    assert find_last_checkpoint(tmp_path, "r") == tmp_path / "r_epoch_0_iter_0.pth"


def test_ties_go_to_the_one_changed_last(tmp_path: Path) -> None:
    put(tmp_path, "r_epoch_1_iter_1_a.pth", "r_epoch_1_iter_1_b.pth")
    for first, second in ("ab", "ba"):
        os.utime(tmp_path / f"r_epoch_1_iter_1_{first}.pth", ns=(0, 1000))
        os.utime(tmp_path / f"r_epoch_1_iter_1_{second}.pth", ns=(0, 2000))
        assert find_last_checkpoint(tmp_path) == tmp_path / f"r_epoch_1_iter_1_{second}.pth"


def test_files_that_do_not_verify_are_skipped_with_their_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "r_epoch_1_iter_1.pth", "r_epoch_2_iter_1.pth")
    damage(tmp_path / "r_epoch_2_iter_1.pth")
    (tmp_path / "r_epoch_3_iter_1.pth").write_text("hello")
    (tmp_path / "r_epoch_4_iter_1.pth").mkdir()
    (tmp_path / "r_epoch_5_iter_1.pth").symlink_to("nothing")
    assert find_last_checkpoint(tmp_path, "r") == tmp_path / "r_epoch_1_iter_1.pth"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 4
    text = caplog.text
    for reason in ("TruncatedError", "NotACheckpointError", "IsADirectoryError", "No such file"):
        assert reason in text
    assert {record.name for record in caplog.records} == {"helios.chkpt"}


def test_other_runs_are_ignored(tmp_path: Path) -> None:
    put(tmp_path, "a_epoch_1_iter_1.pth", "a_epoch_1_iter_1_epoch_9_iter_9.pth", "ab_epoch_8_iter_8.pth")
    (tmp_path / "a_epoch_99_iter_99.pt").write_text("x")
    assert find_last_checkpoint(tmp_path, "a") == tmp_path / "a_epoch_1_iter_1.pth"
    assert find_last_checkpoint(tmp_path, "b") is None


def test_older_releases_are_found_so_that_load_can_say_migrate(tmp_path: Path, legacy: Path) -> None:
    for variant in ("0.2.0/logging", "2.0.1/amp"):
        source = max((legacy / variant).glob("*.pth"))
        found = find_last_checkpoint(source.parent)
        assert found == source
        with pytest.raises(chkpt.VersionTooOldError):
            chkpt.load(found)


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path / "no") is None
    assert find_last_checkpoint(tmp_path) is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        find_last_checkpoint(tmp_path / "file")
    for bad in (3, None):
        with pytest.raises(TypeError, match="root"):
            find_last_checkpoint(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="run_name"):
        find_last_checkpoint(tmp_path, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="run_name"):
        find_last_checkpoint(tmp_path, "a/b")


def test_a_store_names_lists_and_finds(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    with CheckpointStore(root, "run") as store:
        assert store.last() is None and store.list() == [] and store.prune() == []
        ten = store.save({"x": 10}, epoch=10, iteration=1, metadata="m")
        two = store.save({"x": 2}, epoch=2, iteration=1)
        assert ten == root / "run_epoch_10_iter_1_m.pth"
        assert store.list() == [two, ten]
        assert store.last() == ten


def test_the_same_name_overwrites_and_other_metadata_does_not(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "run") as store:
        for x in (1, 2):
            path = store.save({"x": x}, epoch=1, iteration=1)
        store.save({"x": 3}, epoch=1, iteration=1, metadata="m")
        assert len(store.list()) == 2
        assert chkpt.load(path)["x"] == 2


def test_the_state_saved_in_the_background_is_that_of_the_call(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(1000.0))
    buffer = torch.zeros(100)
    sparse = torch.eye(3).to_sparse()
    expected = weight.detach().clone()
    values: list[object] = [1]
    state = {"w": weight, "tied": weight, "a": buffer[:60], "b": buffer[50:], "s": sparse, "values": values}
    with CheckpointStore(tmp_path, "run") as store:
        path = store.save_async(state, epoch=1, iteration=1)
        with torch.no_grad():
            weight.fill_(-1)
        buffer.fill_(-1)
        sparse._values().fill_(-1)
        values.append(set())
        state.clear()
    loaded = chkpt.load(path)
    w, tied, a, b, s = (loaded[key] for key in ("w", "tied", "a", "b", "s"))
    assert isinstance(w, torch.Tensor) and torch.equal(w, expected) and w is tied
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and isinstance(s, torch.Tensor)
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert not a.any() and not b.any() and torch.equal(s.to_dense(), torch.eye(3))
    assert loaded["values"] == [1]


def test_save_async_returns_before_the_write_and_the_next_call_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    order: list[str] = []
    write = _store.write_state

    def slow(state: State, path: Path, **options: Any) -> None:
        assert go.wait(60)
        order.append(path.name)
        write(state, path, **options)

    monkeypatch.setattr(_store, "write_state", slow)
    store = CheckpointStore(tmp_path, "run")
    first = store.save_async({}, epoch=1, iteration=1)
    assert list(tmp_path.iterdir()) == []
    go.set()
    second = store.save_async({}, epoch=1, iteration=2)
    assert first.exists()
    assert store.last() == second
    assert order == [first.name, second.name]
    store.close()


@pytest.mark.parametrize("call", ["save", "save_async", "last", "list", "prune", "wait", "close", "exit"])
def test_an_error_in_the_background_is_raised_by_the_next_call_once(
    call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path / "root", "run")
    shutil.rmtree(tmp_path / "root")
    store.save_async({"x": 1}, epoch=1, iteration=1)
    arguments: dict[str, object] = {}
    if call.startswith("save"):
        arguments = {"state": {}, "epoch": 1, "iteration": 2}
    with pytest.raises(FileNotFoundError, match="No such folder"):
        if call == "exit":
            with store:
                pass
        else:
            getattr(store, call)(**arguments)
    assert "was not saved: FileNotFoundError" in caplog.text
    store.close()
    store.close()


def test_an_error_in_the_background_is_added_to_that_of_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as caught, CheckpointStore(tmp_path / "root", "run") as store:
        shutil.rmtree(tmp_path / "root")
        store.save_async({"x": 1}, epoch=1, iteration=1)
        raise KeyError("mine")
    assert "FileNotFoundError" in caught.value.__notes__[0]


def test_a_bad_state_is_refused_at_once(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "run") as store:
        with pytest.raises(TypeError, match=r"^x: set"):
            store.save_async({"x": set()}, epoch=1, iteration=1)
        with pytest.raises(ValueError, match="epoch"):
            store.save_async({}, epoch=-1, iteration=1)
        with pytest.raises(ValueError, match="metadata"):
            store.save({}, epoch=1, iteration=1, metadata="epoch_1_iter_2")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "run")
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.save({}, epoch=1, iteration=1)


@pytest.mark.parametrize("method", ["save", "save_async"])
def test_the_last_k_are_kept(method: str, tmp_path: Path) -> None:
    put(tmp_path, "other_epoch_0_iter_0.pth")
    with CheckpointStore(tmp_path, "run", keep_last=2) as store:
        for iteration in range(5):
            getattr(store, method)({"i": iteration}, epoch=1, iteration=iteration)
        assert [path.name for path in store.list()] == ["run_epoch_1_iter_3.pth", "run_epoch_1_iter_4.pth"]
        assert store.prune() == []
    assert (tmp_path / "other_epoch_0_iter_0.pth").exists()


def test_a_bad_file_does_not_count_and_a_good_one_is_never_the_price(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "run") as store:
        paths = [store.save({}, epoch=1, iteration=i) for i in range(4)]
    damage(paths[3])
    damage(paths[2])
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        assert store.prune() == [paths[0]]
        assert store.list() == paths[1:]
    damage(paths[1])
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        assert store.prune() == []  # nothing good is left, so nothing is deleted
        damage(paths[1])


def test_a_file_that_went_bad_after_it_was_verified_is_seen(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "run", keep_last=2) as store:
        paths = [store.save({}, epoch=1, iteration=i) for i in range(2)]
        damage(paths[1])
        paths.append(store.save({}, epoch=1, iteration=2))
        assert store.list() == paths


def test_nothing_is_deleted_before_the_successor_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        first = store.save({}, epoch=1, iteration=1)
        write = _store.write_state

        def failing_disk(state: State, path: Path, **options: Any) -> None:
            write(state, path, **options)
            damage(path)

        monkeypatch.setattr(_store, "write_state", failing_disk)
        with pytest.raises(chkpt.TruncatedError):
            store.save({}, epoch=1, iteration=2)
        chkpt.verify(first)


def test_what_was_just_saved_is_kept_though_an_older_run_went_further(tmp_path: Path) -> None:
    put(tmp_path, "run_epoch_9_iter_9.pth")
    with CheckpointStore(tmp_path, "run", keep_last=1) as store:
        first = store.save({}, epoch=1, iteration=1)
        assert first.exists()
        second = store.save({}, epoch=1, iteration=2)
        assert store.list() == [second, tmp_path / "run_epoch_9_iter_9.pth"]


def test_only_orphans_of_the_own_run_are_swept(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    names = {
        f".run_epoch_1_iter_1.pth.{token}.tmp": False,
        f".run_epoch_1_iter_1_meta.pth.{token}.tmp": False,
        f".run_epoch_1_iter_1_{'m' * 190}.{token}.tmp": False,
        f".run_epoch_1_iter_1_epoch_2_iter_2.pth.{token}.tmp": True,
        f".other_epoch_1_iter_1.pth.{token}.tmp": True,
        ".run_epoch_1_iter_1.pth.tmp": True,
        "run_epoch_1_iter_1.pth.0123456789abcdef.tmp": True,
    }
    for name in names:
        (tmp_path / name).write_text("x")
    CheckpointStore(tmp_path, "run").close()
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        ({"root": 3}, TypeError, "root"),
        ({"root": ""}, ValueError, "root"),
        ({"run_name": ""}, ValueError, "run_name"),
        ({"run_name": "a/b"}, ValueError, "run_name"),
        ({"run_name": "a" * 250}, ValueError, "run_name"),
        ({"run_name": None}, TypeError, "run_name"),
        ({"keep_last": 0}, ValueError, "keep_last"),
        ({"keep_last": True}, TypeError, "keep_last"),
        ({"keep_last": "3"}, TypeError, "keep_last"),
    ],
)
def test_bad_stores(arguments: dict[str, object], kind: type[Exception], name: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=name):
        CheckpointStore(**{"root": tmp_path / "root", "run_name": "run", **arguments})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_what_a_child_of_a_killed_writer_still_locks_is_swept_later(tmp_path: Path) -> None:
    """Loader workers inherit the lock of a killed writer, and live on for some seconds."""
    orphan = tmp_path / ".run_epoch_1_iter_1.pth.0123456789abcdef.tmp"
    with orphan.open("wb") as inherited:
        fcntl.flock(inherited, fcntl.LOCK_EX)
        store = chkpt.CheckpointStore(tmp_path, "run")
        assert orphan.exists()
    store.save({"x": 1}, epoch=1, iteration=2)  # the worker is gone by now
    assert not orphan.exists()
    with orphan.open("wb") as inherited:
        fcntl.flock(inherited, fcntl.LOCK_EX)
        store.save({"x": 1}, epoch=1, iteration=3)
        assert orphan.exists()
    store.close()
    assert not orphan.exists()


def test_the_last_one_is_found_and_loaded_in_one_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "r_epoch_1_iter_1.pth", "r_epoch_1_iter_2.pth", "r_epoch_1_iter_3.pth")
    damage(tmp_path / "r_epoch_1_iter_3.pth")
    found = load_last_checkpoint(tmp_path, "r")
    assert found is not None
    path, state = found
    assert path.name == state["name"] == "r_epoch_1_iter_2.pth"
    assert "skipped" in caplog.text and "r_epoch_1_iter_3.pth: TruncatedError" in caplog.text
    assert load_last_checkpoint(tmp_path, "other") is None
    assert load_last_checkpoint(tmp_path / "no_folder") is None


def test_a_file_of_another_release_is_not_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "r_epoch_1_iter_1.pth")
    torch.save({"version": "1.9"}, tmp_path / "r_epoch_1_iter_2.pth")
    with pytest.raises(chkpt.VersionTooOldError):
        load_last_checkpoint(tmp_path, "r")


def test_keep_every_and_keep_best(tmp_path: Path) -> None:
    scores = {1: 0.5, 2: None, 3: 0.9, 4: 0.1, 5: 0.9, 6: 0.2, 7: None, 8: 0.3}
    with CheckpointStore(tmp_path, "r", keep_last=2, keep_every=4, keep_best=2) as store:
        for iteration, score in scores.items():
            store.save({}, epoch=1, iteration=iteration, score=score)
        assert [chkpt.parse_name(path.name).iteration for path in store.list()] == [3, 4, 5, 7, 8]  # type: ignore[union-attr]
    # The scores are in the files, so another process goes on with them.
    with CheckpointStore(tmp_path, "r", keep_best=1) as store:
        store.save_async({}, epoch=2, iteration=9, score=0.0)
        assert [path.name for path in store.list()] == ["r_epoch_1_iter_5.pth", "r_epoch_2_iter_9.pth"]


def test_a_damaged_file_is_not_the_best(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "r", keep_best=1) as store:
        best = store.save({}, epoch=1, iteration=1, score=2.0)
        second = store.save({}, epoch=1, iteration=2, score=1.0)
        damage(best)
        last = store.save({}, epoch=1, iteration=3, score=0.0)
        assert store.list() == [second, last]


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"keep_every": 2}, ValueError),
        ({"keep_last": 1, "keep_every": 0}, ValueError),
        ({"keep_best": True}, TypeError),
    ],
)
def test_retention_arguments(wrong: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match="keep_"):
        CheckpointStore(tmp_path, "r", **wrong)


@pytest.mark.parametrize("score, error", [("1", TypeError), (float("nan"), ValueError), (True, TypeError)])
def test_scores_are_finite_numbers(score: Any, error: type[Exception], tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "r") as store:
        for save in (store.save, store.save_async):
            with pytest.raises(error, match="score"):
                save({}, epoch=1, iteration=1, score=score)
        assert store.list() == []


def test_the_memory_that_states_are_copied_to_is_used_again(tmp_path: Path) -> None:
    """Three saves of one size and one of a smaller share memory; what each holds is still that of its call."""
    weights = torch.zeros(1000)
    addresses: list[int] = []
    with CheckpointStore(tmp_path, "r") as store:
        for step in range(4):
            weights.fill_(step)
            part = weights if step < 3 else weights[:10]
            path = store.save_async({"w": part, "tied": part[5:]}, epoch=1, iteration=step)
            assert store._staging is not None
            addresses.append(store._staging._buffer.data_ptr())
            weights.fill_(-1)
            store.wait()
            loaded = chkpt.load(path)
            assert torch.equal(loaded["w"], torch.full_like(part, step))  # type: ignore[arg-type]
            assert loaded["tied"].data_ptr() - loaded["w"].data_ptr() == 20  # type: ignore[union-attr]
    assert len(set(addresses)) == 1
    assert store._staging is None
