"""Bringing the checkpoints of a folder to the current version."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from helios.chkpt import CheckpointError, VersionTooOldError, __version__, save, verify
from helios.chkpt._arguments import as_path
from helios.chkpt._read import open_regular, read_state
from helios.chkpt._versions import check_version, major_of
from helios.chkpt_migrator._chain import MIGRATIONS, Migration, steps_from

Outcome = Literal["current", "migrated", "failed"]


@dataclass(frozen=True)
class FileResult:
    """What became of one file.

    Attributes:
        path: the file.
        outcome: ``current`` (was so before, not touched), ``migrated``, or ``failed`` (not touched).
        reason: why it failed; empty otherwise.
    """

    path: Path
    outcome: Outcome
    reason: str = ""


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
        return {"current": counter["current"], "migrated": counter["migrated"], "failed": counter["failed"]}


def migrate_checkpoints_to_current_version(root: str | os.PathLike[str]) -> MigrationReport:
    """Bring every ``.pth`` file in `root` and the folders below it to the current version.

    One bad file does not stop the others, and no file that fails is changed.

    Args:
        root: the folder with the checkpoints (``chkpt_root`` of the trainer).

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is no folder.
        TypeError, ValueError: `root` is no path.
    """
    folder = as_path("root", root)
    return MigrationReport(folder, tuple(migrate_file(path, MIGRATIONS) for path in checkpoint_files(folder)))


def checkpoint_files(root: Path) -> list[Path]:
    """The files to migrate, sorted. Earlier releases made a folder for each run, so those below count too."""
    if not root.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(root))
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    return sorted(path for path in root.rglob("*.pth") if not path.name.startswith(".") and path.is_file())


def migrate_file(path: Path, chain: Sequence[Migration]) -> FileResult:
    """Bring one file to the current version by the steps of `chain`."""
    try:
        with open_regular(path) as file:
            state = read_state(file, path, "cpu", True, crc=True, safe_types=())
        try:
            check_version(state.get("version"), path, present="version" in state)
        except VersionTooOldError as error:
            steps = steps_from(major_of(error.version) or 0, chain)
            if not steps:
                raise
            return _apply(steps, state, path)
    except VersionTooOldError as error:
        version = error.version or "a release that wrote no version"
        return FileResult(path, "failed", f"no migration from {version} in this release ({__version__})")
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        return FileResult(path, "failed", f"{type(error).__name__}: {error}")
    return FileResult(path, "current")


def _apply(steps: Sequence[Migration], state: dict[str, object], path: Path) -> FileResult:
    for migration in steps:
        state = migration.step({key: value for key, value in state.items() if key != "version"})
    save(state, path)
    verify(path)
    return FileResult(path, "migrated")
