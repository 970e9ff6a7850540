"""What crosses the border of helios-rng: plain dictionaries, and the error of a state that does not fit."""

from typing import NotRequired, TypedDict

import torch


class PCG64State(TypedDict):
    """The two 128-bit integers of a PCG64 generator."""

    state: int
    inc: int


class NumpyRNGState(TypedDict):
    """The state of the default NumPy generator, as `numpy.random.PCG64.state` gives it."""

    bit_generator: str
    state: PCG64State
    has_uint32: int
    uinteger: int


class RNGStateDict(TypedDict):
    """The state of every generator that Helios seeds: tensors and plain values only.

    Attributes:
        torch: uint8 tensor, shape (5056,): `torch.get_rng_state()`.
        python: `random.getstate()`: (version, tuple of 625 ints, float or None).
        numpy: the default NumPy generator.
        cuda: one uint8 tensor for each CUDA device; absent without CUDA.
    """

    torch: torch.Tensor
    python: tuple[int, tuple[int, ...], float | None]
    numpy: NumpyRNGState
    cuda: NotRequired[list[torch.Tensor]]


class RNGStateError(ValueError):
    """A state dict, or a part of it, that cannot be restored; nothing was changed."""
