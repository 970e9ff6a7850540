"""Which files a command looks at, and in which state they are."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from helios.chkpt._errors import (
    CheckpointError,
    NotACheckpointError,
    UnsafeError,
    VersionTooNewError,
    VersionTooOldError,
)
from helios.chkpt._find import pth_files, sharded_folders
from helios.chkpt._format.archive import open_archive, open_file
from helios.chkpt._inspect import load_error, version_of
from helios.chkpt._naming import CheckpointName, is_sharded, main_file, parse_name
from helios.chkpt._read import Contents, read_contents, verify
from helios.chkpt._sharded.folder import num_bytes_of
from helios.chkpt._sharded.manifest import check_files, read_shards


class State(Enum):
    """What is known of a file."""

    READABLE = "readable"
    GOOD = "good"
    OLD = "to migrate"
    NEWER = "too new"
    REFUSED = "no checkpoint"
    BAD = "bad"
    UNREADABLE = "unreadable"


_STATES = (
    (VersionTooOldError, State.OLD),
    (VersionTooNewError, State.NEWER),
    (UnsafeError, State.REFUSED),
    (NotACheckpointError, State.REFUSED),
    (OSError, State.UNREADABLE),
)

RESUMABLE = frozenset({State.READABLE, State.GOOD, State.OLD, State.NEWER})
"""What a resume stops at: a whole file of another release ends it with a message instead of an older state."""


@dataclass(frozen=True)
class Listed:
    """A file, looked at.

    Attributes:
        path: the file.
        name: the parts of its name, None if it is no name of a checkpoint.
        num_bytes: its size.
        changed_seconds: when it was changed, in seconds since 1970.
        state: what is known of it.
        reason: why it cannot be loaded; empty if it can.
        version: of the release that wrote it, None if it does not say.
        score: None if there is none.
    """

    path: Path
    name: CheckpointName | None
    num_bytes: int = 0
    changed_seconds: float = 0.0
    state: State = State.UNREADABLE
    reason: str = ""
    version: str | None = None
    score: float | None = None

    @property
    def order(self) -> tuple[str, str, int, int, float, str]:
        """By folder and run, then as `find_last_checkpoint` sees them: the last of a run is what it takes."""
        name = self.name or CheckpointName("", -1, -1)
        folder = str(self.path.parent)
        return folder, name.run_name, name.epoch, name.iteration, self.changed_seconds, self.path.name


def checkpoint_files(root: Path, *, recursive: bool) -> list[Path]:
    """The ``.pth`` files and the sharded checkpoints in a folder, sorted; see `pth_files`.

    Raises:
        FileNotFoundError, NotADirectoryError: it is none.
        OSError: it cannot be read.
    """
    if not root.is_dir():
        number = errno.ENOTDIR if root.exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), str(root))
    return sorted(pth_files(root, recursive=recursive) + sharded_folders(root, recursive=recursive))


def look_at(path: Path, *, verify_all: bool) -> Listed:
    """What is known of a file: its head and, if `verify_all`, every byte; never raises for what is wrong with it."""
    listed = Listed(path, parse_name(path.name))
    try:
        status = main_file(path).stat()
        num_bytes = num_bytes_of(path) if is_sharded(path) else status.st_size
        listed = replace(listed, num_bytes=num_bytes, changed_seconds=status.st_mtime)
        contents = _contents(path)
        manifest = contents.archive.manifest
        score = None if manifest is None else manifest.score
        listed = replace(listed, version=version_of(contents), score=score)
        if verify_all:
            verify(path, digests=False)
    except (CheckpointError, OSError) as error:
        return replace(listed, state=_state_of(error, verify_all), reason=reason_of(error, path))
    refusal = load_error(contents)
    reason = "" if refusal is None else reason_of(refusal, path)
    return replace(listed, state=_state_of(refusal, verify_all), reason=reason)


def name_as_json(name: CheckpointName | None) -> dict[str, object]:
    """The parts of a file's name, for programs; null if it is no name of a checkpoint."""
    parts = ("run_name", "epoch", "iteration", "metadata")
    return dict.fromkeys(parts) if name is None else {part: vars(name)[part] for part in parts}


def reason_of(error: Exception, path: Path) -> str:
    """What an error says, without the path that it begins with."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).removeprefix(f'{path}: ')}"


def _contents(path: Path) -> Contents:
    """What is in a file; of one with a manifest of this schema, the manifest alone: its pickle may be long.

    Of a folder its main file, and whether its shards are there.
    """
    main = main_file(path)
    with open_file(main) as file:
        archive = open_archive(file, main)
        if archive.manifest is not None and not archive.is_newer and main == path:
            return Contents(archive, {"version": archive.manifest.version}, ())
        contents = read_contents(file, main)
    if main != path and not contents.archive.is_newer:
        check_files(path, read_shards(contents.values, main))
    return contents


def _state_of(error: Exception | None, verified: bool) -> State:
    if error is None:
        return State.GOOD if verified else State.READABLE
    return next((state for kind, state in _STATES if isinstance(error, kind)), State.BAD)
