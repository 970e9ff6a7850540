"""``ls``: the checkpoints in a folder."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from helios.chkpt._cli._command import Command, Status, path_of
from helios.chkpt._cli._files import RESUMABLE, Listed, State, checkpoint_files, look_at, name_as_json
from helios.chkpt._cli._output import Column, mib_text, plural, print_json, print_table, size_text, time_text
from helios.chkpt._naming import parse_name
from helios.chkpt._places import printable

_COLUMNS = (
    Column(""),
    Column("NAME", shrinks=True),
    Column("EPOCH", is_number=True),
    Column("ITER", is_number=True),
    Column("VERSION"),
    Column("MiB", is_number=True),
    Column("CHANGED"),
    Column("SCORE", is_number=True),
    Column("STATE"),
)
_MARK = "*"
_BAD = frozenset({State.BAD, State.UNREADABLE, State.REFUSED})


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", type=path_of, help="folder with checkpoints")
    parser.add_argument(
        "--run", metavar="NAME", help="this run only; without it, all .pth files and .dcp folders"
    )
    parser.add_argument("--recursive", action="store_true", help="in the folders below ROOT, too")
    parser.add_argument("--verify", action="store_true", help="read every byte: finds files that rotted")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> Status:
    paths = checkpoint_files(arguments.root, recursive=arguments.recursive)
    files = [look_at(path, verify_all=arguments.verify) for path in paths if _is_of(path, arguments.run)]
    files.sort(key=lambda file: file.order)
    resumed = _resumed(files)
    if arguments.json:
        print_json([_as_json(file, file in resumed) for file in files])
    else:
        _print(files, resumed, arguments)
    return Status.BAD if any(file.state in _BAD for file in files) else Status.FINE


def _is_of(path: Path, run_name: str | None) -> bool:
    if run_name is None:
        return True
    name = parse_name(path.name)
    return name is not None and name.run_name == run_name


def _resumed(files: Sequence[Listed]) -> set[Listed]:
    """Of each run in each folder, what a resume would take."""
    last = {
        (file.path.parent, file.name.run_name): file
        for file in files
        if file.name is not None and file.state in RESUMABLE
    }
    return set(last.values())


def _print(files: Sequence[Listed], resumed: set[Listed], arguments: argparse.Namespace) -> None:
    if not files:
        print("no checkpoints")
        return
    print_table(_COLUMNS, [_row(file, file in resumed, arguments.root) for file in files])
    print()
    for file in files:
        if file.reason and file.state is not State.OLD:
            print(f"{printable(_name(file, arguments.root))}: {printable(file.reason)}")
    num_old = sum(file.state is State.OLD for file in files)
    if num_old:
        print(
            f"{plural(num_old, 'file')} to migrate: helios-chkpt migrate {printable(shlex.quote(str(arguments.root)))}"
        )
    total = size_text(sum(file.num_bytes for file in files))
    print(f"{plural(len(files), 'file')}, {total}. {_MARK} is what a resume takes{_condition(arguments)}.")


def _condition(arguments: argparse.Namespace) -> str:
    return "" if arguments.verify else ", if its data is whole: --verify reads it"


def _row(file: Listed, is_resumed: bool, root: Path) -> list[str]:
    is_there = file.state is not State.UNREADABLE
    return [
        _MARK if is_resumed else "",
        _name(file, root),
        "-" if file.name is None else str(file.name.epoch),
        "-" if file.name is None else str(file.name.iteration),
        file.version or "-",
        mib_text(file.num_bytes) if is_there else "-",
        time_text(file.changed_seconds) if is_there else "-",
        "-" if file.score is None else f"{file.score:.6g}",
        file.state.value,
    ]


def _name(file: Listed, root: Path) -> str:
    return str(file.path.relative_to(root))


def _as_json(file: Listed, is_resumed: bool) -> dict[str, object]:
    return {
        "path": str(file.path),
        **name_as_json(file.name),
        "version": file.version,
        "bytes": file.num_bytes,
        "changed": datetime.fromtimestamp(file.changed_seconds, UTC).isoformat(),
        "score": file.score,
        "state": file.state.value,
        "reason": file.reason,
        "resume": is_resumed,
    }


LS = Command(
    "ls",
    "List the checkpoints of a folder, with what a resume would take.",
    "0 all can be read, 1 some cannot, 2 wrong usage or no ROOT",
    _add_arguments,
    _run,
)
