"""The networks of a user's model, found by looking, and what hangs on them."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def named_networks(owner: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, network) of every nn.Module among an object's attributes, also in lists and dicts."""
    for name, value in vars(owner).items():
        yield from _networks_in(name, value)


def _networks_in(name: str, value: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _networks_in(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _networks_in(f"{name}.{index}", item)


def gradients_of(owner: object) -> dict[str, torch.Tensor]:
    """Return the gradients that the networks' parameters hold, by name."""
    return {name: p.grad for name, p in _named_parameters(owner) if p.grad is not None}


def restore_gradients(owner: object, gradients: Mapping[str, torch.Tensor]) -> None:
    """Give the networks' parameters the gradients that `gradients_of` found, and no others.

    Raises:
        ValueError: there is a gradient of a parameter that does not exist.
    """
    parameters = dict(_named_parameters(owner))
    unknown = sorted(set(gradients) - set(parameters))
    if unknown:
        raise ValueError(f"the checkpoint has accumulated gradients of {unknown[0]}, which the model lacks")
    for name, parameter in parameters.items():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)


def _named_parameters(owner: object) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, network in named_networks(owner):
        for name, parameter in network.named_parameters():
            yield f"{prefix}.{name}", parameter


class OptimizerWatch:
    """Knows whether an optimizer has stepped since a batch began.

    If none has, the gradients of the batch are still accumulating, and a checkpoint must hold them.
    """

    def __init__(self) -> None:
        self.has_stepped = False
        self._handle: Any = register_optimizer_step_post_hook(self._note_step)

    def _note_step(self, optimizer: object, args: object, kwargs: object) -> None:
        self.has_stepped = True

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()
