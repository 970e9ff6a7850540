"""Saving and loading the parts of a user's model by name, so that none is forgotten."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

_PARTS = "_parts"


def save_parts(
    attributes: Mapping[str, Any], parts: Mapping[str, Any], omit: Iterable[str]
) -> dict[str, Any]:
    """Return the state of each part; see `ModelHelpers.save_all`.

    Args:
        attributes: of the model, by name, in which a forgotten part is looked for.
        parts: what to save, by name.
        omit: names of attributes that need not be saved.
    """
    if _PARTS in parts:
        raise ValueError(f"no part may be called {_PARTS!r}, which save_all needs: give it another name")
    omitted = _checked_omit(omit, attributes)
    given = [leaf for name, part in parts.items() for _, leaf in _leaves(name, part)]
    forgotten = [name for name in _forgotten(attributes, given) if not _is_in(name, omitted)]
    if forgotten:
        raise ValueError(
            f"save_all was not given {', '.join(forgotten)}: what has a state must be saved, so give each by name, "
            f"as in save_all({forgotten[0].partition('.')[0]}=...), or name it in omit"
        )
    states = {name: _state_of(name, part) for name, part in parts.items()}
    return {**states, _PARTS: [name for name, part in parts.items() if _has_state(part)]}


def load_parts(state: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Give each part its state and return the values; see `ModelHelpers.load_all`."""
    stateful = {name for name, part in parts.items() if _has_state(part)}
    by_hand = stateful | {name for name, value in state.items() if isinstance(value, Mapping)}
    saved = set(state.get(_PARTS, by_hand)) & set(state)
    both = [name for name in parts if name in stateful & saved]
    pairs = [pair for name in both for pair in _pairs(name, parts[name], state[name])]
    problems = [
        *(f"it has no {name}" for name in parts if name not in state),
        *(
            f"it has a state of {name}, which load_all was not given"
            for name in state
            if name in saved - set(parts)
        ),
        *(f"{name} has a state there, and none here" for name in parts if name in saved - stateful),
        *(f"{name} is a value there, and has a state here" for name in state if name in stateful - saved),
        *(f"{name} {problem}" for name, part, value in pairs for problem in _misfits(part, value)),
    ]
    if problems:
        raise ValueError(f"the state does not fit the model, and nothing was loaded: {'; '.join(problems)}")
    for _, part, value in pairs:
        part.load_state_dict(value)
    return {name: value for name, value in state.items() if name not in saved and name != _PARTS}


def _is_stateful(value: Any) -> bool:
    methods = ("state_dict", "load_state_dict")
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in methods)


def _unwrapped(part: Any) -> Any:
    """Return the network in a DistributedDataParallel, so that a file loads with and without it."""
    return part.module if isinstance(part, DistributedDataParallel) else part


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """Return what is in a dict, list or tuple, by key; None of anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else None


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, object) of everything with a state in a value, which may be that itself."""
    if _is_stateful(value):
        yield name, _unwrapped(value)
    else:
        for key, item in _items(value) or ():
            yield from _leaves(f"{name}.{key}", item)


def _has_state(part: Any) -> bool:
    return any(True for _ in _leaves("", part))


def _state_of(name: str, part: Any) -> Any:
    """Return the state of a part in the shape of the part, or a value as it is."""
    if _is_stateful(part):
        return _unwrapped(part).state_dict()
    if not _has_state(part):
        return part
    states = {key: _state_of(f"{name}.{key}", item) for key, item in _items(part) or ()}
    if lost := [key for key, item in _items(part) or () if not _has_state(item)]:
        raise TypeError(
            f"{name}.{lost[0]} has no state_dict, though others in {name} have: give save_all such values by a name "
            "of their own"
        )
    return states if isinstance(part, Mapping) else list(states.values())


def _pairs(name: str, part: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, object, its state); where parts and states are not the same in number, the container of them."""
    parts, values = (None if items is None else dict(items) for items in (_items(part), _items(value)))
    if _is_stateful(part):
        yield name, _unwrapped(part), value
    elif parts is None or values is None or parts.keys() != values.keys():
        yield name, part, value
    else:
        for key, item in parts.items():
            yield from _pairs(f"{name}.{key}", item, values[key])


def _misfits(part: Any, state: Any) -> Iterator[str]:
    """Yield why a part cannot take a state, as far as can be seen without trying."""
    if not _is_stateful(part):
        here, there = ([key for key, _ in _items(each) or ()] for each in (part, state))
        yield f"holds {here} here, and {there} there"
    elif isinstance(part, nn.Module):
        yield from _misfits_of_network(part, state)
    elif isinstance(part, Optimizer):
        here, there = (
            [len(group["params"]) for group in groups]
            for groups in (part.param_groups, state["param_groups"])
        )
        if here != there:
            yield f"has groups of {here} parameters here, and of {there} there"


def _misfits_of_network(network: nn.Module, state: Mapping[str, Any]) -> Iterator[str]:
    own = network.state_dict()
    if missing := [key for key in own if key not in state]:
        yield f"lacks {', '.join(missing)} there"
    if unexpected := [key for key in state if key not in own]:
        yield f"has no {', '.join(unexpected)} here"
    for key in own:
        here, there = (getattr(each.get(key), "shape", None) for each in (own, state))
        if here is not None and there is not None and here != there:
            yield f"has {key} of shape {tuple(here)} here, and {tuple(there)} there"


def _forgotten(attributes: Mapping[str, Any], given: Sequence[Any]) -> Iterator[str]:
    """Yield the name of everything with a state among attributes that is not in what is given."""
    ids = {id(part) for part in given}
    tensors: set[int] = set()
    for network in given:
        if isinstance(network, nn.Module):
            ids.update(id(module) for module in network.modules())
            tensors.update(map(id, network.state_dict(keep_vars=True).values()))
    for name, value in attributes.items():
        for place, leaf in _leaves(name, value):
            is_covered = isinstance(leaf, nn.Module) and tensors.issuperset(
                map(id, leaf.state_dict(keep_vars=True).values())
            )
            if id(leaf) not in ids and not is_covered:
                yield place


def _checked_omit(omit: Iterable[str], attributes: Mapping[str, Any]) -> list[str]:
    """Return the names to omit, each of which must be of an attribute or of a place in one."""
    names = [omit] if isinstance(omit, str) else list(omit)
    if isinstance(omit, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"omit must be several names of attributes, as in omit=['teacher'], found {omit!r}")
    places = {
        *attributes,
        *(place for name, value in attributes.items() for place, _ in _leaves(name, value)),
    }
    if unknown := [name for name in names if name not in places]:
        raise ValueError(
            f"omit names {unknown[0]!r}, which is no attribute of the model with a state: spell it right"
        )
    return names


def _is_in(place: str, names: Sequence[str]) -> bool:
    return any(place == name or place.startswith(f"{name}.") for name in names)
