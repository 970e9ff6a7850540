"""Where a run executes: one value that is passed around, never looked up."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Execution:
    """This process among the others, and its device.

    Attributes:
        device: where models and batches go.
        rank: number of this process in the run.
        local_rank: number of this process on its machine.
        world_size: processes in the run.
        gpu_ids: the CUDA devices of the run; empty on the CPU.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    gpu_ids: tuple[int, ...] = ()

    @property
    def is_distributed(self) -> bool:
        """Whether other processes take part."""
        return self.world_size > 1


def select_execution(use_cpu: bool | None, gpus: list[int] | None) -> Execution:
    """Choose the device: `use_cpu` wins, then `gpus`, then CUDA if there is any, else the CPU.

    Raises:
        TypeError: `use_cpu` is not a bool or `gpus` not a list of ints.
        ValueError: they contradict each other or the machine, or the environment's WORLD_SIZE is not 1.
    """
    if use_cpu is not None and not isinstance(use_cpu, bool):
        raise TypeError(f"use_cpu must be True, False or None, found {type(use_cpu).__name__} {use_cpu!r}")
    world_size = _read_world_size()
    if world_size > 1:
        raise ValueError(
            f"WORLD_SIZE is {world_size}: this release trains in one process; start it "
            "without torchrun, or with --nproc-per-node=1"
        )
    if gpus is not None:
        _check_gpus(gpus)
        if use_cpu:
            raise ValueError(f"use_cpu=True and gpus={gpus} contradict each other: give one of them")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if use_cpu or (gpus is None and num_devices == 0):
        return Execution(torch.device("cpu"))
    if num_devices == 0:
        raise ValueError(f"gpus={gpus} needs CUDA, which is not available here: pass use_cpu=True or no gpus")
    ids = list(range(num_devices)) if gpus is None else gpus
    absent = [i for i in ids if i >= num_devices]
    if absent:
        raise ValueError(f"gpus must be ids of the {num_devices} CUDA devices here, found {absent[0]}")
    if len(ids) > 1:
        raise ValueError(
            f"gpus={gpus} means the {len(ids)} devices {ids}, and this release trains in one process: "
            f"pass gpus=[{ids[0]}]"
        )
    return Execution(torch.device("cuda", ids[0]), gpu_ids=tuple(ids))


def _read_world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"the environment variable WORLD_SIZE must be the number of processes, found {text!r}: unset it, or set it "
            "to 1"
        )
    return int(text)


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
