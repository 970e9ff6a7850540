"""Opening and closing what a run writes for people: console, log file, TensorBoard."""

import contextlib
import copy
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from helios.trainer.logging._events import event_file_sizes, purge_events
from helios.trainer.logging._places import LogTargets, naming

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LINE_FORMAT = "[%(asctime)s] %(levelname)s: {}%(message)s"


def get_root_logger() -> logging.Logger:
    """Return the logger of Helios. While a run is in progress it writes to the console and the log file."""
    return logging.getLogger("helios")


def get_tensorboard_writer() -> "SummaryWriter | None":
    """Return the TensorBoard writer of the run in progress, or None if there is none."""
    # The logging module keeps its loggers for the whole process, so the writer needs no global of ours.
    writer: SummaryWriter | None = getattr(get_root_logger(), "tensorboard_writer", None)
    return writer


class _Formatter(logging.Formatter):
    """Leaves no empty line after a warning, whose text ends with a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip("\n")


class _ToldOnce(logging.Handler):
    """A handler whose place may be full or closed: that must not end a run, and is said once, not with each line."""

    place = ""
    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            with contextlib.suppress(OSError), _above_bars(sys.stderr):
                print(f"log lines are lost, {self.place} cannot be written: {error}", file=sys.stderr)


class _ConsoleHandler(_ToldOnce):
    """Writes lines above the progress bars instead of through them; tracebacks are for the log file."""

    place = "stdout"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            record = copy.copy(record)
            record.exc_info = record.exc_text = None
            line = self.format(record)
            with _above_bars(sys.stdout):
                # At once: who reads a file while it grows wants to see it, and bars are drawn after it.
                print(line, file=sys.stdout, flush=True)
        except Exception:
            self.handleError(record)


class _FileHandler(_ToldOnce, logging.FileHandler):
    """Writes lines to the log file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.place = str(path)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it could not write, it cannot write now
            super().close()


@contextlib.contextmanager
def _above_bars(stream: TextIO | None) -> Iterator[None]:
    """Clear the bars for what is written inside, and draw them again; without a stream nothing can be written."""
    with contextlib.nullcontext() if stream is None else tqdm.external_write_mode(stream):
        yield


class RunLoggers:
    """The open loggers of a run: the console at first, then what `open_log_file` and `open_writer` add.

    What is logged before there is a log file is written to it once there is. `close` puts everything back.

    Rank 0 alone writes. The others say what is wrong with them, on their consoles and, if it ends them, in the log file
    of rank 0.

    Args:
        capture_warnings: write Python's warnings to the same places.
        rank: of this process.
    """

    def __init__(self, *, capture_warnings: bool, rank: int = 0) -> None:
        self._rank = rank
        self.targets = LogTargets(log_file=None, run_folder=None)
        self._writer: Any = None
        self._loggers = [get_root_logger()]
        # Whoever captured warnings before goes on doing so after.
        self._starts_capture = capture_warnings and warnings.showwarning.__module__ != logging.__name__
        if capture_warnings:
            logging.captureWarnings(True)
            self._loggers.append(logging.getLogger("py.warnings"))
        self._level_before = get_root_logger().level
        if self._level_before == logging.NOTSET:  # whoever chose a level gets it
            get_root_logger().setLevel(logging.INFO)
        self._early = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handlers: list[logging.Handler] = []
        self._add(_ConsoleHandler(), level=logging.NOTSET if rank == 0 else logging.WARNING)
        self._add(self._early)

    def open_log_file(self, targets: LogTargets) -> None:
        """Take the places to write to, and write to the log file, if there is to be one.

        Raises:
            OSError: it cannot be written, by rank 0; the others do without. It names the argument.
        """
        self.targets = targets
        if targets.log_file is not None and self._rank == 0:
            file = _open_log_file(targets.log_file)
            self._add(file)
            self._early.setTarget(file)
            self._early.flush()
        elif targets.log_file is not None:
            with contextlib.suppress(OSError):  # on another machine, which may have no such folder
                self._add(_open_log_file(targets.log_file), level=logging.ERROR)
        self._remove(self._early)

    def open_writer(self, event_sizes: Mapping[str, int] | None) -> None:
        """Write TensorBoard events, if it is enabled.

        Args:
            event_sizes: when a run is resumed, the sizes of its event files at the checkpoint: what they have
                beyond is purged.
        """
        if self.targets.run_folder is not None and self._rank == 0:
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
        elif self.targets.run_folder is not None and self._rank == 0:
            with contextlib.suppress(OSError):  # it has something in it
                self.targets.run_folder.rmdir()

    def _add(self, handler: logging.Handler, level: int = logging.NOTSET) -> None:
        of_rank = f"rank {self._rank}: " if self._rank else ""
        handler.setFormatter(_Formatter(_LINE_FORMAT.format(of_rank), "%Y-%m-%d %H:%M:%S"))
        handler.setLevel(level)
        for logger in self._loggers:
            logger.addHandler(handler)
        self._handlers.append(handler)

    def _remove(self, handler: logging.Handler) -> None:
        for logger in self._loggers:
            logger.removeHandler(handler)
        self._handlers.remove(handler)
        handler.close()


def _open_log_file(path: Path) -> logging.Handler:
    with naming("log_path", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # the process that wrote it was killed in mid-line
                    file.write(b"\n")
        return _FileHandler(path)


def _open_writer(folder: Path, event_sizes: Mapping[str, int] | None) -> "SummaryWriter":
    # TensorBoard takes a second to import, so only those who enable it pay.
    from torch.utils.tensorboard import SummaryWriter

    with naming("run_path", folder):
        if event_sizes is not None:
            purge_events(folder, event_sizes)
        return SummaryWriter(str(folder))
