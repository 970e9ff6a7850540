"""A small trainer for PyTorch whose killed and restarted runs end with the same bits."""

from helios.trainer._cuda_plugin import CUDAPlugin
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin, PluginRegistry, UniquePluginOverrides
from helios.trainer._replicas import Strategy
from helios.trainer._trainer import Trainer
from helios.trainer._training_state import TrainingState, TrainingUnit
from helios.trainer._version import __version__

__all__ = [
    "CUDAPlugin",
    "Model",
    "Plugin",
    "PluginRegistry",
    "Strategy",
    "Trainer",
    "TrainingState",
    "TrainingUnit",
    "UniquePluginOverrides",
    "__version__",
]
