"""The lines to write so that a part is kept."""

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from helios.trainer.testing._parts import Part, is_scalar

_STORED_CONTAINERS = (dict, OrderedDict, Counter, list, tuple)  # not what is derived of them
_MAX_DEPTH = 12  # a list may have itself in it


def how_to_keep(part: Part, prefix: str = "") -> tuple[str, ...]:
    """Return lines for `state_dict` and `load_state_dict`.

    Args:
        part: what is to be kept.
        prefix: what its path has before the name of the attribute.
    """
    in_network = isinstance(part.owner, nn.Module)
    if part.owner is None or (in_network and part.holder is not None):  # a plain attribute, also of a module
        whole = kept_whole(part)
        return _lines(whole, prefix, *_forms(whole.value))
    if in_network and part.path.removeprefix(f"{part.owner_path}.") not in part.owner.state_dict():
        return _lines(part, prefix, "{}", "{}.copy_({})")  # a buffer with persistent=False
    return _lines(_owner_of(part), prefix, "{}.state_dict()", "{}.load_state_dict({})")


def kept_whole(part: Part) -> Part:
    """Return the outermost list, dict or the like around a part that a checkpoint can have as a whole, or the part."""
    outer = part.outer
    while outer is not None and isinstance(outer.value, dict | list | tuple | deque):
        if _is_stored(outer.value) or (isinstance(outer.value, deque) and all(map(_is_stored, outer.value))):
            part = outer
        outer = outer.outer
    return part


def _is_stored(value: Any, depth: int = 0) -> bool:
    """Say whether a checkpoint takes a value as it is, and an assignment gives it back as it was."""
    if type(value) in _STORED_CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        return depth < _MAX_DEPTH and all(_is_stored(item, depth + 1) for item in items)
    if isinstance(value, torch.Tensor):
        return not _is_trained(value)
    is_other = isinstance(value, Enum | np.generic | torch.dtype | torch.device | torch.Size)
    return is_scalar(value) and not is_other


def _is_trained(tensor: torch.Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


def _owner_of(part: Part) -> Part:
    owner = part
    while owner.outer is not None and owner.value is not part.owner:
        owner = owner.outer
    return owner


def _forms(value: Any) -> tuple[str, str]:
    """Return how the state of a value is had, and given back."""
    if isinstance(value, torch.Generator):
        return "{}.get_state()", "{}.set_state({}.cpu())"
    if isinstance(value, random.Random):
        return "{}.getstate()", "{}.setstate({})"
    if isinstance(value, np.random.RandomState):
        return "pickle.dumps({}.get_state())", "{}.set_state(pickle.loads({}))"  # it has an array
    if isinstance(value, np.random.Generator):
        if isinstance(value.bit_generator, np.random.PCG64 | np.random.PCG64DXSM):
            return "{}.bit_generator.state", "{}.bit_generator.state = {}"
        return "pickle.dumps({}.bit_generator.state)", "{}.bit_generator.state = pickle.loads({})"
    if isinstance(value, np.ndarray):
        return _forms_of_array(value)
    return _forms_of_others(value)


def _forms_of_array(array: "np.ndarray[Any, Any]") -> tuple[str, str]:
    if array.dtype.kind in "biufc":
        return "torch.as_tensor({})", "{} = {}.cpu().numpy()"
    return "{}.tolist()", f"{{}} = np.array({{}}, dtype={array.dtype.str!r})"


def _forms_of_others(value: Any) -> tuple[str, str]:
    if isinstance(value, torch.Tensor) and _is_trained(value):
        return "{}", "{}.data.copy_({})"  # the optimizer has it too
    name = type(value).__name__
    if isinstance(value, Set):
        return _sorted_form(value), f"{{}} = {name}({{}})"
    if isinstance(value, deque):
        maxlen = "" if value.maxlen is None else f", maxlen={value.maxlen}"
        return "list({})", f"{{}} = {name}({{}}{maxlen})"
    if isinstance(value, np.generic):
        return "{}.item()", f"{{}} = np.{name}({{}})"
    if isinstance(value, Enum):
        return "{}.value", f"{{}} = {name}({{}})"
    return "{}", "{} = {}"


def _sorted_form(items: Set[Any]) -> str:
    try:
        sorted(items)
    except TypeError:  # of several types
        return "sorted({}, key=repr)"
    return "sorted({})"


def _lines(part: Part, prefix: str, get: str, put: str) -> tuple[str, ...]:
    target, key = f"self.{part.code}", part.path.removeprefix(prefix)
    return (
        f"    state_dict:       {key!r}: {get.format(target)},",
        f"    load_state_dict:  {put.format(target, f'state[{key!r}]')}",
    )
