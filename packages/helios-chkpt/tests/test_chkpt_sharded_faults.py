"""Damaged and hostile folders: whatever is wrong is found, and nothing of them is run."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helios import chkpt
from helios.chkpt._sharded.convert import convert
from helios.chkpt._sharded.manifest import fill
from helios.chkpt._sharded.metadata import check_cover

SEED = 20261127


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small sharded checkpoint."""
    file = chkpt.save(
        {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, "n": 1}, tmp_path / "a.pth"
    )
    convert(file, tmp_path / "a.dcp")
    file.unlink()
    return tmp_path / "a.dcp"


def shards_of(path: Path) -> Path:
    (shards,) = path.glob("shards-*")
    return shards


def test_every_bit_of_the_table_of_contents_and_many_of_the_others(path: Path, kit: Any) -> None:
    whole = chkpt.load(path)
    rng = random.Random(SEED)
    metadata, data = shards_of(path) / ".metadata", shards_of(path) / "__0_0.distcp"
    for file, count in ((metadata, None), (data, 2000), (path / "helios.pth", 2000)):
        num_bits = 8 * file.stat().st_size
        positions = range(num_bits) if count is None else rng.sample(range(num_bits), count)

        def read(_: Path) -> dict[str, object]:
            chkpt.verify(path)
            return whole

        assert set(kit.flipped(file, positions, read, whole)) <= {
            "CorruptError",
            "NotACheckpointError",
            "TruncatedError",
        }
        few = rng.sample(list(positions), 100)
        assert "undetected" not in kit.flipped(file, few, lambda _: chkpt.load(path), whole)
        assert "identical" not in kit.flipped(file, few, lambda _: chkpt.load(path), whole)
    chkpt.verify(path)


def test_torch_alone_reads_the_same_bits_without_a_word(path: Path, kit: Any) -> None:
    """The control."""
    data, out = shards_of(path) / "__0_0.distcp", path.with_name("out.pth")

    def read(_: Path) -> Any:
        dcp_to_torch_save(shards_of(path), out)
        return torch.load(out, weights_only=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = read(data)
        content = data.read_bytes()
        position = content.index(struct.pack("<6f", *range(6)))
        found = kit.flipped(data, range(8 * position, 8 * position + 192, 4), read, whole)
    assert found["undetected"] == 48


def test_every_truncation_appended_bytes_and_missing_or_other_files(path: Path) -> None:
    for file in (*sorted(shards_of(path).iterdir()), path / "helios.pth"):
        content = file.read_bytes()
        lengths = range(len(content)) if file.name == ".metadata" else range(0, len(content), 7)
        for changed in (*(content[:length] for length in lengths), content + b"x", content + content):
            file.write_bytes(changed)
            with pytest.raises((chkpt.CorruptError, chkpt.TruncatedError, chkpt.NotACheckpointError)):
                chkpt.verify(path)
        file.unlink()
        for read in (chkpt.verify, chkpt.load):
            with pytest.raises((chkpt.TruncatedError, chkpt.NotACheckpointError)):
                read(path)
        elsewhere = path.with_name(file.name)
        elsewhere.write_bytes(content)
        if file.name != "helios.pth":
            file.symlink_to(elsewhere)
            with pytest.raises(chkpt.CorruptError, match="no regular file"):
                chkpt.verify(path)
            file.unlink()
        elsewhere.rename(file)
        chkpt.verify(path)
    (shards_of(path) / "__1_0.distcp").touch()
    for read in (chkpt.verify, chkpt.load):
        with pytest.raises(chkpt.CorruptError, match="a file that the checkpoint does not list"):
            read(path)
    (shards_of(path) / "__1_0.distcp").unlink()
    name = shards_of(path)
    name.rename(path.with_name("elsewhere"))
    name.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(chkpt.CorruptError, match="found no folder"):
        chkpt.load(path)
    name.unlink()
    with pytest.raises(chkpt.TruncatedError, match="no such folder"):
        chkpt.load(path)


def forged(
    path: Path, change: Callable[[dict[str, Any], Any], None], metadata: Any = None, data: bytes = b""
) -> Path:
    """A copy in which all sums are right: `change` gets the main file's description and DCP's table, to change both.

    Args:
        path: a checkpoint.
        change: what is changed.
        metadata: what to write as the table: bytes, or an object to pickle; None for the changed one.
        data: what to write as the shard, if not empty.
    """
    copy = path.with_name("forged.dcp")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(path, copy)
    state: Any = chkpt.load(copy / "helios.pth")
    del state["version"]
    table = pickle.loads((shards_of(copy) / ".metadata").read_bytes())
    change(state["sharded"], table)
    content = metadata if isinstance(metadata, bytes) else pickle.dumps(metadata or table, protocol=2)
    (shards_of(copy) / ".metadata").write_bytes(content)
    if data:
        (shards_of(copy) / "__0_0.distcp").write_bytes(data)
    for file in state["sharded"]["files"]:
        real = shards_of(copy) / file["name"] if type(file) is dict else copy
        if real.parent == shards_of(copy) and real.is_file():
            file["bytes"], file["sha256"] = real.stat().st_size, hashlib.sha256(real.read_bytes()).hexdigest()
    chkpt.save(state, copy / "helios.pth")
    return copy


def nothing(description: dict[str, Any], table: Any) -> None:
    pass


class Evil:
    """A pickle that writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def test_a_forged_copy_without_a_change_is_read(path: Path, kit: Any) -> None:
    assert kit.same(chkpt.load(forged(path, nothing)), chkpt.load(path))


def test_a_hostile_table_of_contents_runs_nothing(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"

    def planted(description: dict[str, Any], table: Any) -> None:
        table.storage_meta = Evil(target)

    def among_tensors(description: dict[str, Any], table: Any) -> None:
        table.state_dict_metadata["model.w"] = Evil(target)

    for change in (planted, among_tensors):
        copy = forged(path, change)
        for read in (chkpt.verify, chkpt.load, lambda p: chkpt.load_sharded(p, meshes=[])):
            with pytest.raises(chkpt.UnsafeError, match=r"posix\.system"):
                read(copy)
        assert not chkpt.find_last_checkpoint(tmp_path) and not target.exists()
    # The same bytes do run: the control.
    pickle.loads((shards_of(copy) / ".metadata").read_bytes())
    assert target.exists()
    target.unlink()
    for content in (
        pickle.dumps(Evil(target), protocol=2),
        pickle.dumps(Evil(target), protocol=4),
        pickle.dumps(Evil(target), protocol=0),
        b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x01\x00\x00\x00xK\x01sb.",
        b"",
    ):
        copy = forged(path, nothing, content)
        for read in (chkpt.verify, chkpt.load):
            with pytest.raises((chkpt.UnsafeError, chkpt.CorruptError)):
                read(copy)
    assert not target.exists()


def test_a_hostile_shard_runs_nothing(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "written"
    evil = tmp_path / "evil.pth"
    torch.save({"x": Evil(target)}, evil)
    content = evil.read_bytes()

    def reach_all(description: dict[str, Any], table: Any) -> None:
        for info in table.storage_data.values():
            info.offset, info.length = 0, len(content)

    copy = forged(path, reach_all, data=content)
    with pytest.raises(chkpt.CorruptError, match="a content that does not load"):
        chkpt.load(copy)
    assert not target.exists()
    torch.load(evil, weights_only=False)
    assert target.exists()  # the control


def of_table(change: Callable[[Any], object]) -> Callable[[dict[str, Any], Any], None]:
    return lambda description, table: change(table) and None


def of_description(change: Callable[[Any], object]) -> Callable[[dict[str, Any], Any], None]:
    return lambda description, table: change(description) and None


def moved(table: Any, name: str) -> None:
    for info in table.storage_data.values():
        info.relative_path = name


BAD_TABLES: dict[str, Callable[[Any], object]] = {
    "bytes item": lambda t: t.state_dict_metadata.update({"model.w": dcp.BytesStorageMetadata()}),
    "another tensor": lambda t: t.state_dict_metadata.update({"x": t.state_dict_metadata["model.w"]}),
    "one tensor less": lambda t: t.state_dict_metadata.pop("model.w"),
    "no chunks": lambda t: t.state_dict_metadata["model.w"].chunks.clear(),
    "another dtype": lambda t: setattr(t.state_dict_metadata["model.w"].properties, "dtype", torch.int32),
    "another shape": lambda t: setattr(t.state_dict_metadata["model.w"], "size", torch.Size([2, 4])),
    "a chunk elsewhere": lambda t: setattr(
        t.state_dict_metadata["model.w"].chunks[0], "offsets", torch.Size([1, 0])
    ),
    "a smaller chunk": lambda t: setattr(
        t.state_dict_metadata["model.w"].chunks[0], "sizes", torch.Size([1, 3])
    ),
    "nothing stored": lambda t: t.storage_data.clear(),
    "stored besides": lambda t: t.storage_data.update(
        {dcp.MetadataIndex("y", [0]): _StorageInfo("__0_0.distcp", 0, 1)}
    ),
    "outside of the file": lambda t: [setattr(i, "offset", 10**9) for i in t.storage_data.values()],
    "before the file": lambda t: [setattr(i, "offset", -1) for i in t.storage_data.values()],
    "too short": lambda t: [setattr(i, "length", 4) for i in t.storage_data.values()],
    "a transform": lambda t: [setattr(i, "transform_descriptors", ["x"]) for i in t.storage_data.values()],
    "another folder's file": lambda t: moved(t, "../../other"),
    "an absolute file": lambda t: moved(t, "/etc/passwd"),
    "the table itself": lambda t: moved(t, ".metadata"),
    "no table": lambda t: setattr(t, "storage_data", None),
}


@pytest.mark.parametrize("change", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_says_anything_else_than_the_main_file(
    path: Path, change: Callable[[Any], object]
) -> None:
    copy = forged(path, of_table(change))
    for read in (chkpt.verify, chkpt.load):
        with pytest.raises((chkpt.CorruptError, chkpt.UnsafeError)):
            read(copy)


def renamed(description: Any, name: str) -> None:
    description["files"][0]["name"] = name


BAD_DESCRIPTIONS: dict[str, Callable[[Any], object]] = {
    "folder above": lambda d: d.update(folder=".."),
    "folder elsewhere": lambda d: d.update(folder="/tmp"),
    "folder below": lambda d: d.update(folder="shards-0000000000000000/x"),
    "folder with another name": lambda d: d.update(folder="other"),
    "folder that is no text": lambda d: d.update(folder=3),
    "more keys": lambda d: d.update(more=1),
    "no list": lambda d: d.update(tensors={}),
    "file above": lambda d: renamed(d, "../helios.pth"),
    "file elsewhere": lambda d: renamed(d, "/etc/passwd"),
    "file with a line": lambda d: renamed(d, "__0_0.distcp\n"),
    "file of another kind": lambda d: renamed(d, "x.py"),
    "file twice": lambda d: d["files"].append(d["files"][0]),
    "no table": lambda d: d["files"].__delitem__(-1),
    "file that is none": lambda d: d["files"].append(3),
    "negative size": lambda d: d["files"].append({"name": "__9_0.distcp", "bytes": -1, "sha256": "0" * 64}),
    "bool for a size": lambda d: d["files"].append(
        {"name": "__9_0.distcp", "bytes": True, "sha256": "0" * 64}
    ),
    "path to nowhere": lambda d: d["tensors"][0].update(path=["model", "other"]),
    "path to a value": lambda d: d["tensors"][0].update(path=["n"]),
    "path through a value": lambda d: d["tensors"][0].update(path=["n", 0]),
    "path that has no hash": lambda d: d["tensors"][0].update(path=["model", [1]]),
    "path of nothing": lambda d: d["tensors"][0].update(path=[]),
    "the same path twice": lambda d: d["tensors"][1].update(path=d["tensors"][0]["path"]),
    "unknown dtype": lambda d: d["tensors"][0].update(dtype="float99"),
    "negative shape": lambda d: d["tensors"][0].update(shape=[-1]),
    "endless shape": lambda d: d["tensors"][0].update(shape=[2**40, 2**40]),
    "another shape": lambda d: d["tensors"][0].update(shape=[3, 2]),
    "partial": lambda d: d["tensors"][0].update(placements=["P(sum)"]),
    "placed on no dim": lambda d: d["tensors"][0].update(placements=["S(2)"]),
    "more placements": lambda d: d["tensors"][0].update(placements=["R", "R"]),
    "dim names": lambda d: d["tensors"][0].update(mesh_dim_names=["a", "b"]),
    "two of one name": lambda d: d["tensors"][0].update(name=d["tensors"][1]["name"]),
}


@pytest.mark.parametrize("change", BAD_DESCRIPTIONS.values(), ids=BAD_DESCRIPTIONS)
def test_a_main_file_that_says_nonsense(path: Path, change: Callable[[Any], object]) -> None:
    copy = forged(path, of_description(change))
    for read in (chkpt.verify, chkpt.load):
        with pytest.raises(chkpt.CorruptError):
            read(copy)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_cover_a_tensor_exactly_or_are_refused(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    cuts = [sorted({0, *data.draw(st.sets(st.integers(0, max(0, n - 1)), max_size=2))}) for n in shape]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for length, starts in zip(shape, cuts, strict=True):
        stops = [*starts[1:], length]
        boxes = [((*o, a), (*s, b - a)) for o, s in boxes for a, b in zip(starts, stops, strict=True)]
    check_cover(shape, boxes)
    full = [box for box in boxes if 0 not in box[1]]
    if full and 0 not in shape:
        lost = data.draw(st.sampled_from(full))
        with pytest.raises(ValueError):
            check_cover(shape, [box for box in boxes if box != lost])
        with pytest.raises(ValueError):
            check_cover(shape, [*boxes, lost])


def places(value: Any, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where there is None."""
    if value is None:
        return [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else ()
    )
    return [found for key, item in items for found in places(item, (*path, key))]


STATES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        st.none() | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3)
        ),
        max_leaves=10,
    ),
    max_size=3,
)


@given(STATES)
@settings(max_examples=200, deadline=None)
def test_whatever_leads_to_none_can_be_filled_once(state: dict[object, object]) -> None:
    found = places(state)
    for number, path in enumerate(found):
        fill(state, path, f"value {number}")
    assert places(state) == []
    for number, path in enumerate(found):
        value: Any = state
        for key in path:
            value = value[key]
        assert value == f"value {number}"
        with pytest.raises(LookupError):
            fill(state, path, 1)
