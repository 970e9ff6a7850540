"""Tensors as they are stored: on the CPU, detached, tied as they were, without bytes nobody refers to."""

from __future__ import annotations

import ctypes
import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from helios.chkpt._format.dtypes import ITEM_BYTES, STORAGE_CLASSES
from helios.chkpt._format.values import Call, Global, Storage, Tensor
from helios.chkpt._spans import Component, components

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_SMALL_BYTES = 1 << 16  # what one thread copies faster than torch has the tensors for it made
_QUANTISED = {"qint8", "quint8", "qint32"}


class Leaf(NamedTuple):
    """A strided tensor of the state and what describes it in the snapshot.

    Attributes:
        path: where the tensor is in the state: made into text if a message needs it.
        source: the tensor, detached.
        stored: its description, without storage until `pieces_of` has seen all leaves.
        space: what `start` counts in: two leaves overlap only within one space.
        start: its first byte. On the CPU an address, so that two storages over one memory are seen as tied.
        stop: one past its last byte; equal to `start` if it has no elements.
    """

    path: object
    source: torch.Tensor
    stored: Tensor
    space: object
    start: int
    stop: int


class Piece(NamedTuple):
    """Bytes that become one record: those of a tensor, or of several that overlap.

    Attributes:
        leaves: the tensors, in the order of the state.
        start: first byte in their space.
        stop: one past the last byte.
        is_packed: only what the tensors, all one view with holes, show is stored.
    """

    leaves: tuple[Leaf, ...]
    start: int
    stop: int
    is_packed: bool

    @property
    def num_bytes(self) -> int:
        """Size of the record."""
        return int(self.leaves[0].source.nbytes) if self.is_packed else self.stop - self.start


def unsupported(tensor: torch.Tensor) -> str | None:
    """Why plain ``torch.load(weights_only=True)`` would not give `tensor` back; None if it would."""
    if tensor.device.type == "meta":
        return "a tensor on the meta device has no values; materialise it before saving"
    if tensor.is_nested:
        return "nested tensors are not supported; store their unbind() as a list"
    if tensor.layout not in (torch.strided, torch.sparse_coo, *_COMPRESSED):
        return f"the layout {tensor.layout} is not supported; store to_dense()"
    name = dtype_name(tensor.dtype)
    if name not in ITEM_BYTES or (tensor.is_quantized and name not in _QUANTISED):
        return f"{tensor.dtype} cannot be stored; view it as torch.uint8"
    return None


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def leaf_of(tensor: torch.Tensor, path: object) -> Leaf:
    """The leaf for a strided tensor.

    Raises:
        ValueError: the memory of the tensor was freed (as by ``untyped_storage().resize_(0)``).
    """
    source = tensor.detach()
    if source.is_conj() or source.is_neg():
        source = source.resolve_conj().resolve_neg()
    storage = source.untyped_storage()
    dtype = dtype_name(source.dtype)
    size, stride = tuple(source.size()), tuple(source.stride())
    stored = Tensor(_no_storage(dtype), dtype, 0, size, stride)
    if source.numel() == 0:
        return Leaf(path, source, stored, None, 0, 0)
    first = int(source.storage_offset()) * source.itemsize
    extent = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    last = first + (extent + 1) * source.itemsize
    if last > storage.nbytes():
        raise ValueError(
            f"{path}: the tensor needs {last} bytes of a storage that has {storage.nbytes()}: its memory was "
            "freed; save before it is freed or after it is restored"
        )
    if source.device.type == "cpu":
        base = storage.data_ptr()
        return Leaf(path, source, stored, "cpu", base + first, base + last)
    # Elsewhere data_ptr() may be a handle, so only tensors of one storage are known to share memory.
    return Leaf(path, source, stored, (source.device, storage._cdata), first, last)


@functools.cache
def _no_storage(dtype: str) -> Storage:
    """What a tensor has until its storage is known."""
    is_typed = dtype in STORAGE_CLASSES
    return Storage("", dtype if is_typed else "uint8", "cpu", 0, not is_typed)


def sparse_parts(tensor: torch.Tensor) -> tuple[list[tuple[str, torch.Tensor]], Call]:
    """The strided tensors that a sparse one consists of, by name, and the call that makes it of them.

    The call's arguments still lack the parts: see `complete_sparse`.
    """
    layout = Call(Global("torch.serialization", "_get_layout"), (str(tensor.layout),))
    size = Call(Global("torch", "Size"), (tuple(tensor.size()),))
    source = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        parts = [("_indices()", source._indices()), ("_values()", source._values())]
        rest: tuple[object, ...] = (size, source.is_coalesced())
    else:
        names = _COMPRESSED[tensor.layout]
        parts = [(f"{name}()", getattr(source, name)()) for name in names]
        parts.append(("values()", source.values()))
        rest = (size,)
    return parts, Call(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, rest))


def complete_sparse(call: Call, parts: Sequence[object]) -> None:
    """Put the parts into the call that `sparse_parts` gave."""
    layout, rest = call.args
    assert isinstance(rest, tuple)
    call.args = (layout, (*parts, *rest))


def quantisation(tensor: torch.Tensor) -> tuple[object, ...]:
    """How a quantised tensor is to be read: its scheme's name, and numbers or strided tensors."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return "per_tensor_affine", tensor.q_scale(), tensor.q_zero_point()
    scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return "per_channel_affine", scales, zero_points, tensor.q_per_channel_axis()


def quantised_call(stored: Tensor, params: tuple[object, ...]) -> Call:
    """The call that makes a quantised tensor. It takes the storage of `stored` once that is known."""
    scheme, *rest = params
    arguments = (stored, (Global("torch", str(scheme)), *rest))
    return Call(Global("torch._utils", "_rebuild_qtensor"), arguments)


def complete_quantised(call: Call) -> None:
    """Put the storage into the call that `quantised_call` gave."""
    stored, params = call.args
    assert isinstance(stored, Tensor)
    hooks: OrderedDict[object, object] = OrderedDict()
    call.args = (stored.storage, stored.offset, stored.shape, stored.stride, params, False, hooks)


def pieces_of(leaves: Sequence[Leaf]) -> list[Piece]:
    """What has to be written for these leaves; afterwards each knows its storage.

    Storages are numbered in the order of the state, so that equal states give equal files.

    Raises:
        ValueError: tensors of different dtypes share bytes; torch cannot load such files.
    """
    spaces: dict[object, list[int]] = {}
    groups: list[tuple[int, Piece]] = []
    for index, leaf in enumerate(leaves):
        if leaf.start == leaf.stop:
            groups.append((index, Piece((leaf,), 0, 0, is_packed=False)))
        else:
            spaces.setdefault(leaf.space, []).append(index)
    for members in spaces.values():
        for component in components([(leaves[i].start, leaves[i].stop) for i in members]):
            first = members[component.members[0]]
            groups.append((first, _piece([leaves[members[i]] for i in component.members], component)))
    groups.sort(key=lambda group: group[0])
    pieces = [piece for _, piece in groups]
    for number, piece in enumerate(pieces):
        _describe(piece, str(number))
    return pieces


def _piece(leaves: list[Leaf], component: Component) -> Piece:
    head = leaves[0]
    for leaf in leaves:
        if leaf.source.dtype != head.source.dtype or (leaf.start - component.start) % head.source.itemsize:
            raise ValueError(
                f"{head.path} ({head.source.dtype}) and {leaf.path} ({leaf.source.dtype}) share memory "
                "but not their elements, which no torch file can hold; store one of them, or a clone()"
            )
    # One view with holes, such as a column: only what it shows is stored, so its strides change.
    is_packed = head.source.nbytes < component.stop - component.start and all(
        (leaf.start, leaf.stored.shape, leaf.stored.stride)
        == (head.start, head.stored.shape, head.stored.stride)
        for leaf in leaves[1:]
    )
    return Piece(tuple(leaves), component.start, component.stop, is_packed)


def _describe(piece: Piece, key: str) -> None:
    for leaf in piece.leaves:
        old = leaf.stored.storage
        leaf.stored.storage = Storage(key, old.dtype, "cpu", piece.num_bytes, old.is_untyped)
        if piece.is_packed:
            leaf.stored.stride = _contiguous(leaf.stored.shape)
        else:
            leaf.stored.offset = (leaf.start - piece.start) // leaf.source.itemsize


def bytes_of(piece: Piece, into: torch.Tensor | None = None) -> torch.Tensor:
    """The content of the record: a uint8 tensor on the CPU.

    Args:
        piece: what to write.
        into: memory of that size to copy to; None shares memory with the state where that costs nothing.
    """
    head = piece.leaves[0].source
    if piece.num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    if piece.is_packed:
        view = _view_bytes(head)
        if into is None:
            into = torch.empty(piece.num_bytes, dtype=torch.uint8, device="cpu")
        into.view(view.size()).copy_(view)
        return into
    if into is None and head.device.type == "cpu":
        for leaf in piece.leaves:
            offset = _first_byte(leaf) - (leaf.start - piece.start)
            if offset >= 0 and offset + piece.num_bytes <= leaf.source.untyped_storage().nbytes():
                return _byte_range(leaf.source, offset, piece.num_bytes)
    return _copied(piece, into)


def copy_bytes(piece: Piece, buffer: torch.Tensor, start: int) -> None:
    """Copy the content of the record into a uint8 tensor on the CPU, to where `start` says."""
    if (
        piece.num_bytes <= _SMALL_BYTES
        and not piece.is_packed
        and piece.leaves[0].source.device.type == "cpu"
    ):
        ctypes.memmove(buffer.data_ptr() + start, piece.start, piece.num_bytes)
    else:
        bytes_of(piece, buffer[start : start + piece.num_bytes])


def _copied(piece: Piece, into: torch.Tensor | None) -> torch.Tensor:
    """The bytes of a piece in memory of their own: one copy for each storage that it spans."""
    ranges: dict[int, tuple[Leaf, int]] = {}
    for leaf in piece.leaves:
        key = leaf.source.untyped_storage()._cdata
        first, stop = ranges.get(key, (leaf, leaf.stop))
        ranges[key] = (min(first, leaf, key=lambda x: x.start), max(stop, leaf.stop))
    if into is None:
        into = torch.empty(piece.num_bytes, dtype=torch.uint8, device="cpu")
    for first, stop in ranges.values():
        view = _byte_range(first.source, _first_byte(first), stop - first.start)
        into[first.start - piece.start : stop - piece.start].copy_(view)
    return into


def _first_byte(leaf: Leaf) -> int:
    return int(leaf.source.storage_offset()) * leaf.source.itemsize


def _byte_range(tensor: torch.Tensor, start: int, num_bytes: int) -> torch.Tensor:
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return set_storage(view, tensor.untyped_storage(), start, [num_bytes], [1])


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: its shape and one dimension more. Works for dtypes that cannot be copied."""
    width = tensor.itemsize
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    strides = [stride * width for stride in tensor.stride()]
    size = [*tensor.size(), width]
    offset = int(tensor.storage_offset()) * width
    return set_storage(view, tensor.untyped_storage(), offset, size, [*strides, 1])


def _contiguous(size: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(size[1:]):
        strides.append(strides[-1] * length)
    return tuple(strides[::-1]) if size else ()


def set_storage(
    tensor: torch.Tensor,
    storage: torch.UntypedStorage,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    """``tensor.set_`` that no gradient knows of: in a caller's autograd scope this is still plain data."""
    with torch.no_grad():
        return tensor.set_(storage, offset, tuple(size), tuple(stride))
