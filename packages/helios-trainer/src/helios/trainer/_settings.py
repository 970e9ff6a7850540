"""The arguments of a Trainer, checked once."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from helios.core.rng import DEFAULT_SEED
from helios.trainer._naming import check_name
from helios.trainer._replicas import Strategy
from helios.trainer._seconds import check_seconds
from helios.trainer._training_state import TrainingUnit
from helios.trainer.logging._places import check_place, check_tensorboard

_FLAGS = (
    "enable_cudnn_benchmark",
    "enable_deterministic",
    "enable_tensorboard",
    "enable_file_logging",
    "capture_warnings",
    "enable_progress_bar",
    "print_banner",
    "async_chkpt",
)
_OPTIONAL_COUNTS = (
    "valid_frequency",
    "chkpt_frequency",
    "print_frequency",
    "early_stop_cycles",
    "keep_last",
    "nprocs",
    "dry_run",
)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What a Trainer was asked for; see `Trainer` for the meaning of each.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range or contradicts another.
    """

    run_name: str
    train_unit: TrainingUnit
    total_steps: int | float
    valid_frequency: int | None
    chkpt_frequency: int | None
    print_frequency: int | None
    accumulation_steps: int
    enable_cudnn_benchmark: bool
    enable_deterministic: bool
    early_stop_cycles: int | None
    use_cpu: bool | None
    gpus: list[int] | None
    random_seed: int
    enable_tensorboard: bool
    enable_file_logging: bool
    capture_warnings: bool
    enable_progress_bar: bool
    chkpt_root: Path | None
    log_path: Path | None
    run_path: Path | None
    print_banner: bool
    keep_last: int | None
    async_chkpt: bool
    nprocs: int | None
    dry_run: int | None
    strategy: Strategy
    accept_on_resume: tuple[str, ...]
    dist_timeout_s: float | None

    def __post_init__(self) -> None:
        check_name("run_name", self.run_name)
        if not isinstance(self.train_unit, TrainingUnit):
            raise TypeError(
                f"train_unit must be a TrainingUnit, found {type(self.train_unit).__name__} "
                f"{self.train_unit!r}; TrainingUnit.from_str reads a name"
            )
        if not isinstance(self.strategy, Strategy):
            raise TypeError(
                "strategy must be Strategy.DDP or Strategy.FSDP, found "
                f"{type(self.strategy).__name__} {self.strategy!r}"
            )
        for name in _FLAGS:
            _check_flag(name, getattr(self, name))
        for name in _OPTIONAL_COUNTS:
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), minimum=1)
        _check_count("accumulation_steps", self.accumulation_steps, minimum=1)
        _check_count("random_seed", self.random_seed, minimum=0)
        if self.random_seed >= 2**64:
            raise ValueError(f"random_seed must be less than 2**64, found {self.random_seed}")
        if self.dist_timeout_s is not None:
            check_seconds("dist_timeout_s", self.dist_timeout_s)
        self._check_end()
        self._check_pairs()

    def _check_end(self) -> None:
        if isinstance(self.total_steps, float) and self.total_steps == math.inf:
            if self.early_stop_cycles is None:
                raise ValueError(
                    "total_steps is infinite and nothing else ends the run: set early_stop_cycles and "
                    "valid_frequency too, or give a large int if should_training_stop will end it"
                )
        elif isinstance(self.total_steps, float):
            raise TypeError(f"total_steps must be an int or infinity, found {self.total_steps!r}")
        else:
            _check_count("total_steps", self.total_steps, minimum=0)
        if self.early_stop_cycles is not None and self.valid_frequency is None:
            raise ValueError(
                f"early_stop_cycles={self.early_stop_cycles} counts validations, but valid_frequency is None: "
                "set it too"
            )

    def _check_pairs(self) -> None:
        if self.enable_deterministic and self.enable_cudnn_benchmark:
            raise ValueError(
                "enable_deterministic and enable_cudnn_benchmark exclude each other: benchmarking chooses "
                "kernels by their speed on the day; set one of them to False"
            )
        for flag, name in (("enable_tensorboard", "run_path"), ("enable_file_logging", "log_path")):
            if getattr(self, flag) and getattr(self, name) is None:
                raise ValueError(f"{flag} is True, but {name} is None: say where to write, or leave it False")
        for name in ("chkpt_root", "log_path", "run_path"):
            path = getattr(self, name)
            places = () if path is None else (path, *path.parents)
            # Path.exists raises for what this user may not see.
            existing = next((p for p in places if os.path.exists(p)), None)  # noqa: PTH110
            if existing is not None and not existing.is_dir():
                raise ValueError(f"{name} must be a folder, found {path}, where {existing} is a file")
        for flag, name in (("enable_tensorboard", "run_path"), ("enable_file_logging", "log_path")):
            if getattr(self, flag):
                check_place(flag, name, getattr(self, name))
        if self.enable_tensorboard:
            check_tensorboard()

    @property
    def save_root(self) -> Path | None:
        """Folder that checkpoints are saved in; None if none are, for which both root and frequency are needed."""
        return None if self.chkpt_frequency is None else self.chkpt_root

    @property
    def log_folders(self) -> tuple[Path | None, Path | None]:
        """Folders of log files and of TensorBoard's folders; None for what is not enabled."""
        return (
            self.log_path if self.enable_file_logging else None,
            self.run_path if self.enable_tensorboard else None,
        )

    def check_accepted(self, plug_ids: Iterable[str]) -> None:
        """Check `accept_on_resume` against all that can be accepted.

        Raises:
            ValueError: it has another name.
        """
        known = [*self.decisive(), "rng", "rng.cuda", "data", *plug_ids]
        for name in self.accept_on_resume:
            if name not in known:
                raise ValueError(f"accept_on_resume can have {', '.join(known)}; found {name!r}")

    def noted(self) -> dict[str, Any]:
        """Return the settings that a resumed run may change, though it becomes another run by it."""
        return {
            "valid_frequency": self.valid_frequency,
            "early_stop_cycles": self.early_stop_cycles,
            "enable_deterministic": self.enable_deterministic,
            "strategy": self.strategy.name,
        }

    def decisive(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run it continues."""
        return {
            "train_unit": self.train_unit.name,
            "accumulation_steps": self.accumulation_steps,
            "random_seed": self.random_seed,
        }


@contextmanager
def rehearsing(settings: TrainerSettings) -> Iterator[TrainerSettings]:
    """Give the settings; for a dry run, those of a rehearsal.

    It has a few batches, a validation and a save. Nothing is written but what TensorBoard gets, whose writer the hooks
    may take for granted, and that is deleted.
    """
    if settings.dry_run is None:
        yield settings
        return
    by_epoch = settings.train_unit is TrainingUnit.EPOCH
    total_steps = 1 if by_epoch else max(1, settings.dry_run // settings.accumulation_steps)
    with TemporaryDirectory(prefix="helios-dry-run-") as folder:
        yield dataclasses.replace(
            settings,
            total_steps=total_steps,
            valid_frequency=settings.valid_frequency and total_steps,
            chkpt_frequency=total_steps,
            print_frequency=settings.print_frequency and 1,
            chkpt_root=None,
            enable_file_logging=False,
            run_path=Path(folder),
        )


def make_settings(**arguments: Any) -> TrainerSettings:
    """Make settings from a Trainer's arguments: None is the default seed, a str may stand for a path."""
    for name in ("chkpt_root", "log_path", "run_path"):
        value = arguments[name]
        if value is not None and not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} must be a path, found {type(value).__name__} {value!r}")
        if value == "":
            raise ValueError(f"{name} must be a path or None, found ''; '.' is the working folder")
        arguments[name] = None if value is None else Path(value)
    if arguments["random_seed"] is None:
        arguments["random_seed"] = DEFAULT_SEED
    arguments["accept_on_resume"] = _names("accept_on_resume", arguments["accept_on_resume"])
    assert set(arguments) == {f.name for f in fields(TrainerSettings)}
    return TrainerSettings(**arguments)


def _names(argument: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} must be a list of names, found {type(value).__name__} {value!r}")
    names = tuple(value)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a list of names, found {value!r}")
    return names


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, found {type(value).__name__} {value!r}")


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, found {type(value).__name__} {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be {minimum} or more, found {value}")
