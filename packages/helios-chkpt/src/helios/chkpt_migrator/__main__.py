"""The command line: ``python -m helios.chkpt_migrator ROOT``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from helios.chkpt_migrator._chain import MIGRATIONS
from helios.chkpt_migrator._migrate import MigrationReport, checkpoint_files, migrate_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Migrate and print a table; return the exit status: 0 all current, 1 some failed, 2 cannot start."""
    parser = argparse.ArgumentParser(
        prog="python -m helios.chkpt_migrator",
        description="Bring the checkpoints in a folder, and in the folders below it, to the current version.",
        epilog="Exit status: 0 all files are current, 1 some file failed, 2 wrong usage or no ROOT.",
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder with .pth files")
    root: Path = parser.parse_args(arguments).root
    try:
        paths = checkpoint_files(root)
    except OSError as error:
        print(f"{parser.prog}: {root}: {error.strerror}", file=sys.stderr)
        return 2
    bar = tqdm(paths, unit="file", disable=not sys.stderr.isatty())
    report = MigrationReport(root, tuple(migrate_file(path, MIGRATIONS) for path in bar))
    print(_table(report))
    return 0 if report.ok else 1


def _table(report: MigrationReport) -> str:
    names = [str(result.path.relative_to(report.root)) for result in report.results]
    width = max(map(len, names), default=0)
    rows = [
        f"{name:<{width}}  {result.outcome:<8}  {result.reason}".rstrip()
        for name, result in zip(names, report.results, strict=True)
    ]
    summary = ", ".join(f"{count} {outcome}" for outcome, count in report.counts().items())
    return "\n".join([*rows, f"{len(rows)} files: {summary}"])


if __name__ == "__main__":
    sys.exit(main())
