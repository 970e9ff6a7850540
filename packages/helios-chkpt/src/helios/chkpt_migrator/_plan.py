"""What is to become of one file: which structure it has, and what its values will be. Reads, writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from helios.chkpt._errors import NotACheckpointError, UnsafeError
from helios.chkpt._format.archive import Archive, check_records
from helios.chkpt._format.encode import encode
from helios.chkpt._format.manifest import SCHEMA
from helios.chkpt._read import read_contents
from helios.chkpt._versions import MAJOR, major_of, too_new
from helios.chkpt_migrator._chain import Migration, steps_from
from helios.chkpt_migrator._rewrite import misfits, with_storages
from helios.chkpt_migrator._schema import schema_of
from helios.chkpt_migrator._steps import plug_in_names

_DATA = "data/"


@dataclass(frozen=True)
class Plan:
    """How to migrate a file.

    Attributes:
        archive: the file as it is.
        source: its schema.
        values: what the new one holds, without the key ``version``.
        storages: keys of the storages of the old file, in the order of the records of the new one.
        notes: what a person should know about it.
    """

    archive: Archive
    source: int
    values: dict[str, object]
    storages: tuple[str, ...]
    notes: tuple[str, ...] = ()


def plan_for(file: IO[bytes], path: Path, chain: Sequence[Migration]) -> Plan | None:
    """Return how to migrate an open file, or None if it is current.

    Raises:
        CheckpointError: it cannot be migrated; one of its subclasses, by the reason.
        TypeError: it holds something that no checkpoint can.
    """
    contents = read_contents(file, path)
    archive, state = contents.archive, contents.values
    if archive.manifest is not None:
        contents.check_schema()
        contents.check_safe(frozenset())
        return None
    # Those of tensors are checked while they are copied.
    check_records(file, archive, names=[n for n in archive.records if not n.startswith(_DATA)])
    version = next(iter(contents.versions), None)
    if isinstance(version, str) and (major_of(version) or 0) > MAJOR:
        raise too_new(version, path)
    source = schema_of(state)
    if source == SCHEMA:
        contents.check_safe(frozenset())
        return None
    steps = steps_from(source, chain)
    if not steps:
        raise NotACheckpointError(
            f"found schema {source}; expected one that this release can migrate to {SCHEMA}"
        )
    notes: tuple[str, ...] = ()
    for migration in steps:
        if migration.source == 2:
            notes = _renamings(plug_in_names(state))
        state = migration.step(state)
    state.pop("version", None)
    _check_plain(state, contents.foreign)
    values, storages = with_storages(state)
    encode(cast("dict[str, object]", values))  # says now what it cannot store
    return Plan(archive, source, cast("dict[str, object]", values), storages, notes)


def _check_plain(state: Mapping[object, object], foreign: Sequence[str]) -> None:
    """Raise UnsafeError for the first thing that is no plain value and no tensor."""
    for where, name in misfits(state, frozenset(foreign)):
        raise UnsafeError(
            f"{where}: found {name}; expected plain values and tensors only. Nothing of the file was run. Load it with "
            "the code that wrote it, replace this by plain values, and save it again"
        )


def _renamings(names: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(
        f"the state of plug-in {old!r} is under {new!r} now: call the plug-in so, since {old!r} is a key of Helios"
        for old, new in names.items()
        if old != new
    )
