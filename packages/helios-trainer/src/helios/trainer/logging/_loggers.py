"""Opening and closing what a run writes for people: console, log file, TensorBoard."""

import copy
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    def restored(self, before: "LogTargets") -> "LogTargets":
        """Return these targets, with the places that a resumed run wrote to before where it had any."""
        return LogTargets(
            log_file=self.log_file and (before.log_file or self.log_file),
            run_folder=self.run_folder and (before.run_folder or self.run_folder),
        )


def new_targets(name: str, log_path: Path | None, run_path: Path | None) -> LogTargets:
    """Choose the names of a new run: `<name>_<MonthDay_Hour-Minute-Second>`."""
    stamped = f"{name}_{datetime.now().strftime(_TIME_FORMAT)}"
    return LogTargets(
        log_file=None if log_path is None else log_path / f"{stamped}.log",
        run_folder=None if run_path is None else run_path / stamped,
    )


class _ConsoleHandler(logging.Handler):
    """Writes lines above the progress bars instead of through them; tracebacks are for the log file."""

    def emit(self, record: logging.LogRecord) -> None:
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        tqdm.write(self.format(record), file=sys.stdout)


class RunLoggers:
    """The open loggers of a run. `close` them.

    Args:
        targets: where to write.
        capture_warnings: write Python's warnings to the same places.
        event_sizes: when a run is resumed, the sizes of its event files at the checkpoint.
    """

    def __init__(
        self, targets: LogTargets, *, capture_warnings: bool, event_sizes: Mapping[str, int] | None
    ) -> None:
        self.targets = targets
        self._writer: Any = None
        self._capture_warnings = capture_warnings
        self._loggers = [get_root_logger()]
        if capture_warnings:
            logging.captureWarnings(True)
            self._loggers.append(logging.getLogger("py.warnings"))
        self._level_before = get_root_logger().level
        get_root_logger().setLevel(logging.INFO)
        self._handlers: list[logging.Handler] = [_ConsoleHandler()]
        try:
            if targets.log_file is not None:
                self._handlers.append(_open_log_file(targets.log_file))
            if targets.run_folder is not None:
                self._writer = _open_writer(targets.run_folder, event_sizes)
        finally:
            for handler in self._handlers:
                handler.setFormatter(logging.Formatter(_LINE_FORMAT, "%Y-%m-%d %H:%M:%S"))
                for logger in self._loggers:
                    logger.addHandler(handler)
        vars(get_root_logger())["tensorboard_writer"] = self._writer

    def event_sizes(self) -> dict[str, int]:
        """Write out what TensorBoard was given and return the sizes of its files."""
        if self._writer is None or self.targets.run_folder is None:
            return {}
        self._writer.flush()
        return event_file_sizes(self.targets.run_folder)

    def close(self) -> None:
        """Write everything out and let go of the loggers."""
        vars(get_root_logger()).pop("tensorboard_writer", None)
        if self._writer is not None:
            self._writer.close()
        if self._capture_warnings:
            logging.captureWarnings(False)
        for handler in self._handlers:
            for logger in self._loggers:
                logger.removeHandler(handler)
            handler.close()
        get_root_logger().setLevel(self._level_before)


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
