"""Keeping the old file under another name, before the new one takes its place."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import IO

from helios.chkpt._atomic import sync_folder, write_atomically

_CHUNK_BYTES = 1 << 22
_NO_LINKS = (
    errno.EPERM,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EMLINK,
    errno.EXDEV,
    errno.EACCES,
)


def keep(old: IO[bytes], target: Path) -> Path:
    """Give the open file `old`, which is at `target`, a second name, durably.

    The name is ``<name>.bak``, or ``<name>.bak.2``, ... if another file has it already; if `old` itself has one of
    these, from a migration that was killed, that is it. Where the file system has no hard links, it is copied.

    Returns:
        The other name.

    Raises:
        OSError: neither is possible.
    """
    for number in itertools.count(1):
        backup = target.with_name(f"{target.name}.bak" + (f".{number}" if number > 1 else ""))
        try:
            os.link(target, backup, follow_symlinks=False)
        except FileExistsError:
            if _is(old, backup):
                break
            continue
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(backup):
                continue
            _copy(old, backup)
        break
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_folder(folder, target.parent)  # or a crash might leave the new file and no backup
    finally:
        os.close(folder)
    return backup


def _is(old: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(old.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _copy(old: IO[bytes], backup: Path) -> None:
    def write(file: IO[bytes]) -> None:
        position = 0
        while chunk := os.pread(old.fileno(), _CHUNK_BYTES, position):
            position += len(chunk)
            while chunk:
                chunk = chunk[os.write(file.fileno(), chunk) :]
        take_over(os.fstat(old.fileno()), file)

    write_atomically(backup, write)


def take_over(old: os.stat_result, file: IO[bytes]) -> None:
    """Give a file the mode and the times of another, and its owner as far as this process may."""
    descriptor = file.fileno()
    if (old.st_uid, old.st_gid) != ((now := os.fstat(descriptor)).st_uid, now.st_gid):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOTSUP):
                raise
    os.fchmod(descriptor, old.st_mode & 0o777)
    os.utime(descriptor, ns=(old.st_atime_ns, old.st_mtime_ns))
    os.fsync(descriptor)
