"""A plug-in that notes what every step of a run has done, and interrupts it at a given place."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from helios.core.rng import get_rng_state_dict
from helios.data import ResumableDataLoader
from helios.trainer._model import Model
from helios.trainer._plugin import Plugin
from helios.trainer._training_state import TrainingState
from helios.trainer.logging import get_tensorboard_writer
from helios.trainer.testing._leaf import Snapshot, leaf_of, plain_tensor, snapshot_of
from helios.trainer.testing._parts import Part, parts_in, parts_of

PLUG_ID = "check_resume"


class Phase(Enum):
    """What has just been done."""

    BATCH = "when the batch came"
    STEP = "after the step"
    VALIDATION = "after the validation"
    END = "at the end"


class Moment(NamedTuple):
    """A place in a run, the same in every run of it: a phase, and the number of the batch or validation."""

    phase: Phase
    number: int


class InterruptionKind(Enum):
    """How a run is interrupted."""

    STOP = "asked to stop at step {}"
    STOP_IN_VALIDATION = "asked to stop in validation {}"
    KILL = "killed at step {}"


@dataclass(frozen=True)
class Interruption:
    """Where and how a run is interrupted.

    Attributes:
        kind: how.
        at: number of the batch, or of the validation, from 1.
    """

    kind: InterruptionKind
    at: int

    def __str__(self) -> str:
        return self.kind.value.format(self.at)


class Killed(BaseException):
    """Ends a run in mid-step. Not an Exception, so that nobody handles it, as nobody handles a kill."""


@dataclass(frozen=True)
class Seen:
    """What was there at a moment.

    Attributes:
        snapshot: all parts.
        global_iteration: batches trained on.
        epoch: number of the epoch, from 1.
    """

    snapshot: Snapshot
    global_iteration: int
    epoch: int


class Scalar(NamedTuple):
    """A scalar that was logged, and the batch after which it was."""

    name: str
    step: int | None
    value: str
    global_iteration: int
    epoch: int


@dataclass(frozen=True)
class Save:
    """What was there, and had been logged, when a checkpoint was taken."""

    snapshot: Snapshot
    scalars: tuple[Scalar, ...]
    global_iteration: int


@dataclass
class Recording:
    """All that was noted of a process.

    Attributes:
        moments: what was seen, in the order of the run.
        scalars: what TensorBoard has: of the processes before until the checkpoint, and of this one.
        save: number of the checkpoint that it went on from; None if it began.
        loaded: what was there once it was loaded.
        plugins_started: what was there after the plug-ins' `on_training_start`.
        started: what was there after the model's.
        captured: the value that was asked for.
        interrupted: it was, as it was meant to be.
        resumed_from: name of the file that it went on from.
        model: the model at the end.
        legacy_moved: when NumPy's legacy generator was used in this process.
        plugins: the user's plug-ins.
        train_loader: the loader of the training split.
    """

    moments: dict[Moment, Seen] = field(default_factory=dict)
    scalars: list[Scalar] = field(default_factory=list)
    save: int | None = None
    loaded: Snapshot = field(default_factory=dict)
    plugins_started: Snapshot = field(default_factory=dict)
    started: Snapshot = field(default_factory=dict)
    captured: Any = None
    interrupted: bool = False
    resumed_from: str | None = None
    legacy_moved: set[str] = field(default_factory=set)
    model: Any = None
    plugins: tuple[Plugin, ...] = ()
    train_loader: Any = None


class Recorder(Plugin):
    """Notes what every step has done.

    Args:
        interruption: where to interrupt the run, if anywhere.
        saves: of all processes of one run; checkpoints are appended.
        ignored: patterns of paths to leave out.
        folder: the run's folder.
        capture: a moment and a path whose value is to be kept; the run is killed then.
    """

    def __init__(
        self,
        interruption: Interruption | None,
        saves: list[Save],
        ignored: Iterable[str],
        folder: str,
        capture: tuple[Moment, str] | None = None,
    ) -> None:
        super().__init__(PLUG_ID)
        self.recording = Recording()
        self._interruption = interruption
        self._saves = saves
        self._ignored = tuple(ignored)
        self._folder = folder
        self._capture = capture
        self._state = TrainingState()
        self._legacy = legacy_state()

    def configure_loaders(
        self, train_loader: ResumableDataLoader, valid_loader: ResumableDataLoader | None
    ) -> None:
        """Take note of the training loader."""
        self.recording.train_loader = train_loader

    def configure_model(self, model: Model) -> None:
        """Take note of the model, and listen to what it logs and to the last hook before the loop."""
        self.recording.model = self._model = model
        self.recording.plugins = tuple(p for p in self.trainer.plugins.values() if p is not self)
        start = model.on_training_start

        def on_training_start() -> None:
            start()
            self.recording.started = self._look_at_objects()
            if self.recording.save is not None:  # what was logged in start-up the trainer discards
                self.recording.scalars[:] = self._saves[self.recording.save].scalars
            self._note_legacy("before the first batch")

        vars(model)["on_training_start"] = on_training_start
        assert model._scalar_log is not None, "a run is in progress"
        self._state = model._scalar_log._state  # the loop's own, also before the first batch of a resumed run
        self._listen(model._scalar_log, "add")
        if (writer := get_tensorboard_writer()) is not None:
            self._listen(writer, "add_scalar")

    def on_training_start(self) -> None:
        """Look at what the hooks of other plug-ins have changed."""
        self.recording.plugins_started = self._look_at_objects()

    def state_dict(self) -> dict[str, Any]:
        """Note what is there when a checkpoint is taken."""
        scalars = tuple(self.recording.scalars)
        save = Save(self._look_at_objects(), scalars, self._state.global_iteration)
        self._saves.append(save)
        return {"save": len(self._saves) - 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Look at what model and plug-ins have loaded."""
        self.recording.save = state["save"]
        self.recording.loaded = self._look_at_objects()

    def observe_training_batch(self, batch: Any, state: TrainingState) -> None:
        """Note the batch."""
        loader = self.recording.train_loader
        order = [] if loader.last_indices is None else [Part("sample order", list(loader.last_indices))]
        parts = chain(order, parts_in("batch", batch))
        self._note(Moment(Phase.BATCH, state.global_iteration), chain(parts, self._surroundings()))
        self._note_legacy("while a batch was fetched")

    def observe_training_step(self, state: TrainingState) -> None:
        """Note what the batch has done, and interrupt the run if it is time."""
        self._note_all(Moment(Phase.STEP, state.global_iteration))
        self._note_legacy("in a training step")
        if self._interruption == Interruption(InterruptionKind.STOP, state.global_iteration):
            self._stop()
        if self._interruption == Interruption(InterruptionKind.KILL, state.global_iteration):
            self.recording.interrupted = True
            raise Killed

    def on_validation_start(self, validation_cycle: int) -> None:
        """Interrupt the run if it is time."""
        self._note_legacy("between two steps")
        if self._interruption == Interruption(InterruptionKind.STOP_IN_VALIDATION, validation_cycle):
            self._stop()

    def on_validation_end(self, validation_cycle: int) -> None:
        """Note what the validation has done."""
        self._note_all(Moment(Phase.VALIDATION, validation_cycle))
        self._note_legacy("in a validation")

    def finish(self) -> None:
        """Note what there is in the end."""
        self._note_all(Moment(Phase.END, 0))

    def _stop(self) -> None:
        self.recording.interrupted = True
        self.trainer.request_stop()

    def _listen(self, target: Any, method: str) -> None:
        told = getattr(target, method)

        @functools.wraps(told)
        def listen(name: str, value: Any, *rest: Any, **options: Any) -> Any:
            if "walltime" not in options:  # else it is `Model.log` that writes what was noted already
                step = options.get("global_step", options.get("step", rest[0] if rest else None))
                at = self._state
                scalar = Scalar(name, step, str(leaf_of(value)), at.global_iteration, at.global_epoch)
                self.recording.scalars.append(scalar)
            return told(name, value, *rest, **options)

        setattr(target, method, listen)

    def _note_all(self, moment: Moment) -> None:
        self._note(moment, chain(self._objects(), self._surroundings()))

    def _note(self, moment: Moment, parts: Iterator[Part]) -> None:
        if self._capture is not None:
            if self._capture[0] == moment:
                self.recording.captured = next(
                    (_copy(part.value) for part in parts if part.path == self._capture[1]), None
                )
                raise Killed
            return
        snapshot = snapshot_of(parts, self._ignored, self._folder)
        self.recording.moments[moment] = Seen(
            snapshot, self._state.global_iteration, self._state.global_epoch
        )

    def _look_at_objects(self) -> Snapshot:
        return snapshot_of(self._objects(), self._ignored, self._folder)

    def _objects(self) -> Iterator[Part]:
        yield from parts_of(self._model)
        for plugin in self.recording.plugins:
            yield from parts_of(plugin, f"plugins.{plugin.plug_id}.")

    def _surroundings(self) -> Iterator[Part]:
        for name, state in get_rng_state_dict().items():
            yield Part(f"RNG {name}", generator_bits(state))
        for name, value in self._state.to_dict().items():
            if name not in ("average_iter_time", "trainer"):  # measured; and empty while a run is in progress
                yield Part(f"TrainingState.{name}", value)

    def _note_legacy(self, when: str) -> None:
        """Note whether NumPy's legacy generator was used since it was looked at last."""
        now = legacy_state()
        if now != self._legacy:
            self._legacy = now
            self.recording.legacy_moved.add(when)


def generator_bits(state: Any) -> Any:
    """Return the state of a generator in a form that is compared and not shown."""
    return state if isinstance(state, torch.Tensor) else np.frombuffer(repr(state).encode(), np.uint8)


def legacy_state() -> bytes:
    """Return the state of NumPy's legacy generator as bytes."""
    _name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  # it is what is looked for
    return np.asarray(keys).tobytes() + repr(rest).encode()


def _copy(value: Any) -> Any:
    with suppress(NotImplementedError):
        if isinstance(value, torch.Tensor):
            return plain_tensor(value).clone()
    return np.array(value) if isinstance(value, np.ndarray) else value
