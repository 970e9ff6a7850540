"""Whether a sharded checkpoint is whole. Without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from helios.chkpt._errors import CheckpointError, NotACheckpointError, explain
from helios.chkpt._format.archive import check_records, open_file
from helios.chkpt._naming import MAIN_FILE
from helios.chkpt._read import Contents, read_contents
from helios.chkpt._sharded.folder import Stamp, stamp_of
from helios.chkpt._sharded.manifest import (
    METADATA,
    Shards,
    check_digests,
    check_files,
    filled,
    read_metadata_bytes,
    read_shards,
)
from helios.chkpt._sharded.metadata import Chunk, read_chunks

MAX_TRIES = 10
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Main:
    """What the main file of a sharded checkpoint says.

    Attributes:
        folder: the checkpoint.
        contents: what is in the file; where tensors in shards belong there is None.
        shards: what it says of the shards; None in a file of a later major release.
    """

    folder: Path
    contents: Contents
    shards: Shards | None


def read_main(folder: Path, *, digests: bool | None = None) -> Main:
    """Read the main file; shards are not looked at.

    Args:
        folder: the checkpoint.
        digests: compare the sums of its records, with SHA-256 or without; None for neither.

    Raises:
        CheckpointError, OSError: as `opened_main`, or a sum is another.
    """
    with opened_main(folder) as (file, main):
        if digests is not None:
            check_records(file, main.contents.archive, digests=digests)
    return main


@contextlib.contextmanager
def opened_main(folder: Path) -> Iterator[tuple[IO[bytes], Main]]:
    """The open main file and what it says. The contents of tensors are neither read nor compared with their sums.

    Raises:
        NotACheckpointError: there is no such file, or it is that of no sharded checkpoint.
        OSError: it cannot be read.
        CheckpointError: another of its subclasses.
    """
    path = folder / MAIN_FILE
    try:
        file = open_file(path)
    except FileNotFoundError:
        remedy = "Its writer has not finished, or was killed."
        raise NotACheckpointError(
            explain(folder, f"no file {MAIN_FILE}", "a sharded checkpoint", remedy)
        ) from None
    with file:
        contents = read_contents(file, path)
        shards = None if contents.archive.is_newer else read_shards(contents.values, path)
        yield file, Main(folder, contents, shards)


def chunks_of(folder: Path, shards: Shards) -> dict[str, list[Chunk]]:
    """Where the elements of each tensor are. The files are there and as large as they should be.

    Raises:
        CheckpointError: one of its subclasses.
        OSError: something cannot be read.
    """
    check_files(folder, shards)
    data = read_metadata_bytes(folder, shards)
    return read_chunks(data, shards, folder / shards.folder / METADATA)


def verify_folder(folder: Path, types: frozenset[str], *, digests: bool) -> None:
    """As `helios.chkpt.verify`, of a sharded checkpoint. Its shards have SHA-256 sums only.

    Raises:
        CheckpointError: one of its subclasses.
        OSError: something cannot be read.
    """

    def check() -> None:
        main = read_main(folder, digests=digests)
        if main.shards is not None:
            chunks_of(folder, main.shards)
            check_digests(folder, main.shards, main.shards.data_files)
            filled(main.contents.values, main.shards, folder / MAIN_FILE)
        if not main.contents.is_of_other_release(types):
            main.contents.check_safe(types)

    unless_replaced(folder, check)


def unless_replaced(folder: Path, work: Callable[[], _Result]) -> _Result:
    """Do something with a checkpoint; again, if somebody replaced it meanwhile.

    Raises:
        Exception: what `work` raises.
    """
    for _ in range(MAX_TRIES - 1):
        before: Stamp | None = stamp_of(folder)
        try:
            result = work()
        except (CheckpointError, OSError):
            if stamp_of(folder) == before:
                raise
        else:
            if stamp_of(folder) == before:
                return result
    return work()
