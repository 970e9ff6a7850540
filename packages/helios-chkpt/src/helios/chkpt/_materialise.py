"""Values of a file to what was saved: tensors over storages. The only module that reads with torch."""

from __future__ import annotations

import ctypes
import mmap as memory_map
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, cast

import torch

from helios.chkpt._format import checksums
from helios.chkpt._format.archive import Archive, check_crc32, check_records, reader
from helios.chkpt._format.layout import Record
from helios.chkpt._format.torch_zip import corrupt
from helios.chkpt._format.values import Call, Global, Storage, Tensor, walk
from helios.chkpt._tensors import set_storage

MapLocation = (
    Callable[[torch.types.Storage, str], torch.types.Storage] | torch.device | str | dict[str, str] | None
)
"""What `torch.load` takes as ``map_location``."""


_CLASSES: dict[str, type] = {
    **{f"builtins.{kind.__name__}": kind for kind in (set, complex, bytearray)},
    **{f"collections.{kind.__name__}": kind for kind in (OrderedDict, Counter)},
}


def materialise(
    values: object,
    file: IO[bytes],
    archive: Archive,
    *,
    map_location: MapLocation,
    mmap: bool,
    verify: bool,
    safe_types: Sequence[type],
) -> object:
    """What was saved.

    Args:
        values: those of `helios.chkpt._read.read_contents`, or a part of them; containers in it are filled anew.
        file: the open file.
        archive: what is known of it.
        map_location: see `MapLocation`.
        mmap: map storages instead of reading them.
        verify: compare the CRC-32 of each record that is needed.
        safe_types: classes that may be made.

    Raises:
        CorruptError: a CRC-32 is another, or an object cannot be made of its description.
        RecursionError: the caller left too little of the interpreter's stack for containers in containers.
    """
    found = {item.key: item for item in walk(values) if isinstance(item, Storage)}
    records = archive.storages
    needed = [records[key] for key in found]
    if mmap:
        if verify:
            check_records(file, archive, names=[record.name for record in needed])
        memory = _mapped(file, needed)
    else:
        memory = _read(file, archive, needed, verify)
    restore = _restorer(map_location)
    storages = {key: restore(memory[records[key].name], s.location) for key, s in found.items()}
    try:
        return _Maker(storages, safe_types).value(values)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        found_instead = f"a content that does not load ({type(error).__name__}: {error})"
        raise corrupt(archive.path, found_instead, "tensors and plain values") from error


def _mapped(file: IO[bytes], records: Iterable[Record]) -> dict[str, torch.UntypedStorage]:
    # Private: what is written to such a tensor stays in this process.
    flags = memory_map.MAP_PRIVATE
    protection = memory_map.PROT_READ | memory_map.PROT_WRITE
    content = memory_map.mmap(file.fileno(), 0, flags=flags, prot=protection)
    return {
        record.name: torch.frombuffer(
            content, dtype=torch.uint8, count=record.num_bytes, offset=record.offset
        ).untyped_storage()
        if record.num_bytes
        else _new_storage(0)
        for record in records
    }


def _read(
    file: IO[bytes], archive: Archive, records: Sequence[Record], verify: bool
) -> dict[str, torch.UntypedStorage]:
    storages = {record.name: _new_storage(record.num_bytes) for record in records}

    def target(record: Record) -> memoryview:
        address = storages[record.name].data_ptr()
        return memoryview((ctypes.c_char * record.num_bytes).from_address(address)).cast("B")

    read = reader(file, archive.path)
    if verify:
        check_crc32(archive, checksums.crc32_sums(records, read, target))
    else:
        checksums.read_all(records, read, target)
    return storages


def _new_storage(num_bytes: int) -> torch.UntypedStorage:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu").untyped_storage()


def _restorer(
    map_location: MapLocation,
) -> Callable[[torch.UntypedStorage, str], torch.UntypedStorage]:
    """A function that puts a storage, saved from a location, where `torch.load` would put it."""
    default = cast("Callable[[Any, str], Any]", torch.serialization.default_restore_location)

    def restore(new: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        storage: Any = new
        moved: Any
        if map_location is None:
            moved = default(storage, location)
        elif isinstance(map_location, dict):
            moved = default(storage, map_location.get(location, location))
        elif isinstance(map_location, str | torch.device):
            moved = default(storage, str(map_location))
        else:
            moved = map_location(storage, location)
            if moved is None:
                moved = default(storage, location)
        return cast("torch.UntypedStorage", getattr(moved, "_untyped_storage", moved))

    return restore


def placer(map_location: MapLocation) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that puts a new contiguous tensor of the CPU where `load` would put it."""
    restore = _restorer(map_location)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        storage = restore(tensor.untyped_storage(), "cpu")
        empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return set_storage(empty, storage, 0, tensor.shape, tensor.stride())

    return place


class _Maker:
    """Makes objects of descriptions, each once, so that what is shared stays shared."""

    def __init__(self, storages: Mapping[str, torch.UntypedStorage], safe_types: Sequence[type]) -> None:
        self._storages = storages
        self._types = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in safe_types}
        self._done: dict[int, tuple[object, object]] = {}  # with the description, so that its id stays taken

    def value(self, value: object) -> object:
        """What a value stands for; dicts and lists are filled anew and stay the same objects."""
        kind = type(value)
        if kind in (int, float, str, bool, bytes, complex) or value is None:
            return value
        if id(value) in self._done:
            return self._done[id(value)][1]
        made = self._made(value)
        self._done[id(value)] = value, made
        return made

    def _made(self, value: object) -> object:
        if isinstance(value, dict):
            items = [(self.value(key), self.value(item)) for key, item in value.items()]
            value.clear()
            for key, item in items:  # not by update: that of a Counter counts
                value[key] = item
            for name, item in getattr(value, "__dict__", {}).items():
                value.__dict__[name] = self.value(item)
            return value
        if isinstance(value, list):
            value[:] = [self.value(item) for item in value]
            return value
        if isinstance(value, tuple):
            return tuple([self.value(item) for item in value])
        if isinstance(value, set):
            return {self.value(item) for item in value}
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Global):
            return self._types.get(str(value)) or _constant(value)
        if isinstance(value, Call):
            return self._called(value)
        return value

    def _tensor(self, described: Tensor) -> torch.Tensor:
        storage = self._storages[described.storage.key]
        tensor = torch.empty(0, dtype=getattr(torch, described.dtype), device=storage.device)
        set_storage(tensor, storage, described.offset, described.shape, described.stride)
        return tensor.requires_grad_() if described.requires_grad else tensor

    def _called(self, call: Call) -> object:
        name = str(call.function)
        if name in self._types:
            return self._instance(call, self._types[name])
        if call.items or call.state is not None:
            raise ValueError(f"a {name} that is given a state or items")
        if name == "torch._utils._rebuild_qtensor":
            return self._quantised(call.args)
        args = self.value(call.args)
        match name, args:
            case "torch.Size", (tuple(sizes),):
                return torch.Size(sizes)
            case "torch.device", (str(kind), *index):
                return torch.device(kind, *index)
            case "torch.serialization._get_layout", (str(layout),):
                return getattr(
                    torch, layout.removeprefix("torch.")
                )  # `decode` lets nothing but layouts through
            case "torch._utils._rebuild_parameter", (torch.Tensor() as data, bool(requires_grad), _):
                return torch.nn.Parameter(data, requires_grad)
            case "torch._utils._rebuild_sparse_tensor", (torch.layout() as layout, tuple(parts)):
                return _sparse(layout, parts)
        raise ValueError(f"a call of {name} with other arguments than it has")

    def _instance(self, call: Call, kind: type) -> object:
        args = cast("tuple[object, ...]", self.value(call.args))
        made: Any = kind.__new__(kind, *args) if call.is_new else kind(*args)
        items = [self.value(item) for item in call.items]
        if isinstance(made, dict):
            made.update(zip(items[::2], items[1::2], strict=True))
        elif items:
            made.extend(items)
        if call.state is not None:
            state: Any = self.value(call.state)
            if hasattr(made, "__setstate__"):
                made.__setstate__(state)
            else:
                # As pickle has it: a pair if the class has slots.
                attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
                if attributes:
                    made.__dict__.update(attributes)
                for slot, item in (slots or {}).items():
                    setattr(made, slot, item)
        return made

    def _quantised(self, args: tuple[object, ...]) -> torch.Tensor:
        storage, offset, shape, stride, params, _requires_grad, _hooks = args
        assert isinstance(storage, Storage)
        scheme, *rest = cast("tuple[Any, ...]", self.value(params))
        dtype = getattr(torch, storage.dtype)
        size, view = cast("tuple[int, ...]", shape), cast("tuple[int, ...]", stride)
        device = self._storages[storage.key].device
        tensor: Any
        if scheme is torch.per_tensor_affine:
            scale, zero_point = rest
            tensor = torch._empty_affine_quantized(
                [0], scale=scale, zero_point=zero_point, dtype=dtype, device=device
            )
        else:
            scales, zero_points, axis = rest
            # Nothing yet: torch would make room for a size that only the file says.
            none = [length if dimension == axis else 0 for dimension, length in enumerate(size)]
            tensor = torch._empty_per_channel_affine_quantized(
                none, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device=device
            )
        return set_storage(tensor, self._storages[storage.key], cast("int", offset), size, view)


def _constant(value: Global) -> object:
    if str(value) in _CLASSES:
        return _CLASSES[str(value)]
    if value.module != "torch":
        raise ValueError(f"the function {value} as a value")
    return getattr(torch, value.name)


def _sparse(layout: torch.layout, parts: tuple[Any, ...]) -> torch.Tensor:
    if layout is torch.sparse_coo:
        indices, values, size, is_coalesced = parts
        return torch.sparse_coo_tensor(
            indices, values, size, is_coalesced=is_coalesced, check_invariants=True
        )
    first, second, values, size = parts
    return torch.sparse_compressed_tensor(first, second, values, size, layout=layout, check_invariants=True)
