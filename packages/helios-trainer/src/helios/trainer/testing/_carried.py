"""Whether a `state_dict` has a part, found out by changing the part."""

import random
from collections import deque
from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from helios.trainer._model import Model
from helios.trainer._plugin import Plugin
from helios.trainer.testing._leaf import leaf_of, snapshot_of
from helios.trainer.testing._parts import Part, is_series, parts_in, parts_of


def find_part(owner: Model | Plugin, path: str, prefix: str = "") -> Part | None:
    """Return the part at a path of a model or a plug-in, or None if there is none."""
    return next((part for part in parts_of(owner, prefix) if part.path == path), None)


def is_carried(owner: Model | Plugin, part: Part) -> bool:
    """Say whether `owner.state_dict()` has a part.

    The state of the object around the part is marked, or the part itself is changed in place, and the owner's state
    looked at. The owner is of no use afterwards.
    """
    return _has_state_around(owner, part) or _is_seen_to_change(owner, part)


def _has_state_around(owner: Model | Plugin, part: Part) -> bool:
    """Whether the state of the scheduler, scaler, optimizer, ... around a part is in the owner's as a whole."""
    around, mark = part.owner, "marked by check_resume"
    if around is None or isinstance(around, torch.nn.Module):  # a network's may leave out buffers
        return False
    state_dict = around.state_dict
    try:
        around.state_dict = lambda *args, **options: {**state_dict(*args, **options), mark: True}
        return any(path.endswith(f"[{mark!r}]") for path in _digests(owner.state_dict()))
    except (AttributeError, TypeError):  # it has slots, or its state is no mapping
        return False
    finally:
        with suppress(AttributeError):
            del around.state_dict


def _is_seen_to_change(owner: Model | Plugin, part: Part) -> bool:
    before = _digests(owner.state_dict())
    if not _change(part):
        return False
    try:
        return _digests(owner.state_dict()) != before
    except Exception:  # a value such as it never has there: so its state_dict has looked at it
        return True


def _digests(state: Mapping[str, Any]) -> dict[str, bytes]:
    return {path: leaf.digest for path, leaf in snapshot_of(parts_in("state", state)).items()}


def _change(part: Part) -> bool:
    """Give a part another value, where it is; say whether that could be done."""
    value, before = part.value, leaf_of(part.value).digest
    if isinstance(value, torch.Tensor | np.ndarray):
        return any(_fill(value, other) and leaf_of(value).digest != before for other in (0, 1))
    if isinstance(value, torch.Generator):
        value.manual_seed(value.initial_seed() + 1)
    elif isinstance(value, random.Random | np.random.Generator | np.random.RandomState):
        value.random()
    else:
        return _replace(part, _other_value(value))
    return leaf_of(value).digest != before


def _fill(value: torch.Tensor | np.ndarray, number: int) -> bool:
    try:
        with torch.no_grad():
            value[...] = number
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # an expanded tensor, an array that is read-only, other objects
        return False
    return True


def _other_value(value: Any) -> Any:
    if is_series(value):
        longer = [*value, 0]
        return (
            longer
            if isinstance(value, list)
            else tuple(longer)
            if isinstance(value, tuple)
            else deque(longer)
        )
    if isinstance(value, Set):
        return type(value)(list(value)[1:] if value else [0])  # type: ignore[call-arg]
    if isinstance(value, bool):
        return not value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int | float | complex):
        return value + 1 if value == value and value + 1 != value else 0
    if isinstance(value, str):
        return value + "_"
    return 1 if value is None else None


def _replace(part: Part, value: Any) -> bool:
    holder = part.holder
    if isinstance(holder, dict | list):
        holder[part.key] = value
    elif hasattr(holder, "__dict__"):
        vars(holder)[part.key] = value
    else:
        return False
    return True
