"""By how much tensors differ: element by element, in any dtype. Needs torch."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from helios.chkpt._comparison._tensors import CHUNK_BYTES, Side, UncountableError
from helios.chkpt._format.dtypes import ITEM_BYTES
from helios.chkpt._format.values import Tensor
from helios.chkpt._sharded.manifest import ShardedTensor
from helios.chkpt._tensors import set_storage

_SIGN = -(2**63)
# What elements are while only their bits count: integers, by their size in bytes; two each for the largest.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_PARTS = {16: 2}
_QUANTISED = {"quint8": torch.uint8, "qint8": torch.int8, "qint32": torch.int32}
_NO_NUMBERS = frozenset({"float4_e2m1fn_x2", "quint4x2", "quint2x4"})  # several in a byte


@dataclass(frozen=True)
class Counts:
    """How pairs of elements differ; see `helios.chkpt.Difference`. The sum is that of both together."""

    num_differing: int = 0
    max_abs: float | None = None
    num_nan: int = 0

    def __add__(self, other: Counts) -> Counts:
        known = [value for value in (self.max_abs, other.max_abs) if value is not None]
        return Counts(
            self.num_differing + other.num_differing,
            max(known, default=None),
            self.num_nan + other.num_nan,
        )


def count(a: bytearray, b: bytearray, dtype: str) -> Counts:
    """How the elements differ whose bytes these are, of equal number and of this dtype."""
    item = ITEM_BYTES[dtype]
    bits = [torch.frombuffer(memory, dtype=_BITS[item]).view(-1, _PARTS.get(item, 1)) for memory in (a, b)]
    rows = (bits[0] != bits[1]).any(dim=1)
    num_differing = int(rows.count_nonzero())
    kind = _dtype(dtype)
    if num_differing == 0 or kind is None:
        return Counts(num_differing)
    x, y = (side[rows].view(kind).flatten() for side in bits)
    if kind.is_floating_point or kind.is_complex:
        return _of_floats(x, y)
    return Counts(num_differing, _of_integers(x, y))


def _dtype(name: str) -> torch.dtype | None:
    """The dtype as which bytes are numbers; None if they are none, or unknown to this torch."""
    if name in _NO_NUMBERS or name.startswith("bits"):
        return None
    found = _QUANTISED.get(name) or getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _of_floats(x: torch.Tensor, y: torch.Tensor) -> Counts:
    # By way of float32, which every smaller float converts to and which holds all of its values.
    parts = [torch.view_as_real(z) if z.is_complex() else z[:, None] for z in (x, y)]
    a, b = (
        part.to(torch.float32).to(torch.float64) if part.dtype.itemsize < 4 else part.double()
        for part in parts
    )
    nan = (a.isnan() | b.isnan()).any(dim=1)
    distances = torch.where(a == b, 0.0, (a - b).abs())  # inf is as far from inf as 1 from 1
    distance = torch.hypot(distances[:, 0], distances[:, -1]) if x.is_complex() else distances[:, 0]
    largest = float(distance.masked_fill(nan, -1.0).max())
    return Counts(x.numel(), None if largest < 0 else largest, int(nan.count_nonzero()))


def _of_integers(x: torch.Tensor, y: torch.Tensor) -> int:
    if x.dtype is torch.uint64:  # flipping the highest bit keeps the order, and all differences
        x, y = (side.view(torch.int64) ^ _SIGN for side in (x, y))
    a, b = x.to(torch.int64), y.to(torch.int64)
    # The difference modulo 2**64 is right as an unsigned number, which torch cannot compare: flip its highest bit.
    distance = (torch.maximum(a, b) - torch.minimum(a, b)) ^ _SIGN
    return int(distance.max()) + 2**63


def gathered(a: Side, first: Tensor, b: Side, second: Tensor) -> Iterator[tuple[bytearray, bytearray]]:
    """The elements of two views that lie in different orders or have holes, in one order, a chunk at a time.

    Raises:
        UncountableError: there are more elements than bytes: that many would never be compared.
    """
    num_bytes = max(a.record_of(first).num_bytes, b.record_of(second).num_bytes)
    if math.prod(first.shape) > num_bytes:
        raise UncountableError
    x, y = _mapped(a, first), _mapped(b, second)
    yield from _pieces(x, y, CHUNK_BYTES // x.element_size())


def assembled(a: Side, first: Tensor, b: Side, second: Tensor) -> Iterator[tuple[bytearray, bytearray]]:
    """The elements of two tensors of which one is in shards, in one order, a chunk at a time."""
    x, y = (_whole(side, tensor) for side, tensor in ((a, first), (b, second)))
    yield from _pieces(x, y, CHUNK_BYTES // x.element_size())


def _whole(side: Side, tensor: Tensor) -> torch.Tensor:
    """A tensor as elements of integers, in memory if it is in shards."""
    if not isinstance(tensor, ShardedTensor):
        return _mapped(side, tensor)
    from helios.chkpt._sharded.read import read_into, whole  # loads DCP, which takes a while

    assert side.folder is not None and side.shards is not None
    tensors = {tensor.spread.name: whole(tensor.spread)}
    read_into(tensors, side.folder, side.shards, side.chunks)
    item = ITEM_BYTES[tensor.dtype]
    flat = tensors[tensor.spread.name].view(-1).view(torch.uint8).view(_BITS[item])
    parts = _PARTS.get(item, 1)
    return flat.view(*tensor.shape, *([parts] if parts > 1 else []))


def _mapped(side: Side, tensor: Tensor) -> torch.Tensor:
    """The tensor over the file itself, as elements of integers: nothing is read until it is looked at."""
    record = side.record_of(tensor)
    content = mmap.mmap(side.file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flat = torch.frombuffer(content, dtype=torch.uint8, count=record.num_bytes, offset=record.offset)
    item = ITEM_BYTES[tensor.dtype]
    parts = _PARTS.get(item, 1)
    shape, stride = tensor.shape, tensor.stride
    if parts > 1:  # bits alone: an element is two integers
        shape, stride = (*shape, parts), (*(step * parts for step in stride), 1)
    empty = torch.empty(0, dtype=_BITS[item], device="cpu")
    return set_storage(empty, flat.untyped_storage(), tensor.offset * parts, shape, stride)


def _pieces(x: torch.Tensor, y: torch.Tensor, most: int) -> Iterator[tuple[bytearray, bytearray]]:
    if x.numel() <= most:
        yield _bytes(x), _bytes(y)
        return
    dim = max(range(x.dim()), key=lambda d: x.shape[d])
    half = x.shape[dim] // 2
    for start, length in ((0, half), (half, x.shape[dim] - half)):
        yield from _pieces(x.narrow(dim, start, length), y.narrow(dim, start, length), most)


def _bytes(x: torch.Tensor) -> bytearray:
    memory = bytearray(x.numel() * x.element_size())
    torch.frombuffer(memory, dtype=x.dtype).view(x.shape).copy_(x)
    return memory
