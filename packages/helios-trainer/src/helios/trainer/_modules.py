"""The networks of a user's model, found by looking, and what hangs on them."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from helios.trainer._layout import as_laid_out

_MAY_HAVE_PARTS = (nn.Module, Optimizer, dict, list, tuple)


def named_networks(owner: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, network) of every nn.Module among an object's attributes, also in lists and dicts."""
    for name, value in _parts_of(owner):
        if isinstance(value, nn.Module):
            yield name, value


def _named_originals(owner: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield the networks under names that do not say whether they are on several ranks: a run may go on with one."""
    for name, network in named_networks(owner):
        yield name, network.module if isinstance(network, DistributedDataParallel) else network


def _parts_of(owner: object) -> Iterator[tuple[str, nn.Module | Optimizer]]:
    for name, value in vars(owner).items():
        yield from _parts_in(name, value, [])


def _parts_in(name: str, value: object, inside: list[int]) -> Iterator[tuple[str, nn.Module | Optimizer]]:
    """Yield the parts in a value; `inside` are the ids of the containers that it is in, for one may hold itself."""
    if isinstance(value, nn.Module | Optimizer):
        yield name, value
    elif isinstance(value, dict | list | tuple) and id(value) not in inside:
        inside.append(id(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, _MAY_HAVE_PARTS):  # a history of numbers may be long
                yield from _parts_in(f"{name}.{key}", item, inside)
        inside.pop()


def gradients_of(owner: object) -> dict[str, torch.Tensor]:
    """Return the gradients that the parameters hold, by name.

    All of them, although those that an optimizer has used are mostly overwritten next: whether they are is
    the user's business. Another optimizer may still wait for them, `zero_grad(set_to_none=False)` makes zeros
    of them where it leaves None alone, and the next batch may add to them.
    """
    return {name: p.grad for name, p in named_parameters(owner) if p.grad is not None}


def restore_gradients(
    owner: object, gradients: Mapping[str, torch.Tensor], aliases: Mapping[str, list[str]]
) -> None:
    """Give the parameters the gradients that `gradients_of` found, and no others.

    Args:
        owner: whose parameters.
        gradients: what `gradients_of` returned.
        aliases: what `aliases_of` returned then.

    Raises:
        ValueError: there is a gradient of a parameter that does not exist.
    """
    parameters = _parameters_by_name(owner)
    of = {
        id(_found("a gradient", name, aliases, parameters)): gradient for name, gradient in gradients.items()
    }
    for _, parameter in named_parameters(owner):
        gradient = of.get(id(parameter))
        parameter.grad = None if gradient is None else as_laid_out(gradient.to(parameter.device), parameter)


def modes_of(owner: object) -> dict[str, list[str]]:
    """Return which modules evaluate and which parameters are frozen: what hooks set and no state_dict has."""
    modules = _modules_by_name(owner)
    first_names = {id(module): name for name, module in reversed(modules.items())}
    return {
        "evaluating": [
            name
            for name, module in modules.items()
            if not module.training and first_names[id(module)] == name
        ],
        "frozen": [name for name, p in named_parameters(owner) if not p.requires_grad],
    }


def aliases_of(owner: object) -> dict[str, list[str]]:
    """Return the other names of each parameter and module that has several, by its first.

    A network may be an attribute of its own besides: then its parameters have two names, of which a new process may
    know one alone, since the attribute is set in a later epoch.
    """
    names: dict[int, list[str]] = {}
    for by_name in (_parameters_by_name(owner), _modules_by_name(owner)):
        for name, part in by_name.items():
            names.setdefault(id(part), []).append(name)
    return {first: others for first, *others in names.values() if others}


def restore_training_modes(
    owner: object, modes: Mapping[str, list[str]], aliases: Mapping[str, list[str]]
) -> None:
    """Let the modules evaluate that did, and train the others.

    Raises:
        ValueError: one that did does not exist.
    """
    modules = _modules_by_name(owner)
    evaluating = {id(_found("an evaluating module", name, aliases, modules)) for name in modes["evaluating"]}
    for module in modules.values():
        module.training = id(module) not in evaluating


def restore_frozen(owner: object, modes: Mapping[str, list[str]], aliases: Mapping[str, list[str]]) -> None:
    """Freeze the parameters that were frozen, and no others.

    Raises:
        ValueError: one that was does not exist.
    """
    parameters = _parameters_by_name(owner)
    frozen = {id(_found("a frozen parameter", name, aliases, parameters)) for name in modes["frozen"]}
    for _, parameter in named_parameters(owner):
        if parameter.requires_grad is (id(parameter) in frozen):
            parameter.requires_grad_(id(parameter) not in frozen)


_Part = TypeVar("_Part")


def _found(what: str, name: str, aliases: Mapping[str, list[str]], by_name: Mapping[str, _Part]) -> _Part:
    """Return what had this name, or another one, in the process that wrote a checkpoint."""
    names = [name, *aliases.get(name, ())]
    found = {id(by_name[each]): by_name[each] for each in names if each in by_name}
    if len(found) != 1:
        problem = "lacks after its setup" if not found else "has several of after its setup"
        raise ValueError(
            f"the checkpoint has {what} {' = '.join(names)}, which the model {problem}: let setup make what the "
            "checkpoint was written with"
        )
    return next(iter(found.values()))


def _modules_by_name(owner: object) -> dict[str, nn.Module]:
    """Return the modules under every name that they have."""
    return {
        name: module
        for prefix, network in _named_originals(owner)
        for name, module in network.named_modules(prefix=prefix, remove_duplicate=False)
    }


def _parameters_by_name(owner: object) -> dict[str, torch.Tensor]:
    """Return the parameters under every name that they have in networks; those that only an optimizer has come last."""
    by_name: dict[str, torch.Tensor] = {
        name: parameter
        for prefix, network in _named_originals(owner)
        for name, parameter in network.named_parameters(prefix, remove_duplicate=False)
    }
    known = set(map(id, by_name.values()))
    for prefix, optimizer in optimizers_of(owner):
        for number, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    known.add(id(parameter))
                    by_name[f"{prefix}.{number}.{index}"] = parameter
    return by_name


def named_parameters(owner: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter once, by its first name."""
    seen: set[int] = set()
    for name, parameter in _parameters_by_name(owner).items():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def tensors_of(owner: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every parameter and every buffer, once, also of those that no state_dict has.

    Parameters of lazy modules come when they are there.
    """
    yield from ((name, p) for name, p in named_parameters(owner) if not nn.parameter.is_lazy(p))
    yield from buffers_of(owner).items()


def buffers_of(owner: object) -> dict[str, torch.Tensor]:
    """Return every buffer by name, also of those that no state_dict has; of lazy modules when they are there."""
    return {
        name: buffer
        for prefix, network in _named_originals(owner)
        for name, buffer in network.named_buffers(prefix)
        if not nn.parameter.is_lazy(buffer)
    }


def lasting_buffers_of(owner: object) -> dict[str, torch.Tensor]:
    """Return the buffers that are part of a network's state, by name."""
    passing = {
        id(module._buffers[name])
        for _, network in named_networks(owner)
        for module in network.modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in buffers_of(owner).items() if id(buffer) not in passing}


def restore_buffers(owner: object, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give buffers the values that `lasting_buffers_of` found.

    Raises:
        ValueError: one that had a value does not exist.
    """
    own = buffers_of(owner)
    with torch.no_grad():
        for name, value in buffers.items():
            if name not in own:
                raise ValueError(f"the checkpoint has a buffer {name}, which the model lacks after its setup")
            if own[name].shape == value.shape:
                own[name].copy_(value)
            else:  # it grows, and has the size that it had on rank 0
                own[name].data = value.to(own[name].device)


def optimizers_of(owner: object) -> Iterator[tuple[str, Optimizer]]:
    """Yield (name, optimizer) of every optimizer among an object's attributes, also in lists and dicts."""
    for name, part in _parts_of(owner):
        if isinstance(part, Optimizer):
            yield name, part
