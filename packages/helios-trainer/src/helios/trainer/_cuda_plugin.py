"""CUDAPlugin: batches are moved to the device of the run before the model gets them."""

import copy
import dataclasses
from collections import UserDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from helios.trainer._plugin import Plugin
from helios.trainer._training_state import TrainingState

if TYPE_CHECKING:
    from helios.trainer._model import Model


class CUDAPlugin(Plugin):
    """Moves training, validation and test batches to the device of the run; on the CPU it does nothing.

    Moved are tensors, whatever has a method `to(device)`, and what is in dicts, lists, tuples, named tuples and
    dataclasses of them, which are copied, not changed. All else stays as it is. Tensors in pinned memory
    (`pin_memory` of the loader) are moved while the program goes on.

    Args:
        plug_id: name of the plug-in, and of its (empty) state in a checkpoint.

    Raises:
        TypeError: `plug_id` is not a str.
        ValueError: `plug_id` is empty or a key that checkpoints have already.
    """

    def __init__(self, plug_id: str = "cuda") -> None:
        super().__init__(plug_id)
        self._device = torch.device("cpu")

    def configure_model(self, model: "Model") -> None:
        """Note the device of the run."""
        self._device = model.device

    def process_training_batch(self, batch: Any, state: TrainingState) -> Any:
        """Return the batch on the device."""
        return self._moved(batch)

    def process_validation_batch(self, batch: Any, step: int) -> Any:
        """Return the batch on the device."""
        return self._moved(batch)

    def process_testing_batch(self, batch: Any, step: int) -> Any:
        """Return the batch on the device."""
        return self._moved(batch)

    def _moved(self, batch: Any) -> Any:
        return batch if self._device.type == "cpu" else moved(batch, self._device)


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch with everything in it that can be moved on a device."""
    if isinstance(batch, type):
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return _refilled(batch, {key: moved(item, device) for key, item in batch.items()})
    if isinstance(batch, list):
        return [moved(item, device) for item in batch]
    if isinstance(batch, tuple):
        items = [moved(item, device) for item in batch]
        return batch._make(items) if hasattr(batch, "_make") else type(batch)(items)
    if dataclasses.is_dataclass(batch):
        twin = copy.copy(batch)  # not made anew from its fields, which may have been changed since
        for field in dataclasses.fields(batch):
            # A frozen one forbids the usual way, and the twin is ours.
            object.__setattr__(twin, field.name, moved(getattr(batch, field.name), device))
        return twin
    return batch


def _refilled(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the same type with other items, or just the items if the type is not known."""
    if not isinstance(batch, dict | UserDict):
        return items
    twin = copy.copy(batch)  # which keeps what else it has, such as the default of a defaultdict
    twin.update(items)
    return twin
