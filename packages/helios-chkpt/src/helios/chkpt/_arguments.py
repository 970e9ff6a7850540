"""The checks that several public functions make of their arguments."""

from __future__ import annotations

import math
import os
from pathlib import Path


def as_path(name: str, value: object) -> Path:
    """`value` as a `Path`; TypeError unless it is text or a path of text."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str):
            if not text or "\0" in text:
                raise ValueError(f"{name}: expected the path of a file or folder, got {text!r}")
            return Path(text)
    raise TypeError(f"{name}: expected str or os.PathLike[str], got {type(value).__name__}")


def check_count(name: str, value: object, *, at_least: int) -> None:
    """TypeError unless `value` is an `int` (no `bool`), ValueError if it is below `at_least`."""
    if type(value) is not int:
        raise TypeError(f"{name}: expected int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name}: expected {at_least} or more, got {value}")


def check_bool(name: str, value: object) -> None:
    """TypeError unless `value` is a `bool`."""
    if type(value) is not bool:
        raise TypeError(f"{name}: expected bool, got {type(value).__name__}")


def check_score(value: object) -> float | None:
    """`value` as a float, or None; TypeError or ValueError unless it is a finite number."""
    if value is None:
        return None
    if type(value) not in (int, float):
        raise TypeError(f"score: expected float or None, got {type(value).__name__}")
    assert isinstance(value, int | float)
    if not math.isfinite(value):
        raise ValueError(f"score: expected a finite number, got {value}")
    return float(value)
