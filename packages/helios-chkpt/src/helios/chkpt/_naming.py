"""Names of checkpoints: ``<run>_epoch_<epoch>_iter_<iteration>[_<metadata>].pth``, or ``.dcp``."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from helios.chkpt._arguments import check_bool, check_count

MAX_NAME_BYTES = 255  # NAME_MAX of every file system in use

SHARDED_SUFFIX = ".dcp"
"""How the name of a sharded checkpoint ends, which is a folder."""

MAIN_FILE = "helios.pth"
"""The file in it that makes it a checkpoint."""

_NUMBER = "(0|[1-9][0-9]*)"
# `.+` takes as much as it can, so the last `_epoch_N_iter_M` of the name is the one that counts.
_PATTERN = re.compile(f"(.+)_epoch_{_NUMBER}_iter_{_NUMBER}(?:_(.+))?(\\.pth|\\.dcp)", re.DOTALL)


@dataclass(frozen=True)
class CheckpointName:
    """The parts of a checkpoint's file name.

    Attributes:
        run_name: the run; may itself contain ``_epoch_3_iter_4``.
        epoch: the epoch in progress or just ended, from 0.
        iteration: iterations done, from 0.
        metadata: free text at the end of the name, empty for none.
        is_sharded: it is a folder, ``.dcp``, that `save_sharded` writes; else a file, ``.pth``.
    """

    run_name: str
    epoch: int
    iteration: int
    metadata: str = ""
    is_sharded: bool = False


def format_name(name: CheckpointName) -> str:
    """The file name for `name`; `parse_name` gives back an equal `CheckpointName`.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: the run name is empty; a number is negative; a text has a path separator, a control
            character or something that no file name can hold; the metadata looks like an epoch and an
            iteration, so that the name could not be read back; the name is longer than 255 bytes.
    """
    if not isinstance(name, CheckpointName):
        raise TypeError(f"name: expected CheckpointName, got {type(name).__name__}")
    check_text("run_name", name.run_name)
    check_text("metadata", name.metadata)
    if not name.run_name:
        raise ValueError("run_name: expected at least one character, got ''")
    check_count("epoch", name.epoch, at_least=0)
    check_count("iteration", name.iteration, at_least=0)
    check_bool("is_sharded", name.is_sharded)
    end = f"_{name.metadata}" if name.metadata else ""
    end += SHARDED_SUFFIX if name.is_sharded else ".pth"
    text = f"{name.run_name}_epoch_{name.epoch}_iter_{name.iteration}{end}"
    num_bytes = len(os.fsencode(text))
    if num_bytes > MAX_NAME_BYTES:
        raise ValueError(
            f"the file name {text!r} has {num_bytes} bytes, expected at most {MAX_NAME_BYTES}: "
            "shorten run_name or metadata"
        )
    if parse_name(text) != name:
        raise ValueError(
            f"metadata: {name.metadata!r} contains an epoch and an iteration, so {text!r} would be read back "
            f"as {parse_name(text)}; expected text without '_epoch_<number>_iter_<number>'"
        )
    return text


def parse_name(filename: str) -> CheckpointName | None:
    """The parts of a checkpoint's file name, or None if `filename` is not the name of a checkpoint.

    Numbers are read as `format_name` writes them: ``epoch_03`` is no epoch.

    Raises:
        TypeError: `filename` is no `str`.
    """
    if not isinstance(filename, str):
        raise TypeError(f"filename: expected str, got {type(filename).__name__}")
    match = _PATTERN.fullmatch(filename)
    if match is None or _bad_character(filename) is not None:
        return None
    if _num_bytes(filename) > MAX_NAME_BYTES:
        return None
    run_name, epoch, iteration, metadata, suffix = match.groups()
    return CheckpointName(run_name, int(epoch), int(iteration), metadata or "", suffix == SHARDED_SUFFIX)


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that is named as a sharded checkpoint is."""
    return (path.name or path.resolve().name).endswith(SHARDED_SUFFIX) and path.is_dir()


def main_file(path: Path) -> Path:
    """The file that says whether, and since when, there is a checkpoint: its own, or that in the folder."""
    return path / MAIN_FILE if is_sharded(path) else path


def check_text(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is text that may be part of a file name."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, got {type(value).__name__}")
    bad = _bad_character(value)
    if bad is not None:
        raise ValueError(
            f"{name}: {value!r} contains {bad!r}; expected no path separator and no control character"
        )
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {value!r} cannot be part of a file name: {error.reason}") from None


def _num_bytes(filename: str) -> int:
    try:
        return len(os.fsencode(filename))
    except UnicodeEncodeError:  # no file has such a name
        return len(filename.encode("utf-8", "surrogatepass"))


def _bad_character(text: str) -> str | None:
    # A backslash separates paths where Windows machines read the same folder.
    return next((c for c in text if c in "/\\" or unicodedata.category(c) == "Cc"), None)
