"""Opening and closing what a run writes for people: console, log file, TensorBoard."""

import copy
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from helios.trainer.logging._events import event_file_sizes, purge_events

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TIME_FORMAT = "%b%d_%H-%M-%S"
_LINE_FORMAT = "[%(asctime)s] %(levelname)s: %(message)s"


def get_root_logger() -> logging.Logger:
    """Return the logger of Helios. While a run is in progress it writes to the console and the log file."""
    return logging.getLogger("helios")


def get_tensorboard_writer() -> "SummaryWriter | None":
    """Return the TensorBoard writer of the run in progress, or None if there is none."""
    # The logging module keeps its loggers for the whole process, so the writer needs no global of ours.
    writer: SummaryWriter | None = getattr(get_root_logger(), "tensorboard_writer", None)
    return writer


@dataclass(frozen=True)
class LogTargets:
    """Where a run writes; None where it does not.

    Attributes:
        log_file: the log file.
        run_folder: TensorBoard's folder of this run.
    """

    log_file: Path | None
    run_folder: Path | None

    def to_dict(self) -> dict[str, str]:
        """Return the places there are as text, under the keys that they have in a checkpoint."""
        places = {"log_path": self.log_file, "run_path": self.run_folder}
        return {key: str(path) for key, path in places.items() if path is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the places that `to_dict` gave, which may stand among other keys."""
        log_file, run_folder = values.get("log_path"), values.get("run_path")
        return cls(
            log_file=None if log_file is None else Path(log_file),
            run_folder=None if run_folder is None else Path(run_folder),
        )

    def restored(self, before: "LogTargets") -> "LogTargets":
        """Return these targets, with the places that a resumed run wrote to before where it had any."""
        return LogTargets(
            log_file=self.log_file and (before.log_file or self.log_file),
            run_folder=self.run_folder and (before.run_folder or self.run_folder),
        )


def new_targets(name: str, log_path: Path | None, run_path: Path | None) -> LogTargets:
    """Choose names that nobody has: `<name>_<MonthDay_Hour-Minute-Second>`."""
    moment = datetime.now()
    while True:
        stamped = f"{name}_{moment.strftime(_TIME_FORMAT)}"
        targets = LogTargets(
            log_file=None if log_path is None else log_path / f"{stamped}.log",
            run_folder=None if run_path is None else run_path / stamped,
        )
        if not any(p is not None and p.exists() for p in (targets.log_file, targets.run_folder)):
            return targets
        moment += timedelta(seconds=1)  # another run began in this second


class _ConsoleHandler(logging.Handler):
    """Writes lines above the progress bars instead of through them; tracebacks are for the log file."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            record = copy.copy(record)
            record.exc_info = record.exc_text = None
            line = self.format(record)
            with tqdm.external_write_mode():
                if sys.stdout is not None:
                    # At once: who reads a file while it grows wants to see it, and bars are drawn after it.
                    print(line, flush=True)
        except Exception:  # as every handler of the standard library: a closed terminal must not end a run
            self.handleError(record)


class RunLoggers:
    """The open loggers of a run: the console at first, then what `open_log_file` and `open_writer` add.

    What is logged before there is a log file is written to it once there is. `close` puts everything back.

    Args:
        capture_warnings: write Python's warnings to the same places.
    """

    def __init__(self, *, capture_warnings: bool) -> None:
        self.targets = LogTargets(log_file=None, run_folder=None)
        self._writer: Any = None
        self._loggers = [get_root_logger()]
        # Whoever captured warnings before goes on doing so after.
        self._starts_capture = capture_warnings and warnings.showwarning.__module__ != logging.__name__
        if capture_warnings:
            logging.captureWarnings(True)
            self._loggers.append(logging.getLogger("py.warnings"))
        self._level_before = get_root_logger().level
        get_root_logger().setLevel(logging.INFO)
        self._early = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handlers: list[logging.Handler] = []
        self._add(_ConsoleHandler())
        self._add(self._early)

    def open_log_file(self, targets: LogTargets) -> None:
        """Take the places to write to, and write to the log file, if there is to be one."""
        self.targets = targets
        if targets.log_file is not None:
            file = _open_log_file(targets.log_file)
            self._add(file)
            self._early.setTarget(file)
            self._early.flush()
        self._remove(self._early)

    def open_writer(self, event_sizes: Mapping[str, int] | None) -> None:
        """Write TensorBoard events, if it is enabled.

        Args:
            event_sizes: when a run is resumed, the sizes of its event files at the checkpoint: what they have
                beyond is purged.
        """
        if self.targets.run_folder is not None:
            self._writer = _open_writer(self.targets.run_folder, event_sizes)
            vars(get_root_logger())["tensorboard_writer"] = self._writer

    def discard_events(self, event_sizes: Mapping[str, int]) -> None:
        """Purge what was logged since `open_writer`: by hooks that run in every process, and ran before."""
        if self._writer is not None and self.targets.run_folder is not None:
            self._writer.close()  # it opens a new file when it is used again
            purge_events(self.targets.run_folder, event_sizes)

    def event_sizes(self) -> dict[str, int]:
        """Write out what TensorBoard was given and return the sizes of its files."""
        if self._writer is None or self.targets.run_folder is None:
            return {}
        self._writer.flush()
        return event_file_sizes(self.targets.run_folder)

    def close(self) -> None:
        """Write everything out and let go of the loggers."""
        vars(get_root_logger()).pop("tensorboard_writer", None)
        for handler in list(self._handlers):
            self._remove(handler)
        get_root_logger().setLevel(self._level_before)
        if self._starts_capture:
            logging.captureWarnings(False)
        if self._writer is not None:
            self._writer.close()

    def _add(self, handler: logging.Handler) -> None:
        handler.setFormatter(logging.Formatter(_LINE_FORMAT, "%Y-%m-%d %H:%M:%S"))
        for logger in self._loggers:
            logger.addHandler(handler)
        self._handlers.append(handler)

    def _remove(self, handler: logging.Handler) -> None:
        for logger in self._loggers:
            logger.removeHandler(handler)
        self._handlers.remove(handler)
        handler.close()


def _open_log_file(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the process that wrote it was killed in mid-line
                file.write(b"\n")
    return logging.FileHandler(path, encoding="utf-8")


def _open_writer(folder: Path, event_sizes: Mapping[str, int] | None) -> "SummaryWriter":
    # TensorBoard takes a second to import, so only those who enable it pay.
    from torch.utils.tensorboard import SummaryWriter

    if event_sizes is not None:
        purge_events(folder, event_sizes)
    return SummaryWriter(str(folder))
