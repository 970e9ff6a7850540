"""Checkpoints of states that are spread over processes: what is public. Imports torch only when it is called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from helios.chkpt._materialise import MapLocation


def save_sharded(
    state: Mapping[str, object], path: str | os.PathLike[str], *, group: ProcessGroup | None = None
) -> Path:
    """Write one checkpoint of a state that is spread over processes, atomically and durably.

    Every process of the group has to call it. DTensors, wherever they are in the state, go into shards: each process
    writes its own. All else is stored as it is in rank 0. The checkpoint is a folder. When this returns in any process,
    it is on the disk; if something cannot be written, what was there before is there still; whichever processes are
    killed or interrupted, that or the new one is there, whole.

    Args:
        state: as `save` takes it, and with DTensors, which have to be at the same places in all processes. Their
            placements have to be ``Shard`` and ``Replicate``. The keys ``version`` and ``sharded`` are added.
        path: the folder; its name has to end in ``.dcp``. The folder that it is in must exist, and be the same for all.
        group: the processes; None for the default group, or for this process alone if there is none. Objects are sent
            over it, so it is best one of gloo.

    Returns:
        `path` as a `Path`.

    Raises:
        TypeError, ValueError: something in the state of a process cannot be stored; the message names rank and place.
        FileNotFoundError, OSError: something cannot be written; the old checkpoint is as it was.
        RuntimeError: from torch, if another process ended.
    """
    from helios.chkpt._sharded.ranks import (
        Ranks,
    )  # torch: seconds to import, and most of this package needs none
    from helios.chkpt._sharded.write import Job, checked_path, write_folder

    return write_folder(lambda: Job(state, checked_path(path)), Ranks.of(group))


def load_sharded(
    path: str | os.PathLike[str],
    *,
    meshes: Sequence[DeviceMesh],
    map_location: MapLocation = None,
    verify: bool = True,
    safe_types: Sequence[type] = (),
    group: ProcessGroup | None = None,
) -> dict[str, object]:
    """Read a checkpoint into several processes, each its shards, on any number of them.

    Every process of the group has to call it. What was a DTensor becomes one again, with the placements that it had, on
    the first of the meshes that has as many dims as that it was saved from, if possible with the same names. If there
    is none, it comes as a plain whole tensor. All else comes as from `load`.

    Args:
        path: the checkpoint. From a ``.pth`` file this is `load`, in each process.
        meshes: where DTensors go.
        map_location: where all others go, as for `load`.
        verify: compare the SHA-256 of all shards: each process hashes a part of them, before any reads one.
        safe_types: as for `load`.
        group: the processes; None for the default group, or for this process alone if there is none.

    Returns:
        What was saved, with the key ``version`` added.

    Raises:
        FileNotFoundError, OSError: something cannot be read by one of the processes, which the message names.
        CheckpointError: one of its subclasses, by what is wrong with the checkpoint.
        TypeError, ValueError: a wrong argument.
        RuntimeError: from torch, if another process ended, or `map_location` names a device that is not there.
    """
    from helios.chkpt._sharded.read import load_together  # torch, as above

    return load_together(path, meshes, map_location, verify, safe_types, group)
