"""Copies of a file's values in which some objects are others. Pure functions: what they are given stays as it is."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import PurePath, PurePosixPath, PureWindowsPath

from helios.chkpt._format.values import Call, Global, Storage, Tensor

Convert = Callable[[Call | Global | Tensor], object]
"""Gives what an object becomes; what it returns is not looked into, unless it is the object itself."""

_PATHS: dict[str, type[PurePath]] = {
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}
_SET = Global("builtins", "set")
_BYTEARRAY = Global("builtins", "bytearray")
_NUMPY_CODES = {
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}


def rewritten(value: object, convert: Convert) -> object:
    """Return a copy of `value` with every call, global and tensor converted. What was shared is shared again."""
    return _Rewriter(convert).of(value)


class _Rewriter:
    def __init__(self, convert: Convert) -> None:
        self._convert = convert
        self._done: dict[int, object] = {}  # the originals live as long as their owner does

    def of(self, value: object) -> object:
        if not isinstance(value, dict | list | tuple | set | bytearray | Call | Global | Tensor):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._new(value)
        return self._done[id(value)]

    def _new(self, value: object) -> object:
        if isinstance(value, Call | Global | Tensor):
            other = self._convert(value)
            if other is not value or not isinstance(value, Call):
                return other
            args = tuple(self.of(arg) for arg in value.args)
            items = [self.of(item) for item in value.items]
            return replace(value, args=args, state=self.of(value.state), items=items)
        if isinstance(value, list):
            return [self.of(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self.of(item) for item in value)
        if isinstance(value, set):  # described by a call, which torch reads too; in one order
            return Call(_SET, ([self.of(item) for item in sorted(value, key=repr)],))
        if isinstance(value, bytearray):
            return Call(_BYTEARRAY, (bytes(value),))
        assert isinstance(value, dict), "what `of` lets through"
        if isinstance(value, Counter):
            return Counter(value)
        copy: dict[object, object] = OrderedDict() if isinstance(value, OrderedDict) else {}
        copy.update((self.of(key), self.of(item)) for key, item in value.items())
        if isinstance(value, OrderedDict):  # Module.state_dict() keeps the versions of its modules there
            vars(copy).update((name, self.of(item)) for name, item in vars(value).items())
        return copy


def plain(value: Call | Global | Tensor) -> object:
    """Convert paths to text and NumPy's scalars to Python's numbers, leave the rest: for `rewritten`."""
    if isinstance(value, Call):
        text = path_text(value)
        if text is not None:
            return text
        number = _numpy_number(value)
        if number is not None:
            return number
    return value


def path_text(value: object) -> str | None:
    """Return the text of a pickled `pathlib` path, of any system; None for anything else."""
    if not isinstance(value, Call) or value.function.module.partition(".")[0] != "pathlib":
        return None
    kind = _PATHS.get(value.function.name)
    parts = [part for part in value.args if isinstance(part, str)]
    if kind is None or len(parts) != len(value.args):
        return None
    return str(kind(*parts))


def _numpy_number(value: Call) -> complex | None:
    function = value.function
    if function.name != "scalar" or function.module not in (
        "numpy.core.multiarray",
        "numpy._core.multiarray",
    ):
        return None
    match value.args:
        case (Call(Global("numpy", "dtype"), (str(code), *_), (_, "<" | "|", *_)), bytes(data)):
            layout = _NUMPY_CODES.get(code)
            if layout is not None and len(data) == struct.calcsize(f"<{layout}"):
                number: complex = struct.unpack(f"<{layout}", data)[0]
                return number
    return None


def with_storages(value: object) -> tuple[object, tuple[str, ...]]:
    """Return a copy whose storages are on the CPU, where every machine can load them, and numbered in order.

    Returns:
        The copy, and the old keys of storages 0, 1, ...
    """
    storages: dict[str, Storage] = {}

    def convert(item: Call | Global | Tensor) -> object:
        if not isinstance(item, Tensor):
            return item
        old = item.storage
        if old.key not in storages:
            storages[old.key] = replace(old, key=str(len(storages)), location="cpu")
        return replace(item, storage=storages[old.key])

    return rewritten(value, convert), tuple(storages)


_PLAIN = (str, bool, int, float, complex, bytes, type(None), Tensor)
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple)


def misfits(value: object, foreign: frozenset[str], where: str = "") -> Iterator[tuple[str, str]]:
    """Yield what no checkpoint can hold: its place, in dotted keys, and its name.

    Args:
        value: the values.
        foreign: names that stand for neither plain values nor tensors.
        where: the place of `value`.
    """
    if type(value) in _PLAIN:
        return
    if isinstance(value, Global):
        if str(value) in foreign:
            yield where, str(value)
    elif isinstance(value, Call):
        for part in (value.function, *value.args, value.state, *value.items):
            yield from misfits(part, foreign, where)
    elif type(value) not in _CONTAINERS:
        yield where, f"a {type(value).__name__}"
    elif isinstance(value, dict):
        for key, item in value.items():
            name = str(key.function if isinstance(key, Call) else key)
            place = f"{where}.{name}" if where else name
            yield from misfits(key, foreign, place)
            yield from misfits(item, foreign, place)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from misfits(item, foreign, f"{where}[{index}]")
