"""The hooks of a run: plug-ins first, then the model."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from helios.data import ResumableDataLoader
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin, PluginRegistry, is_overridden
from helios.trainer._stop_request import StopRequest, quiet_workers
from helios.trainer._training_state import TrainingState
from helios.trainer.logging import get_root_logger


class Hooks:
    """Calls what plug-ins and model have to say, in that order.

    Args:
        model: the user's model.
        plugins: the trainer's plug-ins.
    """

    def __init__(self, model: Model, plugins: PluginRegistry) -> None:
        self.model = model
        self._plugins: list[Plugin] = list(plugins.values())
        self._training_batch = plugins.owner_of("training_batch")
        self._validation_batch = plugins.owner_of("validation_batch")
        self._testing_batch = plugins.owner_of("testing_batch")
        self._stopper = plugins.owner_of("should_training_stop")
        self._batch_observers = [p for p in self._plugins if is_overridden(p, "observe_training_batch")]
        self._step_observers = [p for p in self._plugins if is_overridden(p, "observe_training_step")]

    def training_start(self) -> None:
        """Training starts, or goes on."""
        for plugin in self._plugins:
            plugin.on_training_start()
        self.model.on_training_start()
        self.model.train()

    def training_batch(self, batch: Any, state: TrainingState, should_log: bool) -> None:
        """Train on one batch."""
        model = self.model
        model.on_training_batch_start(state)
        if self._training_batch is not None:
            batch = self._training_batch.process_training_batch(batch, state)
        for observer in self._batch_observers:
            observer.observe_training_batch(batch, state)
        model.train_step(batch, state)
        model.on_training_batch_end(state, should_log)
        for observer in self._step_observers:
            observer.observe_training_step(state)

    def should_stop(self) -> bool:
        """Whether a plug-in or the model wants training to stop."""
        if self._stopper is not None and checked_answer(self._stopper.should_training_stop()):
            return True
        return checked_answer(self.model.should_training_stop())

    def have_metrics_improved(self) -> bool:
        """Whether the model says after a validation that its metrics improved."""
        return checked_answer(self.model.have_metrics_improved(), "have_metrics_improved")

    def training_end(self) -> None:
        """Training has ended."""
        for plugin in self._plugins:
            plugin.on_training_end()
        self.model.on_training_end()

    def validation_start(self, cycle: int) -> None:
        """A validation starts."""
        self.model.eval()
        for plugin in self._plugins:
            plugin.on_validation_start(cycle)
        self.model.on_validation_start(cycle)

    def validation_batch(self, batch: Any, step: int) -> None:
        """Validate on one batch."""
        model = self.model
        model.on_validation_batch_start(step)
        if self._validation_batch is not None:
            batch = self._validation_batch.process_validation_batch(batch, step)
        model.valid_step(batch, step)
        model.on_validation_batch_end(step)

    def validation_end(self, cycle: int) -> None:
        """A validation has ended."""
        for plugin in self._plugins:
            plugin.on_validation_end(cycle)
        self.model.on_validation_end(cycle)
        self.model.train()

    def testing_start(self) -> None:
        """Testing starts."""
        self.model.eval()
        for plugin in self._plugins:
            plugin.on_testing_start()
        self.model.on_testing_start()

    def testing_batch(self, batch: Any, step: int) -> None:
        """Test on one batch."""
        model = self.model
        model.on_testing_batch_start(step)
        if self._testing_batch is not None:
            batch = self._testing_batch.process_testing_batch(batch, step)
        model.test_step(batch, step)
        model.on_testing_batch_end(step)

    def testing_end(self) -> None:
        """Testing has ended."""
        for plugin in self._plugins:
            plugin.on_testing_end()
        self.model.on_testing_end()


def checked_answer(answer: Any, hook: str = "should_training_stop") -> bool:
    """Return what a hook answered, if it is yes or no.

    Raises:
        TypeError: it is something else: None, most likely, for a return that is missing.
    """
    if answer is True or answer is False:
        return answer
    if isinstance(answer, np.bool_) or (isinstance(answer, torch.Tensor) and answer.numel() == 1):
        return bool(answer)
    raise TypeError(
        f"{hook} must return True or False, found {type(answer).__name__} {answer!r}: is a return missing?"
    )


@contextmanager
def batches_of(loader: ResumableDataLoader, stop_request: StopRequest) -> Iterator[Iterator[Any]]:
    """Iterate over a loader, and stop its workers after, also if an exception that somebody keeps ends it."""
    batches = _received(loader, stop_request)
    try:
        yield batches
    finally:
        batches.close()


def _received(loader: ResumableDataLoader, stop_request: StopRequest) -> Generator[Any]:
    """Yield the batches. If they stop coming once somebody asked for a stop, begin again where the loader stands.

    The signal went to the loader's workers too, most likely (a batch system or systemd sends it to all processes of a
    job), and they died of it. New ones fetch what is left of the iteration or the validation in progress.
    """
    try:
        batches = iter(loader)
        yield from islice(batches, 1)
        quiet_workers()  # that there are since the first batch
        yield from batches
    except Exception as error:
        if not stop_request.is_made:
            raise
        get_root_logger().warning("the loader failed after %s and is started again: %s", stop_request, error)
        loader.load_state_dict(loader.state_dict())
        yield from loader


def length_of(loader: Sized, max_batches: int | None = None) -> int | None:
    """Return the number of batches of an epoch; None if the loader cannot know: an iterable dataset without length."""
    try:
        return len(loader) if max_batches is None else min(len(loader), max_batches)
    except TypeError:
        return max_batches


def evaluate(
    batches: Iterable[Any], on_batch: Callable[[Any, int], None], bar: Any, max_batches: int | None = None
) -> None:
    """Run a whole validation or test, or the beginning of one, showing it on a bar."""
    with bar:
        for step, batch in enumerate(islice(batches, max_batches)):
            on_batch(batch, step)
            bar.update(1)
