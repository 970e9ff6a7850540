"""What each rank has of its own: its generators, and what hooks, buffers or a model's state make differ from rank 0.

Weights of networks that `Model.distribute` gave are the same on all ranks, or shards of the same, and so is what
optimizers have for them. A sum shows that of the weights, since to digest all of it would take as long as to save it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from helios.trainer._digest import digest
from helios.trainer._layout import has_parts, is_dtensor
from helios.trainer._model import Model
from helios.trainer._modules import buffers_of, named_parameters, optimizers_of
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import replicas_of, unsynchronised

_SAME = ""
"""Stands for the digest of what is the same on all ranks."""
_IN_PARTS = ("model", "gradients")
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_Digests = str | dict[Any, "_Digests"]


def states_of_ranks(
    ranks: Ranks, model: Model, generators: Mapping[str, Any], own: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return, on rank 0, what the ranks after it have that rank 0 does not have likewise; elsewhere nothing.

    Args:
        ranks: the ranks, all of which call this.
        model: the user's model.
        generators: state of this rank's generators.
        own: what else this rank has, by name; `model` is what its `state_dict` returned.

    Returns:
        A dict for each rank but the first, with `rng` and what differs of `own`, of buffers and of gradients; of model
        and gradients only the parts that do, as `overlaid` takes them.

    Raises:
        ValueError: what differs has a tensor of which each rank has a part.
    """
    if ranks.world_size == 1:
        return []
    own = {**own, "gradients": _gradients(model), "buffers": buffers_of(model)}
    digests, of_first = _compared(ranks, model, own)
    differing: dict[str, Any] = {}
    for key, value in own.items():
        if digests[key] != of_first[key]:
            parts = list(_parts_that_differ(value, digests[key], of_first[key]))
            differing[key] = parts if key in _IN_PARTS else value
    return ranks.gather({"rng": dict(generators), **_on_cpu(differing)})[1:]  # those of generators are on the CPU


def _gradients(model: Model) -> dict[str, torch.Tensor | None]:
    """Return the gradient of every parameter, or None, so that all ranks have the same names."""
    return {name: p.grad for name, p in named_parameters(model) if not is_dtensor(p)}


def overlaid(state: Mapping[Any, Any], parts: Sequence[tuple[Sequence[Any], Any]]) -> dict[Any, Any]:
    """Return what rank 0 had of something, with what another rank had of its own in it.

    Args:
        state: of rank 0.
        parts: of the other rank, in the form of `_parts_that_differ`.
    """
    merged: dict[Any, Any] = dict(state)
    for path, value in parts:
        if not path:
            return dict(value)
        *above, last = path
        inner = merged
        for key in above:
            inner[key] = dict(inner[key])
            inner = inner[key]
        inner[last] = value
    return merged


def _compared(
    ranks: Ranks, model: Model, own: Mapping[str, Any]
) -> tuple[dict[str, _Digests], dict[str, _Digests]]:
    """Return digests of all that may differ, of this rank and of rank 0."""
    sums = [_sum_of_bits(p) for _, replica in replicas_of(model) for p in replica.parameters()]
    digests = _digests(own, _known(model))
    everyone = ranks.all_gather((sums, digests))
    if any(each[0] != sums for each in everyone):  # copies that the user lets differ for a while
        digests = _digests(own, frozenset())
        return digests, ranks.all_gather(digests)[0]
    return digests, everyone[0][1]


def _digests(own: Mapping[str, Any], known: frozenset[int]) -> dict[str, _Digests]:
    return {
        key: _digests_in(value, known) if key in _IN_PARTS else digest(value) for key, value in own.items()
    }


def _digests_in(state: Any, known: frozenset[int]) -> _Digests:
    if isinstance(state, Mapping):
        return {key: _digests_in(value, known) for key, value in state.items()}
    is_same = has_parts(state) or (isinstance(state, torch.Tensor) and _address(state) in known)
    return _SAME if is_same else digest(state)


def _known(model: Model) -> frozenset[int]:
    """Return the addresses of tensors that are the same on all ranks, and of buffers, which are not the state's."""
    late = unsynchronised(model)
    parameters = [p for _, replica in replicas_of(model) for p in replica.parameters()]
    same: list[Any] = [*parameters, *buffers_of(model).values()]
    same += [p.grad for name, replica in replicas_of(model) if name not in late for p in replica.parameters()]
    for _, optimizer in optimizers_of(model):
        for parameter in parameters:
            same += optimizer.state.get(parameter, {}).values()
    return frozenset(_address(value) for value in same if isinstance(value, torch.Tensor)) - {0}


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


def _sum_of_bits(parameter: torch.Tensor) -> int:
    """Return a number that is the same if the bits are, and hardly ever otherwise; as fast as memory."""
    flat = parameter.detach().reshape(-1)
    return int(flat.view(_WORDS[flat.itemsize]).sum(dtype=torch.int64))


def _parts_that_differ(
    own: Any, digests: _Digests, of_first: _Digests, path: tuple[Any, ...] = ()
) -> Iterator[tuple[list[Any], Any]]:
    """Yield what differs from rank 0's: the keys that lead to it, and the value; mappings with other keys are whole."""
    if isinstance(digests, dict) and isinstance(of_first, dict) and digests.keys() == of_first.keys():
        for key in digests:
            yield from _parts_that_differ(own[key], digests[key], of_first[key], (*path, key))
    elif digests != of_first:
        if has_parts(own):
            raise ValueError(
                f"state_dict of the model has other keys in {list(path)} than on rank 0, and tensors there of which "
                "each rank has a part: let it have the same keys on all ranks"
            )
        yield list(path), own


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), state)
    return moved


def average_of_ranks(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over ranks of what each has under the names of the first; that is what all have together.

    What is no number or tensor, or is not there on a rank, stays that of the first.
    """
    return {name: _mean([each.get(name) for each in values]) for name in values[0]}


def _mean(values: list[Any]) -> Any:
    if len({id(value) for value in values}) == 1:  # also of one rank alone
        return values[0]
    if not all(isinstance(v, int | float | torch.Tensor) and not isinstance(v, bool) for v in values):
        return values[0]
    return sum(values[1:], start=values[0]) / len(values)
