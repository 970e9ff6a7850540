"""Plugin: something that joins a run without being the model, and the registry of a trainer's plug-ins."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from helios.data import ResumableDataLoader
from helios.trainer._training_state import TrainingState

if TYPE_CHECKING:
    from helios.trainer._model import Model
    from helios.trainer._trainer import Trainer

RESERVED_KEYS = frozenset(
    {"training_state", "model", "rng", "version", "sharded", "log_path", "run_path", "data"}
)


@dataclass
class UniquePluginOverrides:
    """What at most one plug-in of a trainer may do; a plug-in that overrides the method does it.

    Attributes:
        training_batch: process training batches.
        validation_batch: process validation batches.
        testing_batch: process test batches.
        should_training_stop: have a say in stopping.
    """

    training_batch: bool = False
    validation_batch: bool = False
    testing_batch: bool = False
    should_training_stop: bool = False


class Plugin:
    """Base of all plug-ins. Its hooks run before the model's of the same name.

    Args:
        plug_id: name of the plug-in, and of its state in a checkpoint.

    Attributes:
        plug_id: as given.
        unique_overrides: what this plug-in claims for itself alone.
        trainer: the Trainer, or None before `fit` and `test`.

    Raises:
        TypeError: `plug_id` is not a str.
        ValueError: `plug_id` is empty or a key that checkpoints have already.
    """

    def __init__(self, plug_id: str) -> None:
        if not isinstance(plug_id, str):
            raise TypeError(f"plug_id must be a str, found {type(plug_id).__name__} {plug_id!r}")
        if not plug_id or plug_id in RESERVED_KEYS:
            raise ValueError(
                f"plug_id names the plug-in's state in a checkpoint: it must not be empty nor one of "
                f"{sorted(RESERVED_KEYS)}, found {plug_id!r}"
            )
        self.plug_id = plug_id
        self.unique_overrides = UniquePluginOverrides()
        self.trainer: Any = None

    def setup(self) -> None:
        """Get ready; runs in every process, before the model's `setup`. Not again to test what was just trained."""

    def configure_trainer(self, trainer: "Trainer") -> None:
        """Change the trainer, for example its lists of exceptions; runs before `setup`."""

    def configure_model(self, model: "Model") -> None:
        """Change the model before its `setup`."""

    def configure_loaders(
        self, train_loader: ResumableDataLoader, valid_loader: ResumableDataLoader | None
    ) -> None:
        """Take note of the loaders that training uses; runs before `setup`.

        Args:
            train_loader: loader of the training split.
            valid_loader: loader of the validation split; None if there are no validations.
        """

    def on_training_start(self) -> None:
        """Called when training starts, in every process; after a resume with the state restored.

        So do not reset here what `state_dict` returns: give it its first value in `setup`.
        """

    def on_training_end(self) -> None:
        """Called when training ends, but not when it is interrupted."""

    def on_validation_start(self, validation_cycle: int) -> None:
        """Called before a validation; its number counts from 1."""

    def on_validation_end(self, validation_cycle: int) -> None:
        """Called after a validation."""

    def on_testing_start(self) -> None:
        """Called before testing."""

    def on_testing_end(self) -> None:
        """Called after testing."""

    def process_training_batch(self, batch: Any, state: TrainingState) -> Any:
        """Return the batch that `train_step` gets."""
        return batch

    def observe_training_batch(self, batch: Any, state: TrainingState) -> None:
        """See the batch that `train_step` is about to get. Any number of plug-ins may."""

    def observe_training_step(self, state: TrainingState) -> None:
        """See what a batch has done: called after the model's `on_training_batch_end`. Any number of plug-ins may."""

    def process_validation_batch(self, batch: Any, step: int) -> Any:
        """Return the batch that `valid_step` gets."""
        return batch

    def process_testing_batch(self, batch: Any, step: int) -> Any:
        """Return the batch that `test_step` gets."""
        return batch

    def should_training_stop(self) -> bool:
        """Say whether training should stop now."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the plug-in: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the plug-in into a state that `state_dict` returned. Called after `setup`."""


class PluginRegistry(MutableMapping[str, Plugin]):
    """A trainer's plug-ins by id, in the order in which they were added.

    `plugins.append(plugin)` and `plugins[plugin.plug_id] = plugin` both add one.
    """

    def __init__(self) -> None:
        self._plugins: dict[str, Plugin] = {}

    def append(self, plugin: Plugin) -> None:
        """Add a plug-in under its id.

        Raises:
            TypeError: it is not a Plugin, or its `__init__` does not call Plugin's.
            ValueError: its id is taken, or another plug-in has one of its unique overrides.
        """
        _check_is_plugin(plugin)
        if plugin.plug_id in self._plugins:
            raise ValueError(
                f"plug_id {plugin.plug_id!r} is taken by another plug-in: give one of them another id"
            )
        for override in fields(UniquePluginOverrides):
            other = self.owner_of(override.name)
            if other is not None and _claims(plugin, override.name):
                raise ValueError(
                    f"plug-in {plugin.plug_id!r} overrides {override.name}, which plug-in {other.plug_id!r} "
                    "does already: at most one may"
                )
        self._plugins[plugin.plug_id] = plugin

    def owner_of(self, override: str) -> Plugin | None:
        """Return the plug-in that claims a field of UniquePluginOverrides, or None."""
        return next((p for p in self._plugins.values() if _claims(p, override)), None)

    def __setitem__(self, plug_id: str, plugin: Plugin) -> None:
        _check_is_plugin(plugin)
        if plugin.plug_id != plug_id:
            raise ValueError(f"plug-in {plugin.plug_id!r} cannot be added under the id {plug_id!r}")
        self.append(plugin)

    def __getitem__(self, plug_id: str) -> Plugin:
        return self._plugins[plug_id]

    def __delitem__(self, plug_id: str) -> None:
        del self._plugins[plug_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plugins)

    def __len__(self) -> int:
        return len(self._plugins)


_METHODS = {
    "training_batch": "process_training_batch",
    "validation_batch": "process_validation_batch",
    "testing_batch": "process_testing_batch",
    "should_training_stop": "should_training_stop",
}


def _check_is_plugin(plugin: object) -> None:
    if not isinstance(plugin, Plugin):
        raise TypeError(f"plugin must be a Plugin, found {type(plugin).__name__}")
    if not hasattr(plugin, "unique_overrides"):
        raise TypeError(f"{type(plugin).__name__}.__init__ must call super().__init__(plug_id)")


def _claims(plugin: Plugin, override: str) -> bool:
    return is_overridden(plugin, _METHODS[override]) or bool(getattr(plugin.unique_overrides, override))


def is_overridden(part: object, method: str, base: type = Plugin) -> bool:
    """Whether a plug-in, or something of another base, has a method of its own instead of that of the base."""
    return getattr(type(part), method) is not getattr(base, method)
