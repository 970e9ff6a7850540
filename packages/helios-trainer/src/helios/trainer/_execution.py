"""Where a run executes: one value that is passed around, never looked up."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from helios.trainer._torchrun import Torchrun, check_no_part_of_torchrun, is_using_torchrun, read_torchrun


@dataclass(frozen=True)
class Execution:
    """This process among the others, and its device.

    Attributes:
        device: where models and batches go.
        rank: number of this process in the run.
        local_rank: number of this process on its machine.
        world_size: processes in the run.
        gpu_ids: the CUDA devices of the run, under torchrun those on this machine; empty on the CPU.
        local_world_size: processes on this machine.
        has_group: whether the process belongs to a group of processes, which may be of one.
        is_spawned: whether a Trainer in another process started it, and prepared the data.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    gpu_ids: tuple[int, ...] = ()
    local_world_size: int = 1
    has_group: bool = False
    is_spawned: bool = False

    @property
    def is_distributed(self) -> bool:
        """Whether other processes may take part."""
        return self.has_group


def select_executions(
    use_cpu: bool | None, gpus: list[int] | None, nprocs: int | None
) -> tuple[Execution, ...]:
    """Choose devices and processes: one is this process; several are to be spawned.

    `use_cpu` wins, then `gpus`, then CUDA if there is any, else the CPU. Under torchrun it is this process, with its
    place among the others.

    Raises:
        TypeError: `use_cpu` is not a bool or `gpus` not a list of ints.
        ValueError: they contradict each other, the machine or the environment, or the environment contradicts itself.
    """
    if use_cpu is not None and not isinstance(use_cpu, bool):
        raise TypeError(f"use_cpu must be True, False or None, found {type(use_cpu).__name__} {use_cpu!r}")
    torchrun = read_torchrun() if is_using_torchrun() else None
    if torchrun is None:
        check_no_part_of_torchrun()
    if gpus is not None:
        _check_gpus(gpus)
        if use_cpu:
            raise ValueError(f"use_cpu=True and gpus={gpus} contradict each other: give one of them")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_on_cpu = bool(use_cpu or (gpus is None and num_devices == 0))
    if not is_on_cpu and num_devices == 0:
        raise ValueError(f"gpus={gpus} needs CUDA, which is not available here: pass use_cpu=True or no gpus")
    absent = [i for i in gpus or () if i >= num_devices]
    if absent:
        raise ValueError(f"gpus must be ids of the {num_devices} CUDA devices here, found {absent[0]}")
    if torchrun is not None:
        return (_under_torchrun(torchrun, gpus, nprocs, is_on_cpu, num_devices),)
    if is_on_cpu:
        cpu = torch.device("cpu")
        return _together([cpu] * (nprocs or 1), ())
    if nprocs is not None:
        raise ValueError(
            f"nprocs={nprocs} is for the CPU: on CUDA there is one process for each GPU. Pass gpus, a list of their "
            "ids, without nprocs; or use_cpu=True"
        )
    ids = tuple(range(num_devices) if gpus is None else gpus)
    return _together([torch.device("cuda", i) for i in ids], ids)


def _together(devices: list[torch.device], gpu_ids: tuple[int, ...]) -> tuple[Execution, ...]:
    """Return one process for each device."""
    size = len(devices)
    if size == 1:
        return (Execution(devices[0], gpu_ids=gpu_ids),)
    return tuple(
        Execution(device, i, i, size, gpu_ids, local_world_size=size, has_group=True, is_spawned=True)
        for i, device in enumerate(devices)
    )


def _under_torchrun(
    torchrun: Torchrun, gpus: list[int] | None, nprocs: int | None, is_on_cpu: bool, num_devices: int
) -> Execution:
    if nprocs is not None and nprocs != torchrun.world_size:
        raise ValueError(
            f"nprocs={nprocs}, but torchrun has started {torchrun.world_size} processes (WORLD_SIZE): leave nprocs out"
        )
    local_rank, num_local = torchrun.local_rank, torchrun.local_world_size
    gpu_ids: tuple[int, ...] = ()
    if not is_on_cpu:
        if gpus is not None and len(gpus) < num_local:
            raise ValueError(
                f"gpus={gpus} has {len(gpus)} ids, but torchrun has started {num_local} processes on this machine "
                "(LOCAL_WORLD_SIZE): each needs one of its own"
            )
        if gpus is None and local_rank >= num_devices:
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, and there are {num_devices} CUDA devices here: start torchrun with "
                f"--nproc-per-node={num_devices}, or pass use_cpu=True"
            )
        gpu_ids = tuple(range(min(num_local, num_devices)) if gpus is None else gpus[:num_local])
    return Execution(
        torch.device("cpu") if is_on_cpu else torch.device("cuda", gpu_ids[local_rank]),
        torchrun.rank,
        local_rank,
        torchrun.world_size,
        gpu_ids,
        local_world_size=num_local,
        has_group=True,
    )


def _check_gpus(gpus: object) -> None:
    if not isinstance(gpus, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in gpus):
        raise TypeError(f"gpus must be a list of device ids (ints), found {gpus!r}")
    if not gpus or min(gpus) < 0 or len(set(gpus)) < len(gpus):
        raise ValueError(f"gpus must be one or more different ids, 0 or more, found {gpus}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a scope in which "cuda" without a number means this device, if it is one of CUDA.

    So it does for the user's `.cuda()`, for the thread that pins memory (which would make a context, of some hundred
    MB, on device 0) and for kernels that are started on the current device, whatever their tensors are on.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Make torch use deterministic kernels inside, on every device, and put its settings back after."""
    if not enabled:
        yield
        return
    # cuBLAS reads this when its first handle is made; a user who set it knows better.
    is_unset = "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_enabled = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=warned_only)
        if is_unset:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Set cuDNN's benchmarking inside and put it back after."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
