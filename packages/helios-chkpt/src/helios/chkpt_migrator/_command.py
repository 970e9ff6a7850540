"""The command ``migrate``, and the program ``helios-chkpt`` that has all commands."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from helios.chkpt._cli import (
    CONVERT,
    DIFF,
    INSPECT,
    LS,
    PRUNE,
    VERIFY,
    Column,
    Command,
    Status,
    main,
    path_of,
    plural,
    print_json,
    print_table,
)
from helios.chkpt._places import printable
from helios.chkpt_migrator._migrate import (
    FileResult,
    MigrationReport,
    checkpoint_files,
    migrate_checkpoints_to_current_version,
    total_bytes,
)

_COLUMNS = (Column("FILE", shrinks=True), Column("SCHEMA"), Column("OUTCOME"), Column("BACKUP", shrinks=True))


def helios_chkpt(arguments: Sequence[str] | None = None) -> int:
    """The console script ``helios-chkpt``; returns its exit status."""
    return main("helios-chkpt", [LS, INSPECT, VERIFY, DIFF, CONVERT, MIGRATE, PRUNE], arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", metavar="ROOT", type=path_of, help="folder with .pth files, in it or below")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument(
        "--no-backup", action="store_true", help="keep no old file; otherwise it stays as <name>.pth.bak"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> Status:
    with _bar(arguments.root) as progress:
        report = migrate_checkpoints_to_current_version(
            arguments.root, dry_run=arguments.dry_run, backup=not arguments.no_backup, progress=progress
        )
    if arguments.json:
        print_json([_as_json(result) for result in report.results])
    else:
        _print(report)
    return Status.FINE if report.ok else Status.BAD


@contextlib.contextmanager
def _bar(root: Path) -> Iterator[Callable[[int], None] | None]:
    """A bar of bytes, for people who look at a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm  # takes longer to import than all else

    total = total_bytes(checkpoint_files(root))
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False) as bar:

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        yield advance


def _print(report: MigrationReport) -> None:
    if not report.results:
        print("no checkpoints")
        return
    print_table(_COLUMNS, [_row(result, report.root) for result in report.results])
    print()
    for result in report.results:
        for text in (result.reason, *result.notes):
            if text:
                print(f"{printable(str(result.path.relative_to(report.root)))}: {printable(text)}")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in report.counts().items() if count)
    print(f"{plural(len(report.results), 'file')}: {counts}")


def _row(result: FileResult, root: Path) -> list[str]:
    schemas = ["?" if schema is None else str(schema) for schema in (result.source, result.target)]
    schema = schemas[0] if result.source == result.target or result.target is None else " -> ".join(schemas)
    backup = "" if result.backup is None else result.backup.name
    return [str(result.path.relative_to(root)), schema, result.outcome, backup]


def _as_json(result: FileResult) -> dict[str, object]:
    return {
        "path": str(result.path),
        "outcome": result.outcome,
        "reason": result.reason,
        "source": result.source,
        "target": result.target,
        "backup": None if result.backup is None else str(result.backup),
        "notes": result.notes,
    }


MIGRATE = Command(
    "migrate",
    "Bring the checkpoints in a folder, and in the folders below it, to the current version.",
    "0 all are current (or, with --dry-run, could be), 1 some failed and are as they were, 2 wrong usage or no ROOT",
    _add_arguments,
    _run,
)

if __name__ == "__main__":
    sys.exit(helios_chkpt())
