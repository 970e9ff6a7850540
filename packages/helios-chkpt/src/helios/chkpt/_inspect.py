"""What is in a file, without torch and without reading a tensor: structure, names, shapes, digests."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from helios.chkpt._arguments import as_path
from helios.chkpt._errors import CheckpointError
from helios.chkpt._format.archive import Archive, open_file, reader
from helios.chkpt._format.dtypes import ITEM_BYTES
from helios.chkpt._format.layout import MANIFEST
from helios.chkpt._format.values import Call, Storage, Tensor
from helios.chkpt._naming import CheckpointName, main_file, parse_name
from helios.chkpt._places import Place, brief, is_leaf, key_text, kind_of, parts_at, tensor_of
from helios.chkpt._read import Contents, read_contents
from helios.chkpt._sharded.manifest import ShardedTensor, filled, read_shards
from helios.chkpt._spans import components


@dataclass(frozen=True)
class Entry:
    """One value of a checkpoint: a tensor, a plain value, or a list of plain values.

    Attributes:
        place: where it is; `path` is its text.
        kind: its type, such as ``tensor``, ``sharded tensor``, ``int`` or ``tuple``; for something of an earlier
            release or foreign, the name of what its pickle would call.
        value: a short text, the shape included; at most 80 characters, all printable.
        dtype: of a tensor, such as ``bfloat16``; else None.
        shape: of a tensor, else None.
        num_bytes: of a tensor's elements, in this view; else None.
        storage: the record that a tensor is in is ``data/<storage>``; of a tensor in shards its name in DCP; else None.
        sha256: of that record, as the file says; None in files of earlier releases, and for a tensor in shards.
        shared_with: the first place of the same memory or of the same container; None if this is the first.
    """

    place: Place
    kind: str
    value: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    num_bytes: int | None = None
    storage: str | None = None
    sha256: str | None = None
    shared_with: Place | None = None

    @property
    def path(self) -> str:
        """Such as ``model.net.0.weight`` or ``model.optimizer.state[0].exp_avg``; at most 80 characters a key."""
        return str(self.place)

    @property
    def shares(self) -> str | None:
        """The path of the tensor whose memory, or of the container that, this one is too; None if of none."""
        return None if self.shared_with is None else str(self.shared_with)


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without reading its tensors.

    Attributes:
        path: the file or folder.
        num_bytes: its size, that of all files together.
        version: of the release that wrote it, None if it does not say.
        schema: number of its structure; None in files without a manifest: those of earlier releases.
        digest: SHA-256 of its manifest, and so of all it holds: equal for files of equal bytes; None without one. That
            of a folder is its main file's, which has the digests of all others.
        score: what was noted for retention, None if nothing.
        name: the parts of its name; None if that is no name of a checkpoint.
        keys: of the dictionary, as text. Empty, as is all that follows, in a file of a later major release.
        foreign: names of classes and functions in it that are neither plain values nor tensors. None was called.
        num_tensor_bytes: of all records that tensors are in, and of all tensors in shards.
        entries: its values, in the order of the file, those of inner containers included.
        load_error: what `load` would say instead of loading it; None if it would try.
        num_shard_files: files in the folder of shards; 0 for a file.
        num_shard_bytes: their size, as the main file has it.
    """

    path: Path
    num_bytes: int
    version: str | None
    schema: int | None
    digest: str | None
    score: float | None
    name: CheckpointName | None
    keys: tuple[str, ...]
    foreign: tuple[str, ...]
    num_tensor_bytes: int
    entries: tuple[Entry, ...]
    load_error: CheckpointError | None = None
    num_shard_files: int = 0
    num_shard_bytes: int = 0

    @property
    def tensors(self) -> tuple[Entry, ...]:
        """The entries that are tensors."""
        return tuple(entry for entry in self.entries if entry.dtype is not None)

    @property
    def num_tensors(self) -> int:
        """How many tensors there are, each place counted."""
        return len(self.tensors)

    @property
    def num_model_elements(self) -> int:
        """Elements of all tensors under ``model``, optimizers included; those that share memory count once."""
        own = (entry for entry in self.tensors if entry.shared_with is None)
        return sum(math.prod(entry.shape or ()) for entry in own if _is_below(entry.place, "model"))


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Say what is in a checkpoint. Imports no torch and reads no tensor, so it costs the same at any size.

    Of a folder that `save_sharded` wrote, it reads the main file, and lists the tensors in shards in their places.

    Files of earlier and of later releases are described as well, and so are those that `load` refuses: nothing in a
    file is imported or called. The structure, the manifest and the pickle are checked as `load` does.

    Args:
        path: the file or folder.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        CheckpointError: one of its subclasses, if it is no checkpoint or damaged.
        TypeError, ValueError: `path` is no path.
    """
    target = as_path("path", path)
    main = main_file(target)
    with open_file(main) as file:
        contents = read_contents(file, main)
        digest = _digest(file, contents.archive)
    shards = None
    if main != target and not contents.archive.is_newer:
        shards = read_shards(contents.values, main)
        filled(contents.values, shards, main)
    manifest = contents.archive.manifest
    num_shard_bytes = sum(file.num_bytes for file in shards.files) if shards else 0
    num_tensor_bytes = sum(record.num_bytes for record in contents.archive.storages.values())
    return CheckpointInfo(
        path=target,
        num_bytes=contents.archive.num_bytes + num_shard_bytes,
        version=version_of(contents),
        schema=None if manifest is None else manifest.schema,
        digest=digest,
        score=None if manifest is None else manifest.score,
        name=parse_name(target.name),
        keys=tuple(_key(key) for key in contents.values),
        foreign=contents.foreign,
        num_tensor_bytes=num_tensor_bytes
        + (sum(spread.num_bytes for spread in shards.by_name.values()) if shards else 0),
        entries=tuple(_entries(contents)),
        load_error=load_error(contents),
        num_shard_files=len(shards.files) if shards else 0,
        num_shard_bytes=num_shard_bytes,
    )


def version_of(contents: Contents) -> str | None:
    """The version in a file, whatever release wrote it; None if there is none or it is no text."""
    manifest = contents.archive.manifest
    if manifest is not None:
        return manifest.version
    return next((version for version in contents.versions if isinstance(version, str)), None)


def load_error(contents: Contents) -> CheckpointError | None:
    """What `load` would raise because of the version or of foreign classes, None if nothing."""
    try:
        contents.check(frozenset())
    except CheckpointError as error:
        return error
    return None


def _digest(file: IO[bytes], archive: Archive) -> str | None:
    record = archive.records.get(MANIFEST) if archive.manifest is not None else None
    if record is None:
        return None
    data = bytearray(record.num_bytes)
    reader(file, archive.path)(record.offset, memoryview(data))
    return hashlib.sha256(data).hexdigest()


def _entries(contents: Contents) -> list[Entry]:
    """Describe all values. The parts of a container that is in several places are described at the first."""
    entries: list[Entry] = []
    tensors: list[tuple[int, Tensor]] = []  # with the positions of their entries
    first: dict[int, Place] = {}
    todo = parts_at(contents.values, None)[::-1]
    while todo:
        place, value = todo.pop()
        tensor = tensor_of(value)
        if tensor is not None:
            tensors.append((len(entries), tensor))
            entries.append(_tensor_entry(place, value, tensor, contents.archive))
        elif is_leaf(value):
            entries.append(_leaf_entry(place, value, contents.archive))
        elif id(value) in first:
            entries.append(Entry(place, kind_of(value), brief(value), shared_with=first[id(value)]))
        else:
            first[id(value)] = place
            if isinstance(value, Call):
                entries.append(Entry(place, kind_of(value), ""))
            todo += parts_at(value, place)[::-1]
    return _with_shares(entries, tensors)


def _tensor_entry(place: Place, value: object, tensor: Tensor, archive: Archive) -> Entry:
    num_bytes = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    key = tensor.storage.key
    sha256 = None if isinstance(tensor, ShardedTensor) else archive.storages[key].sha256
    return Entry(place, kind_of(value), brief(tensor), tensor.dtype, tensor.shape, num_bytes, key, sha256)


def _leaf_entry(place: Place, value: object, archive: Archive) -> Entry:
    if isinstance(value, Storage):
        sha256 = archive.storages[value.key].sha256
        return Entry(
            place, kind_of(value), brief(value), num_bytes=value.num_bytes, storage=value.key, sha256=sha256
        )
    return Entry(place, kind_of(value), brief(value))


def _with_shares(entries: list[Entry], tensors: Sequence[tuple[int, Tensor]]) -> list[Entry]:
    """Note in each tensor's entry which earlier one it overlaps."""
    for members in tied([tensor for _, tensor in tensors]):
        first, *others = (tensors[member][0] for member in members)
        for other in others:
            entries[other] = replace(entries[other], shared_with=entries[first].place)
    return entries


def tied(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Positions of tensors whose bytes hang together by overlapping, in rising order; also those of single ones.

    A tensor with holes counts as the whole of its extent. Empty tensors are in no group.
    """
    by_storage: dict[tuple[str, bool], list[int]] = {}
    for position, tensor in enumerate(tensors):
        if 0 not in tensor.shape:
            key = tensor.storage.key, isinstance(tensor, ShardedTensor)
            by_storage.setdefault(key, []).append(position)
    groups: list[tuple[int, ...]] = []
    for positions in by_storage.values():
        for component in components([_extent(tensors[position]) for position in positions]):
            groups.append(tuple(positions[member] for member in component.members))
    return groups


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and one past its last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride, strict=True))
    item = ITEM_BYTES[tensor.dtype]
    return tensor.offset * item, (tensor.offset + steps + 1) * item


def _key(key: object) -> str:
    text = key_text(key)
    return text if isinstance(text, str) else brief(text)


def _is_below(place: Place, name: str) -> bool:
    """Whether a value is under this key of the checkpoint."""
    while place.parent is not None:
        place = place.parent
    return key_text(place.key) == name
