"""Files that are there as a whole or not at all, and what a killed writer leaves behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_TEMP_NAME = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_MAX_TARGET_BYTES = 255 - len(".") - len(".0123456789abcdef.tmp")
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], None], before_replace: Callable[[IO[bytes]], None] | None = None
) -> None:
    """Make `path` the file that `write` writes, durably; at any instant it is the old file or the new one.

    A symbolic link stays: what it points to is replaced. The mode is that of a new file: 0o666 less the
    umask, whatever the old file had. `before_replace` gets the new file while the old one is still in its place.

    Raises:
        OSError: with its errno; the old file is as it was and nothing else is left in the folder.
        ValueError: there is something at `path` that is no regular file.
    """
    target = resolve(path)
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            file, temp = _open_temp(target)
        except FileNotFoundError:
            message = "No such folder (it is not created)"
            raise FileNotFoundError(errno.ENOENT, message, str(target.parent)) from None
        stack.enter_context(file)
        try:
            write(file)
            os.fsync(file.fileno())
            if before_replace is not None:
                before_replace(file)
            temp.replace(target)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temp.unlink()
            if isinstance(error, OSError) and error.filename is None and error.errno is not None:
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        sync_folder(folder, target.parent)  # the lock is held until here, so no sweeper saw an orphan


def resolve(path: Path) -> Path:
    """The file that a write to `path` replaces: links are followed.

    Raises:
        IsADirectoryError: it is a folder.
        ValueError: it is neither a regular file nor free.
        OSError: links in a circle.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise ValueError(f"path: {path} is no regular file, so it cannot be replaced by a checkpoint")
    return target


def orphans(folder: Path) -> Iterator[tuple[Path, str]]:
    """Temporary files in `folder`, each with the name, maybe cut off, of the file it was to become."""
    for entry in sorted(folder.iterdir()):
        match = _TEMP_NAME.fullmatch(entry.name)
        if match:
            yield entry, match["target"]


def sweep(temp: Path) -> bool:
    """Delete a temporary file unless its writer lives and so holds its lock; say whether it was deleted."""
    try:
        descriptor = os.open(temp, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), temp.lstat()):
            return False
        temp.unlink()
    except OSError:  # locked by its writer, or no locks here, or already in its place
        return False
    finally:
        os.close(descriptor)
    return True


def _open_temp(target: Path) -> tuple[IO[bytes], Path]:
    """A new locked file beside `target`. A sweeper may delete it before it is locked: then another."""
    stem = target.name
    if len(os.fsencode(stem)) > _MAX_TARGET_BYTES:
        stem = os.fsencode(stem)[:_MAX_TARGET_BYTES].decode("utf-8", "ignore")
    while True:
        temp = target.with_name(f".{stem}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "w+b", buffering=0)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                return file, temp  # no locks here: then no sweeper gets one either, and none deletes anything
            file.close()
            temp.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(target)) from error
            raise
        if os.fstat(descriptor).st_nlink:
            return file, temp
        file.close()


def sync_folder(descriptor: int, folder: Path) -> None:
    """Have the names in an open folder on the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise OSError(error.errno, error.strerror, str(folder)) from error
