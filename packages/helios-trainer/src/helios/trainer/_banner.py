"""What a run says at its start and at its end."""

import math
import platform
from pathlib import Path

import torch
from tqdm import tqdm

from helios.chkpt import __version__ as chkpt_version
from helios.core.rng import __version__ as rng_version
from helios.data import __version__ as data_version
from helios.trainer._execution import Execution
from helios.trainer._settings import TrainerSettings
from helios.trainer._training_state import TrainingState
from helios.trainer._version import __version__ as trainer_version


def banner(name: str, settings: TrainerSettings, execution: Execution, resumed_from: Path | None) -> str:
    """Return the lines that a run starts with."""
    origin = "from the beginning" if resumed_from is None else f"goes on from {resumed_from}"
    deterministic = "on" if settings.enable_deterministic else "off"
    benchmark = ", cuDNN benchmark on" if settings.enable_cudnn_benchmark else ""
    return (
        f"Helios: run {name}, {_length(settings)}, {origin}\n"
        f"  {_versions(execution.device)}\n"
        f"  device {_device(execution.device)}{_ranks(settings, execution)}\n"
        f"  seed {settings.random_seed}, deterministic kernels {deterministic}{benchmark}\n"
        f"  {_checkpoints(settings)}"
    )


def summary(
    state: TrainingState, reason: str, num_batches: int, elapsed_s: float, last_checkpoint: Path | None
) -> str:
    """Return the line that a run ends with.

    Args:
        state: where training stands.
        reason: how the line begins: why training ended.
        num_batches: batches of this process.
        elapsed_s: seconds that they took, with all between them.
        last_checkpoint: the last one of this process.
    """
    took = f"{elapsed_s:.1f} s" if elapsed_s < 60 else tqdm.format_interval(elapsed_s)
    return (
        f"{reason}; epoch {state.global_epoch}, iteration {state.global_iteration}; "
        f"{_counted(num_batches, 'batch', 'batches')} in {took}{_speed(num_batches, elapsed_s)}; "
        f"last checkpoint: {last_checkpoint or 'none'}"
    )


def _length(settings: TrainerSettings) -> str:
    unit = settings.train_unit.name.lower()
    if settings.total_steps == math.inf:
        cycles = _counted(settings.early_stop_cycles or 0, "validation", "validations")
        return f"{unit}s until {cycles} in a row bring no improvement"
    length = _counted(int(settings.total_steps), unit, f"{unit}s")
    is_accumulating = settings.accumulation_steps > 1 and unit == "iteration"
    return length + (f" of {settings.accumulation_steps} batches" if is_accumulating else "")


def _versions(device: torch.device) -> str:
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return (
        f"helios-trainer {trainer_version}, helios-data {data_version}, helios-chkpt {chkpt_version}, "
        f"helios-rng {rng_version}; torch {torch.__version__}{cuda}, Python {platform.python_version()}"
    )


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        # Not only a matter of speed: sums over other numbers of threads round differently.
        return f"{device}, {_counted(torch.get_num_threads(), 'thread', 'threads')}"
    return str(device)


def _ranks(settings: TrainerSettings, execution: Execution) -> str:
    if not execution.is_distributed:
        return ""
    machines = execution.world_size // execution.local_world_size
    where = f" on {machines} machines" if machines > 1 else ""
    return f", {_counted(execution.world_size, 'rank', 'ranks')}{where}, {settings.strategy.name}"


def _checkpoints(settings: TrainerSettings) -> str:
    if settings.save_root is None:
        missing = "chkpt_root" if settings.chkpt_root is None else "chkpt_frequency"
        return f"no checkpoints ({missing} is not set): if it is killed it starts from the beginning"
    unit = settings.train_unit.name.lower()
    every = f"{settings.chkpt_frequency} {unit}s" if settings.chkpt_frequency != 1 else unit
    return f"checkpoints every {every} in {settings.save_root}"


def _speed(num_batches: int, elapsed_s: float) -> str:
    if num_batches == 0 or elapsed_s <= 0:
        return ""
    speed = num_batches / elapsed_s
    return f", {speed:.1f} batches/s" if speed >= 1 else f", {1 / speed:.1f} s/batch"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
