"""Several processes that work together: a few lines over `torch.distributed`, the same on the CPU and on CUDA.

The Trainer makes the group of processes itself. `init_dist` and `shutdown_dist` are for scripts that need one
before, after or without it.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, reduce
from typing import Any, overload

import torch
import torch.distributed as dist

from helios.trainer._layout import is_dtensor
from helios.trainer._seconds import check_seconds
from helios.trainer._torchrun import is_using_torchrun, read_torchrun

__all__ = [
    "DistributedInfo",
    "all_reduce_tensors",
    "gather_into_tensor",
    "get_dist_info",
    "get_global_rank",
    "get_local_rank",
    "get_local_world_size",
    "get_world_size",
    "global_print",
    "init_dist",
    "is_dist_active",
    "is_using_torchrun",
    "local_print",
    "safe_barrier",
    "shutdown_dist",
]

# What is gathered at once to be reduced, from each rank: bounds the memory, and is more than metrics ever need.
_PIECE_BYTES = 1 << 24
_TAG_OF_NOTHING = 0x68656C69  # nobody sends with it


@dataclass(frozen=True)
class DistributedInfo:
    """This process among the others.

    Attributes:
        rank: its number in the group.
        local_rank: its number on its machine.
        world_size: processes in the group.
        local_world_size: processes on this machine.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def init_dist(
    *,
    backend: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    store: Any = None,
    timeout_s: float | None = None,
) -> None:
    """Join the group of processes. All of them must call it.

    Under torchrun the environment says which process this is. Elsewhere `rank`, `world_size` and `store` do.

    Args:
        backend: as `torch.distributed.init_process_group` takes it; None is "cpu:gloo,cuda:nccl" if there is CUDA, else
            "gloo".
        rank: number of this process.
        world_size: number of processes.
        store: where the processes find one another: one of torch.distributed's stores.
        timeout_s: how long processes wait for one another before they raise; None is torch's default.

    Raises:
        RuntimeError: a group is active already, nothing says which process this is, or a port is in use.
        TypeError: `timeout_s` is no number.
        ValueError: a variable of torchrun's is missing or no number, some of the arguments are missing, or
            `timeout_s` is 0, less or infinite.
    """
    if timeout_s is not None:
        check_seconds("timeout_s", timeout_s)
    if is_dist_active():
        raise RuntimeError("a group of processes is active already: call shutdown_dist() before init_dist()")
    if rank is None and world_size is None and store is None:
        if not is_using_torchrun():
            raise RuntimeError(
                "nothing says which process this is: start the script with torchrun, or give init_dist rank, "
                "world_size and store"
            )
        torchrun = read_torchrun()
        rank, world_size = torchrun.rank, torchrun.world_size
        store = _torchrun_store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        if torchrun.local_world_size == world_size:
            # A rank that died before it came here did not count. On one machine all know which start this is.
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"helios/start/{start}", store)  # type: ignore[attr-defined]
    if rank is None or world_size is None or store is None:
        raise ValueError(
            f"rank={rank}, world_size={world_size}, store={store} belong together: give all three, or none under "
            "torchrun"
        )
    # A store keeps the addresses of an earlier group, which nobody listens to: each has its own part of it.
    number = store.add(f"helios/groups_of/{rank}", 1)
    dist.init_process_group(
        default_backend(is_cuda_used=torch.cuda.is_available()) if backend is None else backend,
        timeout=None if timeout_s is None else timedelta(seconds=timeout_s),
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore(f"helios/group/{number}", store),  # type: ignore[attr-defined]
    )


@cache
def _torchrun_store(address: str, port: str) -> Any:
    """Return the store of the processes that torchrun started, or of those whose variables were set by hand.

    In the latter case rank 0 hosts it, until the process ends: it may leave a group before others have.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
            raise
        raise RuntimeError(
            f"MASTER_PORT={port} of MASTER_ADDR={address} is in use, by another run perhaps: choose another port "
            "(torchrun --master-port, or --rdzv-endpoint=localhost:0 for a free one on one machine)"
        ) from error
    return store


def default_backend(is_cuda_used: bool) -> str:
    """Return what carries messages: gloo for tensors on the CPU, and nccl for those on CUDA."""
    return "cpu:gloo,cuda:nccl" if is_cuda_used and dist.is_nccl_available() else "gloo"


def shutdown_dist(*, has_failed: bool = False) -> None:
    """Leave the group of processes. Without a group it does nothing.

    Args:
        has_failed: this process or another one has failed, so nobody is waited for, and who waits for this one raises
            at once, instead of when the process ends.
    """
    if not is_dist_active():
        return
    if has_failed:
        for group in list(dist.distributed_c10d._world.pg_map):
            break_gloo(group)
    if has_failed and "nccl" in dist.get_backend_config():
        # Else it waits for what others will never send. That is not worth an error: there is one already.
        with suppress(Exception):
            dist.distributed_c10d._abort_process_group()
    if is_dist_active():
        dist.destroy_process_group()


def break_gloo(group: Any) -> None:
    """Close a group's connections between CPUs, so that others raise who wait for this process, or will.

    Gloo closes them when the group is destroyed, which it is not as long as a DistributedDataParallel or a traceback
    has it, and its abort does not. But it closes all of them when something is not received in time.
    """
    if group.size() == 1 or "gloo" not in dist.get_backend_config(group):
        return
    with suppress(RuntimeError):  # that nothing came, or that they are closed already
        anyone = (group.rank() + 1) % group.size()
        group.recv([torch.empty(1, device="cpu")], anyone, _TAG_OF_NOTHING).wait(timedelta(milliseconds=1))


def is_dist_active() -> bool:
    """Return whether there is a group of processes, which this one has joined."""
    return dist.is_available() and dist.is_initialized()


def get_dist_info() -> DistributedInfo:
    """Return which process this is. Without torchrun all processes are on one machine.

    Raises:
        RuntimeError: no group is active.
    """
    _need_group("get_dist_info")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if not is_using_torchrun():
        return DistributedInfo(rank, rank, world_size, world_size)
    torchrun = read_torchrun()
    return DistributedInfo(rank, torchrun.local_rank, world_size, torchrun.local_world_size)


def get_local_rank() -> int:
    """Return the number of this process on its machine. RuntimeError if no group is active."""
    _need_group("get_local_rank")
    return get_dist_info().local_rank


def get_global_rank() -> int:
    """Return the number of this process in the group. RuntimeError if no group is active."""
    _need_group("get_global_rank")
    return dist.get_rank()


def get_local_world_size() -> int:
    """Return how many processes are on this machine. RuntimeError if no group is active."""
    _need_group("get_local_world_size")
    return get_dist_info().local_world_size


def get_world_size() -> int:
    """Return how many processes are in the group. RuntimeError if no group is active."""
    _need_group("get_world_size")
    return dist.get_world_size()


def gather_into_tensor(tensor: torch.Tensor, size: int | Sequence[int]) -> torch.Tensor:
    """Gather the tensors of all ranks into a new one, one behind the other in the order of ranks, on every rank.

    All ranks must call it, with tensors of the same shape and dtype: pad those that are shorter.

    Args:
        tensor: the tensor of this rank, of any shape, dtype and device.
        size: shape of the result, with `world_size` times as many elements: (world_size * n, m) or (world_size, n, m)
            for tensors of (n, m).

    Returns:
        The result, detached, with dtype and device of the tensor.

    Raises:
        RuntimeError: no group is active.
        TypeError: an argument has the wrong type.
        ValueError: `size` has another number of elements.
    """
    _need_group("gather_into_tensor")
    _check_tensor("tensor", tensor)
    shape = _shape("size", size)
    world_size = dist.get_world_size()
    if shape.numel() != world_size * tensor.numel():
        raise ValueError(
            f"size must have {world_size} (ranks) * {tensor.numel()} (elements of a tensor of shape "
            f"{tuple(tensor.shape)}) elements, found {tuple(shape)}, which has {shape.numel()}"
        )
    return _gather(_flat(tensor)).reshape(shape)


@overload
def all_reduce_tensors(tensors: torch.Tensor, *, op: Any = ...) -> torch.Tensor: ...
@overload
def all_reduce_tensors(tensors: Sequence[torch.Tensor], *, op: Any = ...) -> list[torch.Tensor]: ...
def all_reduce_tensors(
    tensors: torch.Tensor | Sequence[torch.Tensor], *, op: Any = dist.ReduceOp.SUM
) -> torch.Tensor | list[torch.Tensor]:
    """Reduce tensors over all ranks, element by element, into new ones, on every rank.

    All ranks must call it, with tensors of the same shapes and dtypes. Several are sent together, so a list is faster
    than one after the other. They are reduced in the order of ranks: the bits are the same on every rank, and do not
    depend on what is in the list besides. For that each rank receives the tensors of all others: it is for metrics,
    not for gradients.

    Args:
        tensors: a tensor, or a list of them, of any shapes, dtypes (not bool) and devices.
        op: `torch.distributed.ReduceOp.SUM`, `PRODUCT`, `MIN` or `MAX`.

    Returns:
        A tensor for a tensor, and a list for a list; detached.

    Raises:
        RuntimeError: no group is active.
        TypeError: an argument has the wrong type.
        ValueError: another `op`.
    """
    _need_group("all_reduce_tensors")
    combine = _combination(op)
    if not isinstance(tensors, torch.Tensor) and (
        not isinstance(tensors, Iterable) or isinstance(tensors, Mapping)
    ):
        found = f"{type(tensors).__name__} {tensors!r:.100}"
        raise TypeError(f"tensors must be a tensor or a list of tensors, found {found}")
    inputs = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    for index, tensor in enumerate(inputs):
        name = "tensors" if isinstance(tensors, torch.Tensor) else f"tensors[{index}]"
        _check_tensor(name, tensor)
        if tensor.dtype is torch.bool:
            raise TypeError(f"{name} must not be of bool, which has no sum: convert it to an int dtype")
    outputs = [torch.empty(0)] * len(inputs)
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in inputs)
    for kind in kinds:  # in the order of the list, so in the same one on every rank
        indices = [i for i, tensor in enumerate(inputs) if (tensor.dtype, tensor.device) == kind]
        reduced = _reduce(torch.cat([_flat(inputs[i]) for i in indices]), combine)
        parts = torch.split(reduced, [inputs[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            outputs[i] = part.reshape(inputs[i].shape).clone()  # with memory of its own
    return outputs[0] if isinstance(tensors, torch.Tensor) else outputs


def safe_barrier() -> None:
    """Wait until all ranks have come here. Without a group it does nothing."""
    if is_dist_active():
        has_cpu = "cpu:" in dist.get_backend_config()
        dist.barrier(
            device_ids=None if has_cpu else [torch.cuda.current_device()]
        )  # nccl asks on which one to wait


def global_print(*values: object, global_rank: int = 0, **options: Any) -> None:
    """Print on one rank only. Without a group it prints.

    Args:
        values: what to print.
        global_rank: the number of the process in the group that prints.
        options: as `print` takes them.
    """
    if not is_dist_active() or get_global_rank() == global_rank:
        print(*values, **options)


def local_print(*values: object, local_rank: int = 0, **options: Any) -> None:
    """Print on one rank of each machine only. Without a group it prints.

    Args:
        values: what to print.
        local_rank: the number of the process on its machine that prints.
        options: as `print` takes them.
    """
    if not is_dist_active() or get_local_rank() == local_rank:
        print(*values, **options)


def _need_group(name: str) -> None:
    if not is_dist_active():
        raise RuntimeError(
            f"{name} needs a group of processes, and none is active: call it in a run of several processes (torchrun, "
            "nprocs or several GPUs), call init_dist() before, or ask is_dist_active()"
        )


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__} {tensor!r:.100}")
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a DTensor, of which each rank has a part: give to_local() or full_tensor()"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, found the layout {tensor.layout}: give its to_dense()")


def _shape(name: str, size: Any) -> torch.Size:
    sizes: list[Any] = list(size) if isinstance(size, Iterable) else [size]
    if not all(isinstance(number, int) for number in sizes):
        raise TypeError(f"{name} must be an int or several, found {type(size).__name__} {size!r:.100}")
    if any(number < 0 for number in sizes):
        raise ValueError(f"{name} must be 0 or more in each dimension, found {size!r:.100}")
    return torch.Size(sizes)


def _combination(op: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    known: list[tuple[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = [
        (dist.ReduceOp.SUM, torch.add),
        (dist.ReduceOp.PRODUCT, torch.mul),
        (dist.ReduceOp.MIN, torch.minimum),
        (dist.ReduceOp.MAX, torch.maximum),
    ]
    for known_op, combine in known:
        if op == known_op:
            return combine
    raise ValueError(f"op must be SUM, PRODUCT, MIN or MAX of torch.distributed.ReduceOp, found {op!r}")


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor in one row, as they are in memory."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()


def _gather(row: torch.Tensor) -> torch.Tensor:
    """Gather a row from each rank, into one of (world_size * n,)."""
    world_size = dist.get_world_size()
    gathered = torch.empty(world_size * row.numel(), dtype=row.dtype, device=row.device)
    if row.numel() > 0:
        # As bytes: gloo does not know every dtype.
        parts = list(gathered.view(torch.uint8).chunk(world_size))
        dist.all_gather(parts, row.view(torch.uint8))
    return gathered


def _reduce(row: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    reduced = torch.empty_like(row)
    num_at_once = _PIECE_BYTES // row.element_size()
    for begin in range(0, row.numel(), num_at_once):
        piece = row[begin : begin + num_at_once]
        parts = _gather(piece).chunk(dist.get_world_size())
        reduced[begin : begin + num_at_once] = reduce(combine, parts)
    return reduced
