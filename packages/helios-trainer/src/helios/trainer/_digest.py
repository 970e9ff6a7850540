"""Digests of anything that a batch or an optimizer holds, the same in every process and on every machine.

BLAKE2b of 8 bytes over the kind of each value, its size and its content: of a tensor its dtype, its shape and its bytes
in row-major order (as a little-endian machine has them), wherever the tensor is; of numbers their `repr`; of lists and
tuples their items in order, of mappings and sets in the order of the digests of keys and items; of other objects what
pickle would take of them. Only of a tensor of which each rank has a part, it is another one on each: of that part.
"""

import hashlib
from array import array
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch

from helios.trainer._layout import is_dtensor

_PLAIN = (type(None), bool, int, float, complex)


def digest(value: object) -> str:
    """Return the digest of a value, 16 hexadecimal digits.

    Raises:
        TypeError: something in it is neither tensor, array, plain value nor container, and pickle cannot take it.
    """
    digester = _Digester()
    digester.add(value)
    return digester.hasher.hexdigest()


class _Digester:
    def __init__(self) -> None:
        self.hasher = hashlib.blake2b(digest_size=8)
        self._open: list[
            int
        ] = []  # ids of the containers that are being added, for those that hold themselves

    def add(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            self._add_tensor(value)
        elif kind in _PLAIN:
            self._add_bytes(kind.__name__, repr(value).encode())
        elif kind is str:
            self._add_bytes("str", value.encode("utf-8", "surrogatepass"))
        elif kind in (bytes, bytearray):
            self._add_bytes("bytes", value)
        elif isinstance(value, np.ndarray | np.generic):
            self._add_array(value)
        elif isinstance(value, type | FunctionType | BuiltinFunctionType):
            self._add_bytes("name", f"{value.__module__}.{value.__qualname__}".encode())
        elif id(value) in self._open:
            self._add_bytes("itself", str(self._open.index(id(value))).encode())
        else:
            self._open.append(id(value))
            self._add_container(value)
            self._open.pop()

    def _add_bytes(self, kind: str, content: bytes | bytearray) -> None:
        self.hasher.update(f"{kind}:{len(content)}:".encode())
        self.hasher.update(content)

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        tensor = tensor.detach()
        if is_dtensor(tensor):
            tensor = tensor.to_local()
        self._add_bytes("tensor", f"{tensor.dtype} {_shape_of(tensor)}".encode())
        if tensor.is_nested:
            self._add_items("nested", tensor.unbind())
        elif tensor.layout is not torch.strided:
            coordinates = tensor if tensor.layout is torch.sparse_coo else tensor.to_sparse()
            self.add(coordinates._indices())
            self.add(coordinates._values())
        else:
            plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
            self.hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)

    def _add_array(self, value: Any) -> None:
        if value.dtype.hasobject:
            self._add_items(f"array {value.shape}", value.reshape(-1).tolist())
        else:
            self._add_bytes(f"array {value.dtype.str} {value.shape}", value.tobytes())

    def _add_container(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            if (numbers := _as_array(value)) is not None:
                self._add_bytes(f"{kind} of ints", numbers.tobytes())
            else:
                self._add_items(kind, value)
        elif isinstance(value, Mapping):
            # Not in its own order, which a restart may change: optimizers' groups come back in another.
            pairs = sorted(value.items(), key=lambda item: digest(item[0]))
            self._add_items("mapping", [part for pair in pairs for part in pair])
        elif isinstance(value, set | frozenset):
            self._add_items("set", sorted(digest(item) for item in value))
        else:
            self._add_object(value)

    def _add_items(self, kind: str, items: Any) -> None:
        self._add_bytes(kind, str(len(items)).encode())
        for item in items:
            self.add(item)

    def _add_object(self, value: Any) -> None:
        """Add what pickle would take: how to make it, its state, its items."""
        try:
            reduced = value.__reduce_ex__(4)
        except TypeError as error:
            name = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(
                f"a digest can be taken of tensors, plain values, containers and what can be pickled, found "
                f"{name}: {error}"
            ) from error
        if isinstance(reduced, str):
            self._add_bytes("name", reduced.encode())
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self._add_items("object", [make, *arguments, state, list(items or ()), list(pairs or ())])


def _shape_of(tensor: torch.Tensor) -> str:
    return str(tensor.size(0)) if tensor.is_nested else str(tuple(tensor.shape))


def _as_array(values: list[Any] | tuple[Any, ...]) -> "array[int] | None":
    """Return ints as an array, which is fifty times as fast as one by one; None if they are not all of 64 bits."""
    if len(values) < 8 or set(map(type, values)) != {int}:
        return None
    try:
        return array("q", values)
    except OverflowError:
        return None
