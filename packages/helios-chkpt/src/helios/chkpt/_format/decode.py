"""A pickle to values: nothing is imported, called or made but containers, numbers and text.

The opcodes are those that `encode` and torch.save write (protocol 2). What the bytes ask for costs no more memory
than a small multiple of their number, and depth is no danger: nothing here recurses.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from helios.chkpt._format.calls import KNOWN, MAKERS, MalformedError
from helios.chkpt._format.dtypes import DTYPES, ITEM_BYTES
from helios.chkpt._format.values import Call, Global, Storage, Tensor, parts_of

MAX_DEPTH = 200
"""Containers within containers that a file may have."""

_KEY_PARTS = 10**6  # to hash a tuple costs as much as it has parts, each as often as it is referred to


class TooDeepError(MalformedError):
    """Containers or keys are nested too deep: no more is said of such a pickle."""


@dataclass(frozen=True)
class Decoded:
    """What a pickle holds.

    Attributes:
        value: the outermost object.
        foreign: names of what it would import that is neither plain value nor tensor, in order, once each.
    """

    value: object
    foreign: tuple[str, ...]


def decode(data: bytes, records: Mapping[str, int]) -> Decoded:
    """Read a pickle.

    Args:
        data: the pickle.
        records: bytes of the record ``data/<key>``, by key.

    Raises:
        MalformedError: an opcode, a number or a reference that no such pickle has.
    """
    machine = _Machine(data, records)
    try:
        value = machine.run()
    except MalformedError:
        raise
    except (struct.error, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        found = f"nonsense at byte {machine.position} of the pickle ({type(error).__name__})"
        raise MalformedError(found) from error
    check_depth(value)
    return Decoded(value, tuple(machine.foreign))


_CONTAINERS = (dict, list, tuple, set, Tensor, Call)


def check_depth(value: object) -> None:
    """MalformedError if containers are nested too deep or contain themselves. Does not recurse."""
    depths: dict[int, int | None] = {}  # of those that are not empty; None: being looked at
    todo: list[tuple[object, list[object] | None]] = [(value, None)]
    while todo:
        container, parts = todo.pop()
        if parts is not None:  # all that is in it is known
            depth = 1 + max((depths.get(id(part)) or 0 for part in parts), default=0)
            if depth > MAX_DEPTH:
                raise TooDeepError(f"containers nested more than {MAX_DEPTH} deep")
            depths[id(container)] = depth
            continue
        if id(container) in depths:
            if depths[id(container)] is None:
                raise MalformedError("a container that contains itself")
            continue
        inner = parts_of(container)
        if inner:  # what is empty is not looked at: a byte of the pickle makes one
            depths[id(container)] = None
            todo.append((container, inner))
            todo += [(part, None) for part in inner if isinstance(part, _CONTAINERS) and part]


class _Machine:
    """The stack machine that a pickle is a program of."""

    def __init__(self, data: bytes, records: Mapping[str, int]) -> None:
        self._data = data
        self._records = records
        self._stack: list[object] = []
        self._below: list[list[object]] = []  # what is under each mark
        self._memo: dict[int, object] = {}
        self._key_parts_left = _KEY_PARTS + 100 * len(data)
        self.position = 0
        self.foreign: dict[str, None] = {}

    def run(self) -> object:
        if self._take(2) != b"\x80\x02":
            raise MalformedError("a pickle of another protocol than 2")
        while True:
            opcode = self._take(1)
            if opcode == b".":
                break
            action = _ACTIONS.get(opcode)
            if action is None:
                raise MalformedError(f"the opcode {opcode!r} at byte {self.position - 1} of the pickle")
            action(self)
        if self.position != len(self._data):
            raise MalformedError(f"{len(self._data) - self.position} bytes after the end of the pickle")
        if len(self._stack) != 1 or self._below:
            raise MalformedError("a pickle that leaves more than one object")
        return self._stack[0]

    def _take(self, count: int) -> bytes:
        piece = self._data[self.position : self.position + count]
        if len(piece) != count:
            raise MalformedError("a pickle without an end")
        self.position += count
        return piece

    def _number(self, code: str) -> int:
        layout = struct.Struct(code)
        return cast("int", layout.unpack(self._take(layout.size))[0])

    def _line(self) -> str:
        stop = self._data.index(b"\n", self.position)
        line = self._data[self.position : stop]
        self.position = stop + 1
        return line.decode()

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _marked(self) -> list[object]:
        """All above the mark."""
        items = self._stack
        self._stack = self._below.pop()
        return items

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def constant(self, value: object) -> None:
        self._push(value)

    def number(self, code: str) -> None:
        self._push(self._number(code))

    def big_int(self) -> None:
        self._push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def text(self) -> None:
        self._push(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    def put(self, code: str) -> None:
        self._memo[self._number(code)] = self._stack[-1]

    def get(self, code: str) -> None:
        self._push(self._memo[self._number(code)])

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise MalformedError("a tuple of more than there is")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def marked_tuple(self) -> None:
        items = tuple(self._marked())
        self._push(items)

    def append(self) -> None:
        item = self._stack.pop()
        self._extend([item])

    def appends(self) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target += items
        elif isinstance(target, Call):
            target.items += items
        else:
            raise MalformedError(f"items for a {type(target).__name__}")

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self._marked())

    def _update(self, items: list[object]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise MalformedError("a key without a value")
        self._check_keys(items[::2])
        if type(target) in (dict, OrderedDict):
            cast("dict[object, object]", target).update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, Call):
            target.items += items
        else:
            raise MalformedError(f"items for a {type(target).__name__}")

    def _check_keys(self, keys: Iterable[object]) -> None:
        """MalformedError if these, hashed, would use up the interpreter's stack or all time."""
        todo = [(key, 0) for key in keys if type(key) is tuple]
        while todo:
            key, depth = todo.pop()
            self._key_parts_left -= 1
            if depth > MAX_DEPTH or self._key_parts_left < 0:
                raise TooDeepError("a key that is nested too deep or has too many parts")
            if type(key) is tuple:
                todo += [(part, depth + 1) for part in key]

    def global_name(self) -> None:
        module, name = self._line(), self._line()
        found = Global("builtins" if module == "__builtin__" else module, name)
        if str(found) not in KNOWN:
            self.foreign[str(found)] = None
        self._push(found)

    def call(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise MalformedError(f"a call of a {type(function).__name__}")
        if str(function) == "builtins.set" and len(args) == 1 and type(args[0]) is list:
            self._check_keys(args[0])
        make = MAKERS.get(str(function))
        self._push(Call(function, args) if make is None else make(args))

    def new(self) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise MalformedError(f"a new {type(function).__name__}")
        self._push(Call(function, args, is_new=True))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Call):
            if target.state is not None:
                raise MalformedError("a state for an object that has one")
            target.state = state
        elif type(target) is OrderedDict and type(state) is dict and set(state) <= {"_metadata"}:
            target.__dict__.update(state)  # Module.state_dict() keeps the versions of its modules there
        else:
            raise MalformedError(f"a state for a {type(target).__name__}")

    def storage(self) -> None:
        match self._stack.pop():
            case ("storage", Global(module, name), str(key), str(location), int(count)):
                pass
            case _:
                raise MalformedError("a reference that is none to a storage")
        is_untyped = f"{module}.{name}" == "torch.storage.UntypedStorage"
        if not is_untyped and (module != "torch" or name not in DTYPES):
            raise MalformedError(f"a storage of the class {module}.{name}")
        dtype = "uint8" if is_untyped else DTYPES[name]
        num_bytes = self._records.get(key)
        if num_bytes is None:
            raise MalformedError(f"a storage {key!r:.80} that has no record")
        if count != num_bytes // ITEM_BYTES[dtype]:
            raise MalformedError(f"a storage {key!r:.80} of {count} {dtype} in a record of {num_bytes} bytes")
        self._push(Storage(key, dtype, location, num_bytes, is_untyped))


_ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"(": _Machine.mark,
    b"N": lambda machine: machine.constant(None),
    b"\x88": lambda machine: machine.constant(True),
    b"\x89": lambda machine: machine.constant(False),
    b")": lambda machine: machine.constant(()),
    b"]": lambda machine: machine.constant([]),
    b"}": lambda machine: machine.constant({}),
    b"K": lambda machine: machine.number("<B"),
    b"M": lambda machine: machine.number("<H"),
    b"J": lambda machine: machine.number("<i"),
    b"G": lambda machine: machine.number(">d"),
    b"\x8a": _Machine.big_int,
    b"X": _Machine.text,
    b"q": lambda machine: machine.put("<B"),
    b"r": lambda machine: machine.put("<I"),
    b"h": lambda machine: machine.get("<B"),
    b"j": lambda machine: machine.get("<I"),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": _Machine.marked_tuple,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"c": _Machine.global_name,
    b"R": _Machine.call,
    b"\x81": _Machine.new,
    b"b": _Machine.build,
    b"Q": _Machine.storage,
}
