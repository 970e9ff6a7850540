"""Running a user's model as new processes would: new objects, foreign generators, a folder for each run."""

import contextlib
import dataclasses
import itertools
import logging
import random
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from helios.chkpt import find_last_checkpoint
from helios.core.rng import derive_seed, preserve_rng_state, seed_rngs
from helios.data import DataModule
from helios.trainer._model import Model
from helios.trainer._trainer import Trainer
from helios.trainer.logging import get_root_logger
from helios.trainer.testing._recorder import Interruption, Killed, Moment, Recorder, Recording, Save

T = TypeVar("T")


@dataclass(frozen=True)
class Makers:
    """What makes the objects of a run, as `check_resume` was given it."""

    make_trainer: Callable[[Path], Trainer]
    make_model: Callable[[], Model]
    make_datamodule: Callable[[], DataModule]


@dataclass(frozen=True)
class Processes:
    """The processes of one run, one after the other.

    Attributes:
        recordings: of each.
        saves: the checkpoints of all.
    """

    recordings: list[Recording]
    saves: list[Save]


class Runner:
    """Runs a user's model.

    Args:
        makers: make its objects.
        seed: of what the generators are at before a run seeds them.
        ignored: patterns of paths to leave out.
    """

    def __init__(self, makers: Makers, seed: int, ignored: Sequence[str]) -> None:
        self._makers = makers
        self._seed = seed
        self._ignored = ignored
        self._process_numbers = itertools.count()
        self._made: list[weakref.ref[Any]] = []
        self.settings: Any = None  # of the last trainer

    def run(self, *interruptions: Interruption, capture: tuple[int, Moment, str] | None = None) -> Processes:
        """Run in a process for each interruption, and one to the end.

        Args:
            *interruptions: of the first process, the second one and so on.
            capture: the number of a process, and what it is to keep; then all ends.
        """
        recordings: list[Recording] = []
        saves: list[Save] = []
        with tempfile.TemporaryDirectory(prefix="helios-check-resume-") as folder:
            for number, interruption in enumerate([*interruptions, None]):
                wanted = capture[1:] if capture is not None and capture[0] == number else None
                try:
                    recordings.append(self._run_process(Path(folder), interruption, saves, wanted))
                except Exception as error:
                    before = ", ".join(map(str, interruptions[:number]))
                    error.add_note(
                        f"check_resume: raised in the run that was resumed after being {before}"
                        if before
                        else "check_resume: raised in a run from the beginning"
                    )
                    raise
                if wanted is not None or (interruption is not None and not recordings[-1].interrupted):
                    break  # it ended before it could be interrupted
        return Processes(recordings, saves)

    def _run_process(
        self,
        folder: Path,
        interruption: Interruption | None,
        saves: list[Save],
        capture: tuple[Moment, str] | None,
    ) -> Recording:
        root = folder / "chkpt"
        root.mkdir(exist_ok=True)
        origin = find_last_checkpoint(root)
        self._scramble(is_resumed=origin is not None)
        trainer, model, datamodule = self._make(root)
        if trainer._spawns:
            raise ValueError(
                f"check_resume runs in one process, and make_trainer gives a Trainer of {len(trainer._executions)}: "
                "leave nprocs out, or give one of the gpus"
            )
        trainer.settings = dataclasses.replace(
            trainer.settings,
            print_banner=False,
            enable_progress_bar=False,
            log_path=folder / "logs",
            run_path=folder / "runs",
        )
        recorder = Recorder(interruption, saves, self._ignored, str(root), capture)
        trainer.plugins.append(recorder)
        recording = recorder.recording
        recording.resumed_from = None if origin is None else origin.name
        with contextlib.suppress(Killed):
            if trainer.fit(model, datamodule):
                recording.interrupted = False
                recorder.finish()
        return recording

    def _scramble(self, is_resumed: bool) -> None:
        """Put the generators where another process would find them: `fit` seeds those that it knows.

        Torch starts every process at the same place, so networks may well be made before `fit`: only what is resumed
        finds it elsewhere, since a script may do other things before.
        """
        number = next(self._process_numbers)
        seed_rngs(derive_seed(self._seed, "torch", number if is_resumed else 0))
        foreign = derive_seed(self._seed, "process", number)
        random.seed(foreign)
        np.random.seed(foreign % 2**32)  # noqa: NPY002  # what has come to depend on it is to be seen

    def _make(self, root: Path) -> tuple[Trainer, Model, DataModule]:
        makers = self._makers
        trainer = _checked("make_trainer", makers.make_trainer(root), Trainer)
        model = _checked("make_model", makers.make_model(), Model)  # type: ignore[type-abstract]
        datamodule = _checked("make_datamodule", makers.make_datamodule(), DataModule)
        made = {"make_trainer": trainer, "make_model": model, "make_datamodule": datamodule}
        for name, value in made.items():
            self._check_is_new(f"{name} returned", value)
        for plugin in trainer.plugins.values():
            self._check_is_new("make_trainer added to trainer.plugins", plugin)
        self._check_settings(trainer, root)
        return trainer, model, datamodule

    def _check_is_new(self, what: str, value: Any) -> None:
        if any(ref() is value for ref in self._made):
            raise ValueError(
                f"{what} the same {type(value).__name__} as before: it must make a new one each time it is called, "
                "as a new process does, or nothing would have to be loaded"
            )
        self._made.append(weakref.ref(value))

    def _check_settings(self, trainer: Trainer, root: Path) -> None:
        settings = self.settings = trainer.settings
        if settings.dry_run is not None:
            raise ValueError(
                f"make_trainer must make a Trainer that saves checkpoints, found dry_run={settings.dry_run}"
            )
        if settings.chkpt_root is None or settings.chkpt_root.resolve() != root.resolve():
            raise ValueError(
                "make_trainer is given a new folder for every run and must pass it on: "
                f"lambda chkpt_root: Trainer(chkpt_root=chkpt_root, ...); found chkpt_root={settings.chkpt_root}"
            )
        if settings.chkpt_frequency is None:
            raise ValueError(
                "make_trainer must make a Trainer that saves checkpoints: give it a chkpt_frequency, as the real run "
                "has; found None"
            )


def _checked(name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must return a {kind.__name__}, found {type(value).__name__}")
    return value


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave generators as they were, and say nothing of single runs but warnings."""
    legacy = np.random.get_state(legacy=True)  # noqa: NPY002  # put back below
    logger = get_root_logger()

    def is_warning(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logger.addFilter(is_warning)
    try:
        with preserve_rng_state(), warnings.catch_warnings():
            # A resumed process may well begin with what is due at the end of an epoch.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            yield
    finally:
        logger.removeFilter(is_warning)
        np.random.set_state(legacy)  # noqa: NPY002
