"""A state in memory as it is written: values, and the bytes of its tensors, shared or copied. Needs torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from helios.chkpt._format.layout import ALIGNMENT
from helios.chkpt._snapshot import Snapshot, snapshot
from helios.chkpt._tensors import bytes_of, copy_bytes
from helios.chkpt._write import Memory


@dataclass(frozen=True)
class State:
    """What is to be written.

    Attributes:
        values: what the pickle says.
        sources: the content of each storage.
        keeps: the tensors whose memory the sources are.
    """

    values: dict[str, object]
    sources: list[Memory]
    keeps: list[torch.Tensor]


def stated(state: Mapping[str, object]) -> State:
    """A state that shares the memory of its tensors, so it has to be written before they change.

    If they do change meanwhile, in another thread, what is written is between the two, but can be read.

    Raises:
        TypeError, ValueError: as `snapshot`, or `state` has a key ``version``.
    """
    return in_memory(_snapshot(state))


def in_memory(taken: Snapshot) -> State:
    """As `stated`, of what `snapshot` gave."""
    contents = [bytes_of(piece) for piece in taken.pieces]
    sources = [Memory(memory_of(content), may_change=True) for content in contents]
    return State(taken.values, sources, contents)


class Staging:
    """Memory that states are copied to. Made once and used for each, since new memory costs more than a copy."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def staged(self, state: Mapping[str, object]) -> State:
        """A state that shares no memory with its tensors; it is overwritten by the next one.

        Raises:
            TypeError, ValueError: as `stated`.
        """
        taken = _snapshot(state)
        starts, total = [], 0
        for piece in taken.pieces:
            starts.append(total)
            total += piece.num_bytes + -piece.num_bytes % ALIGNMENT
        if total > self._buffer.nbytes:
            # Memory that is pinned is what a device copies to fastest.
            pinned = any(leaf.source.is_cuda for piece in taken.pieces for leaf in piece.leaves)
            self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")  # first let go of the old one
            self._buffer = torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        pieces = zip(taken.pieces, starts, strict=True)
        memory, sources = memory_of(self._buffer), []
        for piece, start in pieces:
            copy_bytes(piece, self._buffer, start)
            sources.append(Memory(memory[start : start + piece.num_bytes]))
        return State(taken.values, sources, [self._buffer])


def _snapshot(state: Mapping[str, object]) -> Snapshot:
    taken = snapshot(state)
    if "version" in taken.values:
        raise ValueError("state: the key 'version' is added by save; expected a state without it")
    return taken


def memory_of(content: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor on the CPU, which has to outlive the view."""
    return memoryview((ctypes.c_char * content.nbytes).from_address(content.data_ptr())).cast("B")
