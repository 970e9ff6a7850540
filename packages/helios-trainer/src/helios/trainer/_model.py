"""Model: the user's networks, optimizers and steps, as the trainer calls them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from helios.trainer._model_helpers import ModelHelpers
from helios.trainer._modules import named_networks
from helios.trainer._naming import check_name
from helios.trainer._replicas import average
from helios.trainer._scalars import ScalarLog
from helios.trainer._training_state import TrainingState


class Model(ModelHelpers, ABC):
    """Base of the user's model. Override `setup` and `train_step`, and what else is needed.

    The base keeps four tables, which the trainer saves in the checkpoint: `_loss_items` (losses of the batch,
    cleared when a batch starts), `_running_losses` (their sums since the last validation), `_val_scores`
    (cleared when a validation starts) and `_test_scores`. An override that wants them kept calls `super()`.

    Args:
        save_name: name of the checkpoints of a run that has no name.

    Attributes:
        save_name: as given.
        trainer: the Trainer, or None before `fit` and `test`.
        device: the device to put networks and batches on.
        rank: number of this process.
        is_distributed: whether other processes take part.

    Raises:
        TypeError: `save_name` is not a str.
        ValueError: `save_name` is empty, or no file name can hold it.
    """

    def __init__(self, save_name: str) -> None:
        check_name("save_name", save_name)
        if not save_name:
            raise ValueError("save_name must not be empty: checkpoints are named after it")
        self.save_name = save_name
        self.trainer: Any = None
        self.device = torch.device("cpu")
        self.rank = 0
        self.is_distributed = False
        self._loss_items: dict[str, Any] = {}
        self._running_losses: dict[str, Any] = {}
        self._val_scores: dict[str, Any] = {}
        self._test_scores: dict[str, Any] = {}
        self._metrics: dict[str, Any] | None = None
        self._scalar_log: ScalarLog | None = None  # while a run is in progress

    def log(self, name: str, value: float | torch.Tensor, step: int | None = None) -> None:
        """Log a scalar: to TensorBoard, if it is enabled, and to the progress bar. Never waits for a device.

        A tensor that is not on the CPU is copied where it is, and written when the run has to wait for the device
        anyway: before a checkpoint, after a validation, at the end, or once 1000 of them wait. A resumed run has each
        scalar once.

        Args:
            name: TensorBoard's tag, for example "train/loss".
            value: a number, or a tensor of one.
            step: where on the x axis; None is `global_iteration`.

        Raises:
            TypeError: `value` is neither.
            ValueError: `value` is a tensor of more than one number.
        """
        if self._scalar_log is not None:
            self._scalar_log.add(name, value, step)

    @property
    def map_loc(self) -> str:
        """Where a checkpoint's tensors are to be loaded, as `map_location` takes it."""
        return str(self.device)

    @property
    def metrics(self) -> dict[str, Any]:
        """Named numbers that the progress bar shows beside the losses; the validation scores by default."""
        return self._val_scores if self._metrics is None else self._metrics

    @metrics.setter
    def metrics(self, metrics: dict[str, Any]) -> None:
        if not isinstance(metrics, Mapping):  # else training would end when a bar is drawn, and only with one
            found = f"{type(metrics).__name__} {metrics!r:.100}"
            raise TypeError(f"metrics must be a dict of numbers by name, found {found}")
        self._metrics = metrics

    @abstractmethod
    def setup(self, fast_init: bool = False) -> None:
        """Make networks, optimizers and schedulers, on `self.device`. Runs in every process.

        Args:
            fast_init: only what testing needs. The trainer passes False; it is for tools of your own.
        """

    def load_for_testing(self) -> None:
        """Get ready for `test`. The last checkpoint of the run, if there is one, is loaded before."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the model: tensors and plain values. Empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        """Put the model into a state that `state_dict` returned. Called after `setup`.

        Args:
            state: what `state_dict` returned, on `self.device`.
            fast_init: as in `setup`.
        """

    def trained_state_dict(self) -> dict[str, Any]:
        """Return what a trained model needs to be used; by default the whole state."""
        return self.state_dict()

    def types_for_safe_load(self) -> list[type]:
        """Return types beyond tensors and plain values that a checkpoint of this model may hold."""
        return []

    def append_metadata_to_chkpt_name(self, chkpt_name: str) -> str:
        """Return text to append to a checkpoint's name, or the name with the text appended.

        Args:
            chkpt_name: the name without metadata and without extension.
        """
        return chkpt_name

    def append_to_banner(self, banner: str) -> str:
        """Return the banner with what the model wants to say at the start of training appended."""
        return banner

    def train(self) -> None:
        """Switch to training: by default every nn.Module among the attributes."""
        for _, network in named_networks(self):
            network.train()

    def eval(self) -> None:
        """Switch to evaluation: by default every nn.Module among the attributes."""
        for _, network in named_networks(self):
            network.eval()

    def on_training_start(self) -> None:
        """Called when training starts, in every process; after a resume with the state restored.

        So do not reset here what `state_dict` returns: give it its first value in `setup`.
        """

    def on_training_epoch_start(self, epoch: int) -> None:
        """Called before an epoch's first batch; not again when an epoch is resumed.

        Args:
            epoch: number of the epoch, from 1.
        """

    def on_training_batch_start(self, state: TrainingState) -> None:
        """Called before a batch; clears `_loss_items`."""
        self._loss_items.clear()

    def train_step(self, batch: Any, state: TrainingState) -> None:
        """Train on a batch."""
        raise TypeError(f"{type(self).__name__} must define train_step to be trained")

    def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
        """Called after a batch; adds `_loss_items` to `_running_losses`.

        With several ranks each adds its own losses, and when `should_log` is true, and before a validation, all get
        the mean of the sums: then call this on every rank, with the same names in `_loss_items`.

        Args:
            state: where training stands.
            should_log: whether `print_frequency` says that it is time to log.

        Raises:
            TypeError: something in `_loss_items` cannot be added up.
            ValueError: `should_log` is true, and another rank has other `_loss_items`.
        """
        for name, loss in self._loss_items.items():
            value = loss.detach() if isinstance(loss, torch.Tensor) else loss
            try:
                self._running_losses[name] = self._running_losses.get(name, 0) + value
            except TypeError as error:
                raise TypeError(
                    f"_loss_items[{name!r}] must be a number or a tensor, which is added to _running_losses, found "
                    f"{type(value).__name__} {value!r:.100}"
                ) from error
        if should_log:
            average_running_losses(self)

    def on_training_epoch_end(self, epoch: int) -> None:
        """Called at the end of an epoch.

        Args:
            epoch: number of the epoch, from 1.
        """

    def on_training_end(self) -> None:
        """Called when training ends, but not when it is interrupted."""

    def on_validation_start(self, validation_cycle: int) -> None:
        """Called before a validation; clears `_val_scores`.

        Args:
            validation_cycle: number of the validation, from 1.
        """
        self._val_scores.clear()

    def on_validation_batch_start(self, step: int) -> None:
        """Called before a validation batch.

        Args:
            step: number of the batch in this validation, from 0.
        """

    def valid_step(self, batch: Any, step: int) -> None:
        """Validate on a batch. Gradients are off."""

    def on_validation_batch_end(self, step: int) -> None:
        """Called after a validation batch."""

    def on_validation_end(self, validation_cycle: int) -> None:
        """Called after a validation; clears `_running_losses`."""
        self._running_losses.clear()

    def have_metrics_improved(self) -> bool:
        """Say after a validation whether the metrics improved, for `early_stop_cycles`."""
        return True

    def should_training_stop(self) -> bool:
        """Say whether training should stop now."""
        return False

    def on_testing_start(self) -> None:
        """Called before testing; clears `_test_scores`."""
        self._test_scores.clear()

    def on_testing_batch_start(self, step: int) -> None:
        """Called before a test batch.

        Args:
            step: number of the batch, from 0.
        """

    def test_step(self, batch: Any, step: int) -> None:
        """Test on a batch. Gradients are off."""

    def on_testing_batch_end(self, step: int) -> None:
        """Called after a test batch."""

    def on_testing_end(self) -> None:
        """Called after testing."""


def tables_of(model: Model) -> dict[str, dict[str, Any]]:
    """Return what the base class keeps, for the checkpoint."""
    return {name: dict(getattr(model, name)) for name in _TABLES}


def average_running_losses(model: Model) -> None:
    """Give all ranks the mean of what each has summed up. What each adds after that makes the next mean right again."""
    if model.is_distributed:
        running = model._running_losses
        running.update(average(running, model.device))


def restore_tables(model: Model, tables: dict[str, dict[str, Any]]) -> None:
    """Put back what `tables_of` returned."""
    for name in _TABLES:
        table = getattr(model, name)
        table.clear()
        table.update(tables[name])


_TABLES = ("_loss_items", "_running_losses", "_val_scores", "_test_scores")
