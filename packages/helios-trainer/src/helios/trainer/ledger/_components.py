"""What a row of the ledger says of a run: digests, by name."""

import math
from typing import Any

import numpy as np
import torch

from helios.core.rng import get_rng_state_dict
from helios.trainer._digest import digest
from helios.trainer._model import Model
from helios.trainer._modules import optimizers_of, tensors_of


def generators() -> dict[str, str]:
    """Return the digest of each generator that a checkpoint holds. None is drawn from."""
    digests: dict[str, str] = {}
    for name, state in get_rng_state_dict().items():
        if name == "cuda":
            assert isinstance(state, list)
            digests.update({f"cuda:{index}": digest(device) for index, device in enumerate(state)})
        else:
            digests[name] = digest(state)
    return digests


def weights(model: Model) -> dict[str, str]:
    """Return the digest of each parameter and buffer of a model's networks."""
    return {name: digest(tensor) for name, tensor in tensors_of(model)}


def optimizers(model: Model) -> dict[str, str]:
    """Return digests of a model's optimizers: what each keeps for a parameter, and its groups' options."""
    names = {id(tensor): name for name, tensor in tensors_of(model)}
    digests: dict[str, str] = {}
    for prefix, optimizer in optimizers_of(model):
        groups = [
            {**group, "params": [names.get(id(p)) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        digests[f"{prefix}.param_groups"] = digest(groups)
        for key, kept in optimizer.state.items():
            name = names.get(id(key), "state") if isinstance(key, torch.Tensor) else str(key)
            digests[f"{prefix}.{name}"] = digest(kept)
    return digests


def losses(model: Model) -> dict[str, Any]:
    """Return the losses of the batch: numbers as they are, anything else as a digest."""
    return {str(name): _readable(value) for name, value in model._loss_items.items()}


def _readable(value: Any) -> int | float | str:
    is_single = isinstance(value, torch.Tensor) and value.numel() == 1
    number = value.item() if is_single or isinstance(value, np.generic) else value
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)  # JSON has no such numbers
    return number if isinstance(number, int | float) else digest(value)
