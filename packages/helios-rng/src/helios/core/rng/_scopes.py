"""Scopes that leave the generators as they found them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from helios.core.rng._numpy_default import (
    get_default_numpy_rng,
    has_default_numpy_rng,
    set_default_numpy_rng,
)


@contextmanager
def preserve_host_rng_state() -> Iterator[None]:
    """Leave torch's CPU generator, `random` and the default NumPy generator unchanged on exit.

    A default NumPy generator that was made inside is gone on exit, and one that was replaced is back.
    """
    torch_state = torch.default_generator.get_state()
    python_state = random.getstate()
    numpy_rng = get_default_numpy_rng() if has_default_numpy_rng() else None
    numpy_state = numpy_rng.state_dict() if numpy_rng is not None else None
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        set_default_numpy_rng(numpy_rng)
        if numpy_rng is not None and numpy_state is not None:
            numpy_rng.generator.bit_generator.state = numpy_state


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Leave every generator that Helios seeds, CUDA included, unchanged on exit, also after an exception."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    with preserve_host_rng_state():
        try:
            yield
        finally:
            if cuda_states is not None:
                torch.cuda.set_rng_state_all(cuda_states)
