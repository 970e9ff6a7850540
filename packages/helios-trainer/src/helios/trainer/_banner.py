"""What a run says at its start and at its end."""

import platform
from pathlib import Path

import torch

from helios.chkpt import __version__ as chkpt_version
from helios.core.rng import __version__ as rng_version
from helios.data import __version__ as data_version
from helios.trainer._execution import Execution
from helios.trainer._settings import TrainerSettings
from helios.trainer._training_state import TrainingState
from helios.trainer._version import __version__ as trainer_version


def banner(name: str, settings: TrainerSettings, execution: Execution, resumed_from: Path | None) -> str:
    """Return the lines that a run starts with."""
    unit = settings.train_unit.name.lower()
    origin = "from the beginning" if resumed_from is None else f"from {resumed_from}"
    deterministic = "on" if settings.enable_deterministic else "off"
    versions = (
        f"helios-trainer {trainer_version}, -data {data_version}, -chkpt {chkpt_version}, -rng {rng_version}"
    )
    return (
        f"Helios: run {name}, {settings.total_steps} {unit}s, {origin}\n"
        f"  {versions}; torch {torch.__version__}, Python {platform.python_version()}\n"
        f"  device {execution.device}, seed {settings.random_seed}, deterministic {deterministic}"
    )


def summary(
    state: TrainingState, reason: str, num_batches: int, elapsed_s: float, last_checkpoint: Path | None
) -> str:
    """Return the line that a run ends with."""
    speed = num_batches / elapsed_s if elapsed_s > 0 else 0.0
    return (
        f"{reason}; epoch {state.global_epoch}, iteration {state.global_iteration}; "
        f"{num_batches} batches in {elapsed_s:.1f} s, {speed:.1f} batches/s; "
        f"last checkpoint: {last_checkpoint or 'none'}"
    )
