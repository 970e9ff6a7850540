"""The checkpoints of one run in one folder."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from helios.chkpt._arguments import as_path, check_count
from helios.chkpt._atomic import orphans, sweep
from helios.chkpt._find import Found, check_run_name, find_last_checkpoint, listed, verifies
from helios.chkpt._naming import CheckpointName, format_name, parse_name
from helios.chkpt._read import verify
from helios.chkpt._write import prepared, write_snapshot

_LOGGER = logging.getLogger("helios.chkpt")


class CheckpointStore:
    """Saves the checkpoints of one run, in the foreground or in the background, and deletes old ones.

    For one thread of one process. Making it creates the folder and sweeps what killed writers of this run
    left; temporary files of living writers stay. Every method but `save` and `save_async` may be preceded by
    the error of the last `save_async`: it is raised once, by whichever method is called next. Usable as a
    context manager, which closes it.

    Args:
        root: the folder; created with its parents.
        run_name: the run whose files these are; files of other runs are left alone.
        keep_last: keep this many good checkpoints and delete older ones after each save; None keeps all.

    Raises:
        TypeError, ValueError: a wrong argument.
        OSError: the folder cannot be made or read.
    """

    def __init__(self, root: str | os.PathLike[str], run_name: str, keep_last: int | None = None) -> None:
        self._root = as_path("root", root)
        check_run_name(run_name)
        if keep_last is not None:
            check_count("keep_last", keep_last, at_least=1)
        format_name(CheckpointName(run_name, 0, 0))
        self._run_name = run_name
        self._keep_last = keep_last
        self._job: _Job | None = None
        self._closed = False
        self._newest: Path | None = None
        self._verified: dict[Path, tuple[int, ...]] = {}
        self._root.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def save(self, state: Mapping[str, object], *, epoch: int, iteration: int, metadata: str = "") -> Path:
        """Save like `helios.chkpt.save`, under the name of this run, epoch and iteration; then prune.

        A file of the same epoch, iteration and metadata is replaced; one with other metadata stays.

        Args:
            state: what to save.
            epoch: part of the name, from 0.
            iteration: part of the name, from 0.
            metadata: end of the name, empty for none.

        Returns:
            The path of the file.

        Raises:
            TypeError, ValueError, OSError: as `helios.chkpt.save`; or the error of an earlier `save_async`,
                and then this state was not saved.
            CheckpointError: with `keep_last`, the new file did not pass `verify`; nothing was deleted.
        """
        self.wait()
        path = self._path(epoch, iteration, metadata)
        self._write(prepared(state), path)
        return path

    def save_async(
        self, state: Mapping[str, object], *, epoch: int, iteration: int, metadata: str = ""
    ) -> Path:
        """As `save`, but return once the state is copied; a thread writes it.

        `state` may be changed as soon as this returns. An earlier save is waited for. At the exit of the
        interpreter the save is finished first.

        Returns:
            The path that the file will have. It is there, durably, after `wait`.

        Raises:
            TypeError, ValueError: as `save`, at once.
            Exception: the error of an earlier `save_async`; then this state was not saved.
        """
        self.wait()
        path = self._path(epoch, iteration, metadata)
        stored = prepared(state, copy=True)
        self._job = _Job(self, stored, path)
        self._job.start()
        return path

    def last(self) -> Path | None:
        """The newest checkpoint of this run that verifies, as `find_last_checkpoint`; waits for a save."""
        self.wait()
        return find_last_checkpoint(self._root, self._run_name)

    def list(self) -> list[Path]:
        """All checkpoints of this run, rising by epoch and iteration, unverified; waits for a save."""
        self.wait()
        return [found.path for found in listed(self._root, self._run_name)]

    def prune(self) -> builtins.list[Path]:
        """Delete all but the `keep_last` newest checkpoints that verify, and return what was deleted.

        With fewer good ones, or without `keep_last`, nothing is deleted; never what this store saved last.
        """
        self.wait()
        return self._prune()

    def wait(self) -> None:
        """Return when nothing is being saved.

        Raises:
            Exception: the error of the last `save_async`, once.
            ValueError: the store is closed.
        """
        if self._closed:
            raise ValueError(f"the store of run {self._run_name!r} is closed; make a new one")
        job, self._job = self._job, None
        if job is not None:
            job.join()
            if job.error is not None:
                raise job.error

    def close(self) -> None:
        """Wait for a save and raise its error; the store cannot be used after. A second call does nothing."""
        if not self._closed:
            try:
                self.wait()
                self._sweep()
            finally:
                self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as lost:
            if error is None:
                raise
            error.add_note(f"Besides, the last checkpoint was not saved: {type(lost).__name__}: {lost}")

    def _sweep(self) -> None:
        """Delete what killed writers of this run left.

        Not only at the start: worker processes that a killed writer had forked inherit its lock, and live on
        for some seconds.
        """
        with contextlib.suppress(FileNotFoundError):  # the folder is gone: whoever saves next will say so
            for temp, target in orphans(self._root):
                if _is_of_run(target, self._run_name) and sweep(temp):
                    _LOGGER.info("deleted %s, left by a writer that was killed", temp)

    def _path(self, epoch: int, iteration: int, metadata: str) -> Path:
        return self._root / format_name(CheckpointName(self._run_name, epoch, iteration, metadata))

    def _write(self, stored: dict[str, object], path: Path) -> None:
        write_snapshot(stored, path)
        self._newest = path
        self._sweep()
        if self._keep_last is not None:
            verify(path)
            self._verified[path] = _identity(path)
            self._prune()

    def _prune(self) -> builtins.list[Path]:
        if self._keep_last is None:
            return []
        deleted: list[Path] = []
        num_good = 0
        for found in reversed(listed(self._root, self._run_name)):
            if num_good >= self._keep_last:
                if found.path != self._newest and self._delete(found):
                    deleted.append(found.path)
            elif self._is_good(found.path):
                num_good += 1
        return deleted[::-1]

    def _is_good(self, path: Path) -> bool:
        """Whether a file verifies; one that did and has not changed is not read again."""
        try:
            identity = _identity(path)
        except OSError:
            return False
        if self._verified.get(path) == identity:
            return True
        if verifies(path):
            self._verified[path] = identity
            return True
        return False

    def _delete(self, found: Found) -> bool:
        self._verified.pop(found.path, None)
        try:
            found.path.unlink()
        except OSError as error:  # the new checkpoint is safe, so training need not stop for this
            _LOGGER.warning("could not delete %s: %s", found.path, error)
            return False
        return True


class _Job(threading.Thread):
    """One save in the background. Not a daemon: the interpreter finishes it before it exits."""

    def __init__(self, store: CheckpointStore, stored: dict[str, object], path: Path) -> None:
        super().__init__(name=f"save {path.name}", daemon=False)
        self._store = store
        self._stored = stored
        self._path = path
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._store._write(self._stored, self._path)
        except BaseException as error:
            self.error = error
            # Also logged, since nobody may ask again.
            _LOGGER.error("%s was not saved: %s: %s", self._path, type(error).__name__, error)
        finally:
            self._stored = {}


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_of_run(target: str, run_name: str) -> bool:
    name = parse_name(target)
    if name is not None:
        return name.run_name == run_name
    start = f"{run_name}_epoch_"  # a name that was cut off
    return target.startswith(start) or start.startswith(target)
