"""Tables for people and JSON for programs."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from helios.chkpt._places import printable

_GAP = "  "
_LEAST = 12  # columns that the widest column is left
_MIB = 1 << 20


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its head.
        is_number: aligned to the right.
        shrinks: may be shortened, in the middle, so that a line fits the terminal.
    """

    title: str
    is_number: bool = False
    shrinks: bool = False


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], width: int | None = None) -> list[str]:
    """The lines of a table.

    Args:
        columns: its columns.
        rows: a text for each column; what cannot be printed is shown as escapes.
        width: of the terminal; None for no limit.
    """
    cells = [[column.title for column in columns], *([printable(text) for text in row] for row in rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(columns))]
    too_wide = sum(widths) + len(_GAP) * (len(widths) - 1) - (width or sys.maxsize)
    for i, column in enumerate(columns):
        if column.shrinks and too_wide > 0:
            least = min(widths[i], max(_LEAST, widths[i] - too_wide))
            too_wide -= widths[i] - least
            widths[i] = least
    return [_line(columns, row, widths) for row in cells]


def _line(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> str:
    texts = []
    for column, text, width in zip(columns, row, widths, strict=True):
        short = shortened(text, width)
        fill = " " * (width - _width(short))
        texts.append(fill + short if column.is_number else short + fill)
    return _GAP.join(texts).rstrip()


def shortened(text: str, width: int) -> str:
    """A text without its middle, if it is wider than `width`: beginnings and ends of names tell most."""
    if _width(text) <= width:
        return text
    head, tail = list(text[: len(text) // 2]), list(text[len(text) // 2 :])
    while (head or tail) and _width("".join([*head, "...", *tail])) > width:
        if len(head) > len(tail):
            head.pop()
        else:
            tail.pop(0)
    return "".join([*head, "...", *tail])


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], indent: str = "") -> None:
    """Print a table as wide as the terminal, or as wide as it gets where there is none."""
    width = shutil.get_terminal_size().columns - len(indent) if sys.stdout.isatty() else None
    for line in table(columns, rows, width):
        print(indent + line)


def print_json(value: object) -> None:
    """Print JSON; numbers that it does not have are text: ``"inf"``, ``"nan"``."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def mib_text(num_bytes: int) -> str:
    """A size in MiB, with three digits at least where there are any."""
    mib = num_bytes / _MIB
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.1f}" if mib >= 10 else f"{mib:.3f}"


def size_text(num_bytes: int) -> str:
    """A size with its unit, such as ``1.5 GiB``."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def time_text(seconds: float) -> str:
    """A time in seconds since 1970, as the local one."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
