"""What several tests of faults share: a bitwise comparison, archives made by hand, and a file system that fails.

No tests: those reach it by the fixture `kit`, the slow session as a module beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import stat
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helios import chkpt
from helios.chkpt._format import layout
from helios.chkpt._format.layout import Record, offset_after
from helios.chkpt._format.manifest import SCHEMA, Manifest, manifest_bytes

VERSION = (
    b"X\x07\x00\x00\x00versionX" + struct.pack("<I", len(chkpt.__version__)) + chkpt.__version__.encode()
)
"""Opcodes of the key and the value that every checkpoint has."""


def bits(tensor: torch.Tensor) -> bytes:
    """The storage of a tensor, byte for byte."""
    return bytes(tensor.untyped_storage().tolist())


def same(a: object, b: object, seen: dict[int, int] | None = None) -> bool:
    """The same types, bits, order, strides, offsets and sharing, all the way down."""
    seen = {} if seen is None else seen
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex) and isinstance(b, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_tensor(a, b, seen)
    if not isinstance(a, dict | list | tuple | set):
        return a == b
    if isinstance(a, dict | list):
        if id(a) in seen or id(b) in seen.values():
            return seen.get(id(a)) == id(b)
        seen[id(a)] = id(b)
    if isinstance(a, dict) and isinstance(b, dict):
        mine, theirs = list(a.items()), list(b.items())
        if isinstance(a, OrderedDict) and not same(vars(a), vars(b), {}):
            return False
    else:
        assert isinstance(a, list | tuple | set) and isinstance(b, list | tuple | set)
        mine, theirs = list(a), list(b)
    return len(mine) == len(theirs) and all(same(x, y, seen) for x, y in zip(mine, theirs, strict=True))


def same_tensor(a: torch.Tensor, b: torch.Tensor, seen: dict[int, int]) -> bool:
    if a.layout is not torch.strided:
        return a.layout == b.layout and a.shape == b.shape and torch.equal(a.to_dense(), b.to_dense())
    one, other = a.untyped_storage(), b.untyped_storage()
    if one.nbytes() and seen.setdefault(one.data_ptr(), other.data_ptr()) != other.data_ptr():
        return False  # tied otherwise
    return (
        (a.dtype, a.shape, a.stride(), a.storage_offset(), a.requires_grad, a.device)
        == (b.dtype, b.shape, b.stride(), b.storage_offset(), b.requires_grad, b.device)
        and (not a.is_quantized or repr(a) == repr(b))
        and (a.device.type == "meta" or bits(a) == bits(b))
    )


def archive(
    path: Path,
    pickle: bytes,
    *storages: bytes,
    manifest: Callable[[bytes], bytes] = lambda data: data,
    records: Callable[[list[tuple[str, bytes]]], None] = lambda records: None,
) -> Path:
    """A file of this format whose every sum and header is right, whatever its contents say.

    Args:
        path: the file.
        pickle: content of ``data.pkl``.
        storages: contents of ``data/0``, ``data/1``, ...
        manifest: changes the manifest's content; its own sum is then right.
        records: changes names and contents.
    """
    contents = [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")]
    contents += [(f"data/{number}", content) for number, content in enumerate(storages)]
    records(contents)
    out = bytearray()
    written: list[Record] = []

    def put(name: str, content: bytes) -> None:
        start, offset = len(out), offset_after(len(out), name)
        sha256 = hashlib.sha256(content).hexdigest()
        written.append(Record(name, start, offset, len(content), zlib.crc32(content), sha256))
        out.extend(layout.header_of(written[-1]) + content)

    for name, content in contents:
        put(name, content)
    put(layout.MANIFEST, manifest(manifest_bytes(Manifest(SCHEMA, chkpt.__version__, tuple(written)))))
    path.write_bytes(bytes(out) + layout.directory_of(written))
    return path


def torch_archive(path: Path, pickle: bytes, *storages: bytes) -> Path:
    """A zip as torch.save writes it, with these contents."""
    contents = [("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")]
    contents += [(f"data/{number}", content) for number, content in enumerate(storages)]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in contents:
            info = zipfile.ZipInfo(f"archive/{name}")
            file.writestr(info, content)
            info.external_attr = 0  # which writestr sets
    return path


def pickled(value: bytes = b"K\x01", before: bytes = b"") -> bytes:
    """The pickle of ``{"version": ..., "x": value}``, where the value is given as opcodes."""
    return b"\x80\x02" + before + b"}(" + VERSION + b"X\x01\x00\x00\x00x" + value + b"u."


def storage(kind: bytes = b"FloatStorage", count: int = 4, key: bytes = b"0") -> bytes:
    """The opcodes that refer to the storage ``data/<key>``."""
    length = bytes([len(key)])
    return (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX" + length + b"\0\0\0" + key
        + b"X\x03\x00\x00\x00cpu" + number(count) + b"tQ"
    )  # fmt: skip


def number(value: int) -> bytes:
    """The opcodes of an int of any size that fits."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    """The opcodes of a tuple of ints."""
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    of: bytes = storage(),
    grad: bytes = b"\x89",
) -> bytes:
    """The opcodes of a tensor."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + number(offset) + numbers(*shape) + numbers(*stride)
        + grad + b"ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


CALLS = ("open", "flock", "pwrite", "fsync", "rename", "unlink")


@dataclass
class Disk:
    """The calls by which files are changed, counted; `at` is asked before, or after, call number `fails`.

    Attributes:
        folder: calls that concern other folders are left alone.
        action: what happens at that call.
        fails: number of the call, from 0; None for none.
        after: the call is done first.
        events: names of the calls so far; fsync says of what.
    """

    folder: Path
    action: Callable[[str], object]
    fails: int | None = None
    after: bool = False
    events: list[str] = field(default_factory=list)

    def call(self, name: str, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        number = len(self.events)
        self.events.append(name)
        if number == self.fails and not self.after:
            self.action(name)
        result = real(*args, **options)
        if number == self.fails and self.after:
            self.action(name)
        return result


@contextmanager
def watched(disk: Disk) -> Iterator[Disk]:
    """Send the calls of this process through `disk`."""
    real_open, real_rename, real_unlink = os.open, Path.replace, Path.unlink
    real_fsync, real_pwrite, real_flock = os.fsync, os.pwrite, fcntl.flock

    def is_of_it(path: object) -> bool:
        return os.fspath(path).startswith(str(disk.folder))  # type: ignore[arg-type,no-any-return,call-overload]

    def open_(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if not is_of_it(path) or not flags & os.O_CREAT:
            return real_open(path, flags, *args, **options)
        try:
            return int(disk.call("open", real_open, path, flags, *args, **options))
        except OSError as failed:
            raise OSError(failed.errno, failed.strerror, os.fspath(path)) from None  # as the real one

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        disk.call(f"fsync {kind}", real_fsync, descriptor)

    changes = [
        (os, "open", open_),
        (os, "fsync", fsync),
        (os, "pwrite", lambda *args: disk.call("pwrite", real_pwrite, *args)),
        (fcntl, "flock", lambda *args: disk.call("flock", real_flock, *args)),
        (Path, "replace", lambda self, to: disk.call("rename", real_rename, self, to)),
        (Path, "unlink", lambda self, **options: disk.call("unlink", real_unlink, self, **options)),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, function in changes:
        setattr(where, name, function)
    try:
        yield disk
    finally:
        for where, name, function in before:
            setattr(where, name, function)


def error(code: int) -> Callable[[str], None]:
    """An action: the system call fails, as it would, without a file's name."""

    def action(name: str) -> None:
        raise OSError(code, os.strerror(code))

    return action


def interrupt(name: str) -> None:
    """An action: Ctrl-C."""
    raise KeyboardInterrupt


def kill(name: str) -> None:
    """An action: kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], object]) -> int:
    """Do it in a forked process; return its exit status as `os.waitstatus_to_exitcode` has it."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def flipped(
    path: Path,
    positions: Iterable[int],
    read: Callable[[Path], object],
    unchanged: object,
    is_error: Callable[[Exception], bool] = lambda error: isinstance(error, chkpt.CheckpointError),
) -> Counter[str]:
    """What `read` makes of a file whose bits are flipped one at a time, in place; afterwards it is as it was.

    Args:
        path: the file.
        positions: numbers of bits.
        read: what is tried.
        unchanged: what `read` gives for the whole file.
        is_error: whether an error is one that a damaged file may have; any other is counted as ``wrong error``.

    Returns:
        How many were ``identical``, ``undetected`` (something else was read), or had which error.
    """
    counts: Counter[str] = Counter()
    with path.open("r+b", buffering=0) as file:
        for position in positions:
            (byte,) = os.pread(file.fileno(), 1, position // 8)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << position % 8]), position // 8)
            try:
                counts["identical" if same(read(path), unchanged) else "undetected"] += 1
            except Exception as error:
                counts[type(error).__name__ if is_error(error) else "wrong error"] += 1
            os.pwrite(file.fileno(), bytes([byte]), position // 8)
    return counts
