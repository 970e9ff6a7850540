"""Writing one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch.utils.serialization import config

from helios.chkpt._arguments import as_path
from helios.chkpt._atomic import write_atomically
from helios.chkpt._snapshot import TOO_DEEP, snapshot
from helios.chkpt._version import __version__


def save(state: Mapping[str, object], path: str | os.PathLike[str]) -> Path:
    """Write a checkpoint, atomically and durably.

    When this returns, the file is on the disk under its name; if it raises, or the process is killed, what
    was there before is there still. The file is an archive that plain ``torch.load(weights_only=True)`` opens
    on any machine: tensors are stored detached and on the CPU, tied where they were tied.

    Args:
        state: plain values and tensors under text keys, see the README; the key ``version`` is added.
        path: the file. A symbolic link is followed and kept. Its folder must exist.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError: something in `state` cannot be stored; the message says where it is.
        ValueError: as `TypeError`, or `state` has a key ``version``, or `path` is no regular file.
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written; the old file is as it was.
    """
    target = as_path("path", path)
    write_snapshot(prepared(state), target)
    return target


def prepared(state: Mapping[str, object], *, copy: bool = False) -> dict[str, object]:
    """The snapshot of a state (see there) with the version added."""
    stored = snapshot(state, copy=copy)
    if "version" in stored:
        raise ValueError("state: the key 'version' is added by save; expected a state without it")
    return {**stored, "version": __version__}


def write_snapshot(stored: dict[str, object], path: Path) -> None:
    """Write what `prepared` gave."""

    def write(file: IO[bytes]) -> None:
        handle = _Handle(file)
        try:
            # CRCs can be switched off for the whole process, and a file without them cannot be verified.
            with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
                torch.save(stored, handle, pickle_protocol=2)  # type: ignore[arg-type]
        except BaseException as error:
            if handle.error is not None and handle.error is not error:
                raise handle.error from error
            raise

    try:
        write_atomically(path, write)
    except RecursionError:  # torch's pickler
        raise ValueError(TOO_DEEP) from None


class _Handle:
    """A file that remembers its first error: torch goes on writing and ends with an error of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self.error is not None:
            raise self.error
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
