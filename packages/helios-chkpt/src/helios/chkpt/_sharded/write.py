"""Writing a sharded checkpoint: each process its shards, then rank 0 the main file, whose name makes them count.

Until then, and if anything fails in any process, what was there before is there, and nothing else is left.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from helios.chkpt._arguments import as_path
from helios.chkpt._errors import CheckpointError
from helios.chkpt._memory import in_memory
from helios.chkpt._naming import MAIN_FILE, SHARDED_SUFFIX
from helios.chkpt._sharded.folder import Claim, claim, sweep_inside
from helios.chkpt._sharded.manifest import KEY, ShardFile, Shards, as_value, check_digests
from helios.chkpt._sharded.ranks import Ranks
from helios.chkpt._sharded.split import Choose, Split, named, split
from helios.chkpt._sharded.stream import ShardWriter
from helios.chkpt._sharded.verify import chunks_of, read_main
from helios.chkpt._snapshot import snapshot
from helios.chkpt._write import write_archive


@dataclass(frozen=True)
class Job:
    """What one process is to save.

    Attributes:
        state: see `helios.chkpt.save_sharded`.
        folder: the checkpoint.
        score: noted in the main file, which rank 0 writes.
        choose: which plain tensors go into shards.
    """

    state: Mapping[str, object]
    folder: Path
    score: float | None = None
    choose: Choose | None = None


def checked_path(path: object) -> Path:
    """A path that ends in ``.dcp``.

    Raises:
        TypeError, ValueError: it is none.
    """
    target = as_path("path", path)
    if not target.name.endswith(SHARDED_SUFFIX):
        raise ValueError(f"path: expected a name that ends in {SHARDED_SUFFIX!r}, got {target.name!r}")
    return target


def write_folder(job: Callable[[], Job], ranks: Ranks) -> Path:
    """Write a checkpoint; every process calls this.

    Args:
        job: gives what this process is to save. An error that it raises is raised by all.
        ranks: the processes.
    """
    own: Job
    parts: Split

    def prepare() -> tuple[str, bytes, dict[int, int]]:
        nonlocal own, parts
        own = job()
        parts = split(own.state, own.choose)
        return own.folder.name, parts.digest, parts.ties

    known = ranks.agree(prepare)
    if any(item[:2] != known[0][:2] for item in known):
        _explain_mismatch(ranks, own, parts)
    tensors, places = named(parts, [ties for _, _, ties in known])
    writing = _Writing(own, parts, tensors, ranks)
    try:
        shards, plan = ranks.central(writing.local_plan, writing.begin)
        ranks.central(lambda: writing.write(shards, plan), lambda written: writing.commit(written, places))
    except BaseException:
        writing.abort()
        raise
    return own.folder


def verify_together(folder: Path, ranks: Ranks) -> None:
    """As ``helios.chkpt.verify(digests=False)``; each process hashes a part of the shards.

    Raises:
        FileNotFoundError: in all processes, if somebody deleted it.
        CheckpointError, OSError: in all processes, if one finds something.
    """

    def check() -> None:
        try:
            shards = read_main(folder, digests=False if ranks.rank == 0 else None).shards
            assert shards is not None, "this release wrote it"
            chunks_of(folder, shards)
            check_digests(folder, shards, shards.data_files[ranks.rank :: ranks.size])
        except (CheckpointError, OSError):
            (folder / MAIN_FILE).stat()  # if it is gone, so may be what it names, and nothing is damaged
            raise

    ranks.agree(check)


def _explain_mismatch(ranks: Ranks, own: Job, parts: Split) -> None:
    """Raise what differs, in all processes."""
    first, *others = ranks.agree(lambda: (own.folder.name, parts.lines))
    for rank, (name, lines) in enumerate(others, 1):
        if name != first[0]:
            raise ValueError(
                f"path: {first[0]!r} on rank 0, {name!r} on rank {rank}; expected the same on all"
            )
        for here, there in zip(first[1] + [""] * len(lines), lines + [""] * len(first[1]), strict=True):
            if here != there:
                texts = f"{here or 'nothing'!r} on rank 0, {there or 'nothing'!r} on rank {rank}"
                raise ValueError(f"state: the DTensors are not the same on all ranks: {texts}")


class _Writing:
    """One save in one process."""

    def __init__(self, job: Job, parts: Split, tensors: dict[str, torch.Tensor], ranks: Ranks) -> None:
        self._job = job
        self._parts = parts
        self._tensors = tensors
        self._ranks = ranks
        self._planner = DefaultSavePlanner(flatten_state_dict=False)
        self._metadata: Any = None
        self._claim: Claim | None = None  # in rank 0, until the shards count

    def local_plan(self) -> SavePlan:
        """What this process has."""
        self._planner.set_up_planner(self._tensors, is_coordinator=self._ranks.rank == 0)
        return self._planner.create_local_plan()

    def begin(self, plans: list[SavePlan]) -> list[tuple[str, SavePlan]]:
        """In rank 0: decide who writes what, and where."""
        plans, self._metadata = self._planner.create_global_plan(plans)
        _check_space(self._job.folder.parent, plans)
        self._claim = claim(self._job.folder)
        plans = ShardWriter(self._claim.shards).prepare_global_plan(plans)
        return [(self._claim.shards.name, plan) for plan in plans]

    def write(self, shards: str, plan: SavePlan) -> tuple[list[Any], list[ShardFile]]:
        """Write the shards of this process, to the disk."""
        writer = ShardWriter(self._job.folder / shards)
        results = writer.write_data(self._planner.finish_plan(plan), self._planner).wait()
        return results, writer.files

    def commit(self, written: list[tuple[list[Any], list[ShardFile]]], places: Any) -> Sequence[None]:
        """In rank 0: have them count."""
        assert self._claim is not None
        writer = ShardWriter(self._claim.shards)
        writer.finish(self._metadata, [results for results, _ in written])
        files = [file for _, files in written for file in files] + writer.files
        for file in files:
            _check_visible(self._claim.shards / file.name, file)
        self._claim.sync()
        state = in_memory(self._parts.plain)
        value = as_value(Shards(self._claim.shards.name, tuple(files), places))
        state.values.update(snapshot({KEY: value}).values)
        write_archive(state.values, state.sources, self._job.folder / MAIN_FILE, score=self._job.score)
        done, self._claim = self._claim, None
        done.release()
        with contextlib.suppress(OSError):  # nothing that fails now is a reason to say that it was not saved
            sweep_inside(self._job.folder)
        return [None] * self._ranks.size

    def abort(self) -> None:
        """Leave nothing behind; after `commit`, nothing happens."""
        if self._claim is not None:
            self._claim.abort()


def _check_visible(path: Path, file: ShardFile) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = -1
    if found != file.num_bytes:
        raise OSError(
            errno.EIO,
            "another rank wrote it, but rank 0 does not see it: use a folder that all share",
            str(path),
        )


def _check_space(folder: Path, plans: Sequence[SavePlan]) -> None:
    """Fail before anything is written if it cannot fit, so that a full disk costs no time."""
    data = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
    num_bytes = sum(math.prod(d.chunk.sizes) * int(d.properties.dtype.itemsize) for d in data)
    try:
        status = os.statvfs(folder)
    except FileNotFoundError:
        return  # whoever makes the checkpoint's folder says so
    if status.f_blocks and num_bytes > status.f_bfree * status.f_frsize:
        free = status.f_bfree * status.f_frsize
        message = f"{os.strerror(errno.ENOSPC)}: {num_bytes} bytes to write, {free} free"
        raise OSError(errno.ENOSPC, message, str(folder))
