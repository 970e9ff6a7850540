"""One call of `fit`: everything between the arguments and the loop, and after it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from helios.chkpt import CheckpointName, CheckpointStore, format_name
from helios.core.rng import seed_rngs
from helios.data import DataModule, ResumableDataLoader
from helios.trainer._banner import banner, summary
from helios.trainer._bars import ProgressBars
from helios.trainer._checkpoint import Resumption, build_checkpoint, metadata_of
from helios.trainer._execution import Execution, cudnn_benchmark, deterministic_kernels
from helios.trainer._find import find_resumption
from helios.trainer._hooks import Hooks
from helios.trainer._loop import Cut, CutPoint, StopReason, TrainingLoop, describe
from helios.trainer._model import Model
from helios.trainer._modules import named_networks
from helios.trainer._plugin import PluginRegistry
from helios.trainer._settings import TrainerSettings
from helios.trainer._start_note import Start, StartNote
from helios.trainer._trained import Trained
from helios.trainer._training_state import TrainingState, TrainingUnit
from helios.trainer.logging import LogTargets, RunLoggers, get_root_logger
from helios.trainer.logging._loggers import new_targets


class FitRun:
    """A run of training, from the first seed to the last checkpoint.

    Args:
        settings: the trainer's settings.
        execution: this process and its device.
        model: the user's model, which knows its trainer and device already.
        datamodule: the user's data, likewise.
        plugins: the trainer's plug-ins.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        execution: Execution,
        model: Model,
        datamodule: DataModule,
        plugins: PluginRegistry,
    ) -> None:
        self._settings = settings
        self._execution = execution
        self._model = model
        self._datamodule = datamodule
        self._plugins = plugins
        self._name = settings.run_name or model.save_name
        self._store: CheckpointStore | None = None
        self._state = TrainingState()
        self._start_note: StartNote | None = None
        if settings.save_root is not None:
            self._start_note = StartNote(settings.save_root, self._name, settings.decisive())

    def run(self) -> Trained:
        """Train, or go on training, to the end. A run that finished before is only loaded."""
        settings = self._settings
        seed_rngs(settings.random_seed)
        with ExitStack() as stack:
            self._loggers = RunLoggers(capture_warnings=settings.capture_warnings)
            stack.callback(self._loggers.close)
            stack.enter_context(logged_exceptions())
            resumption = self._find_resumption()
            if resumption is not None and self._is_finished(resumption):
                return self._load_finished(resumption)
            self._loggers.open_writer({} if resumption is None else resumption.event_sizes)
            if self._start_note is not None:
                stack.callback(self._start_note.remove)
            if settings.save_root is not None:
                store = CheckpointStore(settings.save_root, self._name, keep_last=settings.keep_last)
                self._store = stack.enter_context(store)
            stack.callback(self._datamodule.teardown)
            stack.enter_context(deterministic_kernels(settings.enable_deterministic))
            return self._train(resumption, stack)

    def _find_resumption(self) -> Resumption | None:
        """Find what the run goes on from, if anything, and open its log file."""
        settings = self._settings
        targets = new_targets(self._name, *settings.log_folders)
        try:
            resumption = find_resumption(settings, self._name, self._model)
            if resumption is not None:
                targets = targets.restored(resumption.targets())
                resumption.check_settings(settings)
                resumption.check_plugins(self._plugins)
                self._state = resumption.state
            if self._start_note is not None and (resumption is None or resumption.is_earlier):
                targets = self._noted(self._start_note, targets, resumption)
        finally:
            # Also if the checkpoint is refused: the reason belongs in the log file.
            self._loggers.open_log_file(targets)
        return resumption

    def _noted(self, note: StartNote, targets: LogTargets, resumption: Resumption | None) -> LogTargets:
        """Note where the run writes until it has a checkpoint of its own; where it did if it was killed before."""
        origin, sizes = (None, {}) if resumption is None else (resumption.path.name, resumption.event_sizes)
        before = note.read(origin)
        if before is not None:
            targets, sizes = targets.restored(before.targets), before.event_sizes
            if resumption is not None:
                resumption.event_sizes = sizes
        note.write(origin, Start(targets, sizes))
        return targets

    def _is_finished(self, resumption: Resumption) -> bool:
        settings, stop, state = self._settings, resumption.stop, resumption.state
        if stop is None:
            return False
        done = state.global_epoch if settings.train_unit is TrainingUnit.EPOCH else state.current_iteration
        was_given_more = stop is StopReason.TOTAL_STEPS and done < settings.total_steps
        if not was_given_more:
            where = f"{describe(state)}; {stop.value}"
            path = resumption.path
            get_root_logger().info(
                "nothing to do: run %s finished before (%s), see %s", self._name, where, path
            )
        return not was_given_more

    def _load_finished(self, resumption: Resumption) -> Trained:
        """Leave the model as the run left it, for the script that goes on after `fit`."""
        self._set_up()
        resumption.restore_objects(self._model, self._plugins)
        resumption.restore_surroundings(self._model, is_over=True)
        return self._trained(resumption.event_sizes)

    def _trained(self, event_sizes: Mapping[str, int] | None) -> Trained:
        plugins = tuple(self._plugins.values())
        return Trained(self._model, plugins, self._loggers.targets, event_sizes)

    def _set_up(self) -> None:
        for plugin in self._plugins.values():
            plugin.setup()
            plugin.configure_model(self._model)
        self._model.setup(fast_init=False)

    def _train(self, resumption: Resumption | None, stack: ExitStack) -> Trained:
        settings, model = self._settings, self._model
        if settings.print_banner:
            path = None if resumption is None else resumption.path
            text = banner(self._name, settings, self._execution, path)
            get_root_logger().info("%s", model.append_to_banner(text))
        self._train_loader, valid_loader = self._load_data()
        self._set_up()
        if resumption is not None:
            resumption.restore_objects(model, self._plugins)
            resumption.restore_loader(self._train_loader)
        self._hooks = Hooks(model, self._plugins)
        self._hooks.training_start()
        if resumption is not None:
            resumption.restore_surroundings(model)
            self._loggers.discard_events(resumption.event_sizes)
        bars = ProgressBars(settings.enable_progress_bar, settings.train_unit, settings.total_steps)
        stack.callback(bars.close)
        stack.enter_context(cudnn_benchmark(settings.enable_cudnn_benchmark))
        loop = TrainingLoop(
            settings,
            self._state,
            self._hooks,
            train_loader=self._train_loader,
            valid_loader=valid_loader,
            bars=bars,
            save=self._save,
        )
        self._run_loop(loop, bars, None if resumption is None else resumption.cut)
        return self._trained(None if self._store is None else self._loggers.event_sizes())

    def _run_loop(self, loop: TrainingLoop, bars: ProgressBars, cut: Cut | None) -> None:
        state = self._state
        began_s, batches_before = time.perf_counter(), state.global_iteration
        is_within_epoch = cut is not None and cut.point is not CutPoint.FINISHED
        bars.start(state, finished_epochs=state.global_epoch - is_within_epoch)
        stop = loop.run(cut)
        bars.close()
        self._hooks.training_end()
        last = self._save(Cut(CutPoint.FINISHED), stop)
        elapsed_s = time.perf_counter() - began_s
        num_batches = state.global_iteration - batches_before
        get_root_logger().info("%s", summary(state, stop.value, num_batches, elapsed_s, last))

    def _load_data(self) -> tuple[ResumableDataLoader, ResumableDataLoader | None]:
        datamodule = self._datamodule
        datamodule.prepare_data()
        datamodule.setup()
        train_loader = checked_loader(datamodule, "train", datamodule.train_dataloader())
        if self._settings.valid_frequency is None:
            return train_loader, None
        return train_loader, checked_loader(datamodule, "valid", datamodule.valid_dataloader())

    def _save(self, cut: Cut, stop: StopReason | None = None) -> Path | None:
        if self._store is None:
            return None
        settings, state, model = self._settings, self._state, self._model
        name = CheckpointName(self._name, state.global_epoch, state.global_iteration)
        metadata = metadata_of(model, format_name(name).removesuffix(".pth"))
        checkpoint = build_checkpoint(
            cut,
            stop,
            settings=settings,
            state=state,
            model=model,
            plugins=self._plugins,
            train_loader=self._train_loader,
            targets=self._loggers.targets,
            event_sizes=self._loggers.event_sizes(),
        )
        if self._start_note is not None and not checkpoint["model"] and any(named_networks(model)):
            get_root_logger().warning(
                "%s.state_dict() is empty, though the model has networks: they are not saved, and a restart will "
                "not have their weights",
                type(model).__name__,
            )
        place: dict[str, Any] = {
            "epoch": state.global_epoch,
            "iteration": state.global_iteration,
            "metadata": metadata,
        }
        if settings.async_chkpt and stop is None and self._start_note is None:
            path = self._store.save_async(checkpoint, **place)
        else:
            path = self._store.save(checkpoint, **place)
        if self._start_note is not None:  # the first checkpoint of this process, on the disk now
            self._start_note.remove()
            self._start_note = None
        return path


def checked_loader(datamodule: DataModule, split: str, loader: Any) -> ResumableDataLoader:
    """Return the loader of a split, of which there must be one, with batches.

    Raises:
        TypeError: it is another loader.
        ValueError: there is none, or it has no batches.
    """
    where = f"{type(datamodule).__name__}.{split}_dataloader()"
    if loader is None:
        raise ValueError(
            f"{where} is None, but the {split} split is needed: setup must assign self._{split}_dataset"
        )
    if not isinstance(loader, ResumableDataLoader):
        raise TypeError(f"{where} must be a ResumableDataLoader, found {type(loader).__name__}")
    if len(loader) == 0:
        raise ValueError(
            f"{where} has no batches: drop_last leaves nothing of {loader.sampler.num_samples} samples in batches of "
            f"{loader.batch_size}"
        )
    return loader


@contextmanager
def logged_exceptions() -> Iterator[None]:
    """Write the traceback of an exception to the log before the log is closed."""
    try:
        yield
    except Exception as error:
        get_root_logger().error("%s: %s", type(error).__name__, error, exc_info=error)
        raise
