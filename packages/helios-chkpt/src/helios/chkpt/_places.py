"""Where values are in a checkpoint, and what they are in a few words. For people; bounded, whatever is in a file."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from helios.chkpt._format.values import Call, Global, Storage, Tensor
from helios.chkpt._sharded.manifest import ShardedTensor

MAX_TEXT = 80
"""Characters of a text that are shown."""

_BARE = re.compile(r"[\w.\-]+")
_ATOMS = (bool, int, float, complex, str, bytes, type(None))
_MAX_ITEMS = 4  # of a container that are shown
_MAX_LEVELS = 3
_SPECIAL = {
    "torch._utils._rebuild_parameter": "parameter",
    "torch._utils._rebuild_qtensor": "quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "sparse tensor",
}
_Item = TypeVar("_Item")


class Place(NamedTuple):
    """Where a value is: its key in what is at the parent. Made into text only when somebody reads it.

    Attributes:
        parent: None for keys of the checkpoint itself.
        key: a key of a dict, the name of an attribute, or an index.
        is_index: `key` counts the items of a list or tuple.
    """

    parent: Place | None
    key: object
    is_index: bool = False

    def __str__(self) -> str:
        pieces: list[str] = []
        place: Place | None = self
        while place is not None:
            text = key_text(place.key)
            if type(text) is str and not place.is_index and len(text) <= MAX_TEXT and _BARE.fullmatch(text):
                pieces.append(f".{text}" if place.parent else text)
            else:
                pieces.append(f"[{brief(text)}]")
            place = place.parent
        return "".join(reversed(pieces))


def key_text(key: object) -> object:
    """The text that a member of an enum is made of, as releases 2.x had them for keys; else the key itself."""
    if isinstance(key, Call) and len(key.args) == 1 and type(key.args[0]) is str and key.state is None:
        return key.args[0]
    return key


def is_atom(value: object) -> bool:
    """Whether a value is a number, a text, bytes or None."""
    return type(value) in _ATOMS


def is_leaf(value: object) -> bool:
    """Whether a value is looked at as a whole: it has no parts, or is a list of numbers, as generators have them."""
    if isinstance(value, list | tuple):
        return all(map(is_atom, value))
    if isinstance(value, dict):
        return not value and not (type(value) is OrderedDict and vars(value))
    if isinstance(value, Call):
        return tensor_of(value) is not None or (
            value.state is None and not value.items and all(map(is_atom, value.args))
        )
    return True


def parts_at(value: object, place: Place | None) -> list[tuple[Place, object]]:
    """The parts of a value that is no leaf, in the order of the file. Fields of an object are at their names."""
    if isinstance(value, dict):
        found = [(Place(place, key), item) for key, item in value.items()]
        if type(value) is OrderedDict:
            found += [(Place(place, name), item) for name, item in vars(value).items()]
        return found
    if isinstance(value, list | tuple):
        return [(Place(place, index, True), item) for index, item in enumerate(value)]
    if isinstance(value, Call):
        found = [(Place(place, index, True), item) for index, item in enumerate([*value.args, *value.items])]
        if isinstance(value.state, dict):
            return found + parts_at(value.state, place)
        return found if value.state is None else [*found, (Place(place, "state"), value.state)]
    return []


def tensor_of(value: object) -> Tensor | None:
    """The tensor that a value is, or that it wraps: a parameter's, or the integers of a quantised one."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, Call):
        return None
    match str(value.function), value.args:
        case "torch._utils._rebuild_parameter", (Tensor() as data, *_):
            return data
        case "torch._utils._rebuild_qtensor", (
            Storage() as storage,
            int(start),
            tuple(shape),
            tuple(stride),
            *_,
        ):
            if all(type(number) is int and number >= 0 for number in (start, *shape, *stride)):
                return Tensor(storage, storage.dtype, start, shape, stride)
    return None


def kind_of(value: object) -> str:
    """What a value is: the name of its type, or of what a pickle would call to make it."""
    if isinstance(value, Call | Global):
        if isinstance(value, Call) and str(value.function) in _SPECIAL:
            return _SPECIAL[str(value.function)]
        return _cut(str(value.function if isinstance(value, Call) else value))
    if isinstance(value, ShardedTensor):
        return "sharded tensor"
    return {Tensor: "tensor", Storage: "storage", type(None): "None"}.get(type(value), type(value).__name__)


def brief(value: object) -> str:
    """A value in at most `MAX_TEXT` printable characters; bytes of tensors are not looked at."""
    return _cut(_text(value, _MAX_LEVELS))


def printable(text: str) -> str:
    """A text without what would move a terminal's cursor or change its colours: that is shown as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape such as ``[64, 3, 7, 7]``."""
    return _cut(f"[{', '.join(map(str, shape[:16]))}{', ...' if len(shape) > 16 else ''}]")


def _text(value: object, levels: int) -> str:
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]!r}..."
    if is_atom(value):
        return repr(value)
    if isinstance(value, ShardedTensor):
        return f"{value.dtype} {shape_text(value.shape)}, {value.spread.text}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {shape_text(value.shape)}"
    if isinstance(value, Storage):
        return f"{value.num_bytes} bytes"
    if isinstance(value, Call):
        if value.function.module.partition(".")[0] == "pathlib" and all(type(t) is str for t in value.args):
            return repr(str(PurePosixPath(*(str(text)[:MAX_TEXT] for text in value.args[:MAX_TEXT]))))
        return f"{kind_of(value)}({_items(value.args, levels)})"
    if isinstance(value, dict):
        items = _few(value.items(), levels)
        pairs = [f"{_text(key, levels - 1)}: {_text(item, levels - 1)}" for key, item in items]
        return f"{{{_joined(pairs, len(value))}}}"
    if isinstance(value, set):
        # Sorted, since texts in a set come in another order in each process.
        return f"{{{_joined(sorted(_text(item, 1) for item in value)[:_MAX_ITEMS], len(value))}}}"
    if isinstance(value, list):
        return f"[{_items(value, levels)}]"
    if isinstance(value, tuple):
        return f"({_items(value, levels)}{',' if len(value) == 1 else ''})"
    return kind_of(value)


def _items(values: Collection[object], levels: int) -> str:
    return _joined([_text(value, levels - 1) for value in _few(values, levels)], len(values))


def _few(values: Iterable[_Item], levels: int) -> list[_Item]:
    return list(itertools.islice(values, _MAX_ITEMS)) if levels > 0 else []


def _joined(texts: list[str], count: int) -> str:
    if len(texts) < count:
        texts = [*texts, f"... {count} in all" if texts else f"{count} items"]
    return ", ".join(texts)


def _cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
