"""What is in the folder of a checkpoint, who is writing there, and what may be deleted. Without torch.

<name>.dcp/helios.pth              makes the folder a checkpoint; names the shards that count
<name>.dcp/shards-<token>/         what one save wrote
<name>.dcp/.shards-<token>.lock    its writer holds a lock on it until `helios.pth` names these shards
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from helios.chkpt._atomic import NO_LOCKS, orphans, sweep, sync_folder
from helios.chkpt._errors import CheckpointError
from helios.chkpt._format.archive import open_file
from helios.chkpt._naming import MAIN_FILE, is_sharded, parse_name
from helios.chkpt._read import read_contents
from helios.chkpt._sharded.manifest import KEY, is_shards_name

_LOCK_NAME = re.compile(r"\.(?P<shards>shards-[0-9a-f]{16})\.lock")


@dataclass(frozen=True)
class Claim:
    """A place for new shards, which nobody sweeps while it is held.

    Attributes:
        folder: of the checkpoint.
        shards: the new folder in it.
        lock: the open, locked file.
        is_new: the checkpoint's folder was made for this.
    """

    folder: Path
    shards: Path
    lock: int
    is_new: bool

    def sync(self) -> None:
        """Have the names of the shards, of their folder and of the checkpoint's on the disk."""
        for folder in (self.shards, self.folder, *([self.folder.parent] if self.is_new else [])):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_folder(descriptor, folder)
            finally:
                os.close(descriptor)

    def release(self) -> None:
        """Let go of the lock, once the shards count."""
        with contextlib.suppress(OSError):
            _lock_of(self.shards).unlink()
        with contextlib.suppress(OSError):
            os.close(self.lock)

    def abort(self) -> None:
        """Delete the new shards, unless they count: whatever went wrong may have done so after that."""
        counts = _may_count(self.folder, self.shards.name)
        if not counts:
            shutil.rmtree(self.shards, ignore_errors=True)
        self.release()
        with contextlib.suppress(OSError):  # somebody else saved there
            if counts:
                sweep_inside(self.folder)
            elif self.is_new:
                self.folder.rmdir()


def claim(folder: Path) -> Claim:
    """Make a folder for new shards in the folder of a checkpoint, which is made if it is not there.

    Raises:
        OSError: with its errno; nothing is left.
    """
    while True:
        is_new = _make(folder)
        shards = folder / f"shards-{secrets.token_hex(8)}"
        try:
            lock = _open_lock(_lock_of(shards))
            if lock is None:
                continue
        except FileNotFoundError:
            if folder.is_dir():
                raise
            continue  # a sweeper took the folder for one that a killed writer left
        except OSError:
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        claimed = Claim(folder, shards, lock, is_new)
        try:
            shards.mkdir()
        except BaseException:
            claimed.abort()
            raise
        return claimed


def sweep_inside(folder: Path) -> list[Path]:
    """Delete the shards that do not count and that nobody is writing; return them.

    If the checkpoint's file is damaged, nobody knows which count: then all stay. So do the only shards that a
    checkpoint has and that nobody locks: every save sweeps every folder, and most are like that.

    Raises:
        OSError: the folder cannot be read.
    """
    removed: list[Path] = []
    names = {entry.name for entry in folder.iterdir()}
    locks = {match["shards"] for name in names if (match := _LOCK_NAME.fullmatch(name))}
    shards = {name for name in names if is_shards_name(name)}
    is_tidy = MAIN_FILE in names and len(shards) == 1 and not locks
    for name in [] if is_tidy else sorted(shards | locks):
        with _unlocked(folder / name) as is_free:
            # Only now: as long as its writer lived, its shards may have come to count.
            if is_free and not _may_count(folder, name):
                shutil.rmtree(folder / name, ignore_errors=True)
                removed.append(folder / name)
            if is_free:
                with contextlib.suppress(OSError):
                    _lock_of(folder / name).unlink()
    removed += [temp for temp, _ in orphans(folder) if sweep(temp)]
    return removed


def sweep_folders(root: Path, is_mine: Callable[[str], bool]) -> list[Path]:
    """Delete what killed writers left in the checkpoints' folders in `root`; return it.

    Args:
        root: the folder with the checkpoints.
        is_mine: whether a folder of this name may be swept.

    Raises:
        OSError: `root` cannot be read.
    """
    removed: list[Path] = []
    for folder in sorted(root.iterdir()):
        name = parse_name(folder.name)
        if name is None or not name.is_sharded or not is_mine(folder.name) or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            removed += sweep_inside(folder)
            if not (folder / MAIN_FILE).exists():
                folder.rmdir()
                removed.append(folder)
    return removed


def delete(path: Path) -> None:
    """Delete a checkpoint: of a folder first what makes it one, so that it is there as a whole or not at all.

    Raises:
        OSError: it is still there.
    """
    if path.is_symlink() or not is_sharded(path):
        path.unlink()
        return
    (path / MAIN_FILE).unlink()
    # Whatever is left is no checkpoint: somebody saves there, or put files of their own in it, or it is swept later.
    with contextlib.suppress(OSError):
        sweep_inside(path)
        path.rmdir()


def num_bytes_of(folder: Path) -> int:
    """The size of all files in a checkpoint's folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def identity(path: Path) -> tuple[int, ...]:
    """Numbers that change if a file does, or any file of a checkpoint's folder.

    Raises:
        OSError: it is not there.
    """
    if not is_sharded(path):
        return _identity(path)
    shards = (entry for entry in sorted(path.iterdir()) if is_shards_name(entry.name))
    files = [path / MAIN_FILE, *(file for folder in shards for file in sorted(folder.iterdir()))]
    return tuple(number for file in files for number in _identity(file))


Stamp = tuple[int, ...]


def stamp_of(folder: Path) -> Stamp | None:
    """Numbers that change if another save comes to count; None if there is none."""
    try:
        return _identity(folder / MAIN_FILE)
    except OSError:
        return None


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _make(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        return False
    except FileNotFoundError:
        message = "No such folder (it is not created)"
        raise FileNotFoundError(errno.ENOENT, message, str(folder.parent)) from None
    return True


def _lock_of(shards: Path) -> Path:
    return shards.with_name(f".{shards.name}.lock")


def _open_lock(path: Path) -> int | None:
    """A new locked file; None if a sweeper deleted it before it was locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:  # without locks, no sweeper gets one either
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from error
    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def _unlocked(shards: Path) -> Iterator[bool]:
    """Whether nobody is writing these shards; while inside, nobody else sweeps them."""
    try:
        descriptor = os.open(_lock_of(shards), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # its writer is done: it made the lock before the shards
        return
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except OSError:  # held by its writer, or no locks here
            is_free = False
        yield is_free
    finally:
        os.close(descriptor)


def _may_count(folder: Path, shards: str) -> bool:
    """Whether the checkpoint's file names these shards, or cannot be read."""
    path = folder / MAIN_FILE
    try:
        with open_file(path) as file:
            value = read_contents(file, path).values.get(KEY)
    except FileNotFoundError:
        return False
    except (CheckpointError, OSError):
        return True
    return not isinstance(value, dict) or value.get("folder") in (shards, None)
