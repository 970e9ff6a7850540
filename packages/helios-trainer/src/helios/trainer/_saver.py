"""Saving the checkpoints of a run, and what becomes of one that cannot be written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helios.chkpt import CheckpointName, CheckpointStore, check_state, format_name
from helios.core.rng import preserve_rng_state
from helios.data import ResumableDataLoader
from helios.trainer._checkpoint import build_checkpoint, metadata_of
from helios.trainer._layout import has_parts
from helios.trainer._loop import Cut, StopReason
from helios.trainer._model import Model
from helios.trainer._modules import named_networks
from helios.trainer._plugin import PluginRegistry
from helios.trainer._ranks import Ranks
from helios.trainer._settings import TrainerSettings
from helios.trainer._start_note import StartNote
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
        ranks: this process among those of the run, all of which save; rank 0 writes, the others their shards at most.

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
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._store = store
        self._settings = settings
        self._name_of_run = run_name
        self._state = state
        self._model = model
        self._plugins = plugins
        self._train_loader = train_loader
        self._loggers = loggers
        self._start_note = start_note
        self.last: Path | None = None

    def save(self, cut: Cut, stop: StopReason | None = None, *, is_asked: bool = False) -> None:
        """Save a checkpoint.

        Args:
            cut: where in the loop.
            stop: why training has ended, if it has.
            is_asked: somebody asked to stop here. After that, as after the end, this process saves no other.

        Raises:
            OSError: it is the last one of this process and could not be written. Of another one it is only logged.
        """
        if self._settings.save_root is None and self._settings.dry_run is None:
            return
        # What hooks draw for a checkpoint must not matter: a run that is asked to stop has one more.
        with preserve_rng_state():
            self._save(cut, stop, is_asked)

    def _save(self, cut: Cut, stop: StopReason | None, is_asked: bool) -> None:
        if self._model._scalar_log is not None:
            self._model._scalar_log.flush()
        checkpoint = build_checkpoint(
            cut,
            stop,
            settings=self._settings,
            state=self._state,
            model=self._model,
            plugins=self._plugins,
            train_loader=self._train_loader,
            targets=self._loggers.targets,
            event_sizes=self._loggers.event_sizes(),
            ranks=self._ranks,
        )
        is_last = stop is not None or is_asked
        if has_parts(checkpoint):
            name = self._ranks.on_first(lambda: self._name(is_asked))
            if self._store is None:
                check_state(checkpoint, sharded=True)
            self._write(lambda store, place: store.save_sharded(checkpoint, **place), name, is_last)
        elif self._ranks.is_first:
            self._warn_of_nothing(checkpoint)
            name = self._name(is_asked)
            if self._store is None:
                check_state(checkpoint)
            # The first of a process is not left to a thread, since the note of the start goes with it.
            elif self._settings.async_chkpt and not is_last and self._start_note is None:
                self._write(lambda store, place: store.save_async(checkpoint, **place), name, is_last)
            else:
                self._write(lambda store, place: store.save(checkpoint, **place), name, is_last)

    def _warn_of_nothing(self, checkpoint: dict[str, Any]) -> None:
        if not checkpoint["model"] and self.last is None and any(named_networks(self._model)):
            get_root_logger().warning(
                "%s.state_dict() is empty, though the model has networks: they are not saved, and a restart will "
                "not have their weights",
                type(self._model).__name__,
            )

    def _name(self, is_asked: bool) -> CheckpointName:
        name = CheckpointName(self._name_of_run, self._state.global_epoch, self._state.global_iteration)
        return dataclasses.replace(name, metadata=self._metadata(format_name(name), is_asked))

    def _metadata(self, name: str, is_asked: bool) -> str:
        try:
            return metadata_of(self._model, name.removesuffix(".pth"))
        except Exception:
            if not is_asked:
                raise
            # Nobody expected a checkpoint here, before a score is there, for example.
            get_root_logger().warning(
                "append_metadata_to_chkpt_name failed, the checkpoint gets none", exc_info=True
            )
            return ""

    def _write(
        self, save: Callable[[CheckpointStore, dict[str, Any]], Path], name: CheckpointName, is_last: bool
    ) -> None:
        """Save in the store, if there is one: a rehearsal has none."""
        store, root = self._store, self._settings.save_root
        if store is None or root is None:
            return
        if is_last and self._ranks.is_first:
            root.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
        try:
            store.wait()  # for the one before
        except OSError as error:
            _say_lost(error)
        try:
            place = {"epoch": name.epoch, "iteration": name.iteration, "metadata": name.metadata}
            self.last = save(store, place)
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
