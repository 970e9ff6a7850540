"""What of a state is stored: a checked copy of its containers, and its tensors as they are stored."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from helios.chkpt import _tensors
from helios.chkpt._format.values import Call, Tensor

MAX_DEPTH = 100
"""Containers within containers that a state may have: what `torch.load` makes of it is walked recursively."""

_TOO_DEEP = "state: nested too deep for what the caller left of the interpreter's stack; flatten it"

_MAX_TEXT = 2**30  # pickled text has a length of four bytes, and up to four bytes a character
_MAX_INT_BITS = 255 * 8 - 1  # a pickled int has a length of one byte, and a sign
_ATOMS = (bool, float, complex, type(None))
_PLAIN = (
    "dict, OrderedDict, Counter, list, tuple, str, bytes, bool, int, float, complex, None and torch.Tensor"
)


class Place(NamedTuple):
    """Where a value is in the state; text only when a message needs it."""

    parent: Place | None
    key: object
    is_index: bool = False

    @property
    def keys(self) -> tuple[object, ...]:
        """The keys and indices that lead there."""
        keys: list[object] = []
        place: Place | None = self
        while place is not None:
            keys.append(place.key)
            place = place.parent
        return tuple(reversed(keys))

    def __str__(self) -> str:
        pieces: list[str] = []
        place: Place | None = self
        while place is not None:
            key = place.key
            if isinstance(key, str) and key.isidentifier() and not place.is_index:
                pieces.append(f".{key}" if place.parent else key)
            else:
                pieces.append(f"[{key!r:.80}]")
            place = place.parent
        return "".join(reversed(pieces))


Divert = Callable[[torch.Tensor, Place], bool]


@dataclass(frozen=True)
class Snapshot:
    """A state as it is stored.

    Attributes:
        values: what the pickle says, see `helios.chkpt._format.values`.
        pieces: the records that tensors are in: storage ``n`` is ``pieces[n]``.
        leaves: its strided tensors, in the order of the state.
    """

    values: dict[str, object]
    pieces: list[_tensors.Piece]
    leaves: list[_tensors.Leaf]


def snapshot(state: Mapping[str, object], divert: Divert | None = None) -> Snapshot:
    """What `save` stores of `state`: new containers around descriptions of its tensors, which are not copied.

    Args:
        state: a mapping with text keys; values as the README lists them.
        divert: asked of each tensor; where it says True, None is stored instead.

    Raises:
        TypeError: a value is not plain; the message says where it is.
        ValueError: a cycle, an int or a text that is too big, containers nested more than `MAX_DEPTH`
            deep, tensors that share memory as different dtypes, a tensor whose memory was freed.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a Mapping with str keys, got {type(state).__name__}")
    items = dict(state)  # also keeps alive what a lazy mapping makes: the walk goes by id
    for key in items:
        if type(key) is not str:
            raise TypeError(f"state: expected str keys, got the key {key!r} of type {_name(key)}")
    walk = _Walk(divert)
    try:
        values = {key: walk.value(value, Place(None, key), 1) for key, value in items.items()}
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    pieces = _tensors.pieces_of(walk.leaves)
    for call in walk.quantised:
        _tensors.complete_quantised(call)
    return Snapshot(values, pieces, walk.leaves)


class _Walk:
    """One walk over a state. Remembers what it has converted, so what is shared stays shared."""

    def __init__(self, divert: Divert | None) -> None:
        self.leaves: list[_tensors.Leaf] = []
        self.quantised: list[Call] = []
        self._divert = divert
        self._num_diverted = 0
        self._done: dict[int, object] = {}
        self._open: set[int] = set()

    def value(self, value: object, place: Place, depth: int) -> object:
        """The stored form of a value."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is int or kind is str or kind is bytes:
            return _sized(value, place)
        if kind in (dict, OrderedDict, Counter, list, tuple):  # MultiStepLR has a Counter
            return self._container(value, place, depth)
        if self._divert is not None and isinstance(value, torch.Tensor) and self._divert(value, place):
            self._num_diverted += 1
            return None
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            assert isinstance(value, torch.Tensor)
            return self._tensor(value, place)
        number = _numpy_number(value)
        if number is not None:
            return _sized(number, place)
        raise TypeError(f"{place}: {_name(value)} cannot be stored. {_advice(value)}")

    def _container(self, value: object, place: Place, depth: int) -> object:
        if id(value) in self._done:
            return self._done[id(value)]
        if id(value) in self._open:
            raise ValueError(f"{place}: this {_name(value)} contains itself; expected a state without cycles")
        if depth > MAX_DEPTH:
            raise ValueError(f"{place}: nested more than {MAX_DEPTH} containers deep; flatten the state")
        self._open.add(id(value))
        num_diverted = self._num_diverted
        stored: object
        if isinstance(value, dict):
            stored = self._mapping(value, place, depth)
        else:
            assert isinstance(value, list | tuple)
            parts = [self.value(v, Place(place, i, True), depth + 1) for i, v in enumerate(value)]
            stored = parts if isinstance(value, list) else tuple(parts)
        self._open.remove(id(value))
        if type(value) is not tuple or num_diverted == self._num_diverted:
            # A tuple is made anew where something is put into it later: then each place is one of its own.
            self._done[id(value)] = stored
        return stored

    def _mapping(self, value: dict[object, object], place: Place, depth: int) -> dict[object, object]:
        stored = type(value)()
        for key, item in value.items():
            here = Place(place, key)
            stored[_key(key, here, 0)] = self.value(item, here, depth + 1)
        if isinstance(stored, OrderedDict):
            # Module.state_dict() keeps the versions of its modules in this attribute.
            for name, item in vars(value).items():
                here = Place(place, name)
                if name != "_metadata":
                    raise TypeError(f"{here}: an OrderedDict with this attribute cannot be stored. Remove it")
                stored.__dict__[name] = self.value(item, here, depth + 1)
        return stored

    def _tensor(self, tensor: torch.Tensor, place: Place) -> object:
        if id(tensor) in self._done:
            return self._done[id(tensor)]
        reason = _tensors.unsupported(tensor)
        if reason is not None:
            raise TypeError(f"{place}: {reason}")
        stored: object
        if tensor.layout is not torch.strided:
            parts, stored = _tensors.sparse_parts(tensor)
            _tensors.complete_sparse(stored, [self._leaf(part, f"{place}.{name}") for name, part in parts])
        elif tensor.is_quantized:
            params = [
                self._leaf(param, place) if isinstance(param, torch.Tensor) else param
                for param in _tensors.quantisation(tensor)
            ]
            stored = _tensors.quantised_call(self._leaf(tensor, place), tuple(params))
            self.quantised.append(stored)
        else:
            stored = self._leaf(tensor, place)
        self._done[id(tensor)] = stored
        return stored

    def _leaf(self, tensor: torch.Tensor, path: object) -> Tensor:
        self.leaves.append(_tensors.leaf_of(tensor, path))
        return self.leaves[-1].stored


def _key(key: object, place: Place, depth: int) -> object:
    kind = type(key)
    if kind in _ATOMS:
        return key
    if kind is int or kind is str or kind is bytes:
        return _sized(key, place)
    if isinstance(key, tuple) and kind is tuple and depth < MAX_DEPTH:
        return tuple(_key(part, place, depth + 1) for part in key)
    number = _numpy_number(key)
    if number is not None:
        return _sized(number, place)
    raise TypeError(
        f"{place}: a key of type {_name(key)} cannot be stored. "
        "Use str, bytes, a number, None or a tuple of these"
    )


def _sized(value: object, place: Place) -> object:
    """`value`, an int, a text or bytes, unless it is too big for the pickles that weights_only reads."""
    if isinstance(value, int):
        # For negative numbers one more fits: ~x is what two's complement stores.
        if (~value if value < 0 else value).bit_length() > _MAX_INT_BITS:
            raise ValueError(
                f"{place}: an int of {value.bit_length()} bits cannot be stored, at most {_MAX_INT_BITS}; "
                "store int.to_bytes()"
            )
        return value
    if isinstance(value, str | bytes) and len(value) > _MAX_TEXT:
        raise ValueError(
            f"{place}: {_name(value)} of length {len(value)} cannot be stored, at most {_MAX_TEXT}; "
            "store a uint8 tensor"
        )
    return value


def _numpy_number(value: object) -> object:
    """A NumPy scalar as a Python one; None for anything else. Without NumPy there are none."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic):
        return None
    number: object = value.item()
    return number if type(number) in (bool, int, float, complex, str, bytes) else None


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _advice(value: object) -> str:
    if hasattr(value, "full_tensor"):  # a DTensor
        return "Use save_sharded, or store its full_tensor()"
    for kind, advice in (
        (torch.Tensor, "Store a plain tensor instead, as `x.detach().as_subclass(torch.Tensor)` may give"),
        (dict, "Store dict(x)"),
        ((set, frozenset), "Store sorted(x), a list"),
        (tuple, "Store tuple(x)"),
        (list, "Store list(x)"),
        (str, "Store its value as a plain str"),
        (torch.nn.Module, "Store its state_dict()"),
        ((torch.dtype, torch.device, torch.layout), "Store str(x)"),
    ):
        if isinstance(value, kind):
            return f"{advice}; allowed are {_PLAIN}"
    if hasattr(value, "__array__"):
        return f"Store torch.as_tensor(x); allowed are {_PLAIN}"
    if hasattr(value, "__fspath__"):
        return f"Store str(x); allowed are {_PLAIN}"
    if hasattr(value, "state_dict"):
        return f"Store its state_dict(); allowed are {_PLAIN}"
    return f"Allowed are {_PLAIN}"
