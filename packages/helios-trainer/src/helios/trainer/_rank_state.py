"""What each rank has of its own: its generators, and what hooks or buffers have made differ from rank 0.

Networks, optimizers and what else a model's `state_dict` returns are the same on all ranks, or shards of the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from helios.data import ResumableDataLoader
from helios.trainer._digest import digest
from helios.trainer._layout import is_dtensor
from helios.trainer._model import Model, tables_of
from helios.trainer._modules import buffers_of, gradients_of
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import replicas_of, unsynchronised


def states_of_ranks(
    ranks: Ranks,
    model: Model,
    loader: ResumableDataLoader,
    generators: Mapping[str, Any],
    plugins: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return, on rank 0, what the ranks after it have that rank 0 does not have likewise; elsewhere nothing.

    Args:
        ranks: the ranks, all of which call this.
        model: the user's model.
        loader: loader of the training split.
        generators: state of this rank's generators.
        plugins: states of this rank's plug-ins, by id.

    Returns:
        A dict for each rank but the first, with `rng` and, if they differ, the keys of `_own_state`.
    """
    if ranks.world_size == 1:
        return []
    own = {**_own_state(model, loader), "plugins": dict(plugins)}
    digests = {key: digest(value) for key, value in own.items()}
    of_first = ranks.all_gather(digests)[0]
    differing = {key: value for key, value in own.items() if digests[key] != of_first[key]}
    return ranks.gather({"rng": _on_cpu(dict(generators)), **_on_cpu(differing)})[1:]


def _own_state(model: Model, loader: ResumableDataLoader) -> dict[str, Any]:
    return {
        "data": dict(loader.state_dict()),
        "tables": tables_of(model),
        "gradients": _own_gradients(model),
        "buffers": buffers_of(model),
        "unsynchronised": unsynchronised(model),
    }


def _own_gradients(model: Model) -> dict[str, torch.Tensor]:
    """Return the gradients that the ranks have not exchanged: most have been, and to compare them would take long."""
    late = unsynchronised(model)
    exchanged = {
        id(parameter)
        for name, replica in replicas_of(model)
        if name not in late
        for parameter in replica.parameters()
    }
    return gradients_of(model, lambda parameter: id(parameter) not in exchanged and not is_dtensor(parameter))


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
