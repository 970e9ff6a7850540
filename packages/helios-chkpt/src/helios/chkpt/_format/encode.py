"""Values to a pickle, in the one way this format has: equal values give equal bytes.

Protocol 2, and only what ``torch.load(weights_only=True)`` reads. Text is shared by value and containers by
identity, so that what the interpreter happens to share does not show.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable

from helios.chkpt._format.calls import KNOWN
from helios.chkpt._format.dtypes import ITEM_BYTES, STORAGE_CLASSES
from helios.chkpt._format.values import Call, Global, Storage, Tensor

_ORDERED_DICT = Global("collections", "OrderedDict")
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")
_ENCODE = Global("_codecs", "encode")
_COMPLEX = Global("__builtin__", "complex")


class _Code(bytes):
    """Bytes of the pickle, as opposed to bytes of the state."""


class _Put:
    """Here the object on top of the stack gets a number, under which it can be had again."""

    def __init__(self, key: object, value: object) -> None:
        self.key = key
        self.value = value


_MARK, _APPENDS, _SETITEMS, _TUPLE = _Code(b"("), _Code(b"e"), _Code(b"u"), _Code(b"t")
_REDUCE, _BUILD, _PERSID = _Code(b"R"), _Code(b"b"), _Code(b"Q")
_SHORT_TUPLES = (b")", b"\x85", b"\x86", b"\x87")
_ATOMS = (int, float, bool, str, type(None), complex, bytes)
_CONSTANTS = {None: _Code(b"N"), True: _Code(b"\x88"), False: _Code(b"\x89")}


def encode(state: dict[str, object]) -> bytes:
    """The pickle of a state that consists of what `helios.chkpt._format.values` describes.

    Does not recurse, so depth is no limit. Sharing is kept for containers, tensors and calls.

    Raises:
        TypeError: there is something else in it.
    """
    return _Encoder().encode(state)


class _Encoder:
    def __init__(self) -> None:
        self._memo: dict[object, int] = {}
        self._kept: list[object] = []  # what is known by its id has to live as long as the memo

    def encode(self, state: object) -> bytes:
        out = bytearray(b"\x80\x02")
        todo: list[object] = [state]
        while todo:
            item = todo.pop()
            if type(item) is _Code:
                out += item
            elif type(item) is _Put:
                out += self._put(item)
            else:
                pieces = self._pieces(item)
                if type(pieces) is _Code:
                    out += pieces
                else:
                    todo += reversed(list(pieces))
        return bytes(out + b".")

    def _put(self, put: _Put) -> bytes:
        self._kept.append(put.value)
        return self._mark(put.key)

    def _mark(self, key: object) -> bytes:
        """Give what is on top of the stack a number."""
        index = self._memo[key] = len(self._memo)
        return b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)

    def _get(self, index: int) -> _Code:
        return _Code(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))

    def _shared(self, kind: type, value: str | Global) -> bytes:
        """A text or a name, or the number of an equal one before."""
        index = self._memo.get((kind, value))
        if index is not None:
            return self._get(index)
        if isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            code = b"X" + struct.pack("<I", len(data)) + data
        else:
            code = f"c{value.module}\n{value.name}\n".encode()
        return code + self._mark((kind, value))

    def _storage(self, storage: Storage) -> bytes:
        if storage.is_untyped:
            kind = Global("torch.storage", "UntypedStorage")
            count = storage.num_bytes
        else:
            kind = Global("torch", STORAGE_CLASSES[storage.dtype])
            count = storage.num_bytes // ITEM_BYTES[storage.dtype]
        parts = [
            b"(",
            self._shared(str, "storage"),
            self._shared(Global, kind),
            self._shared(str, storage.key),
        ]
        return b"".join([*parts, self._shared(str, storage.location), _int(count), b"tQ"])

    def _tensor(self, tensor: Tensor) -> bytes:
        """All of a tensor at once: there are many, and nothing in it needs the stack of `encode`."""
        is_untyped = tensor.storage.is_untyped
        name = _REBUILD_UNTYPED if is_untyped else _REBUILD
        parts = [self._shared(Global, name), b"(", self._storage(tensor.storage), _int(tensor.offset)]
        for numbers in (tensor.shape, tensor.stride):
            codes = b"".join(map(_int, numbers))
            parts.append(b"(" + codes + b"t" if len(numbers) > 3 else codes + _SHORT_TUPLES[len(numbers)])
        parts.append(_CONSTANTS[tensor.requires_grad])
        parts += [self._shared(Global, _ORDERED_DICT), b")R"]  # hooks: a new dict for each
        if is_untyped:
            parts.append(self._shared(Global, Global("torch", tensor.dtype)))
        return b"".join([*parts, b"tR"])

    def _pieces(self, value: object) -> _Code | Iterable[object]:
        """The bytes of a value, or the pieces it consists of."""
        kind = type(value)
        if kind is float:
            return _Code(b"G" + struct.pack(">d", value))
        if kind is int:
            assert isinstance(value, int)
            return _int(value)
        if value is None or kind is bool:
            return _CONSTANTS[value]  # type: ignore[index]  # None, True or False
        if isinstance(value, str | Global):
            return _Code(self._shared(kind, value))
        if isinstance(value, Storage):
            return _Code(self._storage(value))
        index = self._memo.get((kind, id(value)))
        if index is not None:
            return self._get(index)
        return self._new_pieces(value, kind, _Put((kind, id(value)), value))

    def _new_pieces(self, value: object, kind: type, put: _Put) -> Iterable[object]:
        if isinstance(value, bytes):
            return [_ENCODE, (value.decode("latin1"), "latin1"), _REDUCE]
        if isinstance(value, complex):
            return [_COMPLEX, (value.real, value.imag), _REDUCE]
        if isinstance(value, Tensor):
            return [_Code(self._tensor(value)), put]
        if isinstance(value, Call):
            return _call(value, put)
        if kind is list:
            assert isinstance(value, list)
            return [_Code(b"]"), put, *([_MARK, *value, _APPENDS] if value else [])]
        if kind is tuple:
            assert isinstance(value, tuple)
            return _tuple(value, put)
        return _mapping(value, kind, put)


def _call(call: Call, put: _Put) -> Iterable[object]:
    if call.items or call.is_new or call.state is not None or str(call.function) not in KNOWN:
        raise TypeError(f"an object made by {call.function} cannot be stored")
    return [call.function, call.args, _REDUCE, put]


def _int(value: int) -> _Code:
    if 0 <= value < 256:
        return _Code(b"K" + bytes([value]))
    if -(2**31) <= value < 2**31:
        return _Code(b"J" + struct.pack("<i", value))
    bits = (~value if value < 0 else value).bit_length()
    data = value.to_bytes(bits // 8 + 1, "little", signed=True)
    if len(data) > 255:
        raise TypeError(f"an int of {bits} bits cannot be stored")
    return _Code(b"\x8a" + bytes([len(data)]) + data)


def _tuple(value: tuple[object, ...], put: _Put) -> Iterable[object]:
    if not value:
        return [_Code(_SHORT_TUPLES[0])]
    # One of plain numbers is repeated, not shared: nobody can tell, and whether it is shared is chance.
    own = () if all(type(item) in _ATOMS for item in value) else (put,)
    if len(value) <= 3:
        return [*value, _Code(_SHORT_TUPLES[len(value)]), *own]
    return [_MARK, *value, _TUPLE, *own]


def _mapping(value: object, kind: type, put: _Put) -> Iterable[object]:
    if kind is Counter:
        assert isinstance(value, Counter)
        return [Global("collections", "Counter"), (dict(value),), _REDUCE, put]
    if kind is not dict and kind is not OrderedDict:
        raise TypeError(f"{kind.__name__} cannot be stored")
    assert isinstance(value, dict)
    start = [_Code(b"}")] if kind is dict else [_ORDERED_DICT, (), _REDUCE]
    items = [part for item in value.items() for part in item]
    pieces: list[object] = [*start, put, *([_MARK, *items, _SETITEMS] if items else [])]
    if kind is OrderedDict and vars(value):
        pieces += [dict(vars(value)), _BUILD]
    return pieces
