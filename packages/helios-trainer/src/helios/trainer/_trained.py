"""What training leaves behind for testing."""

from collections.abc import Mapping
from dataclasses import dataclass

from helios.trainer._model import Model
from helios.trainer._plugin import Plugin
from helios.trainer.logging._places import LogTargets


@dataclass(frozen=True)
class Trained:
    """What a run of training leaves behind, to be tested as it is.

    Attributes:
        model: the model.
        plugins: the plug-ins that took part.
        targets: where the run wrote.
        event_sizes: sizes of TensorBoard's files at its end; None without checkpoints. What is beyond is of
            an earlier test.
        is_finished: training came to its end; else somebody asked it to stop.
    """

    model: Model
    plugins: tuple[Plugin, ...]
    targets: LogTargets
    event_sizes: Mapping[str, int] | None
    is_finished: bool
