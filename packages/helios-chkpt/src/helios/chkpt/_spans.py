"""Which byte ranges overlap. Pure functions, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Component:
    """Byte ranges that hang together by overlapping.

    Attributes:
        start: first byte of their union.
        stop: one past its last byte.
        members: positions of the ranges in the sequence given, in rising order.
    """

    start: int
    stop: int
    members: tuple[int, ...]


def components(spans: Sequence[tuple[int, int]]) -> list[Component]:
    """Group half-open byte ranges ``(start, stop)`` so that ranges of different groups share no byte.

    Ranges that only touch do not overlap. Costs one sort. Groups come in rising order of their start.
    """
    merged: list[Component] = []
    members: list[int] = []
    low = high = 0
    for index in sorted(range(len(spans)), key=spans.__getitem__):
        start, stop = spans[index]
        assert start < stop, f"an empty range overlaps nothing: {start}, {stop}"
        if members and start < high:
            members.append(index)
            high = max(high, stop)
        else:
            if members:
                merged.append(Component(low, high, tuple(sorted(members))))
            members, low, high = [index], start, stop
    if members:
        merged.append(Component(low, high, tuple(sorted(members))))
    return merged
