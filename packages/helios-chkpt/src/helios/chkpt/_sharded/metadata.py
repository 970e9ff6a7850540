"""DCP's table of contents, read as data: nothing in it is imported or called. Without torch.

DCP itself unpickles this file, which runs whatever it asks for. Here it goes through the reader of our own pickles, and
what comes out is compared with what the main file says, down to whether every element of every tensor is somewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helios.chkpt._errors import UnsafeError, explain
from helios.chkpt._format.calls import MalformedError
from helios.chkpt._format.decode import decode
from helios.chkpt._format.dtypes import ITEM_BYTES
from helios.chkpt._format.torch_zip import corrupt
from helios.chkpt._format.values import Call, Global
from helios.chkpt._sharded.manifest import Shards, Spread

_MODULE = "torch.distributed.checkpoint.metadata"
_CLASSES = frozenset(
    {
        *(f"{_MODULE}.{name}" for name in ("Metadata", "TensorStorageMetadata", "TensorProperties")),
        *(f"{_MODULE}.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")),
        f"{_MODULE}._MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
    }
)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its elements are.

    Attributes:
        offsets: its first element in each dim of the tensor.
        sizes: its extent in each.
        file: name of the file it is in.
        start: its first byte there.
        num_bytes: of the zip that torch.save wrote for it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


def read_chunks(data: bytes, shards: Shards, path: Path) -> dict[str, list[Chunk]]:
    """The chunks of each tensor, by its name in DCP, in the order of the file.

    Args:
        data: content of the file, of the right SHA-256.
        shards: what the main file says.
        path: the file, for messages.

    Raises:
        UnsafeError: it asks for more than what such a file is made of.
        CorruptError: it says anything else than the main file does.
    """
    try:
        decoded = decode(data, {})
    except MalformedError as error:
        raise corrupt(path, str(error), "DCP's pickle as this package writes it") from error
    strange = [name for name in decoded.foreign if name not in _CLASSES]
    if strange:
        remedy = "Nothing of the file was run."
        expected = "what DCP describes tensors with"
        raise UnsafeError(explain(path, f"the global {strange[0]:.200}", expected, remedy))
    try:
        return _read(decoded.value, shards)
    except ValueError as error:
        raise corrupt(path, str(error), "what the main file says") from error


def _read(value: object, shards: Shards) -> dict[str, list[Chunk]]:
    metadata = _fields(value, "Metadata", "state_dict_metadata", "storage_data")
    described, stored = metadata["state_dict_metadata"], metadata["storage_data"]
    if type(described) is not dict or type(stored) is not dict:
        raise ValueError("tables that are none")
    spreads = shards.by_name
    if set(described) != set(spreads):
        raise ValueError("other tensors")
    places = _places(stored, {file.name: file.num_bytes for file in shards.data_files})
    chunks: dict[str, list[Chunk]] = {}
    for name, spread in spreads.items():
        boxes = _boxes(described[name], spread)
        try:
            chunks[name] = [Chunk(offsets, sizes, *places.pop((name, offsets))) for offsets, sizes in boxes]
        except KeyError:
            raise ValueError(f"a chunk of {name!r:.80} that is nowhere") from None
        check_cover(spread.shape, boxes)
        if any(math.prod(c.sizes) * ITEM_BYTES[spread.dtype] > c.num_bytes for c in chunks[name]):
            raise ValueError(f"a chunk of {name!r:.80} that is larger than what is stored")
    if places:
        raise ValueError("chunks of no tensor")
    return chunks


def _places(
    stored: Mapping[object, object], sizes: Mapping[str, int]
) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for key, value in stored.items():
        index = _fields(key, "MetadataIndex", "fqn", "offset")
        info = _fields(value, "_StorageInfo", "relative_path", "offset", "length")
        name, file, start, length = index["fqn"], info["relative_path"], info["offset"], info["length"]
        if type(name) is not str or type(file) is not str or file not in sizes:
            raise ValueError(f"a chunk in the file {file!r:.80}")
        if (
            set(info) != {"relative_path", "offset", "length"}
            or type(start) is not int
            or type(length) is not int
        ):
            raise ValueError(f"a chunk of {name!r:.80} that is stored otherwise")
        if start < 0 or length <= 0 or start + length > sizes[file]:
            raise ValueError(f"a chunk of {name!r:.80} that is outside of its file")
        place = name, _size(index["offset"])
        if place in places:
            raise ValueError(f"a chunk of {name!r:.80} that is there twice")
        places[place] = file, start, length
    return places


def _boxes(value: object, spread: Spread) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    tensor = _fields(value, "TensorStorageMetadata", "properties", "size", "chunks")
    properties, chunks = tensor["properties"], tensor["chunks"]
    state = properties.state if isinstance(properties, Call) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if dtype != Global("torch", spread.dtype) or _size(tensor["size"]) != spread.shape:
        raise ValueError(f"another dtype or shape of {spread.name!r:.80}")
    if type(chunks) is not list:
        raise ValueError(f"no chunks of {spread.name!r:.80}")
    boxes = []
    for chunk in chunks:
        fields = _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes")
        boxes.append((_size(fields["offsets"]), _size(fields["sizes"])))
    return boxes


def check_cover(shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """ValueError unless every element of a tensor is in one box: placements make grids of them, nothing else."""
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in boxes):
        raise ValueError("a chunk of other dims than its tensor has")
    full = {(offsets, sizes) for offsets, sizes in boxes if 0 not in sizes}
    if len(full) != sum(0 not in sizes for _, sizes in boxes):
        raise ValueError("a chunk that is there twice")
    if 0 in shape:
        if full:
            raise ValueError("a chunk of an empty tensor")
        return
    num_boxes = 1
    for dim, length in enumerate(shape):
        spans = sorted({(offsets[dim], sizes[dim]) for offsets, sizes in full})
        stop = 0
        for start, size in spans:
            if start != stop:
                raise ValueError("chunks that leave something out, or overlap")
            stop += size
        if stop != length:
            raise ValueError("chunks that are not as large as their tensor")
        num_boxes *= len(spans)
    if len(full) != num_boxes:
        raise ValueError("chunks that leave something out")


def _size(value: object) -> tuple[int, ...]:
    match value:
        case Call(function=Global("torch", "Size"), args=(tuple(sizes),)):
            if all(type(size) is int and 0 <= size < 2**63 for size in sizes) and math.prod(sizes) < 2**63:
                return sizes
    raise ValueError("a size that is none")


def _fields(value: object, name: str, *needed: str) -> dict[str, object]:
    """The fields of an instance of one of DCP's classes."""
    if isinstance(value, Call) and value.is_new and value.function.name == name and not value.items:
        state = value.state
        if type(state) is dict and all(type(key) is str for key in state) and state.keys() >= set(needed):
            return state
    raise ValueError(f"something else than a {name}")
