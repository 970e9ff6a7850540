"""What must be the same on all ranks of a run."""

import dataclasses
import hashlib
import inspect
import platform
from collections.abc import Iterable

import torch

from helios.chkpt import __version__ as chkpt_version
from helios.core.rng import __version__ as rng_version
from helios.data import DataModule
from helios.data import __version__ as data_version
from helios.trainer._execution import Execution
from helios.trainer._model import Model
from helios.trainer._settings import TrainerSettings
from helios.trainer._version import __version__ as trainer_version

_OF_A_MACHINE = ("gpus", "enable_progress_bar", "print_banner", "capture_warnings")


def facts_of(
    settings: TrainerSettings,
    execution: Execution,
    model: Model,
    datamodule: DataModule,
    plugins: Iterable[str],
) -> dict[str, str]:
    """Return what must be the same on all ranks, by name, as text."""
    shared = {
        field.name: repr(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if field.name not in _OF_A_MACHINE and (field.name != "run_path" or settings.dry_run is None)
    }
    return {
        **shared,
        "the kind of device": execution.device.type,
        "the version of helios-trainer": trainer_version,
        "the version of helios-data": data_version,
        "the version of helios-chkpt": chkpt_version,
        "the version of helios-rng": rng_version,
        "the version of torch": torch.__version__,
        "the version of Python": platform.python_version(),
        "the model": _source_of(model),
        "the datamodule": _source_of(datamodule),
        "the plug-ins": ", ".join(plugins),
    }


def _source_of(part: object) -> str:
    """Return the name of a class, and a digest of the code that defines it and what it derives from."""
    hasher = hashlib.sha256()
    for kind in type(part).__mro__:
        if not kind.__module__.startswith("helios.") and kind is not object:
            hasher.update(_code_of(kind).encode())
    return f"{type(part).__qualname__} (source {hasher.hexdigest()[:16]})"


def _code_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in, made by a function, or not of Python
        return kind.__qualname__
