"""What `diff` reports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from helios.chkpt._places import Place


class DifferenceKind(Enum):
    """In what two checkpoints differ at a place."""

    ONLY_IN_A = "only in a"
    ONLY_IN_B = "only in b"
    TYPE = "type"
    VALUE = "value"
    DTYPE = "dtype"
    SHAPE = "shape"
    VALUES = "values"
    TIED = "tied differently"
    ORDER = "order of keys"


@dataclass(frozen=True)
class Difference:
    """One difference of two checkpoints.

    Attributes:
        place: where it is; `path` is its text.
        kind: in what they differ. ``VALUE`` is that of plain values, ``VALUES`` that of a tensor's elements, bit by
            bit: -0.0 and 0.0 differ, and so do two nans with other bits.
        a: what is there in the first file, in some 100 characters at most; empty if nothing is. For ``VALUES`` the
            dtype and the shape, of both.
        b: what is there in the second; empty for ``VALUES``.
        num_elements: of the tensors, or of the lists of numbers; else None.
        num_differing: how many elements have other bits; None if that was not counted, as in tensors that have more
            elements than bytes.
        max_abs: greatest absolute difference of two elements, an int for integers and infinite between inf and
            another number; None for no pair of numbers, or a dtype that has none, such as float4.
        num_nan: how many of the differing pairs have a nan; `max_abs` leaves them out.
    """

    place: Place
    kind: DifferenceKind
    a: str = ""
    b: str = ""
    num_elements: int | None = None
    num_differing: int | None = None
    max_abs: float | None = None
    num_nan: int = 0

    @property
    def path(self) -> str:
        """Such as ``model.net.0.weight``."""
        return str(self.place)

    @property
    def detail(self) -> str:
        """All but the path and the kind, in a line."""
        sides = " -> ".join(side for side in (self.a, self.b) if side)
        if self.num_elements is None:
            return sides
        if self.num_differing is None:
            return f"{sides}: not counted, since there are more elements than bytes"
        parts = [f"{self.num_differing} of {self.num_elements} differ"]
        if self.kind is DifferenceKind.VALUE:
            return f"{parts[0]}, first {sides}"
        if self.max_abs is not None:
            most = f"{self.max_abs:.6g}" if isinstance(self.max_abs, float) else str(self.max_abs)
            parts.append(f"by at most {most}" if self.max_abs else "in nothing but the sign of 0")
        if self.num_nan:
            parts.append(f"{self.num_nan} with nan")
        return f"{sides}: {', '.join(parts)}"

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.kind.value}: {self.detail}"
            if self.detail
            else f"{self.path}: {self.kind.value}"
        )
