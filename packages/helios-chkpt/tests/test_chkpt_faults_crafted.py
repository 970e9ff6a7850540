"""Archives whose sums are right and whose contents lie: an error of the right kind, soon, and without much memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt._format.decode import MAX_DEPTH

pytestmark = pytest.mark.long

Change = Callable[[dict[str, Any]], object]


def refused(path: Path, kind: type[Exception] = chkpt.CorruptError, match: str | None = None) -> None:
    for read in (chkpt.load, chkpt.verify, lambda path: chkpt.load(path, verify=False)):
        with pytest.raises(kind, match=match):
            read(path)


def edited(change: Change) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        values = json.loads(data)
        change(values)
        return json.dumps(values).encode()

    return edit


MANIFESTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "no JSON": lambda data: data[:-3],
    "no text": lambda data: b"\xff\xfe\x00" + data,
    "a list": lambda data: b"[]",
    "a number": lambda data: b"1" * 5000,
    "deep": lambda data: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda data: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a huge int": lambda data: data.replace(b'"schema": 3', b'"schema": ' + b"3" * 5000),
    "schema 0": edited(lambda m: m.update(schema=0)),
    "schema -1": edited(lambda m: m.update(schema=-1)),
    "schema true": edited(lambda m: m.update(schema=True)),
    "schema null": edited(lambda m: m.update(schema=None)),
    "schema text": edited(lambda m: m.update(schema="3")),
    "another kind": edited(lambda m: m.update(kind="x")),
    "no version": edited(lambda m: m.pop("version")),
    "version 3": edited(lambda m: m.update(version=3)),
    "no records": edited(lambda m: m.pop("records")),
    "records of nothing": edited(lambda m: m.update(records=[])),
    "records as a dict": edited(lambda m: m.update(records={})),
    "a record too few": edited(lambda m: m["records"].pop()),
    "the first record missing": edited(lambda m: m["records"].pop(0)),
    "a record too many": edited(lambda m: m["records"].append({**m["records"][-1], "name": "data/9"})),
    "a record twice": edited(lambda m: m["records"].append(m["records"][-1])),
    "other order": edited(lambda m: m["records"].reverse()),
    "another name": edited(lambda m: m["records"][-1].update(name="data/7")),
    "a name that is no text": edited(lambda m: m["records"][-1].update(name=["data/0"])),
    "a long name": edited(lambda m: m["records"][-1].update(name="a" * 70_000)),
    "a name beyond ASCII": edited(lambda m: m["records"][-1].update(name="data/é")),
    "the manifest in itself": edited(lambda m: m["records"][-1].update(name="manifest.json")),
    "a size more": edited(lambda m: m["records"][-1].update(bytes=m["records"][-1]["bytes"] + 1)),
    "a size less": edited(lambda m: m["records"][-1].update(bytes=m["records"][-1]["bytes"] - 1)),
    "a negative size": edited(lambda m: m["records"][-1].update(bytes=-1)),
    "a size of 2**62": edited(lambda m: m["records"][-1].update(bytes=2**62)),
    "a size of 10**400": edited(lambda m: m["records"][-1].update(bytes=10**400)),
    "a size in floats": edited(lambda m: m["records"][-1].update(bytes=64.0)),
    "another CRC": edited(lambda m: m["records"][-1].update(crc32="00000000")),
    "a CRC that is none": edited(lambda m: m["records"][-1].update(crc32="zzzzzzzz")),
    "a digest that is none": edited(lambda m: m["records"][-1].update(sha256="0" * 63)),
    "no digest": edited(lambda m: m["records"][-1].pop("sha256")),
    "a score of text": edited(lambda m: m.update(score="1")),
    "a score of 10**400": lambda data: data.replace(b'"score": null', b'"score": 1' + b"0" * 400),
    "no number as a score": edited(lambda m: m.update(score=float("nan"))),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies(name: str, kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "r_epoch_1_iter_1.pth", kit.pickled(), b"\0" * 64, manifest=MANIFESTS[name])
    refused(path)
    assert chkpt.find_last_checkpoint(tmp_path) is None
    with chkpt.CheckpointStore(tmp_path, "r", keep_last=1, keep_best=1) as store:
        assert store.prune() == []  # its score is asked for too


def test_unknown_keys_of_a_manifest_are_of_a_later_minor_release(kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(), manifest=edited(lambda m: m.update(note=1)))
    chkpt.verify(path)
    chkpt.load(path)


def test_a_digest_is_found_wrong_though_the_crc_is_right(kit: Any, tmp_path: Path) -> None:
    other = hashlib.sha256(b"other").hexdigest()
    wrong = edited(lambda m: m["records"][-1].update(sha256=other))
    path = kit.archive(tmp_path / "a.pth", kit.pickled(kit.tensor((4,), (1,))), bytes(16), manifest=wrong)
    with pytest.raises(chkpt.CorruptError, match=r"SHA-256 .* in the record 'data/0'"):
        chkpt.verify(path)
    chkpt.verify(path, digests=False)
    chkpt.load(path)


def test_a_forged_content_of_the_same_crc_is_found_by_verify(kit: Any, tmp_path: Path) -> None:
    honest, head = (
        b"the weights of a week of training" + bytes(3),
        b"other weights, and four bytes more, "[:32],
    )
    wanted = zlib.crc32(honest)
    # Four bytes that make the sum what is wanted: solved for, a bit at a time, since a CRC is linear.
    base = zlib.crc32(head + bytes(4))
    rows = [(zlib.crc32(head + (1 << i).to_bytes(4, "little")) ^ base, 1 << i) for i in range(32)]
    goal, patch = wanted ^ base, 0
    for bit in range(32):
        pivot = next(row for row in rows if row[0] >> bit & 1)
        rows = [(r ^ pivot[0], m ^ pivot[1]) if r >> bit & 1 else (r, m) for r, m in rows if (r, m) != pivot]
        if goal >> bit & 1:
            goal, patch = goal ^ pivot[0], patch ^ pivot[1]
    forged = head + patch.to_bytes(4, "little")
    assert zlib.crc32(forged) == wanted and forged != honest
    path = chkpt.save({"x": torch.frombuffer(bytearray(honest), dtype=torch.uint8)}, tmp_path / "a.pth")
    path.write_bytes(path.read_bytes().replace(honest, forged))
    with pytest.raises(chkpt.CorruptError, match="SHA-256"):
        chkpt.verify(path)


RECORDS: dict[str, Callable[[list[tuple[str, bytes]]], object]] = {
    "no pickle": lambda records: records.pop(0),
    "no byteorder": lambda records: records.pop(1),
    "no version": lambda records: records.pop(2),
    "no storage": lambda records: records.pop(3),
    "big-endian": lambda records: records.__setitem__(1, ("byteorder", b"big")),
    "another zip version": lambda records: records.__setitem__(2, ("version", b"4\n")),
    "a small storage": lambda records: records.__setitem__(3, ("data/0", bytes(15))),
    "a large storage": lambda records: records.__setitem__(3, ("data/0", bytes(20))),
    "an empty pickle": lambda records: records.__setitem__(0, ("data.pkl", b"")),
    "two manifests": lambda records: records.append(("manifest.json", b"{}")),
    "a storage twice": lambda records: records.append(records[3]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_archives_with_other_records(name: str, kit: Any, tmp_path: Path) -> None:
    pickle = kit.pickled(kit.tensor((4,), (1,)))
    chkpt.load(kit.archive(tmp_path / "good.pth", pickle, bytes(16)))
    refused(kit.archive(tmp_path / "a.pth", pickle, bytes(16), records=RECORDS[name]))


def test_records_that_nobody_refers_to_are_verified_and_not_loaded(kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(), bytes(16), b"extra")
    chkpt.verify(path)
    assert set(chkpt.load(path)) == {"x", "version"}
    path.write_bytes(path.read_bytes().replace(b"extra", b"extrA"))
    with pytest.raises(chkpt.CorruptError, match="data/1"):
        chkpt.verify(path)


def deep(kind: str, depth: int) -> bytes:
    return {
        "lists": b"]" * depth + b"a" * (depth - 1),
        "dicts": b"}" + b"N}" * (depth - 1) + b"s" * (depth - 1),
        "tuples": b")" + b"\x85" * depth,
        "tuples by the memo": b")q\x00" + b"h\x00\x85q\x00" * depth,
        "lists by the memo": b"]q\x00" + b"]h\x00aq\x00" * depth + b"h\x00",
        "a tuple as a key": b"}" + b")" + b"\x85" * depth + b"Ns",
        "equal tuples as keys": b"}" + (b")" + b"\x85" * depth + b"Ns") * 2,
        "tuples in a set": b"c__builtin__\nset\n](" + (b")" + b"\x85" * depth) * 2 + b"e\x85R",
        "calls": b"ctorch\nSize\nq\x00" + b"h\x00" * depth + b")" + b"R\x85" * depth,
    }[kind]


@pytest.mark.parametrize("depth", [1000, 100_000])
@pytest.mark.parametrize("kind", ["lists", "dicts", "tuples", "tuples by the memo", "a tuple as a key",
                                  "equal tuples as keys", "tuples in a set", "calls"])  # fmt: skip
def test_nesting(kind: str, depth: int, kit: Any, tmp_path: Path) -> None:
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(deep(kind, depth))))


def test_a_key_so_deep_that_hashing_it_would_crash_the_process(kit: Any, tmp_path: Path) -> None:
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(deep("a tuple as a key", 1_000_000))), match="key")


def test_nesting_that_is_allowed_loads(kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(deep("lists", MAX_DEPTH - 5)))
    chkpt.verify(path)
    chkpt.load(path)


@pytest.mark.parametrize(
    "value",
    [
        b")" + b"q\x00h\x00\x86" * 100,  # a tuple of 2**100 parts that are shared
        b"](" + b")" + b"q\x00h\x00\x86" * 100 + b"e",
    ],
)
def test_sharing_costs_no_time(value: bytes, kit: Any, tmp_path: Path) -> None:
    chkpt.load(kit.archive(tmp_path / "a.pth", kit.pickled(value)))


def test_sharing_in_keys_and_versions_costs_no_time(kit: Any, tmp_path: Path) -> None:
    huge = b")" + b"q\x00h\x00\x86" * 100
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(b"}" + huge + b"Ns")), match="key")
    helios = b"chelios.x\nf\nq\x01" + huge + b"\x85R"  # a call with it as an argument, as a key
    with pytest.raises(chkpt.CheckpointError):
        chkpt.load(kit.archive(tmp_path / "a.pth", b"\x80\x02}" + helios + b"Ns."))
    lists = b"](]q\x00" + b"](h\x00h\x00eq\x00" * 100 + b"e"
    for value, kind in ((huge, "tuple"), (lists, "list")):
        version = b"X\x07\x00\x00\x00version" + value
        path = kit.archive(tmp_path / "a.pth", b"\x80\x02}" + version + b"s.")
        chkpt.verify(path)
        with pytest.raises(chkpt.NotACheckpointError, match=kind):
            chkpt.load(path)
        size = b"ctorch\nSize\n" + value + b"\x85R"  # as a key that a message might show
        kit.archive(path, b"\x80\x02}(" + kit.VERSION + size + b"Nu.")
        with pytest.raises(KeyError, match="version"):
            chkpt.load(path, keys=["no"])


def test_a_container_in_itself(kit: Any, tmp_path: Path) -> None:
    for value in (
        b"]q\x00h\x00a",
        b"}q\x00Nh\x00s",
        b"]q\x00h\x00\x85a",
        b"ccollections\nOrderedDict\n)Rq\x00Nh\x00s",
    ):
        refused(kit.archive(tmp_path / "a.pth", kit.pickled(value)), match="contains itself")


LONG = struct.pack("<I", 0xFFFFFFFF)


@pytest.mark.parametrize(
    "value",
    [
        b"X" + LONG + b"a", b"T" + LONG + b"a", b"B" + LONG, b"\x8b" + LONG, b"\x8a\xff\x01", b"U\xffa",
        b"\x8d" + LONG + LONG, b"\x8e" + LONG + LONG, b"\x96" + LONG + LONG, b"\x95" + LONG + LONG + b"N",
        b"j" + LONG, b"h\x09", b"g99999999999999999999\n", b"L" + b"9" * 5000 + b"L\n", b"I" + b"9" * 5000 + b"\n",
        b"\x93", b"R", b"b", b"s", b"u", b"e", b"a", b"t", b"0", b"1", b"2", b"Q", b"\x81", b"\x90", b"\x97",
        b"]K\x01K\x02s", b"}(K\x01u", b"K\x01K\x02a", b"NNb", b"N)R", b"]]\x85R", b"]]\x81",
    ],
)  # fmt: skip
def test_opcodes_with_impossible_arguments(value: bytes, kit: Any, tmp_path: Path) -> None:
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(value)), chkpt.CheckpointError)


def test_a_memo_index_of_any_size_costs_nothing(kit: Any, tmp_path: Path) -> None:
    chkpt.load(kit.archive(tmp_path / "a.pth", kit.pickled(b"]r" + LONG + b"j" + LONG + b"\x86")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "kind", ["twice", "deflated", "folder", "comment", "encrypted", "a prefix", "no folder"]
)
def test_other_zips(kind: str, kit: Any, tmp_path: Path) -> None:
    path = kit.torch_archive(tmp_path / "a.pth", kit.pickled(), bytes(64))
    chkpt.load(path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [*entries, entries[0]] if kind == "twice" else entries:
            info = zipfile.ZipInfo(name.replace("archive/", "") if kind == "no folder" else name)
            info.compress_type = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
            archive.writestr(info, content)
            info.external_attr = 0x10 if kind == "folder" else 0
            info.flag_bits |= 1 if kind == "encrypted" else 0
        archive.comment = b"c" if kind == "comment" else b""
    if kind == "a prefix":
        path.write_bytes(b"PK\x03\x04" + path.read_bytes())
    refused(path, chkpt.CheckpointError)


def test_names_with_a_command_for_the_terminal(kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(b"cevil\x1b[2J\nname\n"))
    with pytest.raises(chkpt.UnsafeError) as caught:
        chkpt.verify(path)
    assert re.search("evil", str(caught.value)) and str(caught.value).isprintable()


def test_nothing_warns(kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(kit.tensor((4,), (1,))), bytes(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chkpt.load(path, mmap=True)
    assert os.fspath(path)
