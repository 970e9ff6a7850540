"""The places that a run writes its logs to: their names, that nobody else has them, and that they can be written."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

_TIME_FORMAT = "%b%d_%H-%M-%S"


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


def choose_targets(
    name: str, log_path: Path | None, run_path: Path | None, before: Sequence[LogTargets] = ()
) -> LogTargets:
    """Choose where a run writes: where it did before, else to a new `<name>_<MonthDay_Hour-Minute-Second>`.

    What is new is created at once, lest another process take the name: a script may start many runs together.

    Args:
        name: of the run.
        log_path: folder of log files; None for no log file.
        run_path: folder of TensorBoard's folders; None for none.
        before: where the run wrote before, the likeliest first. It may be gone: deleted, or the run was moved to
            another machine, or is started in another folder.

    Raises:
        OSError: the new ones cannot be created. It names the argument.
    """
    log_file, run_folder = None, None
    if log_path is not None:
        log_file = next((b.log_file for b in before if b.log_file and b.log_file.is_file()), None)
    if run_path is not None:
        run_folder = next((b.run_folder for b in before if b.run_folder and b.run_folder.is_dir()), None)
    new_file_in = log_path if log_file is None else None
    new_folder_in = run_path if run_folder is None else None
    for argument, folder in (("log_path", new_file_in), ("run_path", new_folder_in)):
        if folder is not None:
            with naming(argument, folder):
                folder.mkdir(parents=True, exist_ok=True)
    moment = datetime.now()
    while True:
        stamped = f"{name}_{moment.strftime(_TIME_FORMAT)}"
        new = LogTargets(
            log_file=None if new_file_in is None else new_file_in / f"{stamped}.log",
            run_folder=None if new_folder_in is None else new_folder_in / stamped,
        )
        if _create(new):
            return LogTargets(log_file or new.log_file, run_folder or new.run_folder)
        moment += timedelta(seconds=1)  # another run began in this second


def _create(targets: LogTargets) -> bool:
    """Create what there is to be, all or nothing, in folders that exist; false if some of it is there."""
    log_file, run_folder = targets.log_file, targets.run_folder
    try:
        if log_file is not None:
            with naming("log_path", log_file):
                log_file.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        if run_folder is not None:
            with naming("run_path", run_folder):
                run_folder.mkdir()
    except OSError as error:
        if log_file is not None:
            log_file.unlink()
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


@contextlib.contextmanager
def naming(argument: str, path: Path) -> Iterator[None]:
    """Name the argument in an OSError about a path that it led to."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"{argument}: {error.strerror}", str(path)) from error


def check_place(flag: str, argument: str, path: Path) -> None:
    """Check that logs can be written below a path.

    Raises:
        ValueError: the path, or the nearest folder above it that there is, cannot be written to.
    """
    # Path.exists raises for what this user may not see.
    existing = next((p for p in (path, *path.parents) if os.path.exists(p)), path)  # noqa: PTH110
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"{flag} is True, but {argument} cannot be written to: found {path}, where {existing} gives this user "
            f"no permission to write; choose another {argument}, or leave {flag} False"
        )


def check_tensorboard() -> None:
    """Check that TensorBoard is installed, without the second that it takes to import it.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "enable_tensorboard is True, but the package tensorboard is not installed: pip install tensorboard, or "
            "leave enable_tensorboard False",
            name="tensorboard",
        )
