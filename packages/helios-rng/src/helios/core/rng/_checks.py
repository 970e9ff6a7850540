"""The default seed, and what counts as a seed."""

import operator

DEFAULT_SEED = 6691
_SEED_LIMIT = 2**64  # what torch.manual_seed takes


def check_seed(seed: object) -> int:
    """Return a seed as an int: None is the default seed; TypeError or ValueError for what is none."""
    if seed is None:
        return DEFAULT_SEED
    if isinstance(seed, bool):
        raise TypeError(f"seed must be an int or None, found the bool {seed!r}")
    try:
        number = operator.index(seed)  # type: ignore[arg-type]  # NumPy's integers count as ints
    except TypeError:
        raise TypeError(f"seed must be an int or None, found {type(seed).__name__} {seed!r}") from None
    if not 0 <= number < _SEED_LIMIT:
        raise ValueError(f"seed must be in [0, 2**64), found {number}")
    return number
