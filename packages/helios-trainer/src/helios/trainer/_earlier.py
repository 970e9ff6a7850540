"""Going on with runs that earlier releases of Helios began, from their migrated checkpoints.

Those files hold counters, model, generators, plug-ins and paths; what this release keeps besides under
`training_state["trainer"]` has to be inferred:

- **The cut.** Earlier releases saved after the validation of a step, if there was one, and had counted its outcome in
  `early_stop_count` by then: in their files the counter is always that after `validation_cycles` validations. So
  `have_metrics_improved` is not asked again; only the decisions are left, to stop or not. A validation sets
  `running_iter` to 0, so 0 after some validation tells that one came just before.
- **The unit.** Only ITERATION saved within an epoch, and only ITERATION with accumulation makes `current_iteration`
  and `global_iteration` differ, by its factor. Settings that contradict this are refused.
- **What nobody kept**: the base class's tables, gradients, what was frozen. A save came after a complete iteration, so
  no gradient was waiting; the sums of losses since the last validation are lost, as they were in those releases.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios.chkpt import parse_name
from helios.data import ResumableDataLoader
from helios.trainer._loop import Cut, CutPoint, StopReason
from helios.trainer._model import Model
from helios.trainer._modules import restore_gradients
from helios.trainer._plugin import PluginRegistry
from helios.trainer._ranks import Ranks
from helios.trainer._resumption import Resumption
from helios.trainer._settings import TrainerSettings
from helios.trainer._training_state import TrainingState, TrainingUnit
from helios.trainer.logging import get_root_logger
from helios.trainer.logging._events import event_file_sizes
from helios.trainer.logging._places import LogTargets

_EARLIER_DATA = 0  # the `format` of a loader's state that a migration made


def is_earlier(checkpoint: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint is the migrated one of an earlier release."""
    data, state = checkpoint.get("data"), checkpoint.get("training_state")
    has_earlier_data = isinstance(data, Mapping) and data.get("format") == _EARLIER_DATA
    return has_earlier_data and isinstance(state, Mapping) and "trainer" not in state


class EarlierResumption(Resumption):
    """A migrated checkpoint that a run goes on from; see the module.

    Args:
        path: where it was read from.
        checkpoint: what it holds.
        ranks: this process among those of the run.
        settings: the trainer's settings.

    Raises:
        ValueError: it lacks a part.
    """

    is_earlier = True

    def __init__(
        self, path: Path, checkpoint: dict[str, Any], ranks: Ranks, settings: TrainerSettings
    ) -> None:
        self._settings = settings
        self._targets = targets_of(checkpoint)
        super().__init__(path, checkpoint, ranks, settings.accept_on_resume)

    def _read(self) -> tuple[TrainingState, Cut, StopReason | None, dict[str, int]]:
        state = TrainingState.from_dict({**self._checkpoint["training_state"], "trainer": {}})
        by_epoch = self._settings.train_unit is TrainingUnit.EPOCH
        cut = Cut(
            CutPoint.EPOCH_END if by_epoch else CutPoint.ITERATION,
            has_validated=state.validation_cycles > 0 and state.running_iter == 0,
            is_counted=True,
        )
        # As long as they are now: it is not known what came after the checkpoint, so nothing is purged.
        folder = self._targets.run_folder
        return state, cut, None, {} if folder is None else event_file_sizes(folder)

    def check_settings(self, settings: TrainerSettings) -> None:
        """Refuse settings that the counters contradict.

        Raises:
            ValueError: another train_unit or accumulation_steps than the run had.
        """
        if settings.train_unit is TrainingUnit.EPOCH:
            self._check_is_by_epoch()
        else:
            self._check_accumulation(settings.accumulation_steps)

    def _check_is_by_epoch(self) -> None:
        state = self.state
        if state.dataset_iter > 0:
            reason = f"it was saved {state.dataset_iter} batches into an epoch"
        elif state.current_iteration != state.global_iteration:
            reason = f"it has {state.current_iteration} iterations in {state.global_iteration} batches"
        else:
            return
        self._accept(
            "train_unit",
            f"{self.path} is of a run by ITERATION that an earlier release of Helios began ({reason}), this trainer "
            "has train_unit=EPOCH. Use train_unit=ITERATION, or another run_name or chkpt_root",
        )

    def _check_accumulation(self, now: int) -> None:
        complete, batches = self.state.current_iteration, self.state.global_iteration
        if complete * now == batches:
            return
        then = f"{batches // complete}" if complete and batches % complete == 0 else "another value"
        self._accept(
            "accumulation_steps",
            f"{self.path} has {complete} iterations in {batches} batches: an earlier release of Helios began the run "
            f"with accumulation_steps={then}, this trainer has accumulation_steps={now}. Use the old value, or "
            "another run_name or chkpt_root",
        )

    def check_plugins(self, plugins: PluginRegistry) -> None:
        """Let plug-ins begin anew if the file has none: before 1.2.7 their states were not kept.

        Raises:
            ValueError: it has states of plug-ins, but not that of one.
        """
        if not self._plug_ids() and plugins:
            get_root_logger().warning(
                "%s has no state of any plug-in (releases of Helios before 1.2.7 kept none): %s begins anew",
                self.path,
                ", ".join(plugins),
            )
        else:
            super().check_plugins(plugins)

    def targets(self) -> LogTargets:
        """Return where the run wrote, as far as that is still there."""
        return self._targets

    def restore_loader(self, loader: ResumableDataLoader) -> None:
        """Put the training loader where it stood, in the order of that release; say what is taken on trust."""
        super().restore_loader(loader)
        get_root_logger().warning(
            "%s is of a run that an earlier release of Helios began. Its seeds are not in the file: the order of "
            "samples goes on with random_seed=%d, which the training loader has, and the trainer has random_seed=%d; "
            "other seeds would make another run of it. Settings, batch size and dataset could not be compared either",
            self.path,
            loader.sampler.seed,
            self._settings.random_seed,
        )

    def _restore_own(self, model: Model, is_over: bool) -> None:
        restore_gradients(model, {}, {})


def targets_of(checkpoint: Mapping[str, Any]) -> LogTargets:
    """Return where an earlier run wrote, if that is still there: it may have been moved to another machine."""
    before = LogTargets.from_dict(checkpoint)
    log_file, run_folder = before.log_file, before.run_folder
    if log_file is not None and not log_file.is_file():
        _say_gone("log file", log_file)
        log_file = None
    if run_folder is not None and not run_folder.is_dir():
        _say_gone("TensorBoard folder", run_folder)
        run_folder = None
    return LogTargets(log_file, run_folder)


def _say_gone(what: str, path: Path) -> None:
    get_root_logger().warning("the run's %s is gone, a new one is begun if it is enabled: %s", what, path)


def say_where_others_are(root: Path, run_name: str, save_name: str) -> None:
    """Warn if a run begins anew although an earlier release kept checkpoints of the model there.

    It named them after the model, whatever the run's name, and put them in a folder of that name, which may be what
    `root` was set to.
    """
    is_folder_of_model = root.name == save_name and run_name != save_name
    for folder in [root / save_name, *([root] if is_folder_of_model else [])]:
        paths = folder.glob("*.pth") if folder.is_dir() else ()
        if any((name := parse_name(path.name)) and name.run_name == save_name for path in paths):
            get_root_logger().warning(
                "run %s begins anew, although there are checkpoints %s. Earlier releases of Helios kept a model's "
                "checkpoints there: to go on from them, migrate them (python -m helios.chkpt_migrator %s), and set "
                "chkpt_root to that folder and run_name to %r",
                run_name,
                folder / f"{save_name}_epoch_*.pth",
                folder,
                save_name,
            )
