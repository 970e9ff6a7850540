"""Bringing the checkpoints of a folder to the current version.

Each file is read inertly, its values take the steps of the chain, and its tensors are copied from file to file, a chunk
at a time. The new file is read again and all its sums are compared, the old one gets a second name, and only then
the new one takes its place. At any instant there is the old file or the new one, whatever is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from helios.chkpt._arguments import as_path
from helios.chkpt._atomic import orphans, resolve, sweep
from helios.chkpt._errors import CheckpointError, CorruptError, explain
from helios.chkpt._find import pth_files
from helios.chkpt._format import archive as archives
from helios.chkpt._format.layout import Record
from helios.chkpt._format.manifest import SCHEMA
from helios.chkpt._write import write_archive
from helios.chkpt_migrator._backup import keep, take_over
from helios.chkpt_migrator._chain import MIGRATIONS, Migration
from helios.chkpt_migrator._plan import Plan, plan_for

Outcome = Literal["current", "migrated", "would migrate", "failed"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class FileResult:
    """What became of one file.

    Attributes:
        path: the file.
        outcome: ``current`` (was so before, not touched), ``migrated``, ``would migrate`` (in a dry run), or
            ``failed`` (not touched).
        reason: why it failed; empty otherwise.
        source: schema that the file had, None if it is not known.
        target: schema that the file has or would have, None if it failed.
        backup: the old file's other name, None if there is none.
        notes: what a person should know, such as a plug-in's new name.
    """

    path: Path
    outcome: Outcome
    reason: str = ""
    source: int | None = None
    target: int | None = None
    backup: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MigrationReport:
    """What became of the checkpoints of a folder.

    Attributes:
        root: the folder.
        results: one for each file, sorted by path.
    """

    root: Path
    results: tuple[FileResult, ...]

    @property
    def ok(self) -> bool:
        """Whether no file failed."""
        return all(result.outcome != "failed" for result in self.results)

    def counts(self) -> dict[Outcome, int]:
        """How many files had each outcome."""
        counter = Counter(result.outcome for result in self.results)
        outcomes: tuple[Outcome, ...] = ("current", "migrated", "would migrate", "failed")
        return {outcome: counter[outcome] for outcome in outcomes}


def migrate_checkpoints_to_current_version(
    root: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    backup: bool = True,
    progress: Progress | None = None,
) -> MigrationReport:
    """Bring every ``.pth`` file in `root` and the folders below it to the current version.

    Files stay where they are and keep their names, modes and times of change; links to files stay links. One bad file
    does not stop the others, and no file that fails is changed. A second run changes nothing.

    Args:
        root: the folder with the checkpoints. Earlier releases kept them in a folder for each model, below the
            trainer's ``chkpt_root``; this one looks directly in ``chkpt_root``, so set it to that folder afterwards.
        dry_run: check the files and say what would be done, but write nothing.
        backup: keep each old file beside the new one, as a hard link ``<name>.pth.bak``; where the file system has no
            links, as a copy.
        progress: called with numbers of bytes that were dealt with; in the end they add up to `total_bytes`.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder.
        OSError: it cannot be read. A folder below it that cannot be is a result that failed.
        TypeError, ValueError: `root` is no path.
    """
    folder = as_path("root", root)
    paths = checkpoint_files(folder)
    if not dry_run:
        _sweep(paths)
    results = [migrate_file(path, dry_run=dry_run, backup=backup, progress=progress) for path in paths]
    return MigrationReport(folder, tuple(results))


def checkpoint_files(root: Path) -> list[Path]:
    """The files to migrate, sorted. Earlier releases made a folder for each model, so those below count too."""
    if not root.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root))
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    return [p for p in pth_files(root, recursive=True) if not p.name.startswith(".") and _may_be_file(p)]


def _may_be_file(path: Path) -> bool:
    """Whether a path is a regular file; or a file or folder that cannot be looked at: somebody should hear of it."""
    try:
        return path.is_file() or path.is_dir()
    except OSError:
        return True


def total_bytes(paths: Iterable[Path]) -> int:
    """Size of all files together, for a bar."""
    return sum(map(_size, paths))


def migrate_file(
    path: Path,
    chain: Sequence[Migration] = MIGRATIONS,
    *,
    dry_run: bool = False,
    backup: bool = True,
    progress: Progress | None = None,
) -> FileResult:
    """Bring one file to the current version by the steps of `chain`; see `migrate_checkpoints_to_current_version`."""
    meter = _Meter(_size(path), progress)
    try:
        try:
            return _migrated(path, chain, dry_run, backup, meter.advance)
        except _ChangedError:
            if _is_current(path, chain):  # another migration was faster
                return FileResult(path, "current", source=SCHEMA, target=SCHEMA)
            raise
    except (CheckpointError, OSError, TypeError, ValueError, RecursionError) as error:
        return FileResult(path, "failed", f"{type(error).__name__}: {error}")
    finally:
        meter.finish()


class _ChangedError(OSError):
    """Somebody else changed or replaced a file while it was migrated."""


def _migrated(
    path: Path, chain: Sequence[Migration], dry_run: bool, backup: bool, advance: Progress
) -> FileResult:
    with archives.open_file(path) as file:
        plan = plan_for(file, path, chain)
        if plan is None:
            return FileResult(path, "current", source=SCHEMA, target=SCHEMA)
        if dry_run:
            archives.check_records(file, plan.archive)
            return FileResult(path, "would migrate", source=plan.source, target=SCHEMA, notes=plan.notes)
        kept = _replace(file, path, plan, backup, advance)
        return FileResult(path, "migrated", source=plan.source, target=SCHEMA, backup=kept, notes=plan.notes)


def _is_current(path: Path, chain: Sequence[Migration]) -> bool:
    try:
        with archives.open_file(path) as file:
            return plan_for(file, path, chain) is None
    except (CheckpointError, OSError):
        return False


def _replace(file: IO[bytes], path: Path, plan: Plan, backup: bool, advance: Progress) -> Path | None:
    """Write the new file, verify it, keep the old one, and put the new one in its place."""
    target, before = resolve(path), os.fstat(file.fileno())
    olds = [plan.archive.records[f"data/{key}"] for key in plan.storages]
    kept: list[Path] = []

    def before_replace(new: IO[bytes]) -> None:
        _verify(new, path, olds)
        take_over(before, new)
        if not _is_unchanged(before, file, target):
            message = "it was changed or replaced by somebody else while it was migrated"
            raise _ChangedError(errno.EBUSY, message, str(path))
        if backup:
            kept.append(keep(file, target))

    sources = [_Region(file, path, record, advance) for record in olds]
    write_archive(plan.values, sources, target, before_replace=before_replace)
    return kept[0] if kept else None


def _verify(new: IO[bytes], path: Path, olds: Sequence[Record]) -> None:
    """Prove that the new file is whole and that its tensors are those of the old one.

    The sums that the old file had of its tensors are those of what was read from it, and those of what is read from
    the new file now. Their SHA-256 was taken from the same bytes on their way and is in the new file.
    """
    archive = archives.open_archive(new, path)
    remedy = "Restore it from a copy, or go back to an earlier checkpoint."
    for number, old in enumerate(olds):
        record = archive.records[f"data/{number}"]
        if (record.num_bytes, record.crc32) != (old.num_bytes, old.crc32):
            found = f"the CRC-32 {record.crc32:#010x} in the record {old.name!r}"
            raise CorruptError(explain(path, found, f"{old.crc32:#010x}", remedy))
    try:
        archives.check_records(new, archive)
    except CorruptError as error:
        raise CorruptError(
            f"{error} This is about the new file, which was removed: check the disk."
        ) from error


def _is_unchanged(before: os.stat_result, file: IO[bytes], target: Path) -> bool:
    now = os.fstat(file.fileno())
    try:
        is_there = os.path.samestat(now, target.lstat())
    except FileNotFoundError:
        is_there = False
    return is_there and (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


class _Region:
    """A record of an open file, as the source of one of another: see `helios.chkpt._write.Source`."""

    def __init__(self, file: IO[bytes], path: Path, record: Record, advance: Progress) -> None:
        self._read = archives.reader(file, path)
        self._record = record
        self._advance = advance
        self.num_bytes = record.num_bytes

    def chunks(self, chunk_bytes: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(chunk_bytes, self.num_bytes)))
        for start in range(0, self.num_bytes, chunk_bytes):
            piece = buffer[: min(chunk_bytes, self.num_bytes - start)]
            self._read(self._record.offset + start, piece)
            yield piece
            self._advance(len(piece))


class _Meter:
    """Tells somebody of the bytes of one file, each once."""

    def __init__(self, num_bytes: int, progress: Progress | None) -> None:
        self._left = num_bytes
        self._progress = progress

    def advance(self, num_bytes: int) -> None:
        step = min(num_bytes, self._left)
        self._left -= step
        if self._progress is not None and step:
            self._progress(step)

    def finish(self) -> None:
        self.advance(self._left)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sweep(paths: Iterable[Path]) -> None:
    """Delete what killed migrations of these files left."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            target = resolve(path)
            names.setdefault(target.parent, set()).add(target.name)
    for folder, targets in names.items():
        with contextlib.suppress(OSError):
            for temp, name in orphans(folder):
                if any(target.startswith(name) for target in targets):  # long names are cut off
                    sweep(temp)
