"""Which versions of the format this release reads. Pure functions."""

from __future__ import annotations

import shlex
from pathlib import Path

from packaging.version import InvalidVersion, Version

from helios.chkpt._errors import NotACheckpointError, VersionTooNewError, VersionTooOldError, explain
from helios.chkpt._version import __version__

MAJOR = Version(__version__).major
"""The format changes with the major version of helios-chkpt only."""


_MAX_TEXT = 80


def check_version(version: object, path: Path, *, present: bool = True) -> None:
    """Raise unless this release reads files of `version`.

    Args:
        version: the value of the key ``version`` in the file.
        path: the file, for messages.
        present: whether the key is there: the first releases wrote none.

    Raises:
        VersionTooOldError: lower major number, or no version.
        VersionTooNewError: higher major number.
        NotACheckpointError: `version` is no version.
    """
    if not present:
        remedy = (
            f"If Helios wrote it: migrate it: {_command(path)}. If it is a plain state dict, use torch.load."
        )
        raise VersionTooOldError(explain(path, "no key 'version'", f"version {MAJOR}.x", remedy))
    major = major_of(version)
    if major is None or not isinstance(version, str):
        remedy = "Check that Helios wrote the file."
        # Not the repr of any container: it may be without end.
        shown = f"{version!r:.80}" if type(version) in (str, int, float, bool, type(None)) else "no text"
        found = f"the version {shown} ({type(version).__name__})"
        raise NotACheckpointError(explain(path, found, f"text such as {__version__!r}", remedy))
    if major > MAJOR:
        raise too_new(version, path)
    if major < MAJOR:
        remedy = f"Migrate it: {_command(path)}."
        raise VersionTooOldError(explain(path, f"version {version}", f"version {MAJOR}.x", remedy), version)


def too_new(version: str, path: Path) -> VersionTooNewError:
    """The error for a file of a later major release."""
    # Only what is a version gets into a command that somebody may copy to a shell.
    is_version = major_of(version) is not None
    remedy = f"Install it: pip install 'helios-chkpt>={version}'" if is_version else "Upgrade helios-chkpt."
    found = f"version {version if is_version else ascii(version)[:80]} (this is helios-chkpt {__version__})"
    return VersionTooNewError(explain(path, found, f"version {MAJOR}.x", remedy), version)


def major_of(version: object) -> int | None:
    """The major number of a PEP 440 version; None if `version` is none."""
    if not isinstance(version, str) or len(version) > _MAX_TEXT:
        return None
    try:
        return Version(version).major
    except InvalidVersion:
        return None


def _command(path: Path) -> str:
    return f"python -m helios.chkpt_migrator {shlex.quote(str(path.parent))}"
