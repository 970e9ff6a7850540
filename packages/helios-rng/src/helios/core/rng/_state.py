"""Saving and restoring the state of every generator, all or nothing."""

import random
from collections.abc import Mapping
from typing import Any, cast

import torch

from helios.core.rng._numpy_default import (
    check_numpy_state,
    create_default_numpy_rng,
    get_default_numpy_rng,
    has_default_numpy_rng,
)
from helios.core.rng._types import RNGStateDict, RNGStateError

_PYTHON_STATE_VERSION = 3  # what random.getstate() of every supported Python writes


def get_rng_state_dict() -> RNGStateDict:
    """Return the state of torch, `random`, the default NumPy generator and, if available, CUDA.

    Returns:
        A dict with the keys torch, python, numpy and (only with CUDA) cuda. It holds tensors and plain
        values only: `torch.load(weights_only=True)` reads it back.

    Raises:
        RuntimeError: there is no default NumPy generator; call `seed_rngs` first.
    """
    state: RNGStateDict = {
        "torch": torch.get_rng_state(),
        "python": cast("tuple[int, tuple[int, ...], float | None]", random.getstate()),
        "numpy": get_default_numpy_rng().state_dict(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_rng_state_dict(state: Mapping[str, Any], *, ignore_cuda: bool = False) -> None:
    """Put every generator into a state that `get_rng_state_dict` returned: all of them or none.

    Args:
        state: the state dict. Tensors may have been moved to another device by `map_location`.
        ignore_cuda: restore torch's CPU generator, `random` and NumPy only. Without it, a state with CUDA
            generators is refused where there is no CUDA or another number of devices, and a state without
            them is refused where CUDA is available: the streams of the devices would not go on.

    Raises:
        RNGStateError: a part is missing, foreign or malformed; its name comes first in the message and
            every generator is as it was.
    """
    checked = _check(state, ignore_cuda)
    cuda = checked.get("cuda")
    before = torch.cuda.get_rng_state_all() if cuda is not None else None
    if cuda is not None and before is not None:
        # First, because it alone can still fail (a state of another architecture).
        try:
            torch.cuda.set_rng_state_all(cuda)
        except RuntimeError as error:
            torch.cuda.set_rng_state_all(before)
            raise RNGStateError(f"cuda: {error}") from error
    torch.set_rng_state(checked["torch"])
    random.setstate(checked["python"])
    if not has_default_numpy_rng():
        create_default_numpy_rng()
    get_default_numpy_rng().load_state_dict(checked["numpy"])


def _check(state: object, ignore_cuda: bool) -> RNGStateDict:
    if not isinstance(state, Mapping):
        raise RNGStateError(
            f"state: expected a dict as get_rng_state_dict gives it, found {type(state).__name__}"
        )
    for part in ("torch", "python", "numpy"):
        if part not in state:
            raise RNGStateError(f"{part}: missing; the state has {sorted(map(str, state))}")
    unknown = sorted(str(part) for part in state if part not in RNGStateDict.__annotations__)
    if unknown:
        raise RNGStateError(f"{unknown[0]}: not a generator that Helios knows")
    checked: RNGStateDict = {
        "torch": _check_torch(state["torch"]),
        "python": _check_python(state["python"]),
        "numpy": cast("Any", check_numpy_state(state["numpy"])),
    }
    if not ignore_cuda and (cuda := _check_cuda(state.get("cuda"))) is not None:
        checked["cuda"] = cuda
    return checked


def _check_torch(value: object) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8:
        raise RNGStateError(f"torch: expected a uint8 tensor, found {_describe(value)}")
    on_cpu = value.cpu()
    try:
        torch.Generator().set_state(on_cpu)  # on a generator of no importance
    except (RuntimeError, TypeError) as error:
        raise RNGStateError(f"torch: {error}") from error
    return on_cpu


def _check_python(value: object) -> tuple[int, tuple[int, ...], float | None]:
    # A list where random wants a tuple is what JSON or a careless copy makes of it; refused, not repaired.
    if not isinstance(value, tuple) or len(value) != 3 or value[0] != _PYTHON_STATE_VERSION:
        raise RNGStateError(
            f"python: expected a tuple of random.getstate(), version 3, found {_describe(value)}"
        )
    gauss = value[2]
    if gauss is not None and not isinstance(gauss, float):
        raise RNGStateError(f"python: the value set aside by gauss must be a float or None, found {gauss!r}")
    try:
        random.Random().setstate(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise RNGStateError(f"python: {error}") from error
    return value


def _check_cuda(value: object) -> list[torch.Tensor] | None:
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hint = "pass ignore_cuda=True to go on with other streams on the devices"
    if value is None:
        if num_devices:
            raise RNGStateError(f"cuda: missing, but this machine has {num_devices} CUDA device(s); {hint}")
        return None
    if not isinstance(value, list) or not all(isinstance(v, torch.Tensor) for v in value):
        raise RNGStateError(f"cuda: expected a list of uint8 tensors, found {_describe(value)}")
    if len(value) != num_devices:
        raise RNGStateError(
            f"cuda: the state has {len(value)} CUDA device(s), this machine has {num_devices}; {hint}"
        )
    return [v.cpu() for v in value]


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__
