"""One call of `test`."""

import contextlib
from contextlib import ExitStack

import torch

from helios.core.rng import seed_rngs
from helios.data import DataModule
from helios.trainer._bars import ProgressBars
from helios.trainer._checkpoint import load_trained_model
from helios.trainer._execution import cudnn_benchmark, deterministic_kernels
from helios.trainer._fit import logged_exceptions
from helios.trainer._hooks import Hooks, evaluate
from helios.trainer._model import Model
from helios.trainer._plugin import PluginRegistry
from helios.trainer._settings import TrainerSettings
from helios.trainer.logging import LogTargets, RunLoggers, get_root_logger


def run_test(
    settings: TrainerSettings, model: Model, datamodule: DataModule, plugins: PluginRegistry, is_trained: bool
) -> None:
    """Test a model on the test split.

    Args:
        settings: the trainer's settings.
        model: the user's model.
        datamodule: the user's data.
        plugins: the trainer's plug-ins.
        is_trained: the model was trained by this trainer and is tested as it is; otherwise it is set up and
            given its state from the last checkpoint of the run, if there is one.
    """
    seed_rngs(settings.random_seed)
    nowhere = LogTargets(log_file=None, run_folder=None)
    with ExitStack() as stack:
        loggers = RunLoggers(nowhere, capture_warnings=settings.capture_warnings, event_sizes=None)
        stack.callback(loggers.close)
        stack.enter_context(logged_exceptions())
        stack.callback(datamodule.teardown)
        stack.enter_context(deterministic_kernels(settings.enable_deterministic))
        datamodule.prepare_data()
        datamodule.setup()
        loader = datamodule.test_dataloader()
        if loader is None:
            raise ValueError(
                f"{type(datamodule).__name__} has no test split: its setup must assign self._test_dataset"
            )
        for plugin in plugins.values():
            plugin.setup()
            plugin.configure_model(model)
        if not is_trained:
            model.setup(fast_init=False)
            name = settings.run_name or model.save_name
            path = load_trained_model(settings.chkpt_root, name, model)
            get_root_logger().info("testing the model %s", "as set up" if path is None else f"of {path}")
        model.load_for_testing()
        hooks = Hooks(model, plugins)
        bars = ProgressBars(settings.enable_progress_bar, settings.train_unit, settings.total_steps)
        stack.enter_context(contextlib.closing(bars))
        hooks.testing_start()
        with torch.no_grad(), cudnn_benchmark(False):
            evaluate(loader, hooks.testing_batch, bars.evaluation("test", len(loader)))
        hooks.testing_end()
