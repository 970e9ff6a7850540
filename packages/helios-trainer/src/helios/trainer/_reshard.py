"""Letting networks and optimizers take tensors that are laid out in another way than theirs.

A run may go on on one rank after it was on several that had a part of each tensor, or the other way round. Users call
`load_state_dict` of torch themselves; these hooks, which torch calls then, lay each tensor out as the own one is.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from helios.trainer._layout import as_laid_out
from helios.trainer._modules import named_networks, optimizers_of


@contextmanager
def taking_other_shards(owner: object) -> Iterator[None]:
    """Let the networks and optimizers among an object's attributes take them inside."""
    with ExitStack() as stack:
        for _, network in named_networks(owner):
            for module in network.modules():
                handle: Any = module.register_load_state_dict_pre_hook(_lay_out_in_module)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
        for _, optimizer in optimizers_of(owner):
            stack.callback(optimizer.register_load_state_dict_pre_hook(_lay_out_in_optimizer).remove)
        yield


def _lay_out_in_module(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    for name, tensor in own.items():
        if prefix + name in state:
            state[prefix + name] = as_laid_out(state[prefix + name], tensor)


def _lay_out_in_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=False))
    laid_out = {
        number: {name: as_laid_out(value, by_number[number]) for name, value in values.items()}
        if number in by_number and isinstance(values, dict)
        else values
        for number, values in state["state"].items()
    }
    return {**state, "state": laid_out}
