"""One call of `test`."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from helios.core.rng import seed_rngs
from helios.data import DataModule
from helios.trainer._bars import ProgressBars
from helios.trainer._earlier import is_earlier, targets_of
from helios.trainer._execution import Execution, cudnn_benchmark, deterministic_kernels, on_device
from helios.trainer._facts import facts_of
from helios.trainer._find import find_checkpoint
from helios.trainer._fit import logged_exceptions, torn_down
from helios.trainer._hooks import Hooks, batches_of, evaluate, length_of
from helios.trainer._loaders import check_batches, checked_loader, prepare
from helios.trainer._model import Model, restore_tables
from helios.trainer._plugin import PluginRegistry
from helios.trainer._ranks import check_same, explaining, ranks_of, seed_rank
from helios.trainer._replicas import evaluating
from helios.trainer._resumption import is_in_parts, load_model, with_parts
from helios.trainer._scalars import logging_scalars
from helios.trainer._settings import TrainerSettings
from helios.trainer._stop_request import StopRequest
from helios.trainer._trained import Trained
from helios.trainer._training_state import TrainingState
from helios.trainer.logging import get_root_logger
from helios.trainer.logging._loggers import RunLoggers
from helios.trainer.logging._places import LogTargets, choose_targets


def run_test(
    settings: TrainerSettings,
    execution: Execution,
    model: Model,
    datamodule: DataModule,
    plugins: PluginRegistry,
    trained: Trained | None,
    *,
    owns_group: bool = False,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> None:
    """Test a model on the test split.

    Args:
        settings: the trainer's settings.
        execution: this process and its device.
        model: the user's model.
        datamodule: the user's data.
        plugins: the trainer's plug-ins.
        trained: what this trainer trained, if it is the model; otherwise the model is set up and, like the
            plug-ins, given its state from the last checkpoint of the run, if there is one.
        owns_group: the group of processes was made for this run, and not by the user.
        on_failure: is told the exception that ends this rank of several, as soon as it is seen.
    """
    seed_rngs(settings.random_seed)
    nobody = StopRequest()  # can ask for a stop
    ranks = ranks_of(execution, nobody, settings.dist_timeout_s, owns_group=owns_group, on_failure=on_failure)
    with ExitStack() as stack:
        stack.callback(ranks.close)
        stack.enter_context(on_device(execution.device))
        loggers = RunLoggers(capture_warnings=settings.capture_warnings, rank=ranks.rank)
        stack.callback(loggers.close)
        stack.enter_context(logged_exceptions())
        stack.enter_context(explaining(ranks))
        check_same(ranks, lambda: facts_of(settings, execution, model, datamodule, plugins))
        name = settings.run_name or model.save_name
        found = None if trained is not None else find_checkpoint(settings.chkpt_root, name, model, ranks)
        before = _targets_before(trained, found)
        loggers.open_log_file(ranks.on_first(lambda: choose_targets(name, *settings.log_folders, before)))
        loggers.open_writer(_event_sizes(trained, found))
        stack.enter_context(logging_scalars(model, TrainingState()))
        stack.enter_context(torn_down(datamodule, ranks))
        stack.enter_context(deterministic_kernels(settings.enable_deterministic))
        prepare(datamodule, ranks, execution)
        datamodule.setup()
        loader = checked_loader(datamodule, "test", datamodule.test_dataloader())
        for plugin in plugins.values():
            if trained is None or plugin not in trained.plugins:
                plugin.setup()
                plugin.configure_model(model)
        if trained is None:
            _set_up(model, plugins, found)
        found = None  # or a second copy of the state would stay in memory
        check_batches("test", loader, ranks, model)
        seed_rngs(settings.random_seed)  # again: whether the model was set up here must not matter
        seed_rank(settings.random_seed, ranks)
        model.load_for_testing()
        hooks = Hooks(model, plugins)
        bars = ProgressBars(
            settings.enable_progress_bar and ranks.is_first, settings.train_unit, settings.total_steps
        )
        stack.enter_context(contextlib.closing(bars))
        stack.enter_context(cudnn_benchmark(False))
        stack.enter_context(evaluating(model))
        hooks.testing_start()
        bar = bars.evaluation("test", length_of(loader, settings.dry_run))
        with torch.no_grad(), batches_of(loader, StopRequest()) as batches:
            evaluate(batches, hooks.testing_batch, bar, settings.dry_run)
        hooks.testing_end()
        ranks.wait_for_all()


def _targets_before(trained: Trained | None, found: tuple[Path, dict[str, Any]] | None) -> list[LogTargets]:
    """Return where the training of the model wrote, if it was trained."""
    if trained is not None:
        return [trained.targets]
    if found is None:
        return []
    return [targets_of(found[1]) if is_earlier(found[1]) else LogTargets.from_dict(found[1])]


def _event_sizes(
    trained: Trained | None, found: tuple[Path, dict[str, Any]] | None
) -> Mapping[str, int] | None:
    """Return what to cut TensorBoard's files back to, so that testing again does not log everything again."""
    if trained is not None:
        return trained.event_sizes
    own = {} if found is None or is_earlier(found[1]) else found[1]["training_state"]["trainer"]
    # A run that is not finished may be writing at this moment.
    return own["event_sizes"] if own.get("stop") is not None else None


def _set_up(model: Model, plugins: PluginRegistry, found: tuple[Path, dict[str, Any]] | None) -> None:
    """Set a model up that was not trained here, from a checkpoint if there is one."""
    model.setup(fast_init=False)
    if found is None:
        get_root_logger().warning("testing the model as it was set up: no checkpoint of the run was found")
        return
    path, checkpoint = found
    state: Any = checkpoint["model"]
    if is_in_parts(path):
        state = with_parts(path, model)["model"]
    load_model(model, state, path)
    if not is_earlier(checkpoint):  # earlier releases did not keep them
        restore_tables(model, checkpoint["training_state"]["trainer"]["tables"])
    for plug_id, plugin in plugins.items():
        if plug_id in checkpoint:  # one that only tests has no state
            plugin.load_state_dict(checkpoint[plug_id])
    get_root_logger().info("testing the model of %s", path)
