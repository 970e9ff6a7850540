"""Checkpoint files that are atomic, verified, safe and versioned.

`save` and `load` write and read one file; `CheckpointStore` keeps those of a run; `find_last_checkpoint`
finds the one to resume from. Errors about what is in a file are subclasses of `CheckpointError`.
"""

from helios.chkpt._comparison import Difference, DifferenceKind, diff
from helios.chkpt._errors import (
    CheckpointError,
    CorruptError,
    NotACheckpointError,
    TruncatedError,
    UnsafeError,
    VersionTooNewError,
    VersionTooOldError,
)
from helios.chkpt._find import find_last_checkpoint, load_last_checkpoint
from helios.chkpt._inspect import CheckpointInfo, Entry, inspect
from helios.chkpt._naming import CheckpointName, format_name, parse_name
from helios.chkpt._read import load, verify
from helios.chkpt._sharded.api import load_sharded, save_sharded
from helios.chkpt._store import CheckpointStore
from helios.chkpt._version import __version__
from helios.chkpt._write import check_state, save

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointName",
    "CheckpointStore",
    "CorruptError",
    "Difference",
    "DifferenceKind",
    "Entry",
    "NotACheckpointError",
    "TruncatedError",
    "UnsafeError",
    "VersionTooNewError",
    "VersionTooOldError",
    "__version__",
    "check_state",
    "diff",
    "find_last_checkpoint",
    "format_name",
    "inspect",
    "load",
    "load_last_checkpoint",
    "load_sharded",
    "parse_name",
    "save",
    "save_sharded",
    "verify",
]
