"""A checkpoint as a file or as a folder with shards, one made of the other in one process."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from helios.chkpt._inspect import tied
from helios.chkpt._memory import stated
from helios.chkpt._naming import SHARDED_SUFFIX, is_sharded
from helios.chkpt._read import load, read_score
from helios.chkpt._sharded.ranks import Ranks
from helios.chkpt._sharded.split import Choose
from helios.chkpt._sharded.write import Job, write_folder
from helios.chkpt._snapshot import Place, snapshot
from helios.chkpt._tensors import Leaf
from helios.chkpt._write import write_state

_MODEL = "model"


def convert(source: Path, target: Path) -> None:
    """Write a checkpoint again, as a file if it is a folder and the other way round; `helios.chkpt.diff` sees none.

    From a file, the tensors of one or more dims under ``model`` go into shards, unless they share only a part of their
    memory with others. The state is in memory once.

    Raises:
        FileExistsError: there is something at `target`.
        ValueError: `source` and `target` are not one of each kind.
        CheckpointError, OSError: `source` cannot be loaded.
        OSError: `target` cannot be written.
    """
    to_folder = target.name.endswith(SHARDED_SUFFIX)
    if to_folder == is_sharded(source):
        kind = f"a {SHARDED_SUFFIX} folder" if to_folder else "a .pth file"
        raise ValueError(f"{source} and {target}: expected a .pth file and a .dcp folder, got {kind} twice")
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    state, score = load(source), read_score(source)
    del state["version"]  # of whoever writes it
    if to_folder:
        write_folder(lambda: Job(state, target, score, chosen(state)), Ranks())
    else:
        write_state(stated(state), target, score=score)


def chosen(state: Mapping[str, object]) -> Choose:
    """Which tensors of a state of plain ones go into shards: those that are whole tensors of the model."""
    leaves = [leaf for leaf in snapshot(state).leaves if 0 not in leaf.stored.shape]
    found: set[object] = set()
    for group in tied([leaf.stored for leaf in leaves]):
        members = [leaves[number] for number in group]
        if all(_may_go(leaf) and _view(leaf.source) == _view(members[0].source) for leaf in members):
            found.add(_view(members[0].source))  # not its place: one tensor may be in several

    def choose(tensor: torch.Tensor, place: Place) -> bool:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            return False
        if tensor.numel() == 0:
            return tensor.dim() > 0 and place.keys[0] == _MODEL
        return _view(tensor) in found

    return choose


def _may_go(leaf: Leaf) -> bool:
    is_plain = isinstance(leaf.path, Place) and leaf.path.keys[0] == _MODEL
    return is_plain and leaf.source.dim() > 0 and not leaf.source.is_quantized


def _view(tensor: torch.Tensor) -> object:
    """Where its elements are in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
