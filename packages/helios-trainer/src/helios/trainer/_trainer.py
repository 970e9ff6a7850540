"""Trainer: the arguments, and what the user calls."""

import functools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from helios.core.rng import seed_rngs
from helios.data import DataModule
from helios.trainer._execution import Execution, select_executions
from helios.trainer._fit import FitRun
from helios.trainer._launch import launch, make_stop_flag, refuse_while_importing, request_stop
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin, PluginRegistry, is_overridden
from helios.trainer._rank_process import SpawnContext
from helios.trainer._replicas import Strategy
from helios.trainer._settings import make_settings, rehearsing
from helios.trainer._spawn_queue import SpawnQueue
from helios.trainer._stop_request import StopRequest
from helios.trainer._test_run import run_test
from helios.trainer._trained import Trained
from helios.trainer._training_state import TrainingUnit
from helios.trainer.distributed import (
    default_backend,
    get_global_rank,
    get_world_size,
    init_dist,
    is_dist_active,
    shutdown_dist,
)

T = TypeVar("T")
PathArgument = str | os.PathLike[str]


class Trainer:
    """Trains a Model on a DataModule; a run that is killed and started again ends with the same bits.

    Args:
        run_name: name of the run, in checkpoints and logs; empty takes the model's `save_name`.
        train_unit: what `total_steps` and the frequencies count.
        total_steps: epochs or iterations to train for; infinity needs `early_stop_cycles`.
        valid_frequency: epochs or complete iterations between validations; None never validates.
        chkpt_frequency: epochs or complete iterations between checkpoints. Without `chkpt_root` none is saved.
        print_frequency: epochs or complete iterations between calls of `on_training_batch_end` with
            `should_log`; by EPOCH it is the last batch of the epoch that logs.
        accumulation_steps: batches whose gradients the model accumulates. By ITERATION, that many batches
            make one iteration. By EPOCH it changes no count.
        enable_cudnn_benchmark: let cuDNN choose kernels by speed, while training only.
        enable_deterministic: use deterministic kernels, on the CPU too.
        early_stop_cycles: stop after this many validations in a row without improvement.
        use_cpu: train on the CPU.
        gpus: ids of the CUDA devices to train on; None takes all that there are. With several, a process is spawned for
            each. Under torchrun a process takes that of its local rank.
        random_seed: seed of all generators; None is 6691.
        enable_tensorboard: write TensorBoard events below `run_path`.
        enable_file_logging: write a log file below `log_path`.
        capture_warnings: write Python's warnings to the logs.
        enable_progress_bar: show progress bars.
        chkpt_root: folder of the checkpoints. The run goes on from the last good one in it.
        log_path: folder of log files.
        run_path: folder of TensorBoard folders.
        print_banner: say at the start what is run, and on what.
        keep_last: how many checkpoints to keep; None keeps all.
        async_chkpt: write checkpoints in the background.
        nprocs: processes to train in on the CPU; more than one are spawned. On CUDA `gpus` decides, and under torchrun
            torchrun does.
        dry_run: rehearse: so many training, validation and test batches through every hook (by ITERATION whole
            iterations, at least one), a checkpoint made but not written, nothing left on the disk, nothing resumed.
        accept_on_resume: names of what may differ from the run that is gone on with, or be missing in its checkpoint,
            each with a warning instead of an error: "train_unit", "accumulation_steps", "random_seed" (the new value
            is taken); "rng" (the generators go on as seeded) or only "rng.cuda"; "data" (the epoch in progress begins
            anew); the id of a plug-in (it begins anew).
        strategy: how `Model.distribute` puts networks on several ranks: a copy on each, or in parts.
        dist_timeout_s: how long processes wait for one another, in seconds, before the run ends with an error; None is
            torch's default. Longer than what one of them does alone: rank 0 writes checkpoints, and prepares data.

    Attributes:
        settings: the arguments, checked.
        train_exceptions: types of exceptions that `fit` passes unchanged.
        test_exceptions: types of exceptions that `test` passes unchanged.
        plugins: the plug-ins; `plugins.append(plugin)` adds one.
        queue: if processes are spawned, a queue that they put into, and that can be read here after `fit` and `test`;
            None otherwise. What is put is pickled at once. It has `put`, `get`, `get_nowait`, `empty` and `qsize`.
        rank: number of this process in the run.
        local_rank: number of this process on its machine.
        gpu_ids: the CUDA devices of the run; under torchrun those of this machine.
        stopped_by: the signal that asked the last `fit` to stop, if one did; also if it came when all was done.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range or contradicts another, or the machine.
    """

    def __init__(
        self,
        run_name: str = "",
        train_unit: TrainingUnit = TrainingUnit.EPOCH,
        total_steps: int | float = 0,
        valid_frequency: int | None = None,
        chkpt_frequency: int | None = None,
        print_frequency: int | None = None,
        accumulation_steps: int = 1,
        enable_cudnn_benchmark: bool = False,
        enable_deterministic: bool = False,
        early_stop_cycles: int | None = None,
        use_cpu: bool | None = None,
        gpus: list[int] | None = None,
        random_seed: int | None = None,
        enable_tensorboard: bool = False,
        enable_file_logging: bool = False,
        capture_warnings: bool = False,
        enable_progress_bar: bool = False,
        chkpt_root: PathArgument | None = None,
        log_path: PathArgument | None = None,
        run_path: PathArgument | None = None,
        print_banner: bool = True,
        keep_last: int | None = None,
        async_chkpt: bool = True,
        nprocs: int | None = None,
        *,
        dry_run: int | None = None,
        accept_on_resume: Iterable[str] = (),
        strategy: Strategy = Strategy.DDP,
        dist_timeout_s: float | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self.settings = make_settings(**arguments)
        self._executions = select_executions(use_cpu, gpus, nprocs)
        self.train_exceptions: list[type[BaseException]] = []
        self.test_exceptions: list[type[BaseException]] = []
        self.plugins = PluginRegistry()
        self.queue: SpawnQueue | None = SpawnQueue() if self._spawns else None
        self.rank = self._execution.rank
        self.local_rank = self._execution.local_rank
        self.gpu_ids = list(self._execution.gpu_ids)
        self.stopped_by: signal.Signals | None = None
        self._stop_request = StopRequest()
        self._trained: Trained | None = None
        self._configured: list[Plugin] = []
        # Shared with spawned processes: the signal that asked them to stop.
        self._stop_flag: Any = make_stop_flag() if self._spawns else None
        self._fails_in_parent: Callable[[BaseException], None] | None = None  # in a spawned process

    def fit(self, model: Model, datamodule: DataModule) -> bool:
        """Train, going on from the last good checkpoint of the run if there is one.

        A run that has finished is not trained again: the model is only set up and given its final state. But
        if `total_steps` ended it and is larger now, it goes on.

        While checkpoints are on, SIGTERM, SIGUSR1 and Ctrl-C stop it after the iteration in progress (after the
        validation in progress, if there is one), with a checkpoint; the next `fit` goes on there. A second signal does
        what it always did, at once.

        With several GPUs, or `nprocs`, processes are spawned, and each trains a copy: model and data module that are
        given here are as before afterwards. What is to come back goes through `queue` or a checkpoint; `test` loads the
        last one. The script must be importable (what it does below `if __name__ == "__main__":`), and what is given
        here, and the plug-ins, can be pickled. `prepare_data` runs once, here, before.

        Args:
            model: what to train.
            datamodule: what to train it on.

        Returns:
            True: the run has finished, now or before. False: it was asked to stop, and is to go on another time. What
            prevents both raises.

        Raises:
            TypeError: an argument is not what it should be, or the model has no `train_step`.
            ValueError: `total_steps` is 0.
            RuntimeError: anything went wrong in between (`accept_on_resume` has a name that means nothing, say); its
                cause is the exception itself. Exceptions of the types in `train_exceptions` are passed unchanged.
        """
        self._check(model, datamodule)
        if not is_overridden(model, "train_step", Model):
            raise TypeError(f"model must define train_step to be trained, {type(model).__name__} does not")
        if self.settings.total_steps == 0:
            raise ValueError("total_steps is 0, there is nothing to train: give the Trainer a total_steps")
        self._trained, self.stopped_by = None, None
        self._withdraw_stop()
        outcome = _call(lambda: self._fit(model, datamodule), "training", self.train_exceptions)
        self.stopped_by = outcome.stopped_by
        return outcome.is_finished

    def request_stop(self) -> None:
        """Let `fit` stop after the iteration in progress, with a checkpoint, and return False: as a signal does.

        From any thread; without checkpoints too, but then nothing is saved. A request that comes before `fit` is
        forgotten when it begins.
        """
        self._stop_request.make()
        if self._stop_flag is not None:
            request_stop(self._stop_flag)

    def _withdraw_stop(self) -> None:
        self._stop_request.withdraw()
        if self._stop_flag is not None:
            self._stop_flag.value = 0

    def test(self, model: Model, datamodule: DataModule) -> bool:
        """Test a model: as `fit` left it, or else set up and loaded from the last checkpoint of the run.

        Args:
            model: what to test.
            datamodule: what to test it on.

        Returns:
            True: all of the test split was tested. Whatever prevents that raises.

        Raises:
            TypeError: an argument is not what it should be.
            RuntimeError: anything went wrong in between; its cause is the exception itself. Exceptions of
                the types in `test_exceptions` are passed unchanged.
        """
        self._check(model, datamodule)
        _call(lambda: self._test(model, datamodule), "testing", self.test_exceptions)
        return True

    @property
    def _execution(self) -> Execution:
        """This process; while others are spawned, the first of them."""
        return self._executions[0]

    @property
    def _spawns(self) -> bool:
        return len(self._executions) > 1

    def _fit(self, model: Model, datamodule: DataModule) -> "_Outcome":
        self._introduce(model, datamodule)
        if self._spawns:
            # Without checkpoints there is nothing to do before the processes end.
            listens = self.settings.save_root is not None
            outcome = self._launch(_fit_rank, model, datamodule, listens=listens)
            # One may have come when no rank looked any more.
            if outcome.stopped_by is None and self._stop_flag.value > 0:
                outcome = replace(outcome, stopped_by=signal.Signals(self._stop_flag.value))
            return outcome
        with self._in_group() as owns, rehearsing(self.settings) as settings:
            parts = (model, datamodule, self.plugins, self._stop_request)
            run = FitRun(settings, self._execution, *parts, owns_group=owns, on_failure=self._tell_failure)
            self._trained = run.run()
        return _Outcome(self._trained.is_finished, self._stop_request.signal)

    def _test(self, model: Model, datamodule: DataModule) -> None:
        self._introduce(model, datamodule)
        if self._spawns:
            self._launch(_test_rank, model, datamodule, listens=False)
            return
        trained = self._trained if self._trained is not None and self._trained.model is model else None
        with self._in_group() as owns, rehearsing(self.settings) as settings:
            parts = (model, datamodule, self.plugins, trained)
            run_test(settings, self._execution, *parts, owns_group=owns, on_failure=self._tell_failure)

    def _launch(
        self,
        run: "Callable[[Trainer, Model, DataModule, Execution, SpawnContext], T]",
        model: Model,
        datamodule: DataModule,
        *,
        listens: bool,
    ) -> T:
        """Run a function in the processes of the run, each with copies of this trainer, the model and the data."""
        refuse_while_importing()
        assert self.queue is not None
        datamodule.prepare_data()
        return launch(
            functools.partial(run, self, model, datamodule),
            self._executions,
            queue=self.queue,
            timeout_s=self.settings.dist_timeout_s,
            stop_flag=self._stop_flag,
            listens=listens,
        )

    def _enter_rank(self, execution: Execution, context: SpawnContext) -> None:
        """Become the copy that runs in a spawned process."""
        self._executions = (execution,)
        self.rank, self.local_rank = execution.rank, execution.local_rank
        self.queue, self._stop_request.of_parent = context.queue, context.stop_flag
        self._fails_in_parent = context.fails

    def _tell_failure(self, error: BaseException) -> None:
        """Tell the parent, if this process was spawned, that an exception will end it."""
        if self._fails_in_parent is not None:
            self._fails_in_parent(error)

    def __getstate__(self) -> dict[str, Any]:
        """Return what goes into a spawned process; it gets queue and flag of its own."""
        return {**self.__dict__, "queue": None, "_stop_flag": None}

    @contextmanager
    def _in_group(self) -> Iterator[bool]:
        """Be in the group of processes inside, if there are to be several; yield whether it is not the user's own."""
        execution = self._execution
        if is_dist_active() and (get_global_rank(), get_world_size()) != (
            execution.rank,
            execution.world_size,
        ):
            raise RuntimeError(
                f"the active group of processes has rank {get_global_rank()} of {get_world_size()}, but the trainer "
                f"was made for rank {execution.rank} of {execution.world_size}: make the Trainer, and call "
                "init_dist, in processes that torchrun has started"
            )
        if not execution.has_group or is_dist_active():
            yield False
            return
        backend = default_backend(execution.device.type == "cuda")
        init_dist(backend=backend, timeout_s=self.settings.dist_timeout_s)
        try:
            yield True
        except BaseException:
            shutdown_dist(has_failed=True)
            raise
        shutdown_dist()

    def _check(self, model: Model, datamodule: DataModule) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model must be a Model, found {type(model).__name__}")
        if not hasattr(model, "_loss_items"):
            raise TypeError(f"{type(model).__name__}.__init__ must call super().__init__(save_name)")
        if not isinstance(datamodule, DataModule):
            raise TypeError(f"datamodule must be a DataModule, found {type(datamodule).__name__}")
        if not isinstance(self.plugins, PluginRegistry):
            found = type(self.plugins).__name__
            raise TypeError(f"plugins is replaced by a {found}: add plug-ins with plugins.append(plugin)")
        for name in ("train_exceptions", "test_exceptions"):
            kinds = getattr(self, name)
            if not isinstance(kinds, list | tuple | set) or not all(
                isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds
            ):
                raise TypeError(f"{name} must be a list of exception types, found {kinds!r}")

    def _introduce(self, model: Model, datamodule: DataModule) -> None:
        """Make those who work together known to each other."""
        seed_rngs(self.settings.random_seed)  # before anything of the user's is called
        # Once each, although `test` may follow `fit`; and one may add others.
        while new := [p for p in self.plugins.values() if p not in self._configured]:
            new[0].trainer = self
            new[0].configure_trainer(self)
            self._configured.append(new[0])
        model.trainer = datamodule.trainer = self
        model.device = self._execution.device
        model.rank = self._execution.rank
        model.is_distributed = datamodule.is_distributed = self._execution.is_distributed


@dataclass(frozen=True)
class _Outcome:
    """How a `fit` ended."""

    is_finished: bool
    stopped_by: signal.Signals | None


def _fit_rank(
    trainer: Trainer, model: Model, datamodule: DataModule, execution: Execution, context: SpawnContext
) -> _Outcome:
    trainer._enter_rank(execution, context)
    return trainer._fit(model, datamodule)


def _test_rank(
    trainer: Trainer, model: Model, datamodule: DataModule, execution: Execution, context: SpawnContext
) -> None:
    trainer._enter_rank(execution, context)
    trainer._test(model, datamodule)


def _call(run: Callable[[], T], activity: str, passed: list[type[BaseException]]) -> T:
    try:
        return run()
    except Exception as error:
        if isinstance(error, tuple(passed)):
            raise
        raise RuntimeError(f"{activity} failed: {type(error).__name__}: {error}") from error
