"""Seeding, RNG state and derived seeds for PyTorch, NumPy and Python's `random`.

See `seed_rngs` to begin, `get_rng_state_dict` / `load_rng_state_dict` to stop and go on, and
`derive_seed` for seeds that depend on an epoch, a rank or a name without colliding.
"""

from helios.core.rng._derive import DERIVATION, derive_bytes, derive_seed
from helios.core.rng._numpy_default import (
    DefaultNumpyRNG,
    create_default_numpy_rng,
    get_default_numpy_rng,
    has_default_numpy_rng,
)
from helios.core.rng._scopes import preserve_host_rng_state, preserve_rng_state
from helios.core.rng._seeding import DEFAULT_SEED, get_default_seed, rekey_host_rngs, seed_rngs
from helios.core.rng._state import get_rng_state_dict, load_rng_state_dict
from helios.core.rng._types import NumpyRNGState, RNGStateDict, RNGStateError
from helios.core.rng._version import __version__

__all__ = [
    "DEFAULT_SEED",
    "DERIVATION",
    "DefaultNumpyRNG",
    "NumpyRNGState",
    "RNGStateDict",
    "RNGStateError",
    "__version__",
    "create_default_numpy_rng",
    "derive_bytes",
    "derive_seed",
    "get_default_numpy_rng",
    "get_default_seed",
    "get_rng_state_dict",
    "has_default_numpy_rng",
    "load_rng_state_dict",
    "preserve_host_rng_state",
    "preserve_rng_state",
    "rekey_host_rngs",
    "seed_rngs",
]
