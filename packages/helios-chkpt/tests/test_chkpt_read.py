"""What `load` is asked, and what it says of files that are whole but not for it."""

from __future__ import annotations

import io
import os
import pickle
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt

MAJOR = int(chkpt.__version__.split(".")[0])
NEWER = f"{MAJOR + 1}.2.3"


def num_open() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def torch_save(state: object, path: Path, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


@pytest.mark.parametrize(
    "content", [b"hello, world", b"\x80\x02}q\x00.", b"GIF89a" + bytes(100), b"PX", bytes(99)]
)
def test_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.NotACheckpointError, match="first bytes"):
            read(tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == content


@pytest.mark.parametrize("content", [[1], torch.ones(2), 3, OrderedDict(a=1), None])
def test_archives_that_hold_something_else(content: object, tmp_path: Path) -> None:
    with pytest.raises(chkpt.NotACheckpointError, match="found a"):
        chkpt.load(torch_save(content, tmp_path / "a.pth"))


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(chkpt.NotACheckpointError, match="word"):
        chkpt.load(tmp_path / "a.pth")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    others = [tmp_path / "fifo.pth", Path("/dev/null"), Path("/dev/zero")]
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(tmp_path, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{here}/socket.pth")  # the path itself may be too long for a socket
        finally:
            os.close(here)
        others.append(tmp_path / "socket.pth")
        for read in (chkpt.load, chkpt.verify):
            for path in others:
                with pytest.raises(chkpt.NotACheckpointError, match="no regular file"):
                    read(path)
            with pytest.raises(FileNotFoundError, match=r"no\.pth"):
                read(tmp_path / "no.pth")
            before = num_open()
            with pytest.raises(IsADirectoryError) as caught:
                read(tmp_path)
            assert caught.value.filename == str(tmp_path)
            assert num_open() == before
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError):
        chkpt.load(tmp_path / "a")


def test_no_descriptor_stays_open(tmp_path: Path, kit: Any) -> None:
    good = chkpt.save({"x": torch.ones(3)}, tmp_path / "a.pth")
    bad = kit.archive(tmp_path / "b.pth", b"\x80\x02.")
    before = num_open()
    for _ in range(5):
        chkpt.load(good)
        chkpt.verify(good)
        for read in (chkpt.load, chkpt.verify):
            with pytest.raises(chkpt.CorruptError):
                read(bad)
    assert num_open() == before


VERSIONS: list[tuple[object, type[Exception] | None, str]] = [
    (f"{MAJOR}.99.0", None, ""),
    (f"{MAJOR}.0.0rc1", None, ""),
    (f"{MAJOR}.1.0.dev1+local", None, ""),
    (f"v{MAJOR}.1", None, ""),
    ("2.0.1", chkpt.VersionTooOldError, "python -m helios.chkpt_migrator"),
    ("1.10", chkpt.VersionTooOldError, "version 1.10"),
    ("1.9", chkpt.VersionTooOldError, "version 1.9"),
    ("0.3", chkpt.VersionTooOldError, "python -m helios.chkpt_migrator"),
    (NEWER, chkpt.VersionTooNewError, f"helios-chkpt>={NEWER}"),
    ("10.0", chkpt.VersionTooNewError, r"helios-chkpt>=10\.0"),  # as text it is below "3"
    ("1!1.0", chkpt.VersionTooOldError, "migrator"),
    ("three", chkpt.NotACheckpointError, "'three'"),
    ("", chkpt.NotACheckpointError, "''"),
    ("3.", chkpt.NotACheckpointError, "'3.'"),
    ("\u0663.0", chkpt.NotACheckpointError, "version"),
    ("9" * 5000, chkpt.NotACheckpointError, "999"),
    (3, chkpt.NotACheckpointError, "int"),
    (3.1, chkpt.NotACheckpointError, "float"),
    (None, chkpt.NotACheckpointError, "NoneType"),
    (b"3.1", chkpt.NotACheckpointError, "bytes"),
    (["3.1"], chkpt.NotACheckpointError, "list"),
    (torch.ones(1), chkpt.NotACheckpointError, "Tensor"),
]


@pytest.mark.parametrize(("version", "kind", "message"), VERSIONS, ids=lambda value: repr(value)[:20])
def test_versions(version: object, kind: type[Exception] | None, message: str, tmp_path: Path) -> None:
    path = torch_save({"x": 1, "unknown": 2, "version": version}, tmp_path / "a.pth")
    chkpt.verify(path)  # whole, though maybe not of this version
    if kind is None:
        assert chkpt.load(path) == {"x": 1, "unknown": 2, "version": version}
        return
    with pytest.raises(kind, match=message) as caught:
        chkpt.load(path)
    if isinstance(caught.value, chkpt.VersionTooOldError | chkpt.VersionTooNewError):
        assert caught.value.version == version


def test_no_version(tmp_path: Path) -> None:
    path = torch_save({"x": 1}, tmp_path / "a.pth")
    with pytest.raises(chkpt.VersionTooOldError, match="no key 'version'") as caught:
        chkpt.load(path)
    assert caught.value.version is None


def test_a_newer_schema(kit: Any, tmp_path: Path) -> None:
    """The number counts, not the version beside it; what is in the file then is not looked at."""
    newer = b'"schema": 4, "version": "4.1.0"'
    path = kit.archive(
        tmp_path / "r_epoch_1_iter_1.pth",
        b"\x80\x09nobody knows",
        manifest=lambda data: data.replace(
            b'"schema": 3, "version": "' + chkpt.__version__.encode() + b'"', newer
        ),
    )
    assert newer in path.read_bytes()
    with pytest.raises(chkpt.VersionTooNewError, match=r"helios-chkpt>=4\.1\.0") as caught:
        chkpt.load(path)
    assert caught.value.version == "4.1.0"
    chkpt.verify(path)
    assert chkpt.find_last_checkpoint(tmp_path) == path  # so that load can say what to install


USER_KEYS: dict[str, object] = {
    "data.pkl": 1,
    "manifest.json": {"schema": 99, "version": "99"},
    "storage": ("storage", "FloatStorage", "0", "cpu", 1),
    "archive/data/0": b"x",
    "data/0": torch.ones(2),
    "byteorder": "big",
    "training_state": "mine",
    "schema": 99,
    "_metadata": {"version": "0.0.1"},
    "inner": {"version": "0.0.1", "kind": "helios-checkpoint"},
    "__class__": "x",
    "__reduce__": "cos\nsystem\n",
    "": 0,
    "PK\x03\x04PK\x05\x06" + "\0" * 18: "PK\x06\x06",
    "\ud800": "\udfff",
}


def test_user_keys_named_like_ours(tmp_path: Path, kit: Any) -> None:
    path = chkpt.save(USER_KEYS, tmp_path / "a.pth")
    chkpt.verify(path)
    found = chkpt.load(path)
    assert kit.same(found, {**USER_KEYS, "version": chkpt.__version__})
    assert kit.same(torch.load(path, weights_only=True), found)


LEGACY = {"0.2.0/logging": None, "1.0.0/user_keys": "1.0.0", "1.4.1/plugin": "1.4.1", "2.0.1/amp": "2.0.1"}


@pytest.mark.parametrize("variant", LEGACY)
def test_files_of_earlier_releases_are_old_not_unsafe(variant: str, legacy: Path) -> None:
    path = next((legacy / variant).glob("*.pth"))
    with pytest.raises(chkpt.VersionTooOldError, match="chkpt_migrator") as caught:
        chkpt.load(path)
    assert caught.value.version == LEGACY[variant]
    chkpt.verify(path)  # whole, though not of this version


def test_errors_survive_being_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(chkpt.VersionTooOldError("text", "1.0")))
    assert (str(error), error.version) == ("text", "1.0")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_are_refused(protocol: int, tmp_path: Path) -> None:
    """Plain torch.load does not promise to read them either, and no release of Helios wrote any."""
    path = torch_save({"x": 1, "version": chkpt.__version__}, tmp_path / "a.pth", pickle_protocol=protocol)
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.CorruptError, match="protocol"):
            read(path)


def test_a_file_that_was_written_without_crcs_cannot_be_verified(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = torch_save({"x": torch.ones(2), "version": chkpt.__version__}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.CorruptError, match="CRC"):
            read(path)


@pytest.mark.parametrize("location", ["cuda:0", "nonsense"])
def test_a_device_that_is_not_there_is_no_fault_of_the_file(location: str, tmp_path: Path) -> None:
    if location == "cuda:0" and torch.cuda.is_available():
        pytest.skip("it is there")
    path = chkpt.save({"x": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(RuntimeError) as caught:
        chkpt.load(path, map_location=location)
    assert not isinstance(caught.value, chkpt.CheckpointError)


def test_only_the_keys_that_are_asked_for(tmp_path: Path) -> None:
    path = chkpt.save({"a": torch.ones(2), "b": [torch.zeros(3)], "c": 1}, tmp_path / "a.pth")
    assert list(chkpt.load(path, keys=["c", "a"])) == ["c", "a"]
    assert list(chkpt.load(path, keys=(key for key in ("version",)))) == ["version"]
    assert chkpt.load(path, keys=[]) == {}
    with pytest.raises(KeyError, match="has no key 'd'"):
        chkpt.load(path, keys=["a", "d"])


BAD: list[tuple[dict[str, object], type[Exception]]] = [
    ({"path": 3}, TypeError),
    ({"path": io.BytesIO()}, TypeError),
    ({"path": ""}, ValueError),
    ({"path": "a\0b"}, ValueError),
    ({"mmap": 1}, TypeError),
    ({"verify": None}, TypeError),
    ({"safe_types": "Mine"}, TypeError),
    ({"safe_types": int}, TypeError),
    ({"safe_types": ["Mine"]}, TypeError),
    ({"safe_types": [eval]}, TypeError),
    ({"keys": "abc"}, TypeError),
]


@pytest.mark.parametrize(("arguments", "kind"), BAD)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], tmp_path: Path) -> None:
    path = chkpt.save({}, tmp_path / "a.pth")
    load: Callable[..., object] = chkpt.load
    with pytest.raises(kind, match=next(iter(arguments))):
        load(**{"path": path, **arguments})
