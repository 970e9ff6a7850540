"""Checks of arguments, in one wording: the argument, what was expected, what was found."""

import operator
from typing import Any


def check_int(name: str, value: Any, minimum: int | None = None) -> int:
    """Return an int that is at least `minimum`; TypeError or ValueError otherwise. NumPy's ints count."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, found the bool {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, found {type(value).__name__} {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be {minimum} or more, found {number}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """Return a bool; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {type(value).__name__} {value!r}")
    return value


def check_callable(name: str, value: Any) -> None:
    """TypeError unless the value can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, found {type(value).__name__} {value!r}")


def check_num_samples(name: str, dataset: Any) -> int:
    """Return the length of a dataset that has one and is not empty."""
    try:
        num_samples = len(dataset)
    except TypeError as error:
        raise TypeError(
            f"{name} must have a length (define __len__) to be sampled and resumed by position, "
            f"found {type(dataset).__name__}"
        ) from error
    if num_samples == 0:
        raise ValueError(f"{name} is empty: there is nothing to sample")
    return num_samples
