"""The page about the format is true: a reader made of it alone reads what `save` writes, and misses no bit."""

from __future__ import annotations

import json
import pickletools
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt._format import layout
from helios.chkpt._format.archive import open_archive, open_file
from helios.chkpt._format.decode import decode

PAGE = Path(__file__).parent.parent / "docs" / "format.md"


@pytest.fixture
def reader() -> Callable[[Path], dict[str, bytes]]:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block, scope)
    read: Callable[[Path], dict[str, bytes]] = scope["read_records"]
    return read


def test_the_reader_of_the_page_reads_every_record(
    reader: Callable[[Path], dict[str, bytes]], tmp_path: Path, state: dict[str, object]
) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    records = reader(path)
    with zipfile.ZipFile(path) as archive:
        assert records == {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
        assert archive.testzip() is None
    assert json.loads(records["manifest.json"])["schema"] == 3


def test_the_reader_of_the_page_misses_no_bit(
    reader: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    path = chkpt.save({"x": torch.arange(2.0)}, tmp_path / "a.pth")
    whole = path.read_bytes()
    for bit in range(0, len(whole) * 8, 7):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(Exception):  # noqa: B017  # whatever the reader of 40 lines makes of it
            reader(path)
    path.write_bytes(whole)
    reader(path)


def test_the_pickle_has_only_the_opcodes_of_the_page(tmp_path: Path, state: dict[str, object]) -> None:
    more = {"z": 1j, "b": b"\xff", "i": [-1, 300, 2**80], "f8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    path = chkpt.save({**state, **more, "sparse": torch.eye(2).to_sparse()}, tmp_path / "a.pth")
    with open_file(path) as file:
        data = open_archive(file, path).pickle
    known = set("NKJGX]}()tecbuRQqhrj.") | {"\x80", "\x88", "\x89", "\x8a", "\x85", "\x86", "\x87"}
    assert {opcode.code for opcode, _, _ in pickletools.genops(data)} <= known


def test_records_begin_where_tensors_can_be_mapped(tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    with open_file(path) as file:
        records = open_archive(file, path).records
    assert len(records) > 5
    assert all(record.offset % layout.ALIGNMENT == 0 for record in records.values())


def test_equal_states_give_equal_files(tmp_path: Path, state: dict[str, object]) -> None:
    first = chkpt.save(state, tmp_path / "a.pth").read_bytes()
    loaded = chkpt.load(tmp_path / "a.pth")
    del loaded["version"]
    assert chkpt.save(loaded, tmp_path / "b.pth").read_bytes() == first
    code = (
        "import sys; from helios import chkpt; s = chkpt.load(sys.argv[1]); del s['version'];"
        "chkpt.save(s, sys.argv[2])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.pth"), str(tmp_path / "c.pth")]
    subprocess.run(arguments, check=True)
    assert (tmp_path / "c.pth").read_bytes() == first
    assert chkpt.save({**loaded, "one": 1}, tmp_path / "d.pth").read_bytes() != first


@pytest.mark.parametrize("module", ["archive", "decode", "encode", "layout", "manifest", "checksums"])
def test_the_format_needs_neither_torch_nor_numpy(module: str) -> None:
    code = "import sys; import helios.chkpt{}; print({{'torch', 'numpy'}}.isdisjoint(sys.modules))"
    for suffix, expected in ((f"._format.{module}", "True"), ("._memory", "False")):
        done = subprocess.run([sys.executable, "-c", code.format(suffix)], capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_a_pickle_of_torch_and_ours_hold_the_same_values(tmp_path: Path, state: dict[str, object]) -> None:
    torch.save(state, tmp_path / "torch.pth")
    chkpt.save(state, tmp_path / "ours.pth")
    found = []
    for name in ("torch.pth", "ours.pth"):
        with open_file(tmp_path / name) as file:
            archive = open_archive(file, tmp_path / name)
        sizes = {key: record.num_bytes for key, record in archive.storages.items()}
        values = decode(archive.pickle, sizes).value
        assert isinstance(values, dict)
        values.pop("version", None)
        found.append(repr(values))
    assert found[0] == found[1]
