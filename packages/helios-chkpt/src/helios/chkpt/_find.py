"""Finding checkpoints in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helios.chkpt._arguments import as_path
from helios.chkpt._errors import CheckpointError, VersionTooNewError, VersionTooOldError
from helios.chkpt._naming import MAIN_FILE, SHARDED_SUFFIX, CheckpointName, check_text, is_sharded, parse_name
from helios.chkpt._read import load, verify

if TYPE_CHECKING:
    from helios.chkpt._materialise import MapLocation

_MAX_LISTINGS = 10
_LOGGER = logging.getLogger("helios.chkpt")


@dataclass(frozen=True)
class Found:
    """A file, or a folder with shards, whose name is that of a checkpoint."""

    path: Path
    name: CheckpointName
    mtime_ns: int


def find_last_checkpoint(
    root: str | os.PathLike[str], run_name: str | None = None, *, safe_types: Sequence[type] = ()
) -> Path | None:
    """The checkpoint directly in `root` with the highest (epoch, iteration) that passes ``verify(digests=False)``.

    Of several with the same numbers the one changed last counts. Each file that is skipped is reported, with
    the reason, as a warning of the logger ``helios.chkpt``. A whole file of another release counts, so that
    `load` can say what to do with it.

    Args:
        root: the folder.
        run_name: look at this run only; None for all.
        safe_types: as for `load`: a file that holds other classes does not verify.

    Returns:
        The path, or None if there is none or no folder `root`.

    Raises:
        NotADirectoryError: `root` is a file.
        OSError: the folder cannot be read.
        TypeError, ValueError: a wrong argument.
    """
    folder = as_path("root", root)
    if run_name is not None:
        check_run_name(run_name)
    return next((path for path in _newest_first(folder, run_name) if verifies(path, safe_types)), None)


def load_last_checkpoint(
    root: str | os.PathLike[str],
    run_name: str | None = None,
    *,
    map_location: MapLocation = None,
    safe_types: Sequence[type] = (),
    shards: bool = True,
) -> tuple[Path, dict[str, object]] | None:
    """The checkpoint that `find_last_checkpoint` finds, loaded.

    A file is read once, verified while it is. Of a folder, the shards are read twice: all are verified before any is
    loaded. Without shards, they are read once and the main file twice. This process alone reads them: of large ones,
    that takes a while.

    Args:
        root: the folder.
        run_name: look at this run only; None for all.
        map_location: as for `load`.
        safe_types: as for `load`.
        shards: as for `load`; without them, they are verified all the same, so that a damaged one leads to the
            checkpoint before.

    Returns:
        Path and content, or None if there is none.

    Raises:
        VersionTooOldError, VersionTooNewError: the last one that is whole is of another release.
        NotADirectoryError, OSError, TypeError, ValueError: as `find_last_checkpoint`.
        RuntimeError: from torch, if `map_location` names a device that is not there.
    """
    folder = as_path("root", root)
    if run_name is not None:
        check_run_name(run_name)
    for path in _newest_first(folder, run_name):
        try:
            if not shards and is_sharded(path):
                verify(path, safe_types=safe_types, digests=False)
            return path, load(path, map_location=map_location, safe_types=safe_types, shards=shards)
        except (VersionTooOldError, VersionTooNewError):
            if verifies(path, safe_types):
                raise
        except (CheckpointError, OSError) as error:
            _report(path, error)
    return None


def _newest_first(folder: Path, run_name: str | None) -> Iterator[Path]:
    """The files, newest first; once more if the folder has others by then.

    A process that saves and prunes may delete all that was listed before it is looked at.
    """
    before: list[Path] | None = None
    for _ in range(_MAX_LISTINGS):
        paths = [found.path for found in reversed(listed(folder, run_name))]
        if paths == before:
            return
        yield from paths
        before = paths


def check_run_name(run_name: object) -> None:
    """TypeError or ValueError unless `run_name` can be the name of a run."""
    check_text("run_name", run_name)
    if not run_name:
        raise ValueError("run_name: expected at least one character, got ''")


def listed(folder: Path, run_name: str | None) -> list[Found]:
    """What is named as a checkpoint, rising by (epoch, iteration, time of change, name).

    A folder without its main file is none: its writer is not done, or was killed.
    """
    found: list[Found] = []
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return found
    for path in entries:
        name = parse_name(path.name)
        if name is not None and run_name in (None, name.run_name):
            try:
                main = path / MAIN_FILE if name.is_sharded else path
                found.append(Found(path, name, main.stat().st_mtime_ns))
            except OSError as error:  # a link to nothing, or deleted since
                if name.is_sharded and isinstance(error, FileNotFoundError | NotADirectoryError):
                    continue
                _LOGGER.warning("skipped %s: %s", path, error)
    found.sort(key=lambda f: (f.name.epoch, f.name.iteration, f.mtime_ns, f.path.name))
    return found


def pth_files(root: Path, *, recursive: bool) -> list[Path]:
    """What is named ``.pth`` in a folder and is no folder, sorted; folders below it that cannot be read are among it.

    So somebody hears of them: nobody knows what is in them. Links to folders are not followed, and sharded checkpoints
    are not looked into.

    Raises:
        OSError: `root` cannot be read, or is no folder.
    """
    found: list[Path] = []

    def add(error: OSError) -> None:
        if Path(error.filename) == root:
            raise error
        found.append(Path(error.filename))

    for folder, folders, names in os.walk(root, onerror=add):
        found += [Path(folder, name) for name in names if name.endswith(".pth")]
        folders[:] = [name for name in folders if not name.endswith(SHARDED_SUFFIX)]
        if not recursive:
            break
    return sorted(found)


def sharded_folders(root: Path, *, recursive: bool) -> list[Path]:
    """The sharded checkpoints in a folder, sorted: what is named ``.dcp`` and has a main file. Links are followed.

    Raises:
        OSError: `root` cannot be read, or is no folder.
    """
    found: list[Path] = []
    for folder, folders, _ in os.walk(root):
        mine = [name for name in folders if name.endswith(SHARDED_SUFFIX)]
        found += [Path(folder, name) for name in mine if os.path.lexists(Path(folder, name, MAIN_FILE))]
        folders[:] = [name for name in folders if name not in mine]
        if not recursive:
            break
    return sorted(found)


def verifies(path: Path, safe_types: Sequence[type] = ()) -> bool:
    """Whether `path` passes `verify`; the reason why not is logged."""
    try:
        verify(path, safe_types=safe_types, digests=False)
    except (CheckpointError, OSError) as error:
        _report(path, error)
        return False
    return True


def _report(path: Path, error: Exception) -> None:
    _LOGGER.warning("skipped %s: %s: %s", path, type(error).__name__, error)
