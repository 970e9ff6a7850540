"""Tensors as they are stored: on the CPU, detached, tied as they were, without bytes nobody refers to."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from helios.chkpt._spans import Component, components

_SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


@dataclass(frozen=True)
class Leaf:
    """A strided tensor of the state and the empty shell that becomes its stored form.

    Attributes:
        path: where the tensor is in the state, for messages.
        source: the tensor, detached.
        shell: an empty CPU tensor of the same dtype, already in its place in the snapshot.
        space: what `start` counts in: two leaves overlap only within one space.
        start: its first byte. On the CPU an address, so that two storages over one memory are seen as tied.
        stop: one past its last byte; equal to `start` if it has no elements.
    """

    path: str
    source: torch.Tensor
    shell: torch.Tensor
    space: object
    start: int
    stop: int


def unsupported(tensor: torch.Tensor) -> str | None:
    """Why plain ``torch.load(weights_only=True)`` would not give `tensor` back; None if it would."""
    if tensor.device.type == "meta":
        return "a tensor on the meta device has no values; materialise it before saving"
    if tensor.is_nested:
        return "nested tensors are not supported; store their unbind() as a list"
    if tensor.is_quantized:
        return "quantised tensors are not supported; store int_repr(), q_scale() and q_zero_point()"
    if tensor.layout is not torch.strided and tensor.layout not in _SPARSE:
        return f"the layout {tensor.layout} is not supported; store to_dense()"
    if not _dtype_loads(tensor.dtype):
        return f"this torch cannot store {tensor.dtype}; view it as torch.uint8"
    return None


@functools.cache
def _dtype_loads(dtype: torch.dtype) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(torch.empty(0, dtype=dtype, device="cpu"), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # torch has no common error for this, and any of them means no
        return False
    return True


def stored_sparse(tensor: torch.Tensor) -> torch.Tensor:
    """The stored form of a sparse tensor: a copy, tied to nothing."""
    return tensor.detach().cpu().clone()


def leaf_of(tensor: torch.Tensor, path: str) -> Leaf:
    """The leaf for a strided tensor.

    Raises:
        ValueError: the memory of the tensor was freed (as by ``untyped_storage().resize_(0)``).
    """
    source = tensor.detach()
    if source.is_conj() or source.is_neg():
        source = source.resolve_conj().resolve_neg()
    storage = source.untyped_storage()
    shell = torch.empty(0, dtype=source.dtype, device="cpu")
    if source.numel() == 0:
        return Leaf(path, source, shell, None, 0, 0)
    first = int(source.storage_offset()) * source.itemsize
    extent = sum((size - 1) * stride for size, stride in zip(source.size(), source.stride(), strict=True))
    last = first + (extent + 1) * source.itemsize
    if last > storage.nbytes():
        raise ValueError(
            f"{path}: the tensor needs {last} bytes of a storage that has {storage.nbytes()}: its memory was "
            "freed; save before it is freed or after it is restored"
        )
    if source.device.type == "cpu":
        base = storage.data_ptr()
        return Leaf(path, source, shell, "cpu", base + first, base + last)
    # Elsewhere data_ptr() may be a handle, so only tensors of one storage are known to share memory.
    return Leaf(path, source, shell, (source.device, storage._cdata), first, last)


def fill_shells(leaves: Sequence[Leaf], *, copy: bool) -> None:
    """Turn the shell of each leaf into its stored form.

    Memory is shared with the leaf where that costs nothing, unless `copy` is set.

    Raises:
        ValueError: tensors of different dtypes share bytes; torch cannot load such files.
    """
    spaces: dict[object, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.start == leaf.stop:
            empty = torch.empty(0, dtype=torch.uint8, device="cpu").untyped_storage()
            _set(leaf.shell, empty, 0, leaf.source.size(), leaf.source.stride())
        else:
            spaces.setdefault(leaf.space, []).append(leaf)
    for group in spaces.values():
        for component in components([(leaf.start, leaf.stop) for leaf in group]):
            _fill_component([group[i] for i in component.members], component, copy=copy)


def _fill_component(leaves: list[Leaf], component: Component, *, copy: bool) -> None:
    head = leaves[0]
    for leaf in leaves:
        if leaf.source.dtype != head.source.dtype or (leaf.start - component.start) % head.source.itemsize:
            raise ValueError(
                f"{head.path} ({head.source.dtype}) and {leaf.path} ({leaf.source.dtype}) share memory "
                "but not their elements, which no torch file can hold; store one of them, or a clone()"
            )
    num_bytes = component.stop - component.start
    views = {(leaf.start, leaf.source.size(), leaf.source.stride()) for leaf in leaves}
    if len(views) == 1 and head.source.nbytes < num_bytes:
        # One view with holes, such as a column: only what it shows is stored, so its strides change.
        packed = _view_bytes(head.source).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for leaf in leaves:
            _set(leaf.shell, packed.untyped_storage(), 0, leaf.source.size(), _contiguous(leaf.source.size()))
        return
    storage = head.source.untyped_storage()
    if copy or head.source.device.type != "cpu" or storage.nbytes() != num_bytes:
        storage = _copied(leaves, component)
    for leaf in leaves:
        offset = (leaf.start - component.start) // leaf.source.itemsize
        _set(leaf.shell, storage, offset, leaf.source.size(), leaf.source.stride())


def _copied(leaves: list[Leaf], component: Component) -> torch.UntypedStorage:
    """The bytes of a component in a new CPU storage: one copy for each storage that it spans."""
    ranges: dict[int, tuple[Leaf, int]] = {}
    for leaf in leaves:  # by rising start within a storage, as `first` needs
        key = leaf.source.untyped_storage()._cdata
        first, stop = ranges.get(key, (leaf, leaf.stop))
        ranges[key] = (min(first, leaf, key=lambda x: x.start), max(stop, leaf.stop))
    buffer = torch.empty(component.stop - component.start, dtype=torch.uint8, device="cpu")
    for first, stop in ranges.values():
        offset = int(first.source.storage_offset()) * first.source.itemsize
        view = torch.empty(0, dtype=torch.uint8, device=first.source.device)
        _set(view, first.source.untyped_storage(), offset, [stop - first.start], [1])
        buffer[first.start - component.start : stop - component.start].copy_(view)
    return buffer.untyped_storage()


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: its shape and one dimension more. Works for dtypes that cannot be copied."""
    width = tensor.itemsize
    view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    strides = [stride * width for stride in tensor.stride()]
    size = [*tensor.size(), width]
    return _set(view, tensor.untyped_storage(), int(tensor.storage_offset()) * width, size, [*strides, 1])


def _contiguous(size: Sequence[int]) -> list[int]:
    strides = [1]
    for length in reversed(size[1:]):
        strides.append(strides[-1] * length)
    return strides[::-1] if size else []


def _set(
    tensor: torch.Tensor,
    storage: torch.UntypedStorage,
    offset: int,
    size: Sequence[int],
    stride: Sequence[int],
) -> torch.Tensor:
    # no_grad: in a caller's autograd scope the shells are still plain data
    with torch.no_grad():
        return tensor.set_(storage, offset, tuple(size), tuple(stride))
