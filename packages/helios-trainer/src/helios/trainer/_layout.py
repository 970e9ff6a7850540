"""Tensors of which each rank has a part, beside whole ones."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether a value is a tensor of which each rank has a part. Its module takes long to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def as_laid_out(value: Any, own: torch.Tensor) -> Any:
    """Return a tensor in parts as the own one is, or whole if that is whole.

    Anything else, or a tensor of another shape, is returned as it is.
    """
    if not isinstance(value, torch.Tensor) or value.shape != own.shape:
        return value
    if not is_dtensor(own):
        return value.full_tensor() if is_dtensor(value) else value
    if is_dtensor(value):
        if value.device_mesh == own.device_mesh and value.placements == own.placements:
            return value
        value = value.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    # All ranks have read the same, so none needs to send.
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def is_folder_of_parts(path: Path) -> bool:
    """Whether a checkpoint is one of those that keep such tensors in files of their own."""
    return path.suffix == ".dcp"


def is_unfinished(path: Path) -> bool:
    """Whether a folder was to become such a checkpoint: it is one from when it has its main file on, written last."""
    return is_folder_of_parts(path) and path.is_dir() and not (path / "helios.pth").exists()


def has_parts(state: object) -> bool:
    """Whether a state has tensors of which each rank has a part."""
    return any(is_dtensor(leaf) for leaf in tree_leaves(state))
