"""Which versions of the format this release reads. Pure functions."""

from __future__ import annotations

from pathlib import Path

from packaging.version import InvalidVersion, Version

from helios.chkpt._errors import NotACheckpointError, VersionTooNewError, VersionTooOldError, explain
from helios.chkpt._version import __version__

MAJOR = Version(__version__).major
"""The format changes with the major version of helios-chkpt only."""


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
        found = f"the version {version!r:.80} ({type(version).__name__})"
        raise NotACheckpointError(explain(path, found, f"text such as {__version__!r}", remedy))
    if major > MAJOR:
        remedy = f"Install it: pip install 'helios-chkpt>={version}'"
        found = f"version {version} (this is helios-chkpt {__version__})"
        raise VersionTooNewError(explain(path, found, f"version {MAJOR}.x", remedy), version)
    if major < MAJOR:
        remedy = f"Migrate it: {_command(path)}."
        raise VersionTooOldError(explain(path, f"version {version}", f"version {MAJOR}.x", remedy), version)


def major_of(version: object) -> int | None:
    """The major number of a PEP 440 version; None if `version` is none."""
    if not isinstance(version, str):
        return None
    try:
        return Version(version).major
    except InvalidVersion:
        return None


def _command(path: Path) -> str:
    return f"python -m helios.chkpt_migrator {path.parent}"
