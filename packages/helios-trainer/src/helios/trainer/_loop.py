"""The training loop, one for both units, that can be entered again at any point where it saves.

What it does, by ITERATION on the left and by EPOCH on the right:

    each epoch                                each epoch
      on_training_epoch_start                   on_training_epoch_start
      each batch                                each batch
        train on it                               train on it
        should_training_stop?                     should_training_stop?
        after a complete iteration:               asked to stop?        <- cut
          asked to stop?        <- cut          after the last batch:
          validate, if due                        validate, if due
          save, if due          <- cut            save, if due          <- cut
          if validated: improved? stop?           if validated: improved? stop?
          enough iterations?
      on_training_epoch_end                     on_training_epoch_end
                                                should_training_stop?
                                                enough epochs?

A checkpoint is a cut at one of the places marked: what follows it is done again, first, by the run that resumes. A run
that is asked to stop (by a signal, say) saves at the next of them and leaves the loop. Several ranks leave it at the
same one, and answer every question mark alike.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, NoReturn, Protocol

import torch

from helios.data import ResumableDataLoader
from helios.trainer._bars import ProgressBars
from helios.trainer._execution import cudnn_benchmark
from helios.trainer._hooks import Hooks, batches_of, evaluate, length_of
from helios.trainer._model import average_running_losses
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import evaluating
from helios.trainer._settings import TrainerSettings
from helios.trainer._stop_request import StopRequest
from helios.trainer._training_state import TrainingState, TrainingUnit


class StopReason(Enum):
    """Why training ended."""

    TOTAL_STEPS = "total_steps reached"
    NOT_IMPROVED = "early_stop_cycles validations in a row without improvement"
    REQUESTED = "should_training_stop"


class StoppedOnRequest(Exception):  # noqa: N818  # not an error: the way out of the loop
    """The loop was left because somebody asked for it; what is new since the last checkpoint is saved."""


class CutPoint(Enum):
    """Where in the loop a checkpoint was taken."""

    BATCH = "batch"
    ITERATION = "iteration"
    EPOCH_END = "epoch end"
    FINISHED = "finished"


@dataclass(frozen=True)
class Cut:
    """A place in the loop.

    Attributes:
        point: right after a batch that completed an iteration, after all of an iteration, after an epoch's last batch
            and what is due then, or after everything.
        has_validated: a validation came just before, so the checks that follow one are still to be made.
        is_counted: of those checks the outcome of `have_metrics_improved` is in the counters already: earlier releases
            saved later than this one does. Never written.
    """

    point: CutPoint
    has_validated: bool = False
    is_counted: bool = False


class SaveCheckpoint(Protocol):
    """Saves a checkpoint at a cut; `is_asked` if somebody asked to stop there."""

    def __call__(self, cut: Cut, *, is_asked: bool = False) -> None:
        """Save."""


class TrainingLoop:
    """Trains until there is a reason to stop.

    Args:
        settings: the trainer's settings.
        state: the counters, which the loop advances.
        hooks: plug-ins and model.
        train_loader: loader of the training split.
        valid_loader: loader of the validation split, if there are validations.
        bars: progress bars.
        save: saves a checkpoint at a cut.
        stop_request: whether somebody asked this process to stop.
        ranks: this process among those of the run.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        state: TrainingState,
        hooks: Hooks,
        *,
        train_loader: ResumableDataLoader,
        valid_loader: ResumableDataLoader | None,
        bars: ProgressBars,
        save: SaveCheckpoint,
        stop_request: StopRequest,
        ranks: Ranks,
    ) -> None:
        self._settings = settings
        self._state = state
        self._hooks = hooks
        self._ranks = ranks
        self._train_loader = train_loader
        self._valid_loader = valid_loader
        self._bars = bars
        self._save = save
        self._stop_request = stop_request
        self._by_epoch = settings.train_unit is TrainingUnit.EPOCH
        self._num_batches = length_of(train_loader, settings.dry_run)

    def run(self, cut: Cut | None) -> StopReason:
        """Train from the beginning, or from the cut of the checkpoint that was restored.

        Raises:
            StoppedOnRequest: somebody asked to stop. Nothing is new since the last checkpoint.
        """
        if self._ranks.is_asked_to_stop():  # during start-up
            raise StoppedOnRequest
        stop: StopReason | None = None
        if cut is not None:
            stop = self._go_on_from(cut)
        while stop is None:
            self._begin_epoch()
            stop = self._run_epoch()
        return stop

    def _go_on_from(self, cut: Cut) -> StopReason | None:
        """Do what the interrupted run would have done between the cut and the next epoch."""
        if cut.point is CutPoint.FINISHED and self._is_epoch_over():
            return self._end_of_steps()  # the epoch's end came before
        if cut.point is not CutPoint.EPOCH_END:  # of which no batch is left to be shown
            self._bars.start_epoch(self._state, self._num_batches)
        if cut.point is CutPoint.BATCH:
            return self._run_epoch(self._finish_iteration())
        stop = self._check_after_validation(cut.has_validated, cut.is_counted)
        if cut.point is CutPoint.EPOCH_END:
            return self._end_epoch(stop)
        if stop is None and not self._by_epoch:
            stop = self._end_of_steps()
        return self._run_epoch(stop)

    def _is_epoch_over(self) -> bool:
        return self._train_loader.epoch >= self._state.global_epoch

    def _begin_epoch(self) -> None:
        state = self._state
        state.global_epoch += 1
        state.dataset_iter = 0
        self._train_loader.set_epoch(state.global_epoch - 1)
        self._bars.start_epoch(state, self._num_batches)
        self._hooks.model.on_training_epoch_start(state.global_epoch)

    def _run_epoch(self, stop: StopReason | None = None) -> StopReason | None:
        """Run what is left of the epoch in progress, and end it."""
        # A loader that was saved after its last batch stands at the next epoch already.
        if stop is None and not self._is_epoch_over():
            stop = self._run_batches()
        if stop is None and self._by_epoch:
            self._state.dataset_iter = 0
            stop = self._validate_and_save(self._state.global_epoch, CutPoint.EPOCH_END)
        return self._end_epoch(stop)

    def _end_epoch(self, stop: StopReason | None) -> StopReason | None:
        self._hooks.model.on_training_epoch_end(self._state.global_epoch)
        self._bars.finish_epoch()
        if self._by_epoch and stop is None:
            if self._ranks.agreed("should_training_stop", self._hooks.should_stop()):
                return StopReason.REQUESTED
            return self._end_of_steps()
        return stop

    def _run_batches(self) -> StopReason | None:
        with batches_of(self._train_loader, self._stop_request) as batches:
            return self._train_on(islice(batches, self._settings.dry_run))

    def _train_on(self, batches: Iterator[Any]) -> StopReason | None:
        state, hooks, ranks = self._state, self._hooks, self._ranks
        accumulation = self._settings.accumulation_steps
        due = self._next_due()
        began_s = time.perf_counter()
        for batch in batches:
            state.dataset_iter += 1
            state.global_iteration += 1
            is_complete = self._by_epoch or state.global_iteration % accumulation == 0
            if is_complete:
                state.current_iteration += 1
                state.running_iter += 1
            hooks.training_batch(batch, state, is_complete and self._should_log())
            now_s = time.perf_counter()
            state.average_iter_time += (now_s - began_s - state.average_iter_time) / state.global_iteration
            self._bars.finish_batch(is_complete, hooks.model)
            if ranks.vote("should_training_stop", hooks.should_stop()):
                return StopReason.REQUESTED
            if is_complete:
                if ranks.is_asked_to_stop():
                    self._stop_at(Cut(CutPoint.BATCH))
                if state.current_iteration >= due:
                    if (stop := self._finish_iteration()) is not None:
                        return stop
                    due = self._next_due()
            began_s = time.perf_counter()
        return None

    def _next_due(self) -> float:
        """Return the next iteration after which something is due: by EPOCH none."""
        if self._by_epoch:
            return math.inf
        settings, done = self._settings, self._state.current_iteration
        frequencies = (settings.valid_frequency, settings.chkpt_frequency)
        return min([settings.total_steps, *(done + f - done % f for f in frequencies if f is not None)])

    def _finish_iteration(self) -> StopReason | None:
        """Do what is due after a complete iteration: by EPOCH nothing."""
        if self._by_epoch:
            return None
        stop = self._validate_and_save(self._state.current_iteration, CutPoint.ITERATION)
        return stop or self._end_of_steps()

    def _stop_at(self, cut: Cut) -> NoReturn:
        self._save(cut, is_asked=True)
        raise StoppedOnRequest

    def _should_log(self) -> bool:
        if self._by_epoch:  # frequencies count epochs: once, at the last batch
            is_due = _is_due(self._settings.print_frequency, self._state.global_epoch)
            return is_due and (self._train_loader.is_epoch_over or self._settings.dry_run is not None)
        return _is_due(self._settings.print_frequency, self._state.current_iteration)

    def _validate_and_save(self, step: int, point: CutPoint) -> StopReason | None:
        """Do what is due after a step: validation, checkpoint, and the checks that follow a validation."""
        has_validated = _is_due(self._settings.valid_frequency, step)
        if has_validated:
            self._validate()
        cut = Cut(point, has_validated)
        if self._ranks.is_asked_to_stop():
            self._stop_at(cut)
        if _is_due(self._settings.chkpt_frequency, step):
            self._save(cut)
        return self._check_after_validation(has_validated)

    def _validate(self) -> None:
        state, loader = self._state, self._valid_loader
        assert loader is not None, "checked before the loop began"
        state.validation_cycles += 1
        average_running_losses(self._hooks.model)
        # Another pass for every validation, whatever number it has in this process.
        loader.set_epoch(state.validation_cycles - 1)
        with cudnn_benchmark(False), evaluating(self._hooks.model):
            self._hooks.validation_start(state.validation_cycles)
            bar = self._bars.evaluation("validation", length_of(loader, self._settings.dry_run))
            with torch.no_grad(), batches_of(loader, self._stop_request) as batches:
                evaluate(batches, self._hooks.validation_batch, bar, self._settings.dry_run)
            self._hooks.validation_end(state.validation_cycles)
        state.running_iter = 0

    def _check_after_validation(self, has_validated: bool, is_counted: bool = False) -> StopReason | None:
        if not has_validated:
            return None
        cycles, state = self._settings.early_stop_cycles, self._state
        if not is_counted:
            improved = self._ranks.agreed("have_metrics_improved", self._hooks.have_metrics_improved())
            if cycles is not None:
                state.early_stop_count = 0 if improved else state.early_stop_count + 1
        if cycles is not None and state.early_stop_count >= cycles:
            return StopReason.NOT_IMPROVED
        wants_stop = self._ranks.agreed("should_training_stop", self._hooks.should_stop())
        return StopReason.REQUESTED if wants_stop else None

    def _end_of_steps(self) -> StopReason | None:
        done = self._state.global_epoch if self._by_epoch else self._state.current_iteration
        return StopReason.TOTAL_STEPS if done >= self._settings.total_steps else None


def _is_due(frequency: int | None, count: int) -> bool:
    return frequency is not None and count % frequency == 0


def describe(state: TrainingState) -> str:
    """Say where training stands."""
    return f"epoch {state.global_epoch}, iteration {state.global_iteration}"


def as_dict(cut: Cut) -> dict[str, Any]:
    """Return a cut as plain values, for a checkpoint."""
    return {"point": cut.point.value, "has_validated": cut.has_validated}


def cut_from_dict(values: dict[str, Any]) -> Cut:
    """Return the cut that `as_dict` wrote."""
    return Cut(CutPoint(values["point"]), values["has_validated"])
