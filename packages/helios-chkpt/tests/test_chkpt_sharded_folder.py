"""Sharded checkpoints as files in a folder: names, finding, sweeping, deleting, inspecting, comparing, converting."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt import CheckpointName, CheckpointStore, DifferenceKind
from helios.chkpt import _read as read_module
from helios.chkpt._sharded import verify as verify_module
from helios.chkpt._sharded.convert import convert
from helios.chkpt_migrator import migrate_checkpoints_to_current_version
from helios.chkpt_migrator._command import helios_chkpt

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1.5, -0.0]), "s": torch.tensor(3.0)}


def folder_at(path: Path, **extra: object) -> Path:
    """A sharded checkpoint: `w` and `b` are in shards."""
    file = chkpt.save({"model": dict(TENSORS), "n": 1, **extra}, path.with_name(f"{path.name}.source.pth"))
    convert(file, path)
    file.unlink()
    return path


def shards_of(path: Path) -> Path:
    (shards,) = path.glob("shards-*")
    return shards


@pytest.mark.parametrize("metadata", ["", "best", "a.pth", "x.dcp"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_names(metadata: str, is_sharded: bool) -> None:
    name = CheckpointName("run_epoch_1_iter_2", 3, 4, metadata, is_sharded=is_sharded)
    text = chkpt.format_name(name)
    assert text.endswith(".dcp" if is_sharded else ".pth")
    assert chkpt.parse_name(text) == name


def test_names_refuse_what_is_no_bool() -> None:
    with pytest.raises(TypeError, match="is_sharded: expected bool, got int"):
        chkpt.format_name(CheckpointName("run", 1, 2, is_sharded=1))  # type: ignore[arg-type]


def test_the_folder_holds_what_the_page_on_the_format_says(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    shards = shards_of(path)
    assert {entry.name for entry in path.iterdir()} == {"helios.pth", shards.name}
    assert {entry.name for entry in shards.iterdir()} == {".metadata", "__0_0.distcp"}
    main: Any = torch.load(path / "helios.pth", weights_only=True)
    assert main["model"]["w"] is None
    assert torch.equal(main["model"]["s"], TENSORS["s"])
    assert main["sharded"]["folder"] == shards.name
    assert [file["bytes"] for file in main["sharded"]["files"]] == [
        (shards / file["name"]).stat().st_size for file in main["sharded"]["files"]
    ]
    assert main["sharded"]["tensors"][0] == {
        "path": ["model", "w"],
        "name": "model.w",
        "dtype": "float32",
        "shape": [3, 4],
        "placements": ["S(0)"],
        "mesh_shape": [1],
        "mesh_dim_names": None,
    }


def test_load_gives_parts_and_leaves_shards_alone_if_asked(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "a.dcp")
    assert list(chkpt.load(path, keys=["n"])) == ["n"]
    state: Any = chkpt.load(path, keys=["model"], map_location="cpu")
    assert list(state) == ["model"] and torch.equal(state["model"]["w"], TENSORS["w"])
    for keys in (["sharded"], ["other"]):
        with pytest.raises(KeyError):
            chkpt.load(path, keys=keys)
    with pytest.raises(ValueError, match="mmap: tensors in shards cannot be mapped"):
        chkpt.load(path, mmap=True)
    (shards_of(path) / "__0_0.distcp").unlink()
    state = chkpt.load(path, shards=False)
    assert state["model"]["w"] is None and "sharded" not in state
    assert torch.equal(state["model"]["s"], TENSORS["s"])
    with pytest.raises(chkpt.TruncatedError):
        chkpt.load(path)


def test_the_main_file_is_read_once_by_whatever_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    read: list[Path] = []
    for module in (read_module, verify_module):

        def open_file(file: Path, real: Any = module.open_file) -> Any:
            read.append(file)
            return real(file)

        monkeypatch.setattr(module, "open_file", open_file)
    loads: dict[str, tuple[Callable[[], Any], int]] = {
        "load": (lambda: chkpt.load(path), 1),
        "load without shards": (lambda: chkpt.load(path, shards=False), 1),
        "load_sharded": (lambda: chkpt.load_sharded(path, meshes=[]), 1),
        "load_last_checkpoint": (lambda: chkpt.load_last_checkpoint(tmp_path), 1),
        "load_last_checkpoint without": (lambda: chkpt.load_last_checkpoint(tmp_path, shards=False), 2),
    }
    for name, (act, count) in loads.items():
        assert act() is not None
        assert read == [path / "helios.pth"] * count, name
        read.clear()


def test_a_bit_that_flipped_in_a_shard_leads_to_the_one_before_though_shards_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = folder_at(tmp_path / "run_epoch_1_iter_1.dcp")
    newer = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")

    def found() -> Path:
        last = chkpt.load_last_checkpoint(tmp_path, shards=False)
        assert last is not None and last[1]["n"] == 1
        return last[0]

    for name in (".metadata", "__0_0.distcp"):
        file = shards_of(newer) / name
        content = file.read_bytes()
        for position in range(0, len(content), 97):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            assert found() == older
            assert len(caplog.messages) == 1 and "CorruptError" in caplog.messages[0]
            caplog.clear()
        file.write_bytes(content)
        assert found() == newer and caplog.messages == []  # the control


def test_map_location_moves_what_was_in_shards(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "a.dcp")
    for where in ("meta", {"cpu": "meta"}, torch.device("meta")):
        state: Any = chkpt.load(path, map_location=where)
        assert {tensor.device.type for tensor in state["model"].values()} == {"meta"}
    seen: list[str] = []
    state = chkpt.load(path, map_location=lambda storage, location: seen.append(location) or storage)
    assert seen == ["cpu"] * 3 and torch.equal(state["model"]["w"], TENSORS["w"])


def test_the_last_one_is_found_among_both_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = chkpt.save({}, tmp_path / "run_epoch_1_iter_2.pth")
    folder = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    for newer, older in ((folder, file), (file, folder)):
        os.utime(newer / "helios.pth" if newer is folder else newer, ns=(2 * 10**18, 2 * 10**18))
        os.utime(older / "helios.pth" if older is folder else older, ns=(10**18, 10**18))
        assert chkpt.find_last_checkpoint(tmp_path) == newer
        found = chkpt.load_last_checkpoint(tmp_path)
        assert found is not None and found[0] == newer
    last = folder_at(tmp_path / "run_epoch_1_iter_10.dcp")
    (tmp_path / "run_epoch_1_iter_11.dcp").mkdir()  # a save that has not come so far
    (tmp_path / "run_epoch_1_iter_12.dcp").write_bytes(b"")
    assert chkpt.find_last_checkpoint(tmp_path) == last
    assert caplog.messages == []
    with (shards_of(last) / "__0_0.distcp").open("ab") as opened:
        opened.write(b"x")
    assert chkpt.find_last_checkpoint(tmp_path) == file
    assert len(caplog.messages) == 1 and "CorruptError" in caplog.messages[0]


def test_only_what_nobody_writes_and_nobody_names_is_swept(tmp_path: Path) -> None:
    whole = folder_at(tmp_path / "run_epoch_1_iter_1.dcp")
    broken = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    shards_of(broken).rename(broken / "shards-00000000000000aa")
    (broken / "helios.pth").write_bytes(b"who knows which shards it named")
    names = ("shards-0000000000000001", "shards-0000000000000002", "shards-0000000000000003")
    for folder in (whole, tmp_path / "run_epoch_1_iter_3.dcp", tmp_path / "other_epoch_1_iter_3.dcp"):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).mkdir()
            (folder / name / "__0_0.distcp").write_bytes(b"x")
        for name in names[1:]:
            (folder / f".{name}.lock").touch()
        (folder / ".helios.pth.0123456789abcdef.tmp").touch()
    plain_dcp = tmp_path / "run_epoch_1_iter_4.dcp"
    plain_dcp.mkdir()
    (plain_dcp / "__0_0.distcp").touch()
    with (tmp_path / "run_epoch_1_iter_3.dcp" / f".{names[2]}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # its writer lives
        CheckpointStore(tmp_path, "run", is_writer=False).close()
        assert len(list(whole.iterdir())) == 2 + 3 + 2 + 1
        CheckpointStore(tmp_path, "run").close()
        left = tmp_path / "run_epoch_1_iter_3.dcp"
        assert {entry.name for entry in left.iterdir()} == {names[2], f".{names[2]}.lock"}
    assert {entry.name for entry in whole.iterdir()} == {"helios.pth", shards_of(whole).name}
    chkpt.verify(whole)
    assert {entry.name for entry in broken.iterdir()} == {"helios.pth", "shards-00000000000000aa"}
    assert plain_dcp.is_dir() and len(list((tmp_path / "other_epoch_1_iter_3.dcp").iterdir())) == 6
    CheckpointStore(tmp_path, "run").close()
    assert not left.exists()


def test_a_store_prunes_both_kinds_and_never_the_last_good_one(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, "run", keep_last=2) as store:
        for iteration in range(4):
            state: dict[str, object] = {"n": iteration, "x": torch.arange(3)}
            save = store.save if iteration % 2 else store.save_sharded
            save(state, epoch=1, iteration=iteration)
        assert [path.name for path in store.list()] == ["run_epoch_1_iter_2.dcp", "run_epoch_1_iter_3.pth"]
        (tmp_path / "run_epoch_1_iter_3.pth").write_bytes(b"damaged")
        path = store.save_sharded({"n": 9}, epoch=2, iteration=9, metadata="x", score=0.5)
        assert path.name == "run_epoch_2_iter_9_x.dcp"
        assert next(iter(store.list())).name == "run_epoch_1_iter_2.dcp"
        assert chkpt.inspect(path).score == 0.5
        assert store.last() == path
    with pytest.raises(ValueError, match="is_writer: expected True in the store of this rank"):
        CheckpointStore(tmp_path, "run", is_writer=False).save_sharded({}, epoch=3, iteration=1)
    assert sorted(entry.name for entry in tmp_path.iterdir())[-1] == "run_epoch_2_iter_9_x.dcp"


def test_what_is_refused_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected a name that ends in '\.dcp', got 'a\.pth'"):
        chkpt.save_sharded({}, tmp_path / "a.pth")
    for key in ("version", "sharded"):
        with pytest.raises(ValueError, match=f"state: the key '{key}' is added"):
            chkpt.save_sharded({key: 1}, tmp_path / "a.dcp")
    with pytest.raises(TypeError, match=r"a\.b: set cannot be stored"):
        chkpt.save_sharded({"a": {"b": {1}}}, tmp_path / "a.dcp")
    (tmp_path / "a.dcp").touch()
    with pytest.raises(NotADirectoryError):
        chkpt.save_sharded({}, tmp_path / "a.dcp")
    (tmp_path / "a.dcp").unlink()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.dcp").mkdir()
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.NotACheckpointError, match=r"no file helios\.pth"):
            read(tmp_path / "b.dcp")
    chkpt.save({}, tmp_path / "b.dcp" / "helios.pth")
    with pytest.raises(chkpt.NotACheckpointError, match="no key 'sharded'"):
        chkpt.load(tmp_path / "b.dcp")


def test_converting_there_and_back_changes_nothing(tmp_path: Path, kit: Any) -> None:
    memory = torch.arange(10.0)
    tied = torch.arange(4.0)
    state: dict[str, object] = {
        "model": {
            "w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
            "tied": [tied, {"again": tied, "view": tied.view(4)}],
            "part": memory[2:5],
            "other_part": memory[4:8],
            "column": torch.arange(6.0).reshape(3, 2).t(),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(1.0),
            "f8": torch.arange(3.0).to(torch.float8_e5m2),
            "complex": torch.tensor([1 + 2j]),
            "sparse": torch.eye(2).to_sparse(),
            3: (torch.arange(2), "x"),
        },
        "shared_outside": memory,
        "optimizer": {"m": torch.arange(3.0)},
        "none": None,
    }
    file = tmp_path / "a_epoch_1_iter_2.pth"
    with CheckpointStore(tmp_path, "a") as store:
        store.save(state, epoch=1, iteration=2, score=2.5)
    folder, back = tmp_path / "b.dcp", tmp_path / "c.pth"
    convert(file, folder)
    convert(folder, back)
    for a, b in ((file, folder), (folder, back), (file, back), (folder, folder)):
        assert chkpt.diff(a, b) == [], (a, b)
    names = {e.path for e in chkpt.inspect(folder).tensors if e.kind == "sharded tensor"}
    assert names == {
        *("model.w", "model.tied[0]", "model.tied[1].again", "model.tied[1].view", "model.column"),
        *("model.empty", "model.f8", "model.complex", "model[3][0]"),
    }
    loaded: Any = chkpt.load(folder)
    assert loaded["model"]["tied"][0] is loaded["model"]["tied"][1]["again"]
    assert kit.same(loaded["optimizer"], state["optimizer"])
    contents = []
    for name in ("d.dcp", "e.dcp"):
        convert(back, tmp_path / name)
        contents.append({f.name: f.read_bytes() for f in shards_of(tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_diff_finds_what_differs_in_shards(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "a.dcp")
    changed = {**TENSORS, "w": TENSORS["w"].clone(), "b": torch.tensor([1.5, 0.0])}
    changed["w"][1, 2] += 2
    file = chkpt.save({"model": changed, "n": 1}, tmp_path / "b.pth")
    convert(file, tmp_path / "b.dcp")
    for other in (file, tmp_path / "b.dcp"):
        found = chkpt.diff(path, other)
        assert [(d.path, d.kind, d.num_differing, d.max_abs) for d in found] == [
            ("model.w", DifferenceKind.VALUES, 1, 2.0),
            ("model.b", DifferenceKind.VALUES, 1, 0.0),
        ]
    untied = chkpt.save({"model": {**TENSORS, "w": TENSORS["w"][:2]}, "n": 1}, tmp_path / "c.pth")
    assert [(d.path, d.kind) for d in chkpt.diff(untied, path)] == [("model.w", DifferenceKind.SHAPE)]
    with (shards_of(path) / "__0_0.distcp").open("r+b") as opened:
        opened.seek(500)
        opened.write(b"\xff\xfe")
    with pytest.raises(chkpt.CorruptError):
        chkpt.diff(path, file)


def test_a_reader_takes_the_new_one_if_a_writer_replaces_the_old_one_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helios.chkpt._sharded import verify

    path = folder_at(tmp_path / "a.dcp")
    real, done = verify.check_files, []

    def replaced(folder: Path, shards: Any) -> None:
        if not done:
            done.append(1)
            chkpt.save_sharded({"n": 2}, path)
        real(folder, shards)

    monkeypatch.setattr(verify, "check_files", replaced)
    assert chkpt.load(path)["n"] == 2
    done.clear()
    chkpt.verify(path)
    assert done


def test_the_command_line_takes_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    chkpt.save({"model": dict(TENSORS), "n": 1}, tmp_path / "run_epoch_1_iter_1.pth")

    def printed(*arguments: object, status: int = 0) -> Any:
        assert helios_chkpt([str(argument) for argument in arguments]) == status
        return capsys.readouterr().out

    for recursive in ([], ["--recursive"]):
        found = json.loads(printed("ls", tmp_path, "--json", "--verify", *recursive))
        assert [(Path(f["path"]).name, f["state"], f["resume"]) for f in found] == [
            ("run_epoch_1_iter_1.pth", "good", False),
            ("run_epoch_1_iter_2.dcp", "good", True),
        ]
        assert len(json.loads(printed("verify", tmp_path, "--json", *recursive))) == 2
    assert found[1]["bytes"] == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert printed("verify", path).startswith("ok")
    text = printed("inspect", path, "--tensors")
    assert "shards    2 files" in text and "float32 (sharded tensor)" in text
    info = json.loads(printed("inspect", path, "--json"))
    assert info["shard_files"] == 2 and info["bytes"] == found[1]["bytes"]
    assert printed("diff", tmp_path / "run_epoch_1_iter_1.pth", path) == "no difference\n"
    assert "->" in printed("convert", path, tmp_path / "back.pth")
    printed("convert", path, tmp_path / "back.pth", status=2)
    printed("convert", path, tmp_path / "other.dcp", status=2)
    printed("convert", tmp_path / "back.pth", tmp_path / "other.pth", status=2)
    assert json.loads(printed("convert", tmp_path / "back.pth", tmp_path / "b.dcp", "--json"))
    assert printed("diff", tmp_path / "b.dcp", path) == "no difference\n"
    counts = migrate_checkpoints_to_current_version(tmp_path).counts()
    assert counts == {"current": 2, "migrated": 0, "would migrate": 0, "failed": 0}
    later = chkpt.save({}, tmp_path / "run_epoch_1_iter_3.pth")
    result = json.loads(printed("prune", tmp_path, "--run", "run", "--keep-last", 1, "--json"))
    assert [(r["outcome"], r["bytes"]) for r in result][1] == ("deleted", found[1]["bytes"])
    assert not path.exists() and later.exists()
    b = tmp_path / "b.dcp"
    (shards_of(b) / "__0_0.distcp").unlink()
    assert "TruncatedError" in printed("ls", tmp_path, status=1)
    printed("verify", b, status=1)


def test_looking_at_folders_needs_no_torch(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    code = (
        "import sys; from helios import chkpt; from helios.chkpt_migrator._command import helios_chkpt as c\n"
        f"path, root = {str(path)!r}, {str(tmp_path)!r}\n"
        "chkpt.verify(path); chkpt.inspect(path); chkpt.find_last_checkpoint(root); chkpt.diff(path, path)\n"
        "assert not any([c(['ls', root, '--verify']), c(['verify', path]), c(['inspect', path, '--all'])])\n"
        "chkpt.CheckpointStore(root, 'run', 1).close()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_digest_is_that_of_the_main_file_which_has_all_others(tmp_path: Path) -> None:
    path = folder_at(tmp_path / "run_epoch_1_iter_2.dcp")
    digest = chkpt.inspect(path).digest
    assert digest == chkpt.inspect(path / "helios.pth").digest
    chkpt.save_sharded({"n": 2}, path)
    assert chkpt.inspect(path).digest != digest
