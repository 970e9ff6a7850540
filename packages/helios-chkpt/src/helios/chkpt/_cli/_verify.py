"""``verify``: whether every byte of files is what was written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helios.chkpt._cli._command import Command, Status, path_of
from helios.chkpt._cli._files import checkpoint_files, reason_of
from helios.chkpt._cli._output import plural, print_json
from helios.chkpt._errors import CheckpointError
from helios.chkpt._naming import is_sharded
from helios.chkpt._places import printable
from helios.chkpt._read import verify


@dataclass(frozen=True)
class _Result:
    path: Path
    status: Status
    reason: str = ""


_WORDS = {Status.FINE: "ok", Status.BAD: "bad", Status.UNUSABLE: "unreadable"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        metavar="FILE_OR_FOLDER",
        type=path_of,
        nargs="+",
        help="a .pth file, a .dcp folder, or a folder with some",
    )
    parser.add_argument("--recursive", action="store_true", help="in the folders below each folder, too")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="of files compare CRC-32 sums only, not SHA-256: about three times as fast",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> Status:
    results: list[_Result] = []
    for path in arguments.paths:
        for result in _results(path, arguments):
            results.append(result)
            if not arguments.json:  # as soon as it is known: large files take a while
                reason = f": {result.reason}" if result.reason else ""
                print(f"{_WORDS[result.status]:<10}  {printable(str(result.path) + reason)}", flush=True)
    if arguments.json:
        print_json([{"path": str(r.path), "state": _WORDS[r.status], "reason": r.reason} for r in results])
    elif len(results) != 1:
        print(_count(results))
    return max((result.status for result in results), default=Status.UNUSABLE)


def _results(path: Path, arguments: argparse.Namespace) -> Iterator[_Result]:
    paths = [path]
    if path.is_dir() and not is_sharded(path):
        paths = checkpoint_files(path, recursive=arguments.recursive)
    return (_verified(file, fast=arguments.fast) for file in paths)


def _verified(path: Path, *, fast: bool) -> _Result:
    try:
        verify(path, digests=not fast)
    except CheckpointError as error:
        return _Result(path, Status.BAD, reason_of(error, path))
    except OSError as error:
        return _Result(path, Status.UNUSABLE, reason_of(error, path))
    return _Result(path, Status.FINE)


def _count(results: Sequence[_Result]) -> str:
    counts = {word: sum(r.status is status for r in results) for status, word in _WORDS.items()}
    return f"{plural(len(results), 'file')}: {', '.join(f'{count} {word}' for word, count in counts.items())}"


VERIFY = Command(
    "verify",
    "Check that every byte of checkpoints is what was written, whatever release wrote them.",
    "0 all are whole, 1 some are not, 2 wrong usage, or some cannot be read, or there is none",
    _add_arguments,
    _run,
)
