"""The command line: ``python -m helios.chkpt_migrator ROOT``, which is ``helios-chkpt migrate ROOT``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from helios.chkpt._cli import main as run
from helios.chkpt_migrator._command import MIGRATE


def main(arguments: Sequence[str] | None = None) -> int:
    """Migrate, print what became of each file, and return the exit status: see ``--help``."""
    return run("python -m helios.chkpt_migrator", [MIGRATE], arguments)


if __name__ == "__main__":
    sys.exit(main())
