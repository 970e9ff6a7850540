"""What each rank has of its own: its generators, and what hooks, buffers or a model's state make differ from rank 0.

Tensors in shards are the same on all ranks in that sense. The rest is compared by digests; weights of copies that
`Model.distribute` gave, their gradients and what optimizers have for them by fingerprints, since to digest all of them
would take as long as to save them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from helios.trainer._digest import digest
from helios.trainer._layout import has_parts, is_dtensor
from helios.trainer._model import Model
from helios.trainer._modules import lasting_buffers_of, named_parameters, optimizers_of
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import replicas_of

_SHARD = ""
"""Stands for the digest of a tensor of which each rank has a part."""
_BLOCK_BYTES = 8192
_IN_PARTS = ("model", "plugins", "gradients", "buffers")
_INNER = (Mapping, list, tuple)


class _Inner(NamedTuple):
    """Digests of what is in a container that holds tensors or other containers.

    Attributes:
        kind: its type.
        items: by key or index, in its order.
    """

    kind: str
    items: "dict[Any, str | _Inner]"


_Path = tuple[Any, ...]
_Place = tuple[Any, ...]


def states_of_ranks(
    ranks: Ranks, model: Model, generators: Mapping[str, Any], own: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return, on rank 0, what the ranks after it have that rank 0 does not have likewise; elsewhere nothing.

    Args:
        ranks: the ranks, all of which call this.
        model: the user's model.
        generators: state of this rank's generators.
        own: what else this rank has, by name; `model` is what its `state_dict` returned, and `plugins` has those of
            plug-ins.

    Returns:
        A dict for each rank but the first, with `rng` and what differs of `own`, of buffers and of gradients; of model,
        plug-ins, gradients and buffers only what does, as `overlaid` takes it.

    Raises:
        ValueError: on all ranks, if what differs on one has a tensor of which each rank has a part.
    """
    if ranks.world_size == 1:
        return []
    # None, too: so all ranks have the same names.
    gradients = {name: p.grad for name, p in named_parameters(model)}
    own = {**own, "gradients": gradients, "buffers": lasting_buffers_of(model)}
    known = _fingerprints(model)
    digests = {
        key: _digests_in(value, {} if key == "buffers" else known) if key in _IN_PARTS else digest(value)
        for key, value in own.items()
    }
    of_first = ranks.on_first(lambda: digests)
    changes = {key: list(_changes(own[key], digests[key], of_first[key])) for key in _IN_PARTS}
    _refuse_other_shards(ranks, digests, of_first, changes)
    differing = {key: found for key, found in changes.items() if found}
    differing |= {key: own[key] for key in own.keys() - set(_IN_PARTS) if digests[key] != of_first[key]}
    # Generators are on the CPU, and have thousands of numbers to look through.
    return ranks.gather({"rng": dict(generators), **_on_cpu(differing)})[1:]


def overlaid(state: Mapping[Any, Any], changes: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
    """Return what rank 0 had of something, with what another rank had of its own in it.

    Args:
        state: of rank 0.
        changes: of the other rank, in the form of `_changes`.
    """
    by_path = {tuple(change["path"]): change for change in changes}
    within: dict[_Path, dict[Any, None]] = {}  # keys in which something changes
    for path in by_path:
        for depth in range(len(path)):
            within.setdefault(path[:depth], {})[path[depth]] = None

    def merged(value: Any, path: _Path) -> Any:
        change = by_path.get(path, {})
        if "value" in change:
            return change["value"]
        if not change and path not in within:
            return value
        if not isinstance(value, Mapping):
            return type(value)([merged(item, (*path, index)) for index, item in enumerate(value)])
        result: Any = copy.copy(value)  # with its attributes: a network's state has versions in them
        result.clear()
        for key in change.get("keys", {**value, **within.get(path, {})}):
            result[key] = merged(value.get(key), (*path, key))
        return result

    result: dict[Any, Any] = merged(state, ())
    return result


def _fingerprints(model: Model) -> dict[_Place, str]:
    """Return what stands for digests of the large tensors of a model, by where they are.

    Of buffers it is their name: they are compared by themselves.
    """
    found = {place: _fingerprint(tensor) for tensor in _of_replicas(model) if (place := _place(tensor))}
    buffers = lasting_buffers_of(model).items()
    return found | {place: f"buffer {name}" for name, buffer in buffers if (place := _place(buffer))}


def _of_replicas(model: Model) -> Iterator[torch.Tensor]:
    """Yield weights of copies, and what hangs on them."""
    optimizers = [optimizer for _, optimizer in optimizers_of(model)]
    for _, replica in replicas_of(model):
        for parameter in replica.parameters():
            held = [value for each in optimizers for value in each.state.get(parameter, {}).values()]
            for value in (parameter, parameter.grad, *held):
                if isinstance(value, torch.Tensor):
                    yield value


def _place(tensor: torch.Tensor) -> _Place:
    """Return what two tensors have alike only if they have the same bits; nothing of one without memory of its own."""
    if tensor.layout is not torch.strided or is_dtensor(tensor) or tensor.data_ptr() == 0:
        return ()
    return (tensor.data_ptr(), str(tensor.device), tensor.dtype, tensor.shape, tensor.stride())


def _fingerprint(tensor: torch.Tensor) -> str:
    """Return what is the same if the bits are, and hardly ever otherwise; faster than a digest.

    Of a large tensor its rows and columns are summed up, as if it had 1024 of these.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    words = plain[: plain.numel() // _BLOCK_BYTES * _BLOCK_BYTES]
    if words.storage_offset() % 8:
        words = words.clone()
    block = words.view(torch.int64).view(-1, _BLOCK_BYTES // 8)
    return digest(
        [str(tensor.dtype), tuple(tensor.shape), plain[words.numel() :], block.sum(0), block.sum(1)]
    )


def _digests_in(state: Any, known: Mapping[_Place, str]) -> "str | _Inner":
    if isinstance(state, torch.Tensor):
        return _SHARD if is_dtensor(state) else known.get(_place(state)) or digest(state)
    if isinstance(state, _INNER):
        pairs = list(state.items() if isinstance(state, Mapping) else enumerate(state))
        if any(isinstance(value, (torch.Tensor, *_INNER)) for _, value in pairs):
            return _Inner(type(state).__name__, {key: _digests_in(value, known) for key, value in pairs})
        return digest([type(state).__name__, pairs])  # of a mapping in its order
    return digest(state)


def _changes(
    own: Any, digests: "str | _Inner", of_first: "str | _Inner", path: _Path = ()
) -> Iterator[dict[str, Any]]:
    """Yield what differs from rank 0's: the `path` of keys that leads to it, and its `value`, or only its `keys`."""
    if (
        isinstance(digests, str)
        or isinstance(of_first, str)
        or digests.kind != of_first.kind
        or (not isinstance(own, Mapping) and len(digests.items) != len(of_first.items))
    ):
        if digests != of_first:
            yield {"path": list(path), "value": own}
        return
    if list(digests.items) != list(of_first.items):
        yield {"path": list(path), "keys": list(digests.items)}
    for key, each in digests.items.items():
        yield from _changes(own[key], each, of_first.items.get(key, "none"), (*path, key))


def _refuse_other_shards(
    ranks: Ranks,
    digests: Mapping[str, Any],
    of_first: Mapping[str, Any],
    changes: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Refuse, on all ranks, that one has shards elsewhere than rank 0, or beside what is otherwise there."""
    wrong: list[Any] = []
    for key in _IN_PARTS:
        wrong += sorted(_shards_in(digests[key]) ^ _shards_in(of_first[key]), key=str)
        wrong += [change["path"] for change in changes[key] if has_parts(change.get("value"))]
    for rank, paths in enumerate(ranks.all_gather(wrong[:1])):
        if paths:
            place = " > ".join(map(repr, paths[0]))
            raise ValueError(
                f"rank {rank} has something else in {place} of a state_dict than rank 0, where tensors are of which "
                "each rank has a part: let state_dict return the same keys and containers on all ranks"
            )


def _shards_in(digests: "str | _Inner", path: _Path = ()) -> set[_Path]:
    if isinstance(digests, str):
        return {path} if digests == _SHARD else set()
    return {shard for key, each in digests.items.items() for shard in _shards_in(each, (*path, key))}


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = tree_map_only(torch.Tensor, _by_itself, state)
    return moved


def _by_itself(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU without the rest of its memory, all of which pickle would send with each."""
    tensor = tensor.detach().cpu()
    is_view = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_view else tensor


def average_of_ranks(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over ranks of what each has under the names of any; None, or no such name, counts as zero.

    What is no number or tensor stays that of the first rank that has it.
    """
    names = dict.fromkeys(name for each in values for name in each)
    return {name: _mean([each.get(name) for each in values]) for name in names}


def _mean(values: list[Any]) -> Any:
    if len({id(value) for value in values}) == 1:  # also of one rank alone
        return values[0]
    found = [value for value in values if value is not None]
    if not all(isinstance(v, int | float | torch.Tensor) and not isinstance(v, bool) for v in found):
        return found[0]
    return sum(found[1:], start=found[0]) / len(values)
