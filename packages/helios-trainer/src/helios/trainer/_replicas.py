"""A network on several ranks: copies that are kept equal (DistributedDataParallel), or shards (fully_shard, FSDP2)."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helios.trainer._layout import is_dtensor
from helios.trainer._modules import named_networks
from helios.trainer.distributed import all_reduce_tensors, gather_into_tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


_WIDE = torch.float64


class Strategy(Enum):
    """How `Model.distribute` puts a network on several ranks.

    Attributes:
        DDP: a copy on each rank; their gradients are averaged.
        FSDP: each rank keeps a part of every parameter, of its gradient and of the optimizer's state; for models that
            outgrow a device.
    """

    DDP = "ddp"
    FSDP = "fsdp"


def replicate(network: nn.Module, device: torch.device, options: dict[str, Any]) -> nn.Module:
    """Return a DistributedDataParallel of a network that sums gradients in the same order in every process.

    From its second batch on, DistributedDataParallel exchanges gradients in other groups than in the first: in the
    order in which they came then. A sum over three ranks or more depends on where in a group a number is, so that a
    run that starts again, and with it begins with a first batch, would get other bits. Here the groups change before
    anything is trained, by a backward pass that finds zeros only, in an order that the network's definition fixes.
    """
    if device.type == "cuda":
        options = {"device_ids": [device], **options}
    replica = DistributedDataParallel(network, **options)
    # With the first it regroups nothing; with the second it counts passes, and takes the first as an example.
    is_fixed = options.get("find_unused_parameters", False) or options.get("static_graph", False)
    has_sparse = any(
        getattr(module, "sparse", False) for module in network.modules()
    )  # no zeros of their kind
    if dist.get_world_size(options.get("process_group")) > 2 and not is_fixed and not has_sparse:
        _settle_groups(replica, network)
    return replica


def _settle_groups(replica: DistributedDataParallel, network: nn.Module) -> None:
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    _pass_zeros(replica, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _pass_zeros(replica: DistributedDataParallel, parameters: list[nn.Parameter]) -> None:
    with torch.enable_grad(), _standing_in(replica, _Views(parameters)):
        outputs = replica()
        torch.autograd.backward(list(outputs), [torch.zeros_like(output) for output in outputs])


class _Views(nn.Module):
    """Gives back parameters that are another network's."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._others = [parameters]  # not as its own

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Return all of them."""
        return tuple(parameter.view_as(parameter) for parameter in self._others[0])


@contextmanager
def _standing_in(replica: DistributedDataParallel, other: nn.Module) -> Iterator[None]:
    """Let another network compute inside, so that no hook of the own one, which expects inputs, is called."""
    own, talks = replica.module, replica.broadcast_buffers
    replica.module, replica.broadcast_buffers = other, False  # which the other has none of
    try:
        yield
    finally:
        replica.module, replica.broadcast_buffers = own, talks


def shard(
    network: nn.Module, blocks: Iterable[nn.Module], device: torch.device, options: dict[str, Any]
) -> nn.Module:
    """Shard a network over the ranks, each block as a unit, and return it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "mesh" not in options:
        # By itself it would take GPUs where there are some, also if the run is on the CPU.
        options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), **options}
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(network, **options)
    return network


@contextmanager
def without_exchange(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Let copies keep their gradients to themselves inside; others are as ever."""
    with ExitStack() as stack:
        for network in networks:
            for _, replica in _replicas_in("", network):
                stack.enter_context(replica.no_sync())
        yield


def is_sharded(network: nn.Module) -> bool:
    """Whether a network has parameters of which each rank has a part."""
    return any(is_dtensor(p) for p in network.parameters())


def meshes_of(owner: object) -> list["DeviceMesh"]:
    """Return the meshes that the networks of a model are on."""
    meshes: list[DeviceMesh] = []
    for _, network in named_networks(owner):
        for parameter in network.parameters():
            if is_dtensor(parameter) and parameter.device_mesh not in meshes:
                meshes.append(parameter.device_mesh)
    return meshes


def replicas_of(owner: object) -> Iterator[tuple[str, DistributedDataParallel]]:
    """Yield (name, network) of the copies among an object's attributes, also inside others, such as a compiled one."""
    for name, network in named_networks(owner):
        yield from _replicas_in(name, network)


def _replicas_in(name: str, network: nn.Module) -> Iterator[tuple[str, DistributedDataParallel]]:
    for full_name, module in network.named_modules(prefix=name):
        if isinstance(module, DistributedDataParallel):
            yield full_name, module


def reshard(owner: object) -> None:
    """Let networks in shards forget the whole parameters that a pass without gradients has left.

    As long as they have them, their parameters are others than those that the optimizer has.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # it takes long to import
    if fsdp is None:
        return
    for _, network in named_networks(owner):
        for module in network.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Give the copies the buffers of rank 0, and let them talk no more inside; networks in shards are so again after.

    DistributedDataParallel sends the buffers at each batch. They do not change in evaluation, and a rank that has a
    batch more than another would wait for ever.
    """
    talking = [network for _, network in replicas_of(model) if network.broadcast_buffers]
    for network in talking:
        _share_buffers(network)
    # Without gradients a pass leaves behind that the next one need not begin with the buffers of rank 0.
    were_due = [(network, network.require_forward_param_sync) for _, network in replicas_of(model)]
    for network in talking:
        network.broadcast_buffers = False
    try:
        yield
    finally:
        reshard(model)
        for network in talking:
            network.broadcast_buffers = True
        for network, was_due in were_due:
            network.require_forward_param_sync = was_due


def _share_buffers(network: DistributedDataParallel) -> None:
    by_kind: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for buffer in network.buffers():
        by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for buffers in by_kind.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, group_src=0, group=network.process_group)
        parts = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def unsynchronised(owner: object) -> list[str]:
    """Return the names of the copies whose next forward pass does not begin with the buffers of rank 0."""
    return [name for name, network in replicas_of(owner) if not network.require_forward_param_sync]


def restore_unsynchronised(owner: object, names: Iterable[str]) -> None:
    """Undo and redo what `unsynchronised` found."""
    found = set(names)
    for name, network in replicas_of(owner):
        if name in found and network.find_unused_parameters:
            _mark_used(network)
        network.require_forward_param_sync = name not in found


def _mark_used(replica: DistributedDataParallel) -> None:
    """Let a copy know that parameters had a part in batches that exchanged nothing: those with a gradient.

    With `find_unused_parameters` it exchanges the gradients of those alone that some rank has used since the last time.
    """
    parameters = [p for p in replica.module.parameters() if p.requires_grad and p.grad is not None]
    if not parameters:
        return
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    with replica.no_sync():
        _pass_zeros(replica, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def average(values: Mapping[str, float | torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Return the means over all ranks of numbers and tensors by name, in a message for each dtype.

    Args:
        values: of this rank; of the same names, kinds and shapes on each, in any order.
        device: where numbers are sent from.

    Raises:
        ValueError: another rank has others.
    """
    names = sorted(values)
    tensors = [
        v if isinstance(v, torch.Tensor) else torch.tensor(float(v), dtype=_WIDE, device=device)
        for v in (values[name] for name in names)
    ]
    _check_same_kinds([f"{n} ({t.dtype}, {list(t.shape)})" for n, t in zip(names, tensors, strict=True)])
    means = [total / dist.get_world_size() for total in all_reduce_tensors(tensors)]
    by_name = dict(zip(names, means, strict=True))
    return {n: by_name[n] if isinstance(v, torch.Tensor) else by_name[n].item() for n, v in values.items()}


def _check_same_kinds(kinds: list[str]) -> None:
    """Check that all ranks average the same: else they would wait for ever, or mix up what they send."""
    if "cpu:" not in dist.get_backend_config():
        return  # to find it out would make the device wait
    digest = hashlib.sha256(repr(kinds).encode()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    everyone = gather_into_tensor(own, (dist.get_world_size(), len(digest)))
    if bool((everyone == everyone[0]).all()):
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, kinds)
    by_rank = "; ".join(f"rank {rank}: {', '.join(each) or 'nothing'}" for rank, each in enumerate(found))
    raise ValueError(
        f"_loss_items must have the same names on every rank, and values of the same dtype and shape, found in their "
        f"sums {by_rank}"
    )
