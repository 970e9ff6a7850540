"""Real processes that save and load one checkpoint together; see shard_driver.py for what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt

pytestmark = pytest.mark.long


NAME = "run_epoch_1_iter_2.dcp"


def run(folder: Path, *steps: str) -> list[Any]:
    """What each step gave in each rank; all have to return something."""
    return [[rank["returned"] for rank in found] for found in raw_run(folder, *steps)]


def raw_run(folder: Path, *steps: str) -> list[Any]:
    driver = Path(__file__).parent / "shard_driver.py"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(driver), str(folder), *steps], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_two_ranks_save_any_number_of_ranks_loads_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    saved, *loaded = run(folder, "save:2:1", "load:4:1", "load:1:1", "load:3:1", "plain_dcp_load:3:1")
    assert saved == [str(folder / NAME)] * 2
    assert loaded == [[[]] * 4, [[]], [[]] * 3, [[]] * 3]
    chkpt.verify(folder / NAME)
    assert chkpt.find_last_checkpoint(folder, "run") == folder / NAME

    # In a process without a group, all comes as plain whole tensors, tied as they were.
    state: Any = chkpt.load(folder / NAME)
    net = state["model"]["net"]
    assert {type(tensor) for tensor in net.values()} == {torch.Tensor}
    assert net["uneven"].shape == (7, 3)
    assert state["model"]["tied"] is net["fewer_rows_than_ranks"]
    assert state["optimizer"]["a"] is state["optimizer"]["b"]
    assert type(state["optimizer"]["c"][0]) is tuple
    info = chkpt.inspect(folder / NAME)
    assert info.num_shard_files == 3
    (entry,) = (entry for entry in info.tensors if entry.path == "model.net.uneven")
    assert (entry.kind, entry.dtype, entry.shape) == ("sharded tensor", "float32", (7, 3))
    assert entry.value == "float32 [7, 3], S(0) on dp=2"
    (tied,) = (entry for entry in info.tensors if entry.path == "model.tied")
    assert tied.shares == "model.net.fewer_rows_than_ranks"

    # Another save under the name replaces it as a whole; equal states give equal shards, whoever loads them.
    before = {file.name: file.read_bytes() for file in (folder / NAME).glob("shards-*/*")}
    run(folder, "save:4:2", "load:2:2", "save:2:1")
    assert {file.name: file.read_bytes() for file in (folder / NAME).glob("shards-*/*")} == before
    assert len(list((folder / NAME).iterdir())) == 2


def test_meshes_of_two_dims_subgroups_plain_files_and_fsdp(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    steps = (
        "save_grid:4",
        "load_grid:2",
        "load_grid:3",
        "load_file:2",
        "subgroup:3",
        "save:1:1",
        "load_without_mesh:2:1",
        "fsdp:2",
    )
    _, two, three, file, sub, _, whole, fsdp = run(folder, *steps)
    assert (two, three, file, whole, fsdp) == ([[]] * 2, [[]] * 3, [True] * 2, [True] * 2, [[]] * 2)
    assert sub[1:] == ["[0.0, 1.0, 2.0]", "[3.0, 4.0]"]
    assert sub[0].startswith("ValueError: group: this process is not in it")
    state: Any = chkpt.load(folder / "grid.dcp")
    for number, tensor in enumerate(state["model"].values()):
        assert torch.equal(tensor, torch.arange(35.0).view(5, 7) + number)


def test_an_error_of_one_rank_is_raised_by_all_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    _, bad, full, other, damaged, failing = run(
        folder, "save:2:1", "bad_states:2", "full_disk:2:1", "full_disk:2:0", "damaged:2", "failing_calls:2"
    )
    assert bad[0] == bad[1]
    differ = "ValueError: state: the DTensors are not the same on all ranks: "
    assert [text.split(" Store")[0].split(" cannot")[0] for text in bad[0]] == [
        "TypeError: rank 1: a.b: set",
        "TypeError: rank 1: a[0]: a DTensor with the placement P(sum)",
        f"{differ}'a.0: float32 [6] S(0) on dp=2' on rank 0, 'a.0: float32 [4] S(0) on dp=2' on rank 1",
        f"{differ}'b: float32 [4] S(0) on dp=2' on rank 0, 'nothing' on rank 1",
        "ValueError: rank 1: state: the key 'sharded' is added when it is saved; expected a state without it",
        "ValueError: path: 'a.dcp' on rank 0, 'b.dcp' on rank 1; expected the same on all",
        "ValueError: rank 1: path: expected a name that ends in '.dcp', got 'a.pth'",
        f"FileNotFoundError: [2] [Errno 2] rank 0: No such folder (it is not created): '{folder / 'missing'}'",
        "TypeError: rank 1: meshes: expected a sequence of DeviceMesh, got [1]",
    ]
    for found, rank in ((full, 1), (other, 0)):
        assert found[0] == found[1]
        errors = [text.split(": '")[0] for text in found[0]]
        assert errors[0] == f"OSError: [28] [Errno 28] rank {rank}: No space left on device"
        assert errors[1] == f"OSError: [122] [Errno 122] rank {rank}: Disk quota exceeded"
        assert errors[2] == f"OSError: [5] [Errno 5] rank {rank}: Input/output error"
        assert errors[3] == f"OSError: [27] [Errno 27] rank {rank}: File too large"
        assert errors[4].startswith("OSError: [28] [Errno 28] rank 0: No space left on device")
        assert "bytes to write, 4096 free" in errors[4]
    assert damaged[0] == damaged[1]
    names = [(text.split(": ")[:2], text.split(": ")[2].rsplit("/", 1)[1]) for text in damaged[0]]
    assert names == [
        (["CorruptError", "rank 0"], ".metadata"),
        (["CorruptError", "rank 0"], "__0_0.distcp"),
        (["CorruptError", "rank 1"], "__1_0.distcp"),
    ]
    # Each call of rank 0 failed once.
    assert failing[0] == failing[1]
    (count,) = failing[0]
    assert int(count.split()[0]) > 30
    assert [entry.name for entry in folder.iterdir()] == [NAME]
    assert len(list((folder / NAME).iterdir())) == 2


def test_a_store_in_each_rank_of_which_one_keeps_the_folder(tmp_path: Path) -> None:
    ((first, second),) = run(tmp_path / "f", "store:2")
    for found in (first, second):
        assert not found["unmade"]
        kept = ["run_epoch_1_iter_1.dcp", "run_epoch_1_iter_4.dcp", "run_epoch_1_iter_5.dcp"]
        assert found["left"] == found["list"] == kept
        assert found["path"] == found["last"] == "run_epoch_1_iter_5.dcp"
        assert (
            found["wrong writer"] == "ValueError: rank 0: is_writer: expected True in the store of this rank"
        )
        assert found["wrong number"] == "ValueError: rank 1: iteration: expected 0 or more, got -1"
    assert second["refused"].startswith("ValueError: is_writer: this store is not the writer")


def test_all_ranks_say_alike_that_somebody_else_deleted_what_they_saved(tmp_path: Path) -> None:
    ((first, second),) = run(tmp_path / "f", "pruned:2")
    for found in (first, second):
        assert found["path"] == "run_epoch_1_iter_1.dcp" and not found["there"]
        (message,) = found["messages"]
        assert message.endswith("run_epoch_1_iter_1.dcp was deleted by somebody else as soon as it was saved")


def test_kills_of_any_rank_leave_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    calls, times = raw_run(tmp_path / "f", "storm:0:calls,12", "storm:0:time,4")
    for found in (calls, times):
        assert found["wrong"] == []
    assert calls["outcomes"] == {"old": 11, "new": 1}
    assert sum(times["outcomes"].values()) == 4


def test_the_same_kill_tears_what_torch_alone_saves(tmp_path: Path) -> None:
    """The control: old and new shards in one checkpoint."""
    *_, killed, seeds = raw_run(
        tmp_path / "f", "plain_dcp_save:2:1", "plain_dcp_killed:2:2", "plain_dcp_seeds:2"
    )
    assert killed[1] == -9
    assert [rank["returned"] for rank in seeds] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("function", ["save_sharded", "load_sharded"])
def test_one_process_without_a_group(tmp_path: Path, function: str, kit: Any) -> None:
    state = {"model": {"w": torch.arange(3.0)}, "list": [1, (2, None)]}
    path = chkpt.save_sharded(state, tmp_path / "a.dcp")
    assert path == tmp_path / "a.dcp"
    read = chkpt.load if function == "save_sharded" else lambda path: chkpt.load_sharded(path, meshes=[])
    assert kit.same(read(path), {**state, "version": chkpt.__version__})
