"""Two states side by side: what differs in them, and which pairs of tensors are left to compare. Without torch."""

from __future__ import annotations

import itertools
import struct
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from helios.chkpt._comparison._difference import Difference, DifferenceKind
from helios.chkpt._format.values import Call, Global, Storage, Tensor
from helios.chkpt._places import Place, brief, is_atom, is_leaf, key_text, kind_of, tensor_of

_BEFORE = 20  # characters that are shown before the first one that differs
_SEQUENCES = (list, tuple)


@dataclass(frozen=True)
class TensorPair:
    """Two tensors at the same place."""

    place: Place
    a: Tensor
    b: Tensor


def compare_states(a: dict[object, object], b: dict[object, object]) -> list[Difference | TensorPair]:
    """What differs in two states, in the order of the first, and the pairs of tensors that are at the same places."""
    walk = _Walk()
    walk.compare_dicts(None, a, b)
    walk.run()
    return walk.found


def identity(value: object) -> Hashable:
    """Equal for values of the same type and the same bits, such as two nans; something for each object else."""
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    if isinstance(value, complex):
        return complex, struct.pack("<dd", value.real, value.imag)
    if isinstance(value, tuple):
        return tuple(map(identity, value))
    if isinstance(value, set):
        return frozenset(map(identity, value))
    if isinstance(value, bytearray):
        return bytearray, bytes(value)
    if isinstance(value, Global | Storage):
        return value
    if is_atom(value):
        return type(value), value
    if isinstance(value, Call) and is_leaf(value):
        return str(value.function), identity(value.args)
    return kind_of(value)


class _Walk:
    """Does not recurse, and looks at each pair of containers once, however often they are shared."""

    def __init__(self) -> None:
        self.found: list[Difference | TensorPair] = []
        self._todo: list[tuple[Place, object, object]] = []
        self._seen: set[tuple[int, int]] = set()
        self._first: tuple[dict[int, Place | None], dict[int, Place | None]] = ({}, {})

    def run(self) -> None:
        self._todo.reverse()
        while self._todo:
            start = len(self._todo) - 1
            self._compare(*self._todo.pop())
            self._todo[start:] = reversed(self._todo[start:])  # so that the first part is next

    def _add(self, place: Place, kind: DifferenceKind, a: str = "", b: str = "") -> None:
        self.found.append(Difference(place, kind, a, b))

    def _compare(self, place: Place, a: object, b: object) -> None:
        if isinstance(a, Storage) and isinstance(b, Storage):
            a, b = _as_tensor(a), _as_tensor(b)
        is_one_kind = _type_of(a) == _type_of(b)
        if not is_one_kind:
            self._add(place, DifferenceKind.TYPE, _with_kind(a), _with_kind(b))
        first, second = tensor_of(a), tensor_of(b)
        if first is not None and second is not None:
            self._compare_tensors(place, first, second)
            if is_one_kind and isinstance(a, Call) and isinstance(b, Call):
                self._compare_items(place, _around_tensor(a), _around_tensor(b))
        elif isinstance(_fields(a), dict) and isinstance(_fields(b), dict):
            self._compare_containers(place, a, b)
        elif isinstance(a, _SEQUENCES) and isinstance(b, _SEQUENCES):
            if is_leaf(a) and is_leaf(b):
                self._compare_lists(place, a, b)
            else:
                self._compare_containers(place, a, b)
        elif is_one_kind:
            if isinstance(a, Call) and isinstance(b, Call) and not (is_leaf(a) and is_leaf(b)):
                self._compare_containers(place, a, b)
            elif not _is_same(a, b):
                self._add(place, DifferenceKind.VALUE, *_texts(a, b))

    def _compare_tensors(self, place: Place, a: Tensor, b: Tensor) -> None:
        if a.requires_grad != b.requires_grad:
            texts = [f"requires_grad={tensor.requires_grad}" for tensor in (a, b)]
            self._add(place, DifferenceKind.TYPE, texts[0], texts[1])
        self.found.append(TensorPair(place, a, b))

    def _compare_containers(self, place: Place, a: object, b: object) -> None:
        firsts = [first.setdefault(id(item), place) for first, item in zip(self._first, (a, b), strict=True)]
        if firsts[0] != firsts[1] and not isinstance(a, tuple) and not isinstance(b, tuple):
            texts = (f"the same as {first}" if first != place else "one of its own" for first in firsts)
            self._add(place, DifferenceKind.TIED, *texts)
        if (id(a), id(b)) in self._seen:
            return
        self._seen.add((id(a), id(b)))
        fields = _fields(a), _fields(b)
        if isinstance(fields[0], dict) and isinstance(fields[1], dict):
            self.compare_dicts(place, fields[0], fields[1])
        elif isinstance(a, _SEQUENCES) and isinstance(b, _SEQUENCES):
            self._compare_items(place, a, b)
        elif isinstance(a, Call) and isinstance(b, Call):
            self._compare_items(place, [*a.args, *a.items], [*b.args, *b.items])
            if isinstance(a.state, dict) and isinstance(b.state, dict):
                self.compare_dicts(place, a.state, b.state)
            else:
                self._todo.append((Place(place, "state"), a.state, b.state))

    def compare_dicts(self, place: Place | None, a: dict[object, object], b: dict[object, object]) -> None:
        items = _items_by_identity(a), _items_by_identity(b)
        for name, (key, value) in items[0].items():
            if name in items[1]:
                other_key, other = items[1][name]
                self._todo.append((Place(place, key), value, other))
                if not _is_same(key, other_key):
                    texts = f"key {brief(key)}", f"key {brief(other_key)}"
                    self._add(Place(place, key), DifferenceKind.TYPE, *texts)
            else:
                self._add(Place(place, key), DifferenceKind.ONLY_IN_A, a=_with_kind(value))
        for name, (key, value) in items[1].items():
            if name not in items[0]:
                self._add(Place(place, key), DifferenceKind.ONLY_IN_B, b=_with_kind(value))
        orders = [
            [name for name in items[0] if name in items[1]],
            [name for name in items[1] if name in items[0]],
        ]
        for first, second in zip(*orders, strict=True):
            if first != second:
                keys = brief(items[0][first][0]), brief(items[1][second][0])
                self._add(place or Place(None, "checkpoint"), DifferenceKind.ORDER, *keys)
                break

    def _compare_items(self, place: Place, a: Sequence[object], b: Sequence[object]) -> None:
        missing = object()
        for index, (first, second) in enumerate(itertools.zip_longest(a, b, fillvalue=missing)):
            here = Place(place, index, True)
            if second is missing:
                self._add(here, DifferenceKind.ONLY_IN_A, a=_with_kind(first))
            elif first is missing:
                self._add(here, DifferenceKind.ONLY_IN_B, b=_with_kind(second))
            else:
                self._todo.append((here, first, second))

    def _compare_lists(self, place: Place, a: Sequence[object], b: Sequence[object]) -> None:
        """Those of numbers, as generators have them: one difference, not hundreds."""
        if len(a) != len(b):
            texts = (f"{brief(items)}, length {len(items)}" for items in (a, b))
            self._add(place, DifferenceKind.VALUE, *texts)
            return
        differing = [i for i, pair in enumerate(zip(a, b, strict=True)) if not _is_same(*pair)]
        if differing:
            one, other = _texts(a[differing[0]], b[differing[0]])
            first = f"[{differing[0]}]: {one}"
            self.found.append(Difference(place, DifferenceKind.VALUE, first, other, len(a), len(differing)))


def _items_by_identity(value: dict[object, object]) -> dict[Hashable, tuple[object, object]]:
    """Keys and values of a dict, and attributes, under names that are equal for equal keys.

    A member of an enum and its text are equal here, so that a file can be compared with what it was migrated to.
    """
    items = [(identity(key_text(key)), key, item) for key, item in value.items()]
    if type(value) is OrderedDict:
        items += [(("attribute", name), name, item) for name, item in vars(value).items()]
    counts: Counter[Hashable] = Counter()
    named: dict[Hashable, tuple[object, object]] = {}
    for name, key, item in items:
        counts[name] += 1
        named[name, counts[name]] = (
            key,
            item,
        )  # objects that are keys may have equal names: one after the other
    return named


def _is_same(a: object, b: object) -> bool:
    return type(a) is type(b) and identity(a) == identity(b)


def _type_of(value: object) -> object:
    if isinstance(value, Tensor):
        return Tensor  # in shards or not: `load` gives the same
    return value.function if isinstance(value, Call) else type(value)


def _around_tensor(call: Call) -> tuple[object, ...]:
    """What a call adds to the tensor that it wraps, such as a scale; see `tensor_of`."""
    return call.args[4:] if isinstance(call.args[0], Storage) else call.args[1:]


def _fields(value: object) -> object:
    """The fields of an object that has nothing else, such as those of earlier releases; else the value itself."""
    return value.state if isinstance(value, Call) and not value.args and not value.items else value


def _as_tensor(storage: Storage) -> Tensor:
    return Tensor(storage, "uint8", 0, (storage.num_bytes,), (1,))


def _with_kind(value: object) -> str:
    return f"{kind_of(value)} {brief(value)}" if value is not None else "None"


def _texts(a: object, b: object) -> tuple[str, str]:
    """Two values that differ, in texts that differ."""
    texts = brief(a), brief(b)
    if texts[0] != texts[1]:
        return texts
    if isinstance(a, float) and isinstance(b, float):
        return f"{a} (bits {struct.pack('>d', a).hex()})", f"{b} (bits {struct.pack('>d', b).hex()})"
    long = (a, b) if isinstance(a, str | bytes) and isinstance(b, str | bytes) else (repr(a), repr(b))
    pairs = enumerate(itertools.zip_longest(*long))
    start = max(0, next((i for i, (x, y) in pairs if x != y), 0) - _BEFORE)
    return f"[{start}:] {brief(long[0][start:])}", f"[{start}:] {brief(long[1][start:])}"
