"""The default NumPy generator: one `numpy.random.Generator` that Helios seeds, saves and restores."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from helios.core.rng._checks import check_seed
from helios.core.rng._types import NumpyRNGState, RNGStateError

_STATE_KEYS = {"bit_generator", "state", "has_uint32", "uinteger"}


class DefaultNumpyRNG:
    """A `numpy.random.Generator` over PCG64 with a state that is plain values.

    Args:
        seed: int in [0, 2**64), or None for the default seed (6691).

    Attributes:
        generator: the generator. It stays the same object when it is re-seeded or restored.

    Raises:
        TypeError: the seed is not an int.
        ValueError: the seed is out of range.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.generator: np.random.Generator = np.random.default_rng(check_seed(seed))

    def state_dict(self) -> NumpyRNGState:
        """Return the generator's state: strs and ints only."""
        state: Any = self.generator.bit_generator.state
        return state  # type: ignore[no-any-return]  # PCG64.state has this very shape

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the generator into a state that `state_dict` returned.

        Raises:
            RNGStateError: the state is of another generator or malformed; nothing was changed.
        """
        self.generator.bit_generator.state = check_numpy_state(state)


def check_numpy_state(state: object) -> dict[str, Any]:
    """Return `state` as a dict if PCG64 can take it; RNGStateError otherwise."""
    if not isinstance(state, Mapping) or set(state) != _STATE_KEYS:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise RNGStateError(f"numpy: expected a dict with the keys {sorted(_STATE_KEYS)}, found {found}")
    if state["bit_generator"] != "PCG64":
        raise RNGStateError(f"numpy: expected the state of PCG64, found {state['bit_generator']!r}")
    words = state["state"]
    if not isinstance(words, Mapping) or set(words) != {"state", "inc"}:
        raise RNGStateError(f"numpy: expected state and inc under 'state', found {words!r}")
    limits = [
        ("state", words["state"], 128),
        ("inc", words["inc"], 128),
        ("has_uint32", state["has_uint32"], 1),
        ("uinteger", state["uinteger"], 32),
    ]
    for name, value, bits in limits:
        if not isinstance(value, int) or not 0 <= value < 2**bits:
            raise RNGStateError(f"numpy: {name} must be an int in [0, 2**{bits}), found {value!r}")
    if words["inc"] % 2 == 0:
        raise RNGStateError(f"numpy: inc must be odd, found {words['inc']}")
    return {**state, "state": dict(words)}


# The one module global of Helios: the quick reference gives it a function of no arguments.
_default: DefaultNumpyRNG | None = None


def create_default_numpy_rng(seed: int | None = None) -> DefaultNumpyRNG:
    """Make a new default NumPy generator, replacing the one there is, and return it.

    Args:
        seed: int in [0, 2**64), or None for the default seed (6691).

    Raises:
        TypeError: the seed is not an int.
        ValueError: the seed is out of range.
    """
    global _default
    _default = DefaultNumpyRNG(seed)
    return _default


def get_default_numpy_rng() -> DefaultNumpyRNG:
    """Return the default NumPy generator.

    Ask for it where it is used rather than keeping it in a dataset: a copy that is pickled into a worker
    process is no longer the default, and Helios neither seeds nor restores it.

    Raises:
        RuntimeError: there is none yet.
    """
    if _default is None:
        raise RuntimeError(
            "there is no default NumPy generator yet: call helios.core.rng.seed_rngs() or "
            "helios.core.rng.create_default_numpy_rng() first (the Trainer does so by itself)"
        )
    return _default


def has_default_numpy_rng() -> bool:
    """Say whether a default NumPy generator exists."""
    return _default is not None


def set_default_numpy_rng(rng: DefaultNumpyRNG | None) -> None:
    """Put a generator (or none) back as the default; for the scopes of this package."""
    global _default
    _default = rng
