"""Migration of checkpoints of earlier releases of Helios: ``python -m helios.chkpt_migrator ROOT``."""

from helios.chkpt_migrator._chain import MIGRATIONS, Migration, check_chain
from helios.chkpt_migrator._migrate import (
    FileResult,
    MigrationReport,
    migrate_checkpoints_to_current_version,
)

__all__ = [
    "MIGRATIONS",
    "FileResult",
    "Migration",
    "MigrationReport",
    "check_chain",
    "migrate_checkpoints_to_current_version",
]
