"""The zip that torch.save writes, read strictly: torch checks no CRC and ignores what it does not expect.

Checkpoints of earlier releases are such files.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import IO

from helios.chkpt._errors import CorruptError, NotACheckpointError, TruncatedError, explain
from helios.chkpt._format.layout import Record

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_LOCAL_MAGIC = b"PK\x03\x04"
_END_MAGIC = b"PK\x05\x06"
_END64_MAGIC = b"PK\x06\x06"
_END_SIZE = 22
_END64_SIZE = 56 + 20  # torch always writes the record and the locator of a large archive too
_HAS_DESCRIPTOR = 0x8
_FLAGS = 0x800 | _HAS_DESCRIPTOR  # names in UTF-8; sizes and CRC after the data

RESTORE = "Restore it from a copy, or go back to an earlier checkpoint."


def read_torch_zip(file: IO[bytes], path: Path) -> list[Record]:
    """Check the zip that torch.save writes and return its entries, in the order of the file.

    Entries have to be stored, uniquely named, below one folder, and to fill the file from its first byte to
    its last. Their contents are not read, so a CRC is what the zip says it is.

    Raises:
        NotACheckpointError: the file is of another kind.
        TruncatedError: it has no end.
        CorruptError: anything else is wrong with it.
    """
    num_bytes = file.seek(0, 2)
    _check_ends(file, path, num_bytes)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            folder = _check_entries(entries, path)
            offsets = _check_layout(file, path, entries, archive.start_dir, num_bytes)
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError) as error:
        raise corrupt(path, f"a zip that cannot be read ({error})", "a whole one") from error
    except (UnicodeDecodeError, OverflowError, ValueError) as error:
        raise corrupt(path, f"an impossible value in the zip ({error})", "what torch.save writes") from error
    return [
        Record(entry.filename.removeprefix(folder), entry.header_offset, offset, entry.file_size, entry.CRC)
        for entry, offset in zip(entries, offsets, strict=True)
    ]


def _check_ends(file: IO[bytes], path: Path, num_bytes: int) -> None:
    file.seek(max(0, num_bytes - (1 << 16)))
    tail = file.read()
    has_end = tail[-_END_SIZE:].startswith(_END_MAGIC) and len(tail) >= _END_SIZE
    file.seek(0)
    head = file.read(len(_LOCAL_MAGIC))
    if not _LOCAL_MAGIC.startswith(head):
        if has_end:
            raise corrupt(path, f"the first bytes {head!r}", f"{_LOCAL_MAGIC!r}")
        raise NotACheckpointError(
            explain(path, f"the first bytes {head!r}", "the zip that torch.save writes", "Check the path.")
        )
    if has_end:
        return
    if tail[-_END64_SIZE - _END_SIZE :].startswith(_END64_MAGIC):
        raise corrupt(path, f"the last bytes {tail[-_END_SIZE:]!r}", "the end of a zip")
    end = tail.rfind(_END_MAGIC)
    if end < 0 or len(tail) - end < _END_SIZE:
        found = f"{num_bytes} bytes without the end of a zip"
        remedy = f"The copy or the write of the file was cut short. {RESTORE}"
        raise TruncatedError(explain(path, found, "a whole checkpoint", remedy))
    found = f"{len(tail) - end - _END_SIZE} bytes after the end of the zip"
    raise corrupt(path, found, "none")


def _check_entries(entries: list[zipfile.ZipInfo], path: Path) -> str:
    """Check what the table of contents says; return the folder of all entries, with its slash."""
    names = [entry.filename for entry in entries]
    folder = names[0].partition("/")[0] if names else ""
    name = f"{folder}/data.pkl"
    if name not in names or f"{folder}/constants.pkl" in names:
        found = f"a zip with the entries {names[:5]}"
        raise NotACheckpointError(explain(path, found, "an archive of torch.save", "Check the path."))
    if len(set(names)) != len(names):
        raise corrupt(path, "an entry that is there twice", "unique names")
    for entry in entries:
        problem = _problem_of(entry, folder)
        if problem is not None:
            raise corrupt(path, f"{problem} in the entry {entry.filename!r}", "what torch.save writes")
    return f"{folder}/"


def _problem_of(entry: zipfile.ZipInfo, folder: str) -> str | None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return "compression"
    if not entry.filename.startswith(f"{folder}/") or entry.orig_filename != entry.filename:
        return "a strange name"
    if entry.flag_bits & ~_FLAGS:
        return f"the flags {entry.flag_bits:#x}"
    # torch takes an entry with the attributes of a folder for one, and reads nothing.
    if entry.external_attr or entry.internal_attr or entry.volume or entry.comment:
        return "attributes or a comment"
    return None


def _check_layout(
    file: IO[bytes], path: Path, entries: list[zipfile.ZipInfo], start_dir: int, num_bytes: int
) -> list[int]:
    """Check that the entries follow each other without a gap, up to the table of contents and the end.

    Returns:
        Where the content of each begins.
    """
    contents: list[int] = []
    offsets = [entry.header_offset for entry in entries]
    for entry, start, stop in zip(entries, offsets, [*offsets[1:], start_dir], strict=True):
        if entry is entries[0] and start != 0:
            raise corrupt(path, f"{start} bytes before the first entry", "none")
        contents.append(_check_entry(file, path, entry, stop))
    position = start_dir
    for _ in entries:
        file.seek(position)
        fields = _CENTRAL_HEADER.unpack(file.read(_CENTRAL_HEADER.size))
        position += _CENTRAL_HEADER.size + fields[10] + fields[11] + fields[12]
    if num_bytes - position not in (_END_SIZE, _END_SIZE + _END64_SIZE):
        raise corrupt(path, f"{num_bytes - position} bytes after the table of contents", "its end record")
    return contents


def _check_entry(file: IO[bytes], path: Path, entry: zipfile.ZipInfo, stop: int) -> int:
    file.seek(entry.header_offset)
    fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    magic, flags, method, name_size, extra_size = (fields[i] for i in (0, 2, 3, 9, 10))
    name = file.read(name_size)
    data_stop = entry.header_offset + _LOCAL_HEADER.size + name_size + extra_size + entry.file_size
    if magic != _LOCAL_MAGIC or name != entry.filename.encode() or (flags, method) != (entry.flag_bits, 0):
        raise corrupt(path, f"two headers of {entry.filename!r} that disagree", "equal ones")
    file.seek(data_stop)
    descriptors = [b""]
    if flags & _HAS_DESCRIPTOR:
        start = struct.pack("<4sI", b"PK\x07\x08", entry.CRC)
        descriptors = [start + struct.pack("<QQ", entry.file_size, entry.file_size)]
        if entry.file_size < 1 << 32:
            descriptors.append(start + struct.pack("<II", entry.file_size, entry.file_size))
    gap = stop - data_stop
    if gap not in map(len, descriptors) or file.read(gap) not in descriptors:
        raise corrupt(path, f"{gap} unexplained bytes after the entry {entry.filename!r}", "the next entry")
    return int(data_stop - entry.file_size)


def corrupt(path: Path, found: str, expected: str) -> CorruptError:
    """The error for a damaged file."""
    return CorruptError(explain(path, found, expected, RESTORE))
