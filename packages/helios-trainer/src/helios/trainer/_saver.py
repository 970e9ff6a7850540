"""Saving the checkpoints of a run, and what becomes of one that cannot be written."""

import dataclasses
from pathlib import Path
from typing import Any

from helios.chkpt import CheckpointName, CheckpointStore, check_state, format_name
from helios.core.rng import preserve_rng_state
from helios.data import ResumableDataLoader
from helios.trainer._checkpoint import build_checkpoint, metadata_of
from helios.trainer._loop import Cut, StopReason
from helios.trainer._model import Model
from helios.trainer._modules import named_networks
from helios.trainer._plugin import PluginRegistry
from helios.trainer._settings import TrainerSettings
from helios.trainer._start_note import StartNote
from helios.trainer._stop_request import StopRequest
from helios.trainer._training_state import TrainingState
from helios.trainer.logging import get_root_logger
from helios.trainer.logging._loggers import RunLoggers


class CheckpointSaver:
    """Saves the checkpoints of a run; in a rehearsal it only makes sure that they could be saved.

    Args:
        store: the folder; None if nothing is saved.
        settings: the trainer's settings.
        run_name: begins the name of each file.
        state: the counters.
        model: the user's model.
        plugins: the trainer's plug-ins.
        train_loader: loader of the training split.
        loggers: the loggers of the run.
        start_note: the note of a run that has no checkpoint yet, which the first one replaces.
        stop_request: whether somebody asked to stop, so that this process saves no other.

    Attributes:
        last: path of the last one of this process.
    """

    def __init__(
        self,
        store: CheckpointStore | None,
        settings: TrainerSettings,
        run_name: str,
        *,
        state: TrainingState,
        model: Model,
        plugins: PluginRegistry,
        train_loader: ResumableDataLoader,
        loggers: RunLoggers,
        start_note: StartNote | None,
        stop_request: StopRequest,
    ) -> None:
        self._store = store
        self._settings = settings
        self._name = run_name
        self._state = state
        self._model = model
        self._plugins = plugins
        self._train_loader = train_loader
        self._loggers = loggers
        self._start_note = start_note
        self._stop_request = stop_request
        self.last: Path | None = None

    def save(self, cut: Cut, stop: StopReason | None = None) -> None:
        """Save a checkpoint.

        Raises:
            OSError: it is the last one of this process and could not be written. Of another one it is only logged.
        """
        if self._store is None and self._settings.dry_run is None:
            return
        # What hooks draw for a checkpoint must not matter: a run that is asked to stop has one more.
        with preserve_rng_state():
            self._save(cut, stop)

    def _save(self, cut: Cut, stop: StopReason | None) -> None:
        state, model = self._state, self._model
        if model._scalar_log is not None:
            model._scalar_log.flush()
        checkpoint = build_checkpoint(
            cut,
            stop,
            settings=self._settings,
            state=state,
            model=model,
            plugins=self._plugins,
            train_loader=self._train_loader,
            targets=self._loggers.targets,
            event_sizes=self._loggers.event_sizes(),
        )
        name = CheckpointName(self._name, state.global_epoch, state.global_iteration)
        metadata = self._metadata(format_name(name).removesuffix(".pth"), is_due=stop is not None)
        if not checkpoint["model"] and self.last is None and any(named_networks(model)):
            get_root_logger().warning(
                "%s.state_dict() is empty, though the model has networks: they are not saved, and a restart will "
                "not have their weights",
                type(model).__name__,
            )
        if self._store is None:
            check_state(checkpoint)
        else:
            is_last = stop is not None or self._stop_request.is_made
            if is_last and self._settings.save_root is not None:
                self._settings.save_root.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            self._write(self._store, checkpoint, dataclasses.replace(name, metadata=metadata), is_last)

    def _metadata(self, name: str, is_due: bool) -> str:
        try:
            return metadata_of(self._model, name)
        except Exception:
            if is_due or not self._stop_request.is_made:
                raise
            # Nobody expected a checkpoint here, before a score is there, for example.
            get_root_logger().warning(
                "append_metadata_to_chkpt_name failed, the checkpoint gets none", exc_info=True
            )
            return ""

    def _write(
        self, store: CheckpointStore, checkpoint: dict[str, Any], name: CheckpointName, is_last: bool
    ) -> None:
        try:
            store.wait()  # for the one before
        except OSError as error:
            _say_lost(error)
        place: dict[str, Any] = {"epoch": name.epoch, "iteration": name.iteration, "metadata": name.metadata}
        try:
            if self._settings.async_chkpt and not is_last and self._start_note is None:
                self.last = store.save_async(checkpoint, **place)
            else:
                self.last = store.save(checkpoint, **place)
        except OSError as error:
            if is_last:
                raise
            _say_lost(error)
            return
        if self._start_note is not None:  # the first checkpoint of this process, on the disk now
            self._start_note.remove()
            self._start_note = None


def _say_lost(error: OSError) -> None:
    # A full disk may have room again in an hour. To end the run would lose what was trained since the last one.
    get_root_logger().error(
        "a checkpoint could not be written, training goes on and the next one is tried when it is due: %s: %s",
        type(error).__name__,
        error,
    )
