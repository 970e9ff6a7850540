"""Everything that a model, a plug-in or a batch consists of, by path: `net.2.weight`, `scheduler.last_epoch`."""

import pathlib
import random
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from helios.data import DataModule
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin
from helios.trainer._trainer import Trainer

# What the trainer gives to models and plug-ins, and what never changes.
_GIVEN = {
    Model: {"save_name", "trainer", "device", "rank", "is_distributed", "_scalar_log", "on_training_start"},
    Plugin: {"plug_id", "unique_overrides", "trainer"},
}
# Names of places differ from run to run; the others are looked at in ways of their own.
_PASSED_OVER = (pathlib.PurePath, Model, Plugin, Trainer, DataModule, DataLoader, Dataset, Sampler, type)
_SCALARS = (bool, int, float, complex, str, bytes, Enum, np.generic, torch.dtype, torch.device, torch.Size)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MAX_DEPTH = 12


@dataclass(frozen=True)
class Part:
    """One of the smallest things that are compared.

    Attributes:
        path: where it is.
        value: the thing itself, not a copy wherever that can be had.
        code: how Python writes that: `stages[0]['meter'].total` for the path `stages[0].meter.total`.
        holder: the dict, list or object that has it; None if it is part of a `state_dict`.
        key: under which the holder has it.
        outer: the part that it is in, or None.
        owner: the innermost object around it that has a `state_dict` of its own, or None.
        owner_path: where that is.
    """

    path: str
    value: Any
    code: str = ""
    holder: Any = None
    key: Any = None
    outer: "Part | None" = None
    owner: Any = None
    owner_path: str = ""


def parts_of(owner: Model | Plugin, prefix: str = "") -> Iterator[Part]:
    """Yield all parts of a model or a plug-in."""
    kind = Model if isinstance(owner, Model) else Plugin
    walk = _Walk()
    for name, value in list(vars(owner).items()):
        if name not in _GIVEN[kind]:
            yield from walk.within(Part(f"{prefix}{name}", value, name, owner, name))
    yield from walk.optimizers()


def parts_in(path: str, value: Any) -> Iterator[Part]:
    """Yield all parts of any value, such as a batch."""
    walk = _Walk()
    yield from walk.within(Part(path, value))
    yield from walk.optimizers()


def is_scalar(value: object) -> bool:
    """Say whether a value is one number, text or the like."""
    return value is None or isinstance(value, _SCALARS)


def is_series(value: object) -> bool:
    """Say whether a value is a list of numbers and the like, which is compared as a whole."""
    return isinstance(value, list | tuple | deque) and all(map(is_scalar, value))


class _Walk:
    """One look at everything; what is reached by two paths has the first."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # the objects too, lest another one gets the id of one that is gone
        self._parameter_names: dict[int, str] = {}
        self._optimizers: list[Part] = []

    def within(self, part: Part, depth: int = 0) -> Iterator[Part]:
        value = part.value
        if is_scalar(value) or is_series(value):
            yield part
            return
        if isinstance(value, torch.Tensor) and is_lazy(value):
            return  # of a LazyLinear before its first batch: there are no values yet
        if isinstance(value, _PASSED_OVER) or id(value) in self._seen or depth > _MAX_DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, (torch.Tensor, np.ndarray, Set, *GENERATORS)):
            yield part
        elif isinstance(value, nn.Module):
            yield from self._in_network(part, depth)
        elif isinstance(value, Optimizer):
            self._optimizers.append(part)  # until the names of all parameters are known
        else:
            yield from self._in_others(part, depth)

    def _in_network(self, part: Part, depth: int) -> Iterator[Part]:
        part = replace(part, owner=part.value, owner_path=part.path, holder=None, key=None, outer=part)
        for name, module in part.value.named_modules():
            prefix = f"{part.path}.{name}" if name else part.path
            code = part.code + (re.sub(r"\.(\d+)\b", r"[\1]", f".{name}") if name else "")
            self._seen[id(module)] = module
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self._seen:
                    path = f"{prefix}.{key}"
                    self._parameter_names[id(parameter)] = path
                    if is_lazy(parameter):
                        continue
                    yield from self.within(replace(part, path=path, value=parameter), depth)
                    yield replace(part, path=f"{path}.requires_grad", value=parameter.requires_grad)
                    if parameter.is_leaf and parameter.grad is not None:
                        yield replace(part, path=f"{path}.grad", value=parameter.grad)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    yield from self.within(
                        replace(part, path=f"{prefix}.{key}", code=f"{code}.{key}", value=buffer), depth
                    )
            for key, value in list(vars(module).items()):
                if not key.startswith("_"):
                    inner = replace(part, path=f"{prefix}.{key}", code=f"{code}.{key}", value=value)
                    yield from self.within(replace(inner, holder=module, key=key), depth + 1)

    def optimizers(self) -> Iterator[Part]:
        """Yield the parts of all optimizers that were met."""
        for part in self._optimizers:
            optimizer, names = part.value, self._parameter_names
            part = replace(part, owner=optimizer, owner_path=part.path, holder=None, key=None, outer=part)
            for number, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    names.setdefault(id(parameter), f"{number}.{index}")
                settings = {key: value for key, value in group.items() if key != "params"}
                yield from self._items(part, f"{part.path}.param_groups[{number}]", settings, 0)
            for parameter, entries in optimizer.state.items():
                name = names.get(id(parameter), parameter)
                path = f"{part.path}.state[{name}]"
                yield from self.within(replace(part, path=path, value=entries, holder=None), 0)

    def _in_others(self, part: Part, depth: int) -> Iterator[Part]:
        value = part.value
        if isinstance(value, Mapping):
            yield from self._items(part, part.path, value, depth)
        elif isinstance(value, list | tuple | deque):
            for index, item in enumerate(value):
                yield from self.within(_inside(part, f"[{index}]", f"[{index}]", item, index), depth + 1)
        elif (state := _state_of(value)) is not None:
            self._seen[id(state)] = state
            inner = replace(part, owner=value, owner_path=part.path, holder=None, key=None, outer=part)
            yield from self._items(inner, part.path, state, depth)
        elif _is_of_user(value):
            for key, item in list(vars(value).items()):
                yield from self.within(_inside(part, f".{key}", f".{key}", item, key), depth + 1)

    def _items(self, part: Part, path: str, items: Mapping[Any, Any], depth: int) -> Iterator[Part]:
        for key, value in list(items.items()):
            name = f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"
            inner = replace(_inside(part, name, f"[{key!r}]", value, key), path=f"{path}{name}", holder=items)
            yield from self.within(inner, depth + 1)


def _inside(part: Part, name: str, code: str, value: Any, key: Any) -> Part:
    """Return what a part has under a key."""
    return replace(
        part,
        path=part.path + name,
        value=value,
        code=part.code + code,
        holder=part.value,
        key=key,
        outer=part,
    )


def _state_of(value: object) -> Mapping[Any, Any] | None:
    """Return the `state_dict()` of a scheduler, a scaler, an average of weights and the like."""
    if not callable(getattr(value, "state_dict", None)):
        return None
    state = value.state_dict()  # type: ignore[attr-defined]
    return state if isinstance(state, Mapping) else {"state_dict()": state}


def _is_of_user(value: object) -> bool:
    """Say whether to look into an object: not into files, locks, loggers, functions and what torch has."""
    home = type(value).__module__.partition(".")[0]
    known = home in sys.stdlib_module_names or home in ("torch", "numpy", "helios", "tqdm", "tensorboard")
    return hasattr(value, "__dict__") and not known
