"""`inspect` says what is in a file, whoever wrote it, without torch and without reading a tensor."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt._format import layout
from helios.chkpt._format.encode import encode
from helios.chkpt._format.layout import Record
from helios.chkpt._format.manifest import SCHEMA, Manifest, manifest_bytes
from helios.chkpt._format.values import Storage, Tensor

LEGACY = sorted((Path(__file__).parent / "legacy").rglob("*.pth"))


def lines(info: chkpt.CheckpointInfo) -> list[str]:
    return [f"{e.path}: {e.kind} {e.value}" + (f" = {e.shares}" if e.shares else "") for e in info.entries]


def write_zip(path: Path, pickled: bytes) -> Path:
    """A file like those of torch.save, without tensors."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.external_attr = 0
            archive.writestr(entry, data)
            entry.external_attr = 0
    return path


def test_what_is_in_a_file(tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save(state, tmp_path / "run_epoch_1_iter_40_best.pth")
    info = chkpt.inspect(path)
    assert (info.path, info.num_bytes) == (path, path.stat().st_size)
    assert (info.version, info.schema, info.score, info.load_error) == (chkpt.__version__, SCHEMA, None, None)
    assert info.name == chkpt.CheckpointName("run", 1, 40, "best")
    assert info.keys == ("training_state", "model", "rng", "version")
    assert (info.foreign, info.num_tensors, info.num_tensor_bytes, info.num_model_elements) == ((), 4, 52, 9)
    assert lines(info) == [
        "training_state.global_epoch: int 1",
        "training_state.loss: float 0.1",
        "training_state.name: str 'run'",
        "model.net.weight: tensor float32 [2, 3]",
        "model.net.bias: tensor float32 [2]",
        "model.net._metadata[''].version: int 1",
        "model.opt.state[0].step: tensor float32 []",
        "model.opt.betas: tuple (0.9, 0.99)",
        "rng.torch: tensor uint8 [16]",
        "rng.rand[0]: int 3",
        "rng.rand[1]: tuple (0, 1, 2, 3, ... 5 in all)",
        "rng.rand[2]: None None",
        f"version: str '{chkpt.__version__}'",
    ]
    weight = info.tensors[0]
    assert (weight.dtype, weight.shape, weight.num_bytes, weight.storage) == ("float32", (2, 3), 24, "0")
    assert weight.sha256 is not None and len(weight.sha256) == 64


def test_tensors_that_share_memory_are_counted_once(tmp_path: Path) -> None:
    weight, flat = torch.ones(4, 3), torch.zeros(10)
    shared: list[object] = [{"x": 1}]
    state = {
        "version": chkpt.__version__,
        "model": {"embedding": weight, "head": weight, "row": weight[1], "empty": weight[:0]},
        "other": {"first": flat[:5], "second": flat[5:]},  # of one storage, but nothing in common
        "lists": [shared, shared],
    }
    path = tmp_path / "torch.pth"
    torch.save(state, path)
    info = chkpt.inspect(path)
    assert {e.path: e.shares for e in info.tensors} == {
        "model.embedding": None,
        "model.head": "model.embedding",
        "model.row": "model.embedding",
        "model.empty": None,
        "other.first": None,
        "other.second": None,
    }
    assert (info.num_model_elements, info.num_tensor_bytes) == (12, 88)
    assert lines(info)[-2:] == ["lists[0][0].x: int 1", "lists[1]: list [{'x': 1}] = lists[0]"]


def test_the_digest_says_whether_files_are_equal(tmp_path: Path, state: dict[str, object]) -> None:
    digests = [chkpt.inspect(chkpt.save(state, tmp_path / name)).digest for name in ("a.pth", "b.pth")]
    changed = chkpt.save({**state, "x": 1}, tmp_path / "c.pth")
    assert digests[0] == digests[1] is not None
    assert chkpt.inspect(changed).digest not in (digests[0], None)


def test_the_score_is_shown(tmp_path: Path, state: dict[str, object]) -> None:
    with chkpt.CheckpointStore(tmp_path, "run") as store:
        assert chkpt.inspect(store.save(state, epoch=0, iteration=0, score=0.25)).score == 0.25


def test_sparse_and_wrapped_tensors(tmp_path: Path) -> None:
    state = {
        "version": chkpt.__version__,
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.zeros(2)),
    }
    path = tmp_path / "a.pth"
    torch.save(state, path)
    assert [(e.path, e.kind, e.shape) for e in chkpt.inspect(path).entries if e.kind != "str"][:5] == [
        ("sparse", "sparse tensor", None),
        ("sparse[0]", "torch.serialization._get_layout", None),
        ("sparse[1][0]", "tensor", (2, 3)),
        ("sparse[1][1]", "tensor", (3,)),
        ("sparse[1][2]", "torch.Size", None),
    ]
    assert chkpt.inspect(path).entries[-1].kind == "parameter"


def test_there_are_files_of_earlier_releases() -> None:
    assert len(LEGACY) > 20


@pytest.mark.parametrize("path", LEGACY, ids=lambda path: "-".join(path.parts[-3:]))
def test_files_of_earlier_releases_are_described(path: Path) -> None:
    expected = json.loads(path.with_suffix(".expected.json").read_text())
    info = chkpt.inspect(path)
    assert info.version == expected["version"]
    assert list(info.keys) == expected["top_level_keys"]
    assert (info.schema, info.digest) == (None, None)
    assert isinstance(info.load_error, chkpt.VersionTooOldError)
    values = {entry.path: entry.value for entry in info.entries}
    for name, value in expected["training_state"]["fields"].items():
        assert values[f"training_state.{name}"] == repr(value)
    assert info.num_tensors > 5


def test_paths_of_earlier_releases_are_text(legacy: Path) -> None:
    info = chkpt.inspect(legacy / "1.4.1" / "plugin" / "tiny_epoch_1_iter_6.pth")
    (found,) = [entry for entry in info.entries if entry.path == "run_path"]
    assert found.kind == "pathlib.PosixPath" and found.value.startswith("'/")
    assert "pathlib.PosixPath" in info.foreign


def test_later_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"version": "99.1", "x": torch.ones(2)}, tmp_path / "torch.pth")
    info = chkpt.inspect(tmp_path / "torch.pth")
    assert (info.version, info.num_tensors) == ("99.1", 1)
    assert isinstance(info.load_error, chkpt.VersionTooNewError)
    monkeypatch.setattr("helios.chkpt._write.SCHEMA", SCHEMA + 1)
    monkeypatch.setattr("helios.chkpt._write.__version__", "99.2")
    path = chkpt.save({"x": torch.ones(2)}, tmp_path / "own.pth")
    info = chkpt.inspect(path)
    assert (info.version, info.schema, info.num_bytes) == ("99.2", SCHEMA + 1, path.stat().st_size)
    assert (info.keys, info.entries) == ((), ())
    assert info.digest is not None
    assert isinstance(info.load_error, chkpt.VersionTooNewError)
    assert "helios-chkpt>=99.2" in str(info.load_error)


def test_what_a_hostile_file_names_is_shown_and_not_called(tmp_path: Path) -> None:
    target = tmp_path / "made-by-the-file"
    call = b"cos\nmkdir\nX%s%s\x85R" % (len(str(target)).to_bytes(4, "little"), str(target).encode())
    path = write_zip(tmp_path / "a.pth", b"\x80\x02}X\x01\x00\x00\x00x" + call + b"s.")
    info = chkpt.inspect(path)
    assert info.foreign == ("os.mkdir",)
    assert isinstance(info.load_error, chkpt.UnsafeError)
    assert [(entry.path, entry.kind) for entry in info.entries] == [("x", "os.mkdir")]
    assert not target.exists()


@pytest.mark.parametrize("levels", [10, 90])
def test_containers_that_are_shared_over_and_over_are_described_once(levels: int, tmp_path: Path) -> None:
    nested: object = [{"x": 1}]
    for _ in range(levels):
        nested = [nested, nested]  # 2**levels places
    info = chkpt.inspect(chkpt.save({"x": nested}, tmp_path / "a.pth"))
    assert len(info.entries) == levels + 2
    assert info.entries[1].shares == "x" + "[0]" * levels
    assert max(len(entry.value) for entry in info.entries) <= 80


def test_text_is_short_and_cannot_move_the_cursor(tmp_path: Path) -> None:
    nasty = "a\x1b[31m\r\n\u202e" + "b" * 10_000
    state = {nasty: {nasty: nasty.encode("utf-8"), "n": 2**2000}, "l": [[nasty] * 1000] * 2, "d": {7: nasty}}
    info = chkpt.inspect(chkpt.save(state, tmp_path / "a.pth"))
    for entry in info.entries:
        assert (entry.path + entry.value + entry.kind).isprintable()
        assert len(entry.path) < 250 and len(entry.value) <= 80


def sparse_file(path: Path, num_bytes: int) -> Path:
    """A checkpoint of one tensor, with a hole for its bytes: their sums are not those that it says."""
    tensor = Tensor(Storage("0", "float32", "cpu", num_bytes), "float32", 0, (num_bytes // 4,), (1,))
    contents = {"data.pkl": encode({"model": {"w": tensor}, "version": chkpt.__version__})}
    contents |= {"byteorder": b"little", "version": b"3\n"}
    records: list[Record] = []
    position = 0
    with path.open("wb") as file:

        def add(name: str, size: int, content: bytes | None) -> None:
            nonlocal position
            offset = layout.offset_after(position, name)
            data = content or b""
            record = Record(name, position, offset, size, zlib.crc32(data), hashlib.sha256(data).hexdigest())
            file.seek(position)
            file.write(layout.header_of(record) + data)
            records.append(record)
            position = offset + size

        for name, content in contents.items():
            add(name, len(content), content)
        add("data/0", num_bytes, None)
        manifest = manifest_bytes(Manifest(SCHEMA, chkpt.__version__, tuple(records)))
        add(layout.MANIFEST, len(manifest), manifest)
        file.write(layout.directory_of(records))
    return path


def bytes_read(path: Path, function: str) -> int:
    """What a call reads, by the kernel's count: mapped memory is in none, but then nobody maps a file here."""
    code = f"""
import sys
from pathlib import Path
from helios.chkpt import {function}
count = lambda: int(Path("/proc/self/io").read_text().split()[1])
{function}(sys.argv[1])  # imports, too
before = count()
between = count() - before
{function}(sys.argv[1])
print(count() - before - between)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count")
def test_what_is_read_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small = bytes_read(sparse_file(tmp_path / "small.pth", 1024), "inspect")
    large = bytes_read(sparse_file(tmp_path / "large.pth", 10 << 30), "inspect")
    assert (tmp_path / "large.pth").stat().st_size > 10 << 30
    assert 0 < small < 8192
    assert abs(large - small) < 200  # numbers with more digits


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count")
def test_control_what_reads_all_is_noticed(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(100_000)}, tmp_path / "a.pth")
    assert bytes_read(path, "verify") > 400_000


@pytest.mark.parametrize(
    ("function", "expected"), [("inspect", "False"), ("load", "True")]
)  # load: the control
def test_torch_is_not_imported(
    function: str, expected: str, tmp_path: Path, state: dict[str, object]
) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    code = f"import sys, helios.chkpt; helios.chkpt.{function}({os.fspath(path)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"hello")
    with pytest.raises(chkpt.NotACheckpointError, match=r"a\.pth"):
        chkpt.inspect(tmp_path / "a.pth")
    path = chkpt.save({"x": OrderedDict(y=1)}, tmp_path / "b.pth")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(chkpt.TruncatedError):
        chkpt.inspect(path)
    with pytest.raises(FileNotFoundError):
        chkpt.inspect(tmp_path / "c.pth")
    with pytest.raises(IsADirectoryError):
        chkpt.inspect(tmp_path)
    with pytest.raises(TypeError):
        chkpt.inspect(3)  # type: ignore[arg-type]


def test_what_is_shared_often_costs_no_time_as_text(tmp_path: Path, kit: Any) -> None:
    """A key that is a call with a tuple of 2**100 parts, which are shared."""
    size = b"ctorch\nSize\n" + b")" + b"q\x00h\x00\x86" * 100 + b"\x85R"
    path = kit.archive(tmp_path / "a.pth", b"\x80\x02}" + size + b"Ns.")
    assert len(repr(chkpt.inspect(path))) < 10_000
