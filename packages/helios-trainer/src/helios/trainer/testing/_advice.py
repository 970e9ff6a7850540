"""The lines to write so that a part is kept."""

import re

import numpy as np
import torch
from torch import nn

from helios.trainer.testing._parts import GENERATORS, Part


def how_to_keep(part: Part, prefix: str = "") -> tuple[str, ...]:
    """Return lines for `state_dict` and `load_state_dict`.

    Args:
        part: what is to be kept.
        prefix: what its path has before the name of the attribute.
    """
    network = part.owner if isinstance(part.owner, nn.Module) else None
    if network is not None and part.path.removeprefix(f"{part.owner_path}.") not in network.state_dict():
        return _lines(part.path.removeprefix(prefix), "{}", "{}.copy_({})")  # a buffer with persistent=False
    if part.owner is not None:
        return _lines(part.owner_path.removeprefix(prefix), "{}.state_dict()", "{}.load_state_dict({})")
    return _lines(part.path.removeprefix(prefix), *_forms(part.value))


def _forms(value: object) -> tuple[str, str]:
    """Return how the state of a value is had, and given back."""
    if isinstance(value, torch.Generator):
        return "{}.get_state()", "{}.set_state({}.cpu())"
    if isinstance(value, np.random.Generator):
        return "{}.bit_generator.state", "{}.bit_generator.state = {}"
    if isinstance(value, np.random.RandomState):
        return "{}.get_state(legacy=False)", "{}.set_state({})"
    if isinstance(value, GENERATORS):
        return "{}.getstate()", "{}.setstate({})"
    return "{}", "{} = {}"


def _lines(path: str, get: str, put: str) -> tuple[str, ...]:
    target, key = "self." + re.sub(r"\.(\d+)", r"[\1]", path), path
    return (
        f"    state_dict:       {key!r}: {get.format(target)},",
        f"    load_state_dict:  {put.format(target, f'state[{key!r}]')}",
    )
