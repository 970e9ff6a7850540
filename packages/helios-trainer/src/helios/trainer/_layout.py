"""Tensors of which each rank has a part, beside whole ones."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

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


def has_parts(state: object) -> bool:
    """Whether a state has tensors of which each rank has a part."""
    # Not by torch's tree_leaves, which takes as long for the numbers in states of generators as to write them.
    if isinstance(state, Mapping):
        return any(map(has_parts, state.values()))
    if isinstance(state, list | tuple):
        return any(has_parts(value) for value in state if type(value) is not int)
    return is_dtensor(state)
