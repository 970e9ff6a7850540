"""One call of `fit`: everything between the arguments and the loop, and after it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from helios.chkpt import CheckpointStore
from helios.core.rng import seed_rngs
from helios.data import DataModule, ResumableDataLoader
from helios.trainer._banner import banner, summary
from helios.trainer._bars import ProgressBars
from helios.trainer._checkpoint import check_pairs
from helios.trainer._execution import Execution, cudnn_benchmark, deterministic_kernels, on_device
from helios.trainer._facts import facts_of
from helios.trainer._find import find_resumption
from helios.trainer._hooks import Hooks
from helios.trainer._loaders import check_batches, check_shares, checked_loader, prepare
from helios.trainer._loop import Cut, CutPoint, StoppedOnRequest, StopReason, TrainingLoop, describe
from helios.trainer._model import Model
from helios.trainer._plugin import PluginRegistry
from helios.trainer._ranks import Ranks, check_same, explaining, ranks_of, seed_rank
from helios.trainer._resumption import Resumption
from helios.trainer._saver import CheckpointSaver
from helios.trainer._scalars import logging_scalars
from helios.trainer._settings import TrainerSettings
from helios.trainer._start_note import Start, StartNote
from helios.trainer._stop_request import StopRequest, hearing_of_workers, listening_to_signals, signals_let_in
from helios.trainer._trained import Trained
from helios.trainer._training_state import TrainingState, TrainingUnit
from helios.trainer.logging import get_root_logger
from helios.trainer.logging._loggers import RunLoggers
from helios.trainer.logging._places import LogTargets, choose_targets


class FitRun:
    """A run of training, from the first seed to the last checkpoint.

    Args:
        settings: the trainer's settings.
        execution: this process and its device.
        model: the user's model, which knows its trainer and device already.
        datamodule: the user's data, likewise.
        plugins: the trainer's plug-ins.
        stop_request: whether somebody asked the run to stop.
        owns_group: the group of processes was made for this run, and not by the user.
        on_failure: is told the exception that ends this rank of several, as soon as it is seen.

    Raises:
        ValueError: `accept_on_resume` has a name that means nothing.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        execution: Execution,
        model: Model,
        datamodule: DataModule,
        plugins: PluginRegistry,
        stop_request: StopRequest,
        *,
        owns_group: bool = False,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        settings.check_accepted(plugins)
        if settings.chkpt_root is not None or settings.dry_run is not None:
            check_pairs(model, plugins)
        self._settings = settings
        self._execution = execution
        self._model = model
        self._datamodule = datamodule
        self._plugins = plugins
        self._stop_request = stop_request
        self._ranks = ranks_of(
            execution, stop_request, settings.dist_timeout_s, owns_group=owns_group, on_failure=on_failure
        )
        self._is_stopped = False
        self._name = settings.run_name or model.save_name
        self._store: CheckpointStore | None = None
        self._state = TrainingState()
        self._start_note: StartNote | None = None
        if settings.save_root is not None and self._ranks.is_first:
            self._start_note = StartNote(settings.save_root, self._name, settings.decisive())

    def run(self) -> Trained:
        """Train, or go on training, to the end or until somebody asks for a stop.

        A run that finished before is only loaded.
        """
        seed_rngs(self._settings.random_seed)
        with ExitStack() as stack:
            stack.callback(self._ranks.close)
            if self._settings.save_root is not None:  # else there is nothing to do before the process ends
                stack.enter_context(listening_to_signals(self._stop_request.make))
                if self._execution.is_spawned:
                    stack.enter_context(signals_let_in())
            stack.enter_context(on_device(self._execution.device))
            trained = self._run()
            with explaining(self._ranks):
                self._ranks.wait_for_all()  # rank 0 has saved by then, for whoever looks for its last checkpoint next
            return trained

    def _run(self) -> Trained:
        settings = self._settings
        with ExitStack() as stack:
            stack.enter_context(hearing_of_workers())
            self._loggers = RunLoggers(capture_warnings=settings.capture_warnings, rank=self._ranks.rank)
            stack.callback(self._loggers.close)
            stack.enter_context(logged_exceptions())
            stack.enter_context(explaining(self._ranks))
            parts = (self._execution, self._model, self._datamodule, self._plugins)
            check_same(self._ranks, lambda: facts_of(settings, *parts))
            resumption = self._find_resumption()
            if resumption is not None and self._is_finished(resumption):
                return self._load_finished(resumption)
            self._loggers.open_writer({} if resumption is None else resumption.event_sizes)
            if self._start_note is not None:
                stack.callback(self._drop_start_note)
            if settings.save_root is not None:
                store = CheckpointStore(
                    settings.save_root,
                    self._name,
                    keep_last=settings.keep_last,
                    is_writer=self._ranks.is_first,
                )
                self._store = stack.enter_context(store)
            stack.enter_context(torn_down(self._datamodule, self._ranks))
            stack.enter_context(logging_scalars(self._model, self._state))
            stack.enter_context(deterministic_kernels(settings.enable_deterministic))
            return self._train(resumption, stack)

    def _find_resumption(self) -> Resumption | None:
        """Find what the run goes on from, if anything, and open its log file."""
        settings = self._settings
        before: list[LogTargets] = []
        try:
            resumption = find_resumption(settings, self._name, self._model, self._ranks)
            if resumption is not None:
                before.append(resumption.targets())
                resumption.check_settings(settings)
                resumption.check_plugins(self._plugins)
                self._state = resumption.state
            start = self._killed_start(resumption)
            if start is not None:
                before.insert(0, start.targets)
        except BaseException:
            # If the checkpoint is refused, the reason belongs in the log file. Nobody is waited for, since this may be
            # the only rank that cannot read it.
            if self._ranks.is_first:
                self._loggers.open_log_file(choose_targets(self._name, *settings.log_folders, before))
            raise
        targets = self._ranks.on_first(lambda: choose_targets(self._name, *settings.log_folders, before))
        self._loggers.open_log_file(targets)
        self._note_start(resumption, start)
        return resumption

    def _killed_start(self, resumption: Resumption | None) -> Start | None:
        """Return where the run wrote if it was killed before it had a checkpoint of its own."""
        if self._start_note is None or not _is_new(resumption):
            return None
        return self._start_note.read(_origin(resumption))

    def _note_start(self, resumption: Resumption | None, start: Start | None) -> None:
        if self._start_note is None or not _is_new(resumption):
            return
        sizes = {} if resumption is None else resumption.event_sizes
        if start is not None:
            sizes = start.event_sizes
            if resumption is not None:
                resumption.event_sizes = sizes
        self._start_note.write(_origin(resumption), Start(self._loggers.targets, sizes))

    def _drop_start_note(self) -> None:
        # A run that was asked to stop before its first checkpoint goes on in its logs, as one that was killed. Of
        # several ranks this one may have failed because another was.
        if self._start_note is not None and not self._is_stopped and self._ranks.world_size == 1:
            self._start_note.remove()

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
        resumption.restore_surroundings(self._model, self._settings.random_seed, is_over=True)
        return self._trained(resumption.event_sizes)

    def _trained(self, event_sizes: Mapping[str, int] | None) -> Trained:
        plugins = tuple(self._plugins.values())
        is_rehearsal = self._settings.dry_run is not None
        targets = LogTargets(None, None) if is_rehearsal else self._loggers.targets
        is_finished = not self._is_stopped
        return Trained(self._model, plugins, targets, event_sizes, is_finished)

    def _set_up(self) -> None:
        for plugin in self._plugins.values():
            plugin.setup()
            plugin.configure_model(self._model)
        self._model.setup(fast_init=False)

    def _train(self, resumption: Resumption | None, stack: ExitStack) -> Trained:
        settings, model = self._settings, self._model
        if settings.print_banner and self._ranks.is_first:
            path = None if resumption is None else resumption.path
            text = banner(self._name, settings, self._execution, path)
            appended = model.append_to_banner(text)
            if not isinstance(appended, str):
                raise TypeError(
                    f"append_to_banner must return a str, found {type(appended).__name__} {appended!r}"
                )
            get_root_logger().info("%s", appended)
        train_loader, valid_loader = self._load_data()
        for plugin in self._plugins.values():
            plugin.configure_loaders(train_loader, valid_loader)
        model._running_losses.clear()  # of an earlier `fit`
        self._set_up()
        seed_rank(settings.random_seed, self._ranks)
        if valid_loader is not None:
            check_batches("valid", valid_loader, self._ranks, model)
        if resumption is not None:
            resumption.restore_objects(model, self._plugins)
            resumption.say_what_differs(settings, train_loader)
            resumption.restore_loader(train_loader)
        hooks = Hooks(model, self._plugins)
        hooks.training_start()
        if resumption is not None:
            resumption.restore_surroundings(model, settings.random_seed)
            self._loggers.discard_events(resumption.event_sizes)
        shows_bars = settings.enable_progress_bar and self._ranks.is_first
        bars = ProgressBars(shows_bars, settings.train_unit, settings.total_steps)
        stack.callback(bars.close)
        stack.enter_context(cudnn_benchmark(settings.enable_cudnn_benchmark))
        saver = CheckpointSaver(
            self._store,
            settings,
            self._name,
            state=self._state,
            model=model,
            plugins=self._plugins,
            train_loader=train_loader,
            loggers=self._loggers,
            start_note=self._start_note,
            ranks=self._ranks,
        )
        loop = TrainingLoop(
            settings,
            self._state,
            hooks,
            train_loader=train_loader,
            valid_loader=valid_loader,
            bars=bars,
            save=saver.save,
            stop_request=self._stop_request,
            ranks=self._ranks,
        )
        self._run_loop(loop, hooks, saver, bars, None if resumption is None else resumption.cut)
        return self._trained(None if self._store is None else self._loggers.event_sizes())

    def _run_loop(
        self, loop: TrainingLoop, hooks: Hooks, saver: CheckpointSaver, bars: ProgressBars, cut: Cut | None
    ) -> None:
        state = self._state
        began_s, batches_before = time.perf_counter(), state.global_iteration
        is_within_epoch = cut is not None and cut.point is not CutPoint.FINISHED
        bars.start(state, finished_epochs=state.global_epoch - is_within_epoch)
        try:
            stop = loop.run(cut)
        except StoppedOnRequest:
            self._is_stopped = True
            bars.close()
            reason = f"stopped by {self._stop_request}, to go on when it is started again"
        else:
            bars.close()
            hooks.training_end()
            saver.save(Cut(CutPoint.FINISHED), stop)
            reason = f"finished: {stop.value}"
        elapsed_s = time.perf_counter() - began_s
        num_batches = state.global_iteration - batches_before
        get_root_logger().info("%s", summary(state, reason, num_batches, elapsed_s, saver.last))

    def _load_data(self) -> tuple[ResumableDataLoader, ResumableDataLoader | None]:
        datamodule = self._datamodule
        prepare(datamodule, self._ranks, self._execution)
        datamodule.setup()
        train_loader = checked_loader(datamodule, "train", datamodule.train_dataloader())
        check_shares(train_loader, self._ranks)
        if self._settings.valid_frequency is None:
            return train_loader, None
        valid_loader = checked_loader(datamodule, "valid", datamodule.valid_dataloader())
        if valid_loader is train_loader:
            raise ValueError(
                f"{type(datamodule).__name__} has one loader for training and validation, which a validation would "
                "wind on: make two"
            )
        return train_loader, valid_loader


def _is_new(resumption: Resumption | None) -> bool:
    """Whether a run has no checkpoint of its own yet. Until it has, it is noted where it writes."""
    return resumption is None or resumption.is_earlier


def _origin(resumption: Resumption | None) -> str | None:
    return None if resumption is None else resumption.path.name


@contextmanager
def torn_down(datamodule: DataModule, ranks: Ranks) -> Iterator[None]:
    """Let the data go at the end. An exception that ended the run is not hidden by another one of `teardown`."""
    try:
        with explaining(ranks):
            yield
    except BaseException as error:
        ranks.leave()  # or a barrier there would wait for a rank that never comes
        try:
            datamodule.teardown()
        except Exception as other:
            error.add_note(f"Besides, teardown failed: {type(other).__name__}: {other}")
            get_root_logger().error("teardown failed besides: %s", other, exc_info=other)
        raise
    datamodule.teardown()


@contextmanager
def logged_exceptions() -> Iterator[None]:
    """Write the traceback of an exception to the log before the log is closed."""
    try:
        yield
    except Exception as error:
        get_root_logger().error("%s: %s", type(error).__name__, error, exc_info=error)
        raise
