"""Reading checkpoints: nothing is believed before it is checked, and nothing of a file is ever run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch

from helios.chkpt._arguments import as_path, check_bool
from helios.chkpt._container import read_pickle
from helios.chkpt._errors import (
    CheckpointError,
    CorruptError,
    NotACheckpointError,
    UnsafeError,
    VersionTooNewError,
    VersionTooOldError,
    explain,
)
from helios.chkpt._peek import peek
from helios.chkpt._versions import check_version

MapLocation = (
    Callable[[torch.types.Storage, str], torch.types.Storage] | torch.device | str | dict[str, str] | None
)
"""What `torch.load` takes as ``map_location``."""

_REFUSED = re.compile(r"GLOBAL (\S+)")
_FAMILIES = frozenset(
    {"helios", "pathlib", "torch", "collections"}
)  # what releases of Helios had in their files
_LEGACY_KEYS = frozenset({"training_state", "model", "rng"})


def load(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = None,
    mmap: bool | None = None,
    verify: bool = True,
    safe_types: Sequence[type] = (),
) -> dict[str, object]:
    """Read a checkpoint.

    Args:
        path: the file.
        map_location: where tensors go, as for `torch.load`; checkpoints hold CPU tensors.
        mmap: map the tensors instead of reading them; None is `torch.load`'s default. The file must not be
            changed in place while they are in use (`save` never does that).
        verify: read the whole file first and compare its CRCs. The rest of the container is always checked.
        safe_types: classes that may be made from the file in addition to plain values and tensors, in this
            call only.

    Returns:
        What was saved, with the key ``version`` added.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        CheckpointError: one of its subclasses, by what is wrong with the file.
        TypeError, ValueError: a wrong argument.
        RuntimeError: from torch, if `map_location` names a device that is not there.
    """
    target = as_path("path", path)
    check_bool("verify", verify)
    if mmap is not None:
        check_bool("mmap", mmap)
    _check_types(safe_types)
    with open_regular(target) as file:
        state = read_state(file, target, map_location, mmap, crc=verify, safe_types=safe_types)
    check_version(state.get("version"), target, present="version" in state)
    return state


def verify(path: str | os.PathLike[str], *, safe_types: Sequence[type] = ()) -> None:
    """Check that a file is a whole checkpoint: every CRC, and that it loads; tensors are mapped, not read in.

    The version is not judged: a file of another major release that is whole passes, and `load` says what to
    do with it.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        CheckpointError: one of its subclasses, by what is wrong with the file.
        TypeError, ValueError: `path` is no path.
    """
    target = as_path("path", path)
    _check_types(safe_types)
    with open_regular(target) as file:
        try:
            read_state(file, target, "cpu", True, crc=True, safe_types=safe_types)
        except (VersionTooOldError, VersionTooNewError):
            return


def _check_types(safe_types: object) -> None:
    if isinstance(safe_types, str) or not isinstance(safe_types, Sequence):
        raise TypeError(f"safe_types: expected a sequence of classes, got {type(safe_types).__name__}")
    for kind in safe_types:
        if not isinstance(kind, type):
            raise TypeError(f"safe_types: expected classes, got {kind!r}")


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; does not wait for the writer of a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")  # raises IsADirectoryError
    if not file.seekable():
        file.close()
        raise NotACheckpointError(explain(path, "no regular file", "a checkpoint file", "Check the path."))
    return file


def read_state(
    file: IO[bytes],
    path: Path,
    map_location: MapLocation,
    mmap: bool | None,
    *,
    crc: bool,
    safe_types: Sequence[type],
) -> dict[str, object]:
    """The dictionary in an open file, whatever its version says, as long as only plain values are in it.

    Raises:
        CheckpointError: version errors only for files of other releases that hold more than plain values.
    """
    data = read_pickle(file, path, crc=crc)
    try:
        state = _unpickle(file, map_location, mmap, safe_types)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise _refusal(file, path, data, str(error)) from error
    except Exception as error:
        if map_location != "cpu" and _loads_to_cpu(file, safe_types):
            raise  # the file is good: what was asked for is not possible here
        remedy = "Restore it from a copy, or go back to an earlier checkpoint."
        found = f"a content that does not load ({type(error).__name__}: {error})"
        raise CorruptError(explain(path, found, "tensors and plain values", remedy)) from error
    if type(state) is not dict:
        found = f"a {type(state).__name__}"
        raise NotACheckpointError(explain(path, found, "a dict", "Use torch.load for it."))
    return cast("dict[str, object]", state)


def _unpickle(
    file: IO[bytes], map_location: MapLocation, mmap: bool | None, safe_types: Sequence[type]
) -> object:
    # safe_globals takes away on exit what it was given: not what the caller allowed globally before.
    known = torch.serialization.get_safe_globals()
    extra: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    extra = [kind for kind in safe_types if kind not in known]
    # torch maps by path only. This one names the file that was checked, even if `path` was replaced since.
    source = f"/dev/fd/{file.fileno()}" if mmap else file
    file.seek(0)
    with torch.serialization.safe_globals(extra):
        return torch.load(source, map_location=map_location, mmap=mmap, weights_only=True)


def _loads_to_cpu(file: IO[bytes], safe_types: Sequence[type]) -> bool:
    try:
        _unpickle(file, "cpu", True, safe_types)
    except Exception:  # torch's loader has no common error
        return False
    return True


def _refusal(file: IO[bytes], path: Path, data: bytes, message: str) -> CheckpointError:
    """The error for a pickle that torch refuses: written by another release, or unsafe."""
    seen = peek(data)
    try:
        file.seek(0)
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # opcodes it does not know; then torch's message has to do
        refused = []
    if seen is not None and refused and all(name.partition(".")[0] in _FAMILIES for name in refused):
        helios = any(name.startswith("helios.") for name in refused) or seen.keys >= _LEGACY_KEYS
        try:
            if seen.version is not None or helios:
                check_version(seen.version, path, present="version" in seen.keys)
        except CheckpointError as error:
            return error
    match = _REFUSED.search(message)
    found = (
        f"the global {match.group(1)}" if match else f"a pickle that is more than data ({message[-200:]!r})"
    )
    remedy = "Nothing of the file was run. If you trust it and the type is your own, pass it in safe_types."
    return UnsafeError(explain(path, found, "plain values and tensors only", remedy))
