"""What can be wrong with a checkpoint file."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(Exception):
    """A file cannot be used as a checkpoint. The base of all errors about what is *in* a file.

    A file that cannot be reached at all is an `OSError`, a wrong argument a `ValueError` or a `TypeError`.
    """


class NotACheckpointError(CheckpointError):
    """The file is whole, or of another kind altogether, but is not a checkpoint."""


class TruncatedError(CheckpointError):
    """The file ends before its table of contents does."""


class CorruptError(CheckpointError):
    """The file is a checkpoint whose bytes are not those that were written."""


class UnsafeError(CheckpointError):
    """The file asks for something that is neither a plain value nor a tensor. Nothing of it was run."""


class VersionTooNewError(CheckpointError):
    """A release with a higher major number wrote the file.

    Attributes:
        version: the version in the file.
    """

    def __init__(self, message: str, version: str | None = None) -> None:
        super().__init__(message)
        self.version = version


class VersionTooOldError(CheckpointError):
    """A release with a lower major number wrote the file: it has to be migrated.

    Attributes:
        version: the version in the file, None if it has none.
    """

    def __init__(self, message: str, version: str | None = None) -> None:
        super().__init__(message)
        self.version = version


def explain(path: Path, found: str, expected: str, remedy: str) -> str:
    """The four parts that the message of every error about a file has."""
    # Text of the file is in it: no control character gets to somebody's terminal.
    found = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in found)
    return f"{path}: found {found}; expected {expected}. {remedy}"
