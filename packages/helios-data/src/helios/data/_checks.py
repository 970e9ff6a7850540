"""Checks of arguments, in one wording: the argument, what was expected, what was found."""

import operator
from typing import Any

import numpy as np
import numpy.typing as npt


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


def as_array(name: str, values: Any) -> npt.NDArray[Any]:
    """Return what the user gave as an array, a memory-mapped one as it is; TypeError if it cannot be one."""
    try:
        array: npt.NDArray[Any] = np.asanyarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot take
        raise TypeError(
            f"{name} must be a 1-d array of numbers, found a {type(values).__name__} that is none: {error}"
        ) from error
    return array


def as_numbers(name: str, values: Any) -> npt.NDArray[Any]:
    """Return what the user gave as a 1-d array of numbers, at least one; TypeError or ValueError otherwise."""
    array = as_array(name, values)
    if array.dtype.kind not in "iuf" or array.ndim != 1:
        raise TypeError(f"{name} must be a 1-d array of numbers, found {array.dtype}, shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: there is nothing to sample")
    return array


def check_positions(positions: Any, num_samples: int) -> None:
    """TypeError unless positions are a 1-d array of integers; ValueError unless each is in range(num_samples)."""
    if not isinstance(positions, np.ndarray) or positions.dtype.kind not in "iu" or positions.ndim != 1:
        found = getattr(positions, "dtype", type(positions).__name__)
        raise TypeError(f"positions must be a 1-d array of integers, found {found}")
    if positions.size and (positions.min() < 0 or positions.max() >= num_samples):
        found = f"{positions.min()} to {positions.max()}"
        raise ValueError(f"positions must be in range({num_samples}), found {found}")
