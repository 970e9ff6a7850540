"""A state in two: what goes into the main file, and the tensors that go into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from helios.chkpt._format.dtypes import ITEM_BYTES
from helios.chkpt._sharded.manifest import KEY, Spread, fill
from helios.chkpt._snapshot import Place, Snapshot, snapshot
from helios.chkpt._tensors import dtype_name

Choose = Callable[[torch.Tensor, Place], bool]


@dataclass(frozen=True)
class Split:
    """A state that is to be saved in shards.

    Attributes:
        plain: what goes into the main file, with None for each tensor in shards.
        places: for each place of a tensor in shards the keys that lead there.
        tensors: what belongs there.
        spreads: how it is described, still without a name.
        ties: places, by number, that have the tensor of an earlier place, as far as this process can tell.
    """

    plain: Snapshot
    places: list[tuple[object, ...]]
    tensors: list[torch.Tensor]
    spreads: list[Spread]
    ties: dict[int, int]

    @property
    def lines(self) -> list[str]:
        """What has to be the same in all processes, a line for each place."""
        pairs = zip(self.places, self.spreads, strict=True)
        return [f"{_joined(keys)}: {s.dtype} {list(s.shape)} {s.text}" for keys, s in pairs]

    @property
    def digest(self) -> bytes:
        """Equal in two processes if their lines are."""
        return hashlib.sha256(repr(self.lines).encode("utf-8", "surrogatepass")).digest()


def split(state: Mapping[str, object], choose: Choose | None = None) -> Split:
    """Take the tensors out of a state that go into shards.

    Args:
        state: as `helios.chkpt.save` takes it, and with DTensors.
        choose: which plain tensors go there besides.

    Raises:
        TypeError, ValueError: something cannot be stored; the message says where it is.
    """
    found: list[tuple[Place, torch.Tensor]] = []

    def divert(tensor: torch.Tensor, place: Place) -> bool:
        if type(tensor) is DTensor or (choose is not None and choose(tensor, place)):
            found.append((place, tensor))
            return True
        return False

    plain = snapshot(state, divert)
    for key in ("version", KEY):
        if key in plain.values:
            raise ValueError(f"state: the key {key!r} is added when it is saved; expected a state without it")
    spreads: list[Spread] = []
    ties: dict[int, int] = {}
    firsts: dict[object, int] = {}
    for number, (place, tensor) in enumerate(found):
        _check_place(plain, place)
        spreads.append(_spread(tensor, place))
        first = min(firsts.setdefault(identity, number) for identity in _identities(tensor))
        if first != number:
            ties[number] = first
    return Split(
        plain, [place.keys for place, _ in found], [tensor.detach() for _, tensor in found], spreads, ties
    )


def named(
    parts: Split, ties: Iterable[Mapping[int, int]]
) -> tuple[dict[str, torch.Tensor], tuple[tuple[tuple[object, ...], Spread], ...]]:
    """The tensors to write by their names in DCP, and the places that they belong to.

    Args:
        parts: the state.
        ties: what each process knows of ties. A process that has no element of a tensor may see none.
    """
    first = list(range(len(parts.places)))
    for known in ties:
        for number, earlier in known.items():
            first[number] = min(first[number], earlier)
    names: list[str] = []
    tensors: dict[str, torch.Tensor] = {}
    for number, keys in enumerate(parts.places):
        if first[number] < number:
            names.append(names[first[number]])
            continue
        name = _joined(keys)
        while name in tensors:
            name += "~"
        names.append(name)
        tensors[name] = parts.tensors[number]
    spreads = [replace(spread, name=name) for spread, name in zip(parts.spreads, names, strict=True)]
    return tensors, tuple(zip(parts.places, spreads, strict=True))


def _joined(keys: Iterable[object]) -> str:
    """As DCP itself names what is at these keys."""
    return ".".join(map(str, keys))


def _check_place(plain: Snapshot, place: Place) -> None:
    try:
        fill(plain.values, place.keys, None)
    except LookupError:
        raise TypeError(
            f"{place}: a DTensor cannot be stored here; store it in a dict, list or tuple"
        ) from None


def _identities(tensor: torch.Tensor) -> list[object]:
    """Tensors that are one in memory, such as tied weights, have an identity in common."""
    local = tensor.detach()
    spread: tuple[object, ...] = ()
    if isinstance(local, DTensor):
        spread = (tensor.shape, local.placements, id(local.device_mesh))
        local = local.to_local()
    if local.numel() == 0:
        return [id(tensor)]
    start = local.untyped_storage().data_ptr() + local.storage_offset() * local.itemsize
    return [id(tensor), (local.device, start, local.shape, local.stride(), local.dtype, spread)]


def _spread(tensor: torch.Tensor, place: Place) -> Spread:
    dtype = dtype_name(tensor.dtype)
    if dtype not in ITEM_BYTES or tensor.is_quantized:
        raise TypeError(f"{place}: {tensor.dtype} cannot be stored in shards; view it as torch.uint8")
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise TypeError(
            f"{place}: a {tensor.layout} tensor on {tensor.device.type} cannot be stored in shards"
        )
    if type(tensor) is not DTensor:
        return Spread("", dtype, tuple(tensor.shape), ("S(0)",), (1,), None)
    placements = tuple(_placement(placement, place) for placement in tensor.placements)
    mesh = tensor.device_mesh
    dim_names = None if mesh.mesh_dim_names is None else tuple(mesh.mesh_dim_names)
    return Spread("", dtype, tuple(tensor.shape), placements, tuple(mesh.shape), dim_names)


def _placement(placement: object, place: Place) -> str:
    if type(placement) is Replicate:
        return "R"
    if type(placement) is Shard:
        return f"S({placement.dim})"
    raise TypeError(
        f"{place}: a DTensor with the placement {placement} cannot be stored; expected Shard and Replicate. "
        "Store full_tensor(), or redistribute() it first"
    )
