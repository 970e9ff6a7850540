"""Where two runs part: the first step at which their ledgers differ, and in what."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from helios.trainer.ledger._format import LedgerError, is_end, read_header, read_rows

Row = Mapping[str, Any]
# From cause to effect: what a step begins with, and what comes of it.
COMPONENTS = ("epoch", "ids", "batch", "rng", "weights", "optimizers", "losses")


@dataclass(frozen=True)
class Difference:
    """A component in which two runs differ.

    Attributes:
        component: its name, for example `batch`, `rng.torch`, `weights.net.2.bias`, or of a setting.
        a: digest or number in the first ledger; None where it has none.
        b: likewise in the second.
    """

    component: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Parting:
    """The first row in which two runs differ.

    Attributes:
        step: its number.
        epoch: its epoch, in the first ledger.
        is_end: it is the end of the runs, after that step.
        differences: in what they differ, from cause to effect.
    """

    step: int
    epoch: int
    is_end: bool
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class Span:
    """The rows of one ledger.

    Attributes:
        run: name of the run.
        first: number of its first step.
        last: number of its last step; where the runs part, none after it was read.
        is_finished: it has the end of the run.
    """

    run: str
    first: int
    last: int
    is_finished: bool


@dataclass(frozen=True)
class Comparison:
    """What two ledgers have in common, and where they part.

    Attributes:
        a: the first ledger.
        b: the second.
        settings: what the runs began with that differs.
        first: the first step that both have.
        equal_through: the last step that is equal in both; None if none is.
        weights_equal_at: the last step whose weights are in both, and equal; None if there is none.
        parting: where they part; None if all that both have is equal.
    """

    a: Span
    b: Span
    settings: tuple[Difference, ...]
    first: int
    equal_through: int | None
    weights_equal_at: int | None
    parting: Parting | None

    @property
    def has_same_steps(self) -> bool:
        """Whether neither ledger has steps, or an end, that the other lacks."""
        a, b = self.a, self.b
        return (a.first, a.last, a.is_finished) == (b.first, b.last, b.is_finished)


def diff(a: Path, b: Path) -> Comparison:
    """Compare two ledgers, step by step, until they part.

    Args:
        a: a ledger.
        b: another.

    Raises:
        LedgerError: one is no ledger, is damaged, or has no step that the other has.
        OSError: one cannot be read.
    """
    with a.open("rb") as file_a, b.open("rb") as file_b:
        headers = read_header(file_a, a), read_header(file_b, b)
        rows_a, rows_b = _Rows(read_rows(file_a, a)), _Rows(read_rows(file_b, b))
        first = _align(rows_a, rows_b, a, b)
        equal, weights_at, parting = _walk(rows_a, rows_b)
    return Comparison(
        a=rows_a.span(headers[0]["run"]),
        b=rows_b.span(headers[1]["run"]),
        settings=tuple(_differences_in("", headers[0]["begun_with"], headers[1]["begun_with"])),
        first=first,
        equal_through=equal,
        weights_equal_at=weights_at,
        parting=parting,
    )


class _Rows:
    """The rows of a ledger, the next of which can be looked at, and where they began and ended."""

    def __init__(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows = rows
        self.next = next(rows, None)
        self._first = self.next
        self._last = self.next

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (row := self.next) is not None:
            self._last = row
            self.next = next(self._rows, None)
            yield row

    def span(self, run: str) -> Span:
        assert self._first is not None and self._last is not None, "_align refuses a ledger without rows"
        return Span(run, self._first["step"], self._last["step"], is_end(self._last))


def _key(row: Row) -> tuple[int, bool]:
    return row["step"], is_end(row)


def _align(rows_a: _Rows, rows_b: _Rows, a: Path, b: Path) -> int:
    """Leave out the steps before the first that both have, and return its number."""
    for rows, path in ((rows_a, a), (rows_b, b)):
        if rows.next is None:
            raise LedgerError(f"{path} has no step yet: there is nothing to compare")
    assert rows_a.next is not None and rows_b.next is not None
    start = max(_key(rows_a.next), _key(rows_b.next))
    for rows, path in ((rows_a, a), (rows_b, b)):
        iterator = iter(rows)
        while rows.next is not None and _key(rows.next) < start:
            next(iterator)
        if rows.next is None:
            raise LedgerError(
                f"{path} ends before step {start[0]}, the first of the other: no step is in both"
            )
    return start[0]


def _walk(rows_a: _Rows, rows_b: _Rows) -> tuple[int | None, int | None, Parting | None]:
    """Return the last equal step, the last with equal weights, and where the rows part.

    If one ledger ends before the other, the rest of the other is read, to know its end.
    """
    equal: int | None = None
    weights_at: int | None = None
    is_common = True
    for row_a, row_b in zip_longest(rows_a, rows_b):
        # An end has the number of the last step: it may stand beside the next step of a longer run.
        if row_a is None or row_b is None or _key(row_a) != _key(row_b):
            is_common = False
        if not is_common:
            continue
        if differences := tuple(differences_of(row_a, row_b)):
            return equal, weights_at, Parting(row_a["step"], row_a["epoch"], is_end(row_a), differences)
        equal = row_a["step"]
        if "weights" in row_a and "weights" in row_b:
            weights_at = equal
    return equal, weights_at, None


def differences_of(row_a: Row, row_b: Row) -> Iterator[Difference]:
    """Yield the differences of two rows, from cause to effect. What only one of them has digests of is left out."""
    for name in COMPONENTS:
        if name not in row_a or name not in row_b:
            continue  # weights are in every so many rows, which may be others
        a, b = row_a[name], row_b[name]
        if not isinstance(a, dict) or not isinstance(b, dict):
            if a != b:
                yield Difference(name, a, b)
            continue
        if name == "rng":  # another machine may have more GPUs
            a, b = ({key: side[key] for key in a if key in b} for side in (a, b))
        yield from _differences_in(f"{name}.", a, b)


def _differences_in(prefix: str, a: Row, b: Row) -> Iterator[Difference]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield Difference(prefix + key, a.get(key), b.get(key))
