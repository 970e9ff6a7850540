"""A check of durations."""

import math


def check_seconds(name: str, value: object) -> None:
    """Check an argument that is a duration in seconds.

    Raises:
        TypeError: it is no number.
        ValueError: it is 0, less or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be seconds or None, found {type(value).__name__} {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be more than 0 seconds, and finite, found {value}")
