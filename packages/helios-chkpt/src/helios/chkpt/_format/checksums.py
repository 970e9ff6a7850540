"""Checksums of large records, by several threads at once. zlib and hashlib let go of the interpreter's lock."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from helios.chkpt._format.layout import Record

CHUNK_BYTES = 1 << 18
"""What is read and summed at a time: it stays in the processor's cache in between."""

_SEGMENT_BYTES = 1 << 26
_LOT_BYTES = 1 << 23
_POLYNOMIAL = 0xEDB88320  # of CRC-32, bits reversed
_ONE = 1 << 31

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Read = Callable[[int, memoryview], None]
"""Fills the memory with the file's bytes from a position on, or raises."""


@dataclass(frozen=True)
class Segment:
    """A part of a record's content, for one thread.

    Attributes:
        record: the record.
        start: first byte, counted from the beginning of the content.
        stop: one past its last byte.
    """

    record: Record
    start: int
    stop: int


def num_threads() -> int:
    """How many threads may work: one for each processor that this process may use, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)  # macOS


def segments(record: Record) -> Iterator[Segment]:
    """The parts of a record that different threads may work on."""
    for start in range(0, record.num_bytes, _SEGMENT_BYTES):
        yield Segment(record, start, min(start + _SEGMENT_BYTES, record.num_bytes))


def crc32_sums(
    records: Sequence[Record], read: Read, target: Callable[[Record], memoryview] | None = None
) -> dict[str, int]:
    """The CRC-32 of each record's content in the file.

    Args:
        records: which.
        read: reads the file.
        target: memory that a record is read into; None reads into memory that is used again and again.

    Returns:
        By name, what the sum is.
    """

    def work(segment: Segment) -> int:
        memory = None if target is None else target(segment.record)[segment.start : segment.stop]
        return _crc32(segment, read, memory)

    parts = [segment for record in records for segment in segments(record)]
    sums = {record.name: 0 for record in records}
    for part, crc in zip(parts, _map(work, parts, _segment_bytes), strict=True):
        name = part.record.name
        sums[name] = combine_crc32(sums[name], crc, part.stop - part.start) if part.start else crc
    return sums


def read_all(records: Sequence[Record], read: Read, target: Callable[[Record], memoryview]) -> None:
    """Read each record's content into memory."""

    def work(segment: Segment) -> None:
        read(segment.record.offset + segment.start, target(segment.record)[segment.start : segment.stop])

    _map(work, [segment for record in records for segment in segments(record)], _segment_bytes)


def all_sums(records: Sequence[Record], read: Read) -> dict[str, tuple[int, str]]:
    """The CRC-32 and the SHA-256, in hexadecimal digits, of each record's content in the file, read once; by name."""
    stopped = threading.Event()

    def work(record: Record) -> tuple[int, str]:
        crc, digest = 0, hashlib.sha256()
        for piece in _pieces(Segment(record, 0, record.num_bytes), read, None):
            if stopped.is_set():  # a record may take minutes, and nobody waits for it any more
                break
            crc = zlib.crc32(piece, crc)
            digest.update(piece)
        return crc, digest.hexdigest()

    # The largest first, so that no thread is left with one of them at the end.
    largest_first = sorted(records, key=lambda record: -record.num_bytes)
    sums = _map(work, largest_first, lambda record: record.num_bytes, stopped)
    return dict(zip((record.name for record in largest_first), sums, strict=True))


def _map(
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
    num_bytes: Callable[[_Item], int],
    stopped: threading.Event | None = None,
) -> list[_Result]:
    """What `work` gives for each, by several threads unless there is little to do.

    Small items are done several in a go: to hand one over costs as much as to sum 50 kB.
    After an error, or Ctrl-C, `stopped` is set, for work that takes long.
    """
    lots: list[list[_Item]] = []
    room = 0
    for item in items:
        if not lots or num_bytes(item) > room:
            lots.append([])
            room = _LOT_BYTES
        lots[-1].append(item)
        room -= num_bytes(item)
    count = min(num_threads(), len(lots))
    if count < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(count) as pool:
        try:
            futures = [pool.submit(lambda lot: [work(item) for item in lot], lot) for lot in lots]
        except RuntimeError:  # the interpreter exits, and lets no thread begin any more
            return [work(item) for item in items]
        try:
            return [result for future in futures for result in future.result()]
        except BaseException:  # such as Ctrl-C: what has not begun never does
            if stopped is not None:
                stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _segment_bytes(segment: Segment) -> int:
    return segment.stop - segment.start


def _crc32(segment: Segment, read: Read, memory: memoryview | None) -> int:
    crc = 0
    for piece in _pieces(segment, read, memory):
        crc = zlib.crc32(piece, crc)
    return crc


def _pieces(segment: Segment, read: Read, memory: memoryview | None) -> Iterator[memoryview]:
    buffer = memory
    if buffer is None:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, segment.stop - segment.start)))
    for start in range(segment.start, segment.stop, CHUNK_BYTES):
        num_bytes = min(CHUNK_BYTES, segment.stop - start)
        first = 0 if memory is None else start - segment.start
        piece = buffer[first : first + num_bytes]
        read(segment.record.offset + start, piece)
        yield piece


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two pieces one after the other, from those of the pieces.

    Args:
        first: of the first piece.
        second: of the second piece.
        second_bytes: size of the second piece.

    Source: Mark Adler, ``crc32_combine`` of zlib 1.2.12: multiplication by x^(8 n) modulo the polynomial.
    """
    power, square, bits = _ONE, _ONE >> 8, second_bytes  # square: x^8, x^16, x^32, ...
    while bits:
        if bits & 1:
            power = _product(square, power)
        square = _product(square, square)
        bits >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """``a * b`` modulo the polynomial; the highest bit is the coefficient of 1."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
