"""Writing one checkpoint.

    write_archive(values, sources, path)          # from memory, or from the records of another file

Values are what `helios.chkpt._format.values` describes, and source ``n`` is the content of storage ``n``. Each
chunk is summed while it is written, so nothing is read twice; the SHA-256 runs in a thread beside the rest.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from helios.chkpt._arguments import as_path, check_bool
from helios.chkpt._atomic import write_atomically
from helios.chkpt._format import layout
from helios.chkpt._format.encode import encode
from helios.chkpt._format.layout import PICKLE, Record, offset_after
from helios.chkpt._format.manifest import SCHEMA, Manifest, manifest_bytes
from helios.chkpt._version import __version__

if TYPE_CHECKING:
    from helios.chkpt._memory import State

_CHUNK_BYTES = 1 << 22
_WRITEBACK_BYTES = 1 << 23
_ALONE_BYTES = 1 << 16  # below this a thread costs more than it saves


class Source(Protocol):
    """The content of a record, wherever it comes from."""

    @property
    def num_bytes(self) -> int:
        """Its size."""

    def chunks(self, chunk_bytes: int) -> Iterator[memoryview]:
        """The content in pieces of this size; a piece may be overwritten once the next one is asked for."""


def save(state: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Write a checkpoint, atomically and durably.

    When this returns, the file is on the disk under its name; if it raises, or the process is killed, what
    was there before is there still. The file is an archive that plain ``torch.load(weights_only=True)`` opens
    on any machine: tensors are stored detached and on the CPU, tied where they were tied. Equal states give
    equal files.

    Args:
        state: plain values and tensors under text keys, see the README; the key ``version`` is added.
        path: the file. A symbolic link is followed and kept. Its folder must exist.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: something in `state` cannot be stored; the message says where it is.
        ValueError: as `TypeError`, or `state` has a key ``version``, or `path` is no regular file.
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written; the old file is as it was.
    """
    from helios.chkpt._memory import stated  # torch: seconds to import, and most of this package needs none

    target = as_path("path", path)
    write_state(stated(state), target)
    return target


def check_state(state: Mapping[str, object], *, sharded: bool = False) -> None:
    """Check that `save` could store a state, without writing or copying it.

    Args:
        state: as `save` takes it.
        sharded: check for `save_sharded` instead, which takes DTensors. Looks at the state of this process only.

    Raises:
        TypeError, ValueError: as `save`.
    """
    check_bool("sharded", sharded)
    if sharded:
        from helios.chkpt._sharded.split import split

        split(state)
    else:
        from helios.chkpt._memory import stated  # as in `save`

        stated(state)


def write_state(state: State, path: Path, *, score: float | None = None, in_background: bool = False) -> None:
    """Write what `helios.chkpt._memory.stated` gave.

    Args:
        state: values and the memory of tensors.
        path: the file.
        score: noted in the manifest.
        in_background: keep to one thread, so that a training loop keeps the other processors.
    """
    write_archive(state.values, state.sources, path, score=score, num_threads=1 if in_background else 2)


def write_archive(
    values: dict[str, object],
    sources: Sequence[Source],
    path: Path,
    *,
    score: float | None = None,
    num_threads: int = 2,
    before_replace: Callable[[IO[bytes]], None] | None = None,
) -> None:
    """Write an archive, atomically and durably.

    Args:
        values: what the pickle says, without the key ``version``.
        sources: the content of the records ``data/0``, ``data/1``, ...
        path: the file.
        score: noted in the manifest.
        num_threads: 1, or 2 to sum and to write at the same time.
        before_replace: called with the new file, readable and on the disk, before it takes its place; an error
            that it raises leaves the old file.

    Raises:
        OSError: with its errno; the old file is as it was.
    """
    pickle = encode({**values, "version": __version__})

    def write(file: IO[bytes]) -> None:
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(1)) if num_threads > 1 else None
            _Writer(file.fileno(), path, pool).write(pickle, sources, score)

    write_atomically(path, write, before_replace)


class Memory:
    """A source that is in memory.

    Args:
        content: the bytes, not copied.
        may_change: another thread may write to them meanwhile. Then each piece is copied first, so that its sums are
            those of what is written, whatever that is: the file can be read.
    """

    def __init__(self, content: bytes | memoryview, *, may_change: bool = False) -> None:
        self._content = memoryview(content)
        self._may_change = may_change
        self.num_bytes = self._content.nbytes

    def chunks(self, chunk_bytes: int) -> Iterator[memoryview]:
        """See `Source`."""
        copy = memoryview(bytearray(min(chunk_bytes, self.num_bytes) if self._may_change else 0))
        for start in range(0, self.num_bytes, chunk_bytes):
            piece = self._content[start : start + chunk_bytes]
            if self._may_change:
                copy[: len(piece)] = piece
                piece = copy[: len(piece)]
            yield piece


class _Writer:
    """Writes the records one after the other into a new file."""

    def __init__(self, descriptor: int, path: Path, pool: ThreadPoolExecutor | None) -> None:
        self._descriptor = descriptor
        self._path = path
        self._pool = pool
        self._records: list[Record] = []
        self._position = 0
        self._flushed = 0

    def write(self, pickle: bytes, sources: Sequence[Source], score: float | None) -> None:
        contents: list[tuple[str, Source]] = [
            (PICKLE, Memory(pickle)),
            ("byteorder", Memory(b"little")),
            ("version", Memory(b"3\n")),  # of torch's archives
            *((f"data/{number}", source) for number, source in enumerate(sources)),
        ]
        self._check_space(sum(source.num_bytes for _, source in contents))
        for name, source in contents:
            self._record(name, source)
        manifest = Manifest(SCHEMA, __version__, tuple(self._records), score)
        self._record(layout.MANIFEST, Memory(manifest_bytes(manifest)))
        self._put(memoryview(layout.directory_of(self._records)), self._position)

    def _check_space(self, num_bytes: int) -> None:
        """Fail before anything is written if it cannot fit, so that a full disk costs no time."""
        status = os.fstatvfs(self._descriptor)
        if status.f_blocks and num_bytes > status.f_bfree * status.f_frsize:
            free = status.f_bfree * status.f_frsize
            message = f"{os.strerror(errno.ENOSPC)}: {num_bytes} bytes to write, {free} free"
            raise OSError(errno.ENOSPC, message, str(self._path))

    def _record(self, name: str, source: Source) -> None:
        start = self._position
        offset = position = offset_after(start, name)
        crc, digest = 0, hashlib.sha256()
        for chunk in source.chunks(_CHUNK_BYTES):
            summed = None
            if self._pool is not None and len(chunk) > _ALONE_BYTES:
                with suppress(RuntimeError):  # the interpreter exits, and lets no thread begin any more
                    summed = self._pool.submit(digest.update, chunk)
            if summed is None:
                digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
            self._put(chunk, position)
            position += len(chunk)
            if summed is not None:
                summed.result()
        assert position == offset + source.num_bytes, f"{name}: a source that is not as large as it said"
        record = Record(name, start, offset, source.num_bytes, crc, digest.hexdigest())
        self._put(memoryview(layout.header_of(record)), start)
        self._records.append(record)
        self._position = position

    def _put(self, data: memoryview, position: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, position)
            if count == 0:
                raise OSError(errno.EIO, "a write of no bytes", str(self._path))
            data = data[count:]
            position += count
        if position - self._flushed >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):  # not on macOS
            # The disk begins at once, not at fsync: that halves the time a large file takes.
            with suppress(OSError):  # advice, no more
                os.posix_fadvise(
                    self._descriptor, self._flushed, position - self._flushed, os.POSIX_FADV_DONTNEED
                )
            self._flushed = position
