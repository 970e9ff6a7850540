"""The bytes of two tensors in two files, a chunk at a time. torch is imported once two chunks differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

from helios.chkpt._format.archive import Archive, check_records, reader
from helios.chkpt._format.dtypes import ITEM_BYTES
from helios.chkpt._format.layout import Record
from helios.chkpt._format.values import Tensor
from helios.chkpt._sharded.manifest import ShardedTensor, Shards, check_digests
from helios.chkpt._sharded.metadata import Chunk
from helios.chkpt._sharded.verify import chunks_of

if TYPE_CHECKING:
    from helios.chkpt._comparison._numbers import Counts

CHUNK_BYTES = 1 << 22
"""What is read of each file at a time; a multiple of the size of every element."""


class UncountableError(Exception):
    """Two views have more elements than their files have bytes."""


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        file: open; of a folder its main file.
        archive: what is known of it.
        folder: of a folder, where it is; None for a file.
        shards: of a folder, what is in its shards.
    """

    file: IO[bytes]
    archive: Archive
    folder: Path | None = None
    shards: Shards | None = None

    @cached_property
    def chunks(self) -> dict[str, list[Chunk]]:
        """Where the elements of each tensor in shards are."""
        assert self.folder is not None and self.shards is not None
        return chunks_of(self.folder, self.shards)

    def record_of(self, tensor: Tensor) -> Record:
        """The record that a tensor is in."""
        return self.archive.storages[tensor.storage.key]

    def check(self, tensors: Sequence[Tensor]) -> None:
        """CheckpointError unless the records of these tensors, and the shards if one is there, are what was written."""
        names = {self.record_of(tensor).name for tensor in tensors if not isinstance(tensor, ShardedTensor)}
        check_records(self.file, self.archive, names=sorted(names))
        if self.folder is not None and self.shards is not None and len(names) < len(tensors):
            check_digests(self.folder, self.shards, self.shards.files)


def is_known_equal(a: Side, first: Tensor, b: Side, second: Tensor) -> bool:
    """Whether two tensors of the same dtype and shape are equal by what the files say, without reading them."""
    if isinstance(first, ShardedTensor) or isinstance(second, ShardedTensor):
        is_one_content = a.shards is not None and b.shards is not None and a.shards.files == b.shards.files
        return is_one_content and first.storage.key == second.storage.key
    digests = a.record_of(first).sha256, b.record_of(second).sha256
    return digests[0] is not None and digests[0] == digests[1] and _is_same_view(first, second)


def compare_elements(a: Side, first: Tensor, b: Side, second: Tensor) -> Counts | None:
    """How the elements of two tensors of the same dtype and shape differ; None if no bit does.

    Memory does not grow with the tensors, unless one is in shards: then both are held as a whole.

    Raises:
        UncountableError: they have more elements than bytes, and are not equal for sure.
    """
    if math.prod(first.shape) == 0:
        return None
    if isinstance(first, ShardedTensor) or isinstance(second, ShardedTensor):
        from helios.chkpt._comparison._numbers import assembled  # torch: it is what reads shards

        pieces = assembled(a, first, b, second)
    elif _is_same_view(first, second) and _is_dense(first):
        pieces = _chunks(a, first, b, second)
    elif _is_same_view(first, second) and _are_equal_storages(a, first, b, second):
        return None
    else:
        from helios.chkpt._comparison._numbers import gathered

        pieces = gathered(a, first, b, second)
    counts: Counts | None = None
    for one, other in pieces:
        if one != other:
            from helios.chkpt._comparison._numbers import Counts, count  # torch: for tensors that differ only

            counts = (counts or Counts()) + count(one, other, first.dtype)
    return counts


def _is_same_view(first: Tensor, second: Tensor) -> bool:
    return (first.offset, first.shape, _steps(first)) == (second.offset, second.shape, _steps(second))


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the dimensions that matter: a single element takes no step."""
    return [(size, step) for size, step in zip(tensor.shape, tensor.stride, strict=True) if size != 1]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of bytes, each once, in whatever order."""
    expected = 1
    for size, step in sorted(_steps(tensor), key=lambda pair: pair[1]):
        if step != expected:
            return False
        expected *= size
    return True


def _chunks(a: Side, first: Tensor, b: Side, second: Tensor) -> Iterator[tuple[bytearray, bytearray]]:
    num_bytes = math.prod(first.shape) * ITEM_BYTES[first.dtype]
    starts = [
        side.record_of(tensor).offset + tensor.offset * ITEM_BYTES[tensor.dtype]
        for side, tensor in ((a, first), (b, second))
    ]
    return _ranges(a, starts[0], b, starts[1], num_bytes)


def _ranges(
    a: Side, start_a: int, b: Side, start_b: int, num_bytes: int
) -> Iterator[tuple[bytearray, bytearray]]:
    """The same number of bytes of both files, in memory that is used again for each chunk."""
    read_a, read_b = reader(a.file, a.archive.path), reader(b.file, b.archive.path)
    one, other = bytearray(), bytearray()
    for position in range(0, num_bytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, num_bytes - position)
        if len(one) != size:
            one, other = bytearray(size), bytearray(size)
        read_a(start_a + position, memoryview(one))
        read_b(start_b + position, memoryview(other))
        yield one, other


def _are_equal_storages(a: Side, first: Tensor, b: Side, second: Tensor) -> bool:
    records = a.record_of(first), b.record_of(second)
    if records[0].num_bytes != records[1].num_bytes or records[0].crc32 != records[1].crc32:
        return False
    return all(x == y for x, y in _ranges(a, records[0].offset, b, records[1].offset, records[0].num_bytes))
