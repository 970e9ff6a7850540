"""The networks of a user's model, found by looking, and what hangs on them."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

_MAY_HAVE_PARTS = (nn.Module, Optimizer, Mapping, list, tuple)


def named_networks(owner: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, network) of every nn.Module among an object's attributes, also in lists and dicts."""
    for name, value in _parts_of(owner):
        if isinstance(value, nn.Module):
            yield name, value


def _parts_of(owner: object) -> Iterator[tuple[str, nn.Module | Optimizer]]:
    for name, value in vars(owner).items():
        yield from _parts_in(name, value)


def _parts_in(name: str, value: object) -> Iterator[tuple[str, nn.Module | Optimizer]]:
    if isinstance(value, nn.Module | Optimizer):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, _MAY_HAVE_PARTS):  # a history of numbers may be long
                yield from _parts_in(f"{name}.{key}", item)


def gradients_of(owner: object) -> dict[str, torch.Tensor]:
    """Return the gradients that the parameters hold, by name.

    All of them, although those that an optimizer has used are mostly overwritten next: whether they are is
    the user's business. Another optimizer may still wait for them, `zero_grad(set_to_none=False)` makes zeros
    of them where it leaves None alone, and the next batch may add to them.
    """
    return {name: p.grad for name, p in _named_parameters(owner) if p.grad is not None}


def restore_gradients(owner: object, gradients: Mapping[str, torch.Tensor]) -> None:
    """Give the parameters the gradients that `gradients_of` found, and no others.

    Raises:
        ValueError: there is a gradient of a parameter that does not exist.
    """
    parameters = dict(_named_parameters(owner))
    unknown = sorted(set(gradients) - set(parameters))
    if unknown:
        raise ValueError(
            f"the checkpoint has a gradient of {unknown[0]}, which the model lacks after its setup"
        )
    for name, parameter in parameters.items():
        gradient = gradients.get(name)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def modes_of(owner: object) -> dict[str, list[str]]:
    """Return which modules evaluate and which parameters are frozen: what hooks set and no state_dict has."""
    return {
        "evaluating": [name for name, module in _named_modules(owner) if not module.training],
        "frozen": [name for name, p in _named_parameters(owner) if not p.requires_grad],
    }


def restore_training_modes(owner: object, modes: Mapping[str, list[str]]) -> None:
    """Let the modules evaluate that did, and train the others."""
    evaluating = set(modes["evaluating"])
    for name, module in _named_modules(owner):
        module.training = name not in evaluating


def restore_frozen(owner: object, modes: Mapping[str, list[str]]) -> None:
    """Freeze the parameters that were frozen, and no others."""
    frozen = set(modes["frozen"])
    for name, parameter in _named_parameters(owner):
        if parameter.requires_grad is (name in frozen):
            parameter.requires_grad_(name not in frozen)


def _named_modules(owner: object) -> Iterator[tuple[str, nn.Module]]:
    for prefix, network in named_networks(owner):
        yield from network.named_modules(prefix=prefix)


def _named_parameters(owner: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter once: those of the networks, and those that only an optimizer has."""
    seen: set[int] = set()
    for prefix, part in _parts_of(owner):
        for name, parameter in _parameters_in(prefix, part):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def _parameters_in(prefix: str, part: nn.Module | Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(part, nn.Module):
        yield from part.named_parameters(prefix=prefix)
    else:
        for number, group in enumerate(part.param_groups):
            for index, parameter in enumerate(group["params"]):
                yield f"{prefix}.{number}.{index}", parameter


def tensors_of(owner: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every parameter and every buffer, once, also of those that no state_dict has.

    Parameters of lazy modules come when they are there.
    """
    yield from ((name, p) for name, p in _named_parameters(owner) if not nn.parameter.is_lazy(p))
    for prefix, network in named_networks(owner):
        yield from ((name, b) for name, b in network.named_buffers(prefix) if not nn.parameter.is_lazy(b))


def optimizers_of(owner: object) -> Iterator[tuple[str, Optimizer]]:
    """Yield (name, optimizer) of every optimizer among an object's attributes, also in lists and dicts."""
    for name, part in _parts_of(owner):
        if isinstance(part, Optimizer):
            yield name, part
