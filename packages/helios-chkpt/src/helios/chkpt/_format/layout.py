"""Where every byte of an archive goes: a zip of stored entries, each header a function of what it is for.

All that is in a file is either the content of a record or given by `headers_of` and `directory_of`, so a reader
that compares both knows that no bit of the file is other than it was written. Pure functions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Records begin at multiples of this many bytes, so that tensors can be mapped."""

FOLDER = "archive/"
"""All records are below this folder, as torch.load wants."""

MANIFEST = "manifest.json"
PICKLE = "data.pkl"

_LOCAL = struct.Struct("<4s5H3I2H")
_LOCAL_ZIP64 = struct.Struct("<2H2Q")
_PADDING = struct.Struct("<2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_CENTRAL_ZIP64 = struct.Struct("<2H3Q")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")

END_BYTES = _END64.size + _LOCATOR64.size + _END.size
"""Size of the end of every archive."""

_ZIP_VERSION = 45  # of the zip format, the first with 64 bits
_FIRST_DAY = 0x21  # 1 January 1980: no clock has a say in the bytes
_SHORT, _LONG = 0xFFFF, 0xFFFFFFFF  # "see the 64 bits"


@dataclass(frozen=True)
class Record:
    """One entry of an archive.

    Attributes:
        name: its name below the folder, such as ``data/0``.
        start: where its header begins in the file.
        offset: where its content begins in the file.
        num_bytes: size of its content.
        crc32: of its content.
        sha256: of its content, in hexadecimal digits; None if nobody wrote it down.
    """

    name: str
    start: int
    offset: int
    num_bytes: int
    crc32: int
    sha256: str | None = None


def offset_after(start: int, name: str) -> int:
    """Where the content of a record begins whose header begins at `start`."""
    least = start + _LOCAL.size + len(FOLDER + name) + _LOCAL_ZIP64.size + _PADDING.size
    return least + -least % ALIGNMENT


def header_of(record: Record) -> bytes:
    """The header of a record, up to its content."""
    name = (FOLDER + record.name).encode("ascii")
    extra = _LOCAL_ZIP64.pack(1, _LOCAL_ZIP64.size - 4, record.num_bytes, record.num_bytes)
    padding = record.offset - record.start - _LOCAL.size - len(name) - len(extra) - _PADDING.size
    extra += _PADDING.pack(0x4246, padding) + bytes(padding)
    local = _LOCAL.pack(
        b"PK\x03\x04", _ZIP_VERSION, 0, 0, 0, _FIRST_DAY, record.crc32, _LONG, _LONG, len(name), len(extra)
    )
    return local + name + extra


def directory_of(records: Sequence[Record]) -> bytes:
    """Table of contents and end of an archive whose records are these, in the order of the file.

    The last record, the manifest, comes first in the table, where a reader finds it without reading the table.
    """
    last = records[-1]
    start = last.offset + last.num_bytes
    entries = b"".join(map(_entry, [last, *records[:-1]]))
    end64 = _END64.pack(
        b"PK\x06\x06",
        _END64.size - 12,
        _ZIP_VERSION,
        _ZIP_VERSION,
        0,
        0,
        len(records),
        len(records),
        len(entries),
        start,
    )
    locator = _LOCATOR64.pack(b"PK\x06\x07", 0, start + len(entries), 1)
    end = _END.pack(b"PK\x05\x06", 0, 0, _SHORT, _SHORT, _LONG, _LONG, 0)
    return entries + end64 + locator + end


def directory_start(end: bytes) -> int:
    """Where the table of contents begins, from the last `END_BYTES` of a file; ValueError if they are none."""
    magic, *_, start = _END64.unpack_from(end)
    if magic != b"PK\x06\x06" or not end.endswith(
        _END.pack(b"PK\x05\x06", 0, 0, _SHORT, _SHORT, _LONG, _LONG, 0)
    ):
        raise ValueError("not the end of an archive")
    return int(start)


def manifest_record(entry: bytes) -> Record | None:
    """The manifest's record, from the beginning of the table of contents; None if it does not begin with one."""
    name = (FOLDER + MANIFEST).encode("ascii")
    size = _CENTRAL.size + len(name)
    if len(entry) < manifest_entry_bytes() or entry[_CENTRAL.size : size] != name:
        return None
    crc32 = _CENTRAL.unpack_from(entry)[7]
    _, _, num_bytes, _, start = _CENTRAL_ZIP64.unpack_from(entry, size)
    return Record(MANIFEST, start, offset_after(start, MANIFEST), num_bytes, crc32)


def manifest_entry_bytes() -> int:
    """Size of the manifest's entry in the table of contents."""
    return _CENTRAL.size + len(FOLDER + MANIFEST) + _CENTRAL_ZIP64.size


def _entry(record: Record) -> bytes:
    name = (FOLDER + record.name).encode("ascii")
    extra = _CENTRAL_ZIP64.pack(1, _CENTRAL_ZIP64.size - 4, record.num_bytes, record.num_bytes, record.start)
    return (
        _CENTRAL.pack(
            b"PK\x01\x02",
            _ZIP_VERSION,
            _ZIP_VERSION,
            0,
            0,
            0,
            _FIRST_DAY,
            record.crc32,
            _LONG,
            _LONG,
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            _LONG,
        )
        + name
        + extra
    )
