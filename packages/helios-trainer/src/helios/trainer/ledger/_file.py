"""The file of a ledger while a run writes it: begun anew, or gone on with exactly where a checkpoint left it."""

import hashlib
import os
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from helios.trainer.ledger._format import HEADER_KEY, LedgerError, header_of, line_of
from helios.trainer.logging import get_root_logger

_CHUNK = 1 << 20  # bytes
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC


@dataclass(frozen=True)
class Mark:
    """Where a ledger stands.

    Attributes:
        length: bytes in the file.
        digest: of these bytes, so that no other file is taken for it.
        waiting: rows that come next and could not be written yet, for want of space.
    """

    length: int
    digest: str
    waiting: str

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return asdict(self)


class LedgerFile:
    """An open ledger. Every row is given to the operating system at once, so that a kill loses none.

    If that fails (a full disk) it is an error in the log, the rows wait, and the next row tries again.

    Args:
        path: of the file.
        descriptor: it is open for appending under this number, and closed when nobody refers to this object.
        length: bytes of it that are kept.
        hasher: over these bytes.
    """

    def __init__(self, path: Path, descriptor: int, length: int, hasher: "hashlib.blake2b") -> None:
        self._path = path
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)  # no hook is called when an exception ends a run
        self._length = length
        self._hasher = hasher
        self._waiting = b""
        self._is_failing = False

    @classmethod
    def begin(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Begin a file, in the place of an earlier one of the run of that name if there is one.

        Raises:
            LedgerError: what is there is no ledger, or that of a run of another name.
            OSError: it cannot be opened or written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o666)
        file = cls(path, descriptor, 0, _new_hasher())
        if os.fstat(descriptor).st_size > 0:
            _check_replaceable(path, header["run"])
            get_root_logger().info("the run begins anew, and so does its ledger: %s is replaced", path)
            os.ftruncate(descriptor, 0)
        file.append(header)
        file.finish()
        _sync_folder(path.parent)
        return file

    @classmethod
    def go_on(cls, path: Path, mark: Mark, way_out: str) -> Self:
        """Open the file that a checkpoint was written with, and cut off what came after it.

        Args:
            path: of the file.
            mark: where it stood.
            way_out: what to do if it is not that file, for messages.

        Raises:
            LedgerError: it is missing, or does not begin with the bytes that it had then.
            OSError: it cannot be opened.
        """
        try:
            descriptor = os.open(path, _FLAGS)
        except FileNotFoundError:
            raise LedgerError(
                f"{path} is missing, the ledger that this run has written to. {way_out}"
            ) from None
        length, hasher = _read_through(descriptor, mark.length)
        file = cls(path, descriptor, length, hasher)
        if length < mark.length:
            raise LedgerError(
                f"{path} has {length} bytes, but had {mark.length} when the checkpoint was written. {way_out}"
            )
        if hasher.hexdigest() != mark.digest:
            raise LedgerError(
                f"{path} is not the ledger that this run has written to, or was changed: its first {length} bytes are "
                f"others. {way_out}"
            )
        os.ftruncate(descriptor, mark.length)
        file._write(mark.waiting.encode())
        return file

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, and those that still wait."""
        self._write(line_of(row))

    def _write(self, content: bytes) -> None:
        self._waiting += content
        try:
            self._drain()
        except OSError as error:
            if not self._is_failing:
                self._say(error)
            self._is_failing = True
        else:
            self._is_failing = False

    def _drain(self) -> None:
        while self._waiting:
            num_bytes = os.write(self._descriptor, self._waiting)
            self._hasher.update(self._waiting[:num_bytes])
            self._length += num_bytes
            self._waiting = self._waiting[num_bytes:]

    def _say(self, error: OSError) -> None:
        get_root_logger().error(
            "%s could not be written, training goes on and the rows wait: %s: %s",
            self._path,
            type(error).__name__,
            error,
        )

    def mark(self) -> Mark:
        """Return where the file stands. As much is on the disk then: not even a power cut makes it shorter."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._say(error)
        return Mark(self._length, self._hasher.hexdigest(), self._waiting.decode())

    def finish(self) -> None:
        """See that nothing waits any more, and that all is on the disk.

        Raises:
            OSError: what waits still cannot be written.
        """
        self._drain()
        os.fsync(self._descriptor)


def _new_hasher() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=16)


def _check_replaceable(path: Path, run_name: str) -> None:
    """Refuse to replace what no run of that name has begun."""
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n") and line.startswith(f'{{"{HEADER_KEY}":'.encode()):
        return  # of a process that was killed when it began
    found = header_of(line, path)["run"]
    if found != run_name:
        raise LedgerError(
            f"{path} is the ledger of the run {found!r}, and would be replaced by that of {run_name!r}: give Ledger "
            "another path, or remove the file"
        )


def _read_through(descriptor: int, num_bytes: int) -> "tuple[int, hashlib.blake2b]":
    """Return how many of so many bytes there are at the beginning of a file, and a hasher over them."""
    hasher, length = _new_hasher(), 0
    while length < num_bytes and (chunk := os.pread(descriptor, min(_CHUNK, num_bytes - length), length)):
        hasher.update(chunk)
        length += len(chunk)
    return length, hasher


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
