"""``prune``: delete old checkpoints of a run, never the last good one."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from helios.chkpt._cli._command import Command, Status, path_of
from helios.chkpt._cli._files import checkpoint_files, reason_of
from helios.chkpt._cli._output import plural, print_json, size_text
from helios.chkpt._find import listed, verifies
from helios.chkpt._naming import is_sharded
from helios.chkpt._places import printable
from helios.chkpt._read import read_score
from helios.chkpt._retention import Candidate, Retention, deletable
from helios.chkpt._sharded.folder import delete, num_bytes_of


class _Outcome(Enum):
    KEPT = "kept"
    DELETED = "deleted"
    WOULD_DELETE = "would delete"
    FAILED = "not deleted"


@dataclass(frozen=True)
class _Result:
    path: Path
    outcome: _Outcome
    num_bytes: int
    reason: str = ""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", type=path_of, help="folder with the checkpoints")
    parser.add_argument("--run", metavar="NAME", required=True, help="the run; files of others stay")
    parser.add_argument(
        "--keep-last", metavar="K", type=int, required=True, help="keep the newest K that verify"
    )
    parser.add_argument(
        "--keep-every", metavar="N", type=int, help="of older ones, keep iterations that are multiples of N"
    )
    parser.add_argument(
        "--keep-best", metavar="B", type=int, help="of older ones, keep the B of highest score"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be deleted, and delete nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> Status:
    retention = Retention(arguments.keep_last, arguments.keep_every, arguments.keep_best)
    checkpoint_files(arguments.root, recursive=False)  # raises unless it is a folder
    files = listed(arguments.root, arguments.run)
    if not files:
        raise ValueError(
            f"{arguments.root}: no checkpoints of the run {arguments.run!r}; see helios-chkpt ls"
        )
    is_good = functools.cache(verifies)  # reads the whole file
    newest_first = [Candidate(file.path, file.name.iteration) for file in reversed(files)]
    chosen = set(deletable(newest_first, retention, is_good=is_good, score=read_score))
    results = [_result(file.path, file.path in chosen, dry_run=arguments.dry_run) for file in files]
    if arguments.json:
        print_json([_as_json(result) for result in results])
    else:
        _print(results)
    return Status.BAD if any(result.outcome is _Outcome.FAILED for result in results) else Status.FINE


def _result(path: Path, is_chosen: bool, *, dry_run: bool) -> _Result:
    """Delete a file if it is chosen, and say what became of it."""
    try:
        num_bytes = num_bytes_of(path) if is_sharded(path) else path.stat().st_size
        if not is_chosen:
            return _Result(path, _Outcome.KEPT, num_bytes)
        if dry_run:
            return _Result(path, _Outcome.WOULD_DELETE, num_bytes)
        delete(path)
    except FileNotFoundError:  # its trainer prunes as well
        return _Result(path, _Outcome.DELETED, 0)
    except OSError as error:
        return _Result(path, _Outcome.FAILED, 0, reason_of(error, path))
    return _Result(path, _Outcome.DELETED, num_bytes)


def _print(results: Sequence[_Result]) -> None:
    for result in results:
        reason = f": {result.reason}" if result.reason else ""
        print(f"{result.outcome.value:<12}  {printable(result.path.name + reason)}")
    counts = []
    for outcome in _Outcome:
        sizes = [result.num_bytes for result in results if result.outcome is outcome]
        if sizes:
            counts.append(f"{len(sizes)} {outcome.value} ({size_text(sum(sizes))})")
    print(f"{plural(len(results), 'file')}: {', '.join(counts)}")


def _as_json(result: _Result) -> dict[str, object]:
    return {
        "path": str(result.path),
        "outcome": result.outcome.value,
        "bytes": result.num_bytes,
        "reason": result.reason,
    }


PRUNE = Command(
    "prune",
    "Delete old checkpoints of a run. The newest that verify stay, and so does every file newer than the oldest of "
    "these, damaged or not.",
    "0 done, 1 some could not be deleted, 2 wrong usage, or no ROOT, or no such run",
    _add_arguments,
    _run,
)
