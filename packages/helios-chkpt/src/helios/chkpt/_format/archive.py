"""Reading an archive, strictly: nothing is believed before it is checked, and no byte is without a reason.

with open_file(path) as file:
archive = open_archive(file, path)       # the structure, the manifest and the pickle are checked
check_records(file, archive)             # the CRC-32 of every record
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from helios.chkpt._errors import CorruptError, NotACheckpointError, explain
from helios.chkpt._format import checksums, layout
from helios.chkpt._format.layout import MANIFEST, PICKLE, Record
from helios.chkpt._format.manifest import SCHEMA, Manifest, ManifestError, read_head, read_manifest
from helios.chkpt._format.torch_zip import RESTORE, corrupt, read_torch_zip

_STORAGE = "data/"


@dataclass(frozen=True)
class Archive:
    """What is known of a file once its structure was checked.

    Attributes:
        path: the file, for messages.
        num_bytes: its size.
        records: all of its records by name.
        pickle: content of the record ``data.pkl``, checked.
        manifest: None in files that torch.save wrote.
    """

    path: Path
    num_bytes: int
    records: Mapping[str, Record]
    pickle: bytes
    manifest: Manifest | None = None

    @property
    def is_newer(self) -> bool:
        """Whether a later major release wrote the file. Then nothing else is known of it."""
        return self.manifest is not None and self.manifest.schema > SCHEMA

    @cached_property
    def storages(self) -> dict[str, Record]:
        """The records that tensors are in, by the key of the storage."""
        return {
            name.removeprefix(_STORAGE): record
            for name, record in self.records.items()
            if name.startswith(_STORAGE)
        }


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading; does not wait for the writer of a pipe.

    Raises:
        OSError: it cannot be opened.
        NotACheckpointError: it is a pipe, a socket or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_socket():
            raise NotACheckpointError(_no_file(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb", buffering=0)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotACheckpointError(_no_file(path))


def open_archive(file: IO[bytes], path: Path) -> Archive:
    """Check the structure of a file, its manifest and its pickle; tensors are not looked at.

    Raises:
        NotACheckpointError: the file is of another kind.
        TruncatedError: it has no end.
        CorruptError: anything else is wrong with it.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    own = _find_manifest(file, num_bytes)
    if own is None:
        return _torch_archive(file, path, num_bytes, None)
    manifest_record, directory = own
    data = _checked_content(file, path, manifest_record)
    try:
        _, schema, version = read_head(data)
        if schema > SCHEMA:  # all that can be said of it is that it is a zip
            return _torch_archive(file, path, num_bytes, Manifest(schema, version, ()))
        manifest = read_manifest(data)
    except ManifestError as error:
        raise corrupt(path, str(error), "a manifest of this format") from error
    if schema != SCHEMA:
        raise corrupt(path, f"a manifest with the schema {schema}", f"{SCHEMA}, the first that there was")
    _check_bytes(file, path, [*manifest.records, manifest_record], directory)
    records = {record.name: record for record in (*manifest.records, manifest_record)}
    if not {PICKLE, "byteorder", "version"} <= records.keys():
        raise corrupt(path, f"a manifest without the record {PICKLE}, byteorder or version", "all of them")
    for name, content in (("byteorder", b"little"), ("version", b"3\n")):
        if records[name].num_bytes != len(content) or _checked_content(file, path, records[name]) != content:
            raise corrupt(path, f"another content of the record {name!r}", f"{content!r}")
    return Archive(path, num_bytes, records, _checked_content(file, path, records[PICKLE]), manifest)


def check_records(
    file: IO[bytes], archive: Archive, *, names: Iterable[str] | None = None, digests: bool = False
) -> None:
    """Read records and compare their sums.

    Args:
        file: the open file.
        archive: what `open_archive` said of it.
        names: which; None for all.
        digests: compare the SHA-256 as well, where it was written down.

    Raises:
        CorruptError: a sum is another; the record is named.
    """
    records = [archive.records[name] for name in (archive.records if names is None else names)]
    noted = [record for record in records if digests and record.sha256 is not None]
    others = [record for record in records if not digests or record.sha256 is None]
    read = reader(file, archive.path)
    both = checksums.all_sums(noted, read)
    crcs = {**checksums.crc32_sums(others, read), **{name: crc for name, (crc, _) in both.items()}}
    check_crc32(archive, {record.name: crcs[record.name] for record in records})
    for record in noted:
        digest = both[record.name][1]
        if digest != record.sha256:
            found = f"the SHA-256 {digest} in the record {record.name!r}"
            raise corrupt(archive.path, found, f"{record.sha256}")


def check_crc32(archive: Archive, found: Mapping[str, int]) -> None:
    """CorruptError unless these are the CRCs of the records of these names."""
    for name, crc in found.items():
        if crc != archive.records[name].crc32:
            expected = f"{archive.records[name].crc32:#010x}"
            raise corrupt(archive.path, f"the CRC-32 {crc:#010x} in the record {name!r}", expected)


def reader(file: IO[bytes], path: Path) -> checksums.Read:
    """A function that fills memory from a file; threads may share it."""
    descriptor = file.fileno()

    def read(position: int, memory: memoryview) -> None:
        while memory:
            try:
                count = os.preadv(descriptor, [memory], position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            if count == 0:
                raise corrupt(path, "an end that was not there before", "a file that nobody cuts short")
            memory = memory[count:]
            position += count

    return read


def _find_manifest(file: IO[bytes], num_bytes: int) -> tuple[Record, int] | None:
    """The manifest's record and where the table of contents begins; None if the file is not one of ours."""
    if num_bytes < layout.END_BYTES:
        return None
    end = os.pread(file.fileno(), layout.END_BYTES, num_bytes - layout.END_BYTES)
    try:
        directory = layout.directory_start(end)
    except (ValueError, struct.error):
        return None
    if directory > num_bytes:
        return None
    entry = os.pread(file.fileno(), layout.manifest_entry_bytes(), directory)
    record = layout.manifest_record(entry)
    if record is None or record.offset + record.num_bytes != directory:
        return None
    return record, directory


def _checked_content(file: IO[bytes], path: Path, record: Record) -> bytes:
    data = bytearray(record.num_bytes)
    reader(file, path)(record.offset, memoryview(data))
    if zlib.crc32(data) != record.crc32:
        raise corrupt(path, f"a wrong CRC-32 of the record {record.name!r}", f"{record.crc32:#010x}")
    if record.sha256 is not None and hashlib.sha256(data).hexdigest() != record.sha256:
        raise corrupt(path, f"a wrong SHA-256 of the record {record.name!r}", record.sha256)
    return bytes(data)


def _check_bytes(file: IO[bytes], path: Path, records: list[Record], directory: int) -> None:
    """Compare all that is between the records with what it has to be."""
    last = records[-1]
    before = records[-2] if len(records) > 1 else None
    if last.start != (0 if before is None else before.offset + before.num_bytes):
        raise corrupt(path, "bytes between the last record and the manifest", "none")
    expected = layout.directory_of(records)
    num_bytes = os.fstat(file.fileno()).st_size
    is_as_large = num_bytes - directory == len(expected)  # asked first: the file may be sparse, and huge
    if not is_as_large or os.pread(file.fileno(), len(expected), directory) != expected:
        raise corrupt(path, "a table of contents that is not the manifest's", "that of its records")
    for record in records:
        header = layout.header_of(record)
        if os.pread(file.fileno(), len(header), record.start) != header:
            raise corrupt(path, f"a damaged header of the record {record.name!r}", "that of the manifest")


def _torch_archive(file: IO[bytes], path: Path, num_bytes: int, newer: Manifest | None) -> Archive:
    """A file that torch.save wrote, or one of a newer schema."""
    records = {record.name: record for record in read_torch_zip(file, path)}
    if newer is None and MANIFEST in records:
        raise corrupt(path, "a manifest out of its place", "the end of an archive of Helios")
    if PICKLE not in records:
        raise NotACheckpointError(
            explain(path, f"a zip with the entries {list(records)[:5]}", "an archive of torch.save", RESTORE)
        )
    byteorder = records.get("byteorder")
    if byteorder is not None and _checked_content(file, path, byteorder) != b"little":
        raise CorruptError(explain(path, "numbers that are not little-endian", "little-endian ones", RESTORE))
    return Archive(path, num_bytes, records, _checked_content(file, path, records[PICKLE]), newer)


def _no_file(path: Path) -> str:
    return explain(path, "no regular file", "a checkpoint file", "Check the path.")
