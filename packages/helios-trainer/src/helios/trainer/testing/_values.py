"""Showing two values that differ."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from helios.trainer.testing._leaf import Leaf


@dataclass(frozen=True)
class Pair:
    """Two values as text.

    Attributes:
        expected: in the whole run.
        found: in the other.
        summary: both in short.
    """

    expected: str
    found: str
    summary: str


def pair_of(expected: Leaf | None, found: Leaf | None, values: tuple[Any, Any] | None = None) -> Pair:
    """Return two values as text.

    Args:
        expected: what was remembered of the one; None if it was not there.
        found: of the other.
        values: tensors or arrays, if they are large.
    """
    if expected is not None and found is not None:
        if values is not None and (pair := _compared(*values, expected.kind)) is not None:
            return pair
        if str(expected) == str(found):
            if expected.kind == found.kind:
                return Pair(str(expected), str(found), "other bits")
            return _pair(f"{expected} ({expected.kind})", f"{found} ({found.kind})")
    one, two = ("not there" if leaf is None else str(leaf) for leaf in (expected, found))
    return _pair(one, two)


def _pair(expected: str, found: str) -> Pair:
    return Pair(expected, found, f"{expected} != {found}")


def _compared(expected: Any, found: Any, kind: str) -> Pair | None:
    """Say how many elements differ, by how much, and show the first that does; None if they are no numbers."""
    if not (_is_numeric(expected) and _is_numeric(found)):
        return None
    one, two = (torch.as_tensor(value) for value in (expected, found))
    if one.shape != two.shape or one.dtype != two.dtype:
        return None
    differs = (one != two) & ~((one != one) & (two != two))  # a NaN equals itself here
    places = differs.nonzero()
    if len(places) == 0:
        return None
    summary = f"{len(places)} of {one.numel()} elements differ"
    if one.dtype is not torch.bool:
        wide = torch.complex128 if one.is_complex() else torch.float64
        distance = (one.to(wide) - two.to(wide)).abs()[differs].max().item()
        summary += f", by up to {distance:.3g},"
    place = tuple(places[0].tolist())
    texts = [f"{tensor[place].item()} at {list(place)} of {kind}" for tensor in (one, two)]
    return Pair(texts[0], texts[1], summary)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")
