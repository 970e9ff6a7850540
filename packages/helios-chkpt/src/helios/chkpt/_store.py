"""The checkpoints of one run in one folder."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from helios.chkpt._arguments import as_path, check_bool, check_score
from helios.chkpt._atomic import orphans, sweep
from helios.chkpt._find import check_run_name, find_last_checkpoint, listed, verifies
from helios.chkpt._job import SaveJob
from helios.chkpt._naming import CheckpointName, format_name, parse_name
from helios.chkpt._read import read_score, verify
from helios.chkpt._retention import Candidate, Retention, deletable
from helios.chkpt._sharded.folder import delete, identity, sweep_folders
from helios.chkpt._write import write_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from helios.chkpt._memory import Staging, State
    from helios.chkpt._sharded.ranks import Ranks

_LOGGER = logging.getLogger("helios.chkpt")
_LEFT = "deleted %s, left by a writer that was killed"


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
        keep_every: of the older ones, keep those whose iteration is a multiple of this.
        keep_best: of the older ones, keep this many: those of the highest scores.
        is_writer: whether this is the process that makes the folder, sweeps it and deletes old checkpoints: of several
            that `save_sharded` together, rank 0. A store in another process changes nothing but its own shards.

    Raises:
        TypeError, ValueError: a wrong argument.
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        run_name: str,
        keep_last: int | None = None,
        *,
        keep_every: int | None = None,
        keep_best: int | None = None,
        is_writer: bool = True,
    ) -> None:
        check_bool("is_writer", is_writer)
        self._is_writer = is_writer
        self._root = as_path("root", root)
        check_run_name(run_name)
        format_name(CheckpointName(run_name, 0, 0))
        self._run_name = run_name
        self._retention = Retention(keep_last, keep_every, keep_best)
        self._job: SaveJob | None = None
        self._staging: Staging | None = None
        self._closed = False
        self._newest: Path | None = None
        self._verified: dict[Path, tuple[int, ...]] = {}
        if is_writer:
            self._root.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def save(
        self,
        state: Mapping[str, object],
        *,
        epoch: int,
        iteration: int,
        metadata: str = "",
        score: float | None = None,
    ) -> Path:
        """Save like `helios.chkpt.save`, under the name of this run, epoch and iteration; then prune.

        A file of the same epoch, iteration and metadata is replaced; one with other metadata stays.

        Args:
            state: what to save.
            epoch: part of the name, from 0.
            iteration: part of the name, from 0.
            metadata: end of the name, empty for none.
            score: how good the checkpoint is, higher is better: for `keep_best`. It is noted in the file.

        Returns:
            The path of the file.

        Raises:
            TypeError, ValueError, OSError: as `helios.chkpt.save`; or the error of an earlier `save_async`,
                and then this state was not saved.
            CheckpointError: with `keep_last`, the new file did not pass `verify`; nothing was deleted.
        """
        from helios.chkpt._memory import stated  # torch: not needed to list, find and prune

        self.wait()
        self._check_writer()
        path = self._path(epoch, iteration, metadata)
        self._write(stated(state), path, check_score(score), in_background=False)
        return path

    def save_async(
        self,
        state: Mapping[str, object],
        *,
        epoch: int,
        iteration: int,
        metadata: str = "",
        score: float | None = None,
    ) -> Path:
        """As `save`, but return once the state is copied; a thread writes it.

        `state` may be changed as soon as this returns. An earlier save is waited for. At the exit of the
        interpreter the save is finished first. The copy is kept until `close` and used again, so the second
        call and those after it cost one copy of the state and no new memory.

        Returns:
            The path that the file will have. It is there, durably, after `wait`.

        Raises:
            TypeError, ValueError: as `save`, at once.
            Exception: the error of an earlier `save_async`; then this state was not saved.
        """
        from helios.chkpt._memory import Staging  # as in `save`

        self.wait()
        self._check_writer()
        path = self._path(epoch, iteration, metadata)
        if self._staging is None:
            self._staging = Staging()
        number = check_score(score)
        staged = self._staging.staged(state)
        job = SaveJob(path, lambda: self._write(staged, path, number, in_background=True))
        self._job = job  # before it starts: whatever interrupts that, the job is waited for
        job.start()
        return path

    def save_sharded(
        self,
        state: Mapping[str, object],
        *,
        epoch: int,
        iteration: int,
        metadata: str = "",
        score: float | None = None,
        group: ProcessGroup | None = None,
    ) -> Path:
        """Save like `helios.chkpt.save_sharded`, under the name of this run, epoch and iteration; then prune.

        Every process of the group has to call it, each on a store of its own for the same folder and run: rank 0 on one
        that is the writer, the others on one that is not. What is kept, and the score, are up to that of rank 0.

        Args:
            state: what to save, the same in all processes but for the shards.
            epoch: part of the name, from 0.
            iteration: part of the name, from 0.
            metadata: end of the name, empty for none.
            score: as for `save`.
            group: as for `helios.chkpt.save_sharded`.

        Returns:
            The path of the checkpoint, a folder.

        Raises:
            TypeError, ValueError, OSError: as `helios.chkpt.save_sharded`; or the error of an earlier `save_async` of
                rank 0, and then this state was not saved.
            CheckpointError: with `keep_last`, the new checkpoint did not pass `verify`; nothing was deleted.
        """
        from helios.chkpt._sharded.ranks import Ranks  # as in `save`
        from helios.chkpt._sharded.write import Job, verify_together, write_folder

        ranks = Ranks.of(group)

        def job() -> Job:
            self.wait()
            if self._is_writer != (ranks.rank == 0):
                raise ValueError(f"is_writer: expected {ranks.rank == 0} in the store of this rank")
            return Job(state, self._path(epoch, iteration, metadata, is_sharded=True), check_score(score))

        path = write_folder(job, ranks)
        self._finish(path, ranks, lambda: verify_together(path, ranks))
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
        """Delete what `keep_last`, `keep_every` and `keep_best` do not keep, and return what was deleted.

        With fewer good ones than `keep_last`, or if neither it nor `keep_best` is set, nothing is deleted; never
        what this store saved last.
        """
        self.wait()
        self._check_writer()
        return self._prune()

    def wait(self) -> None:
        """Return when nothing is being saved.

        Raises:
            Exception: the error of the last `save_async`, once.
            ValueError: the store is closed.
        """
        if self._closed:
            raise ValueError(f"the store of run {self._run_name!r} is closed; make a new one")
        job = self._job
        if job is not None:
            job.wait()  # an interrupt here leaves the job: it still reads the staging buffer
            self._job = None
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
                self._staging = None

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
        if not self._is_writer:
            return
        with contextlib.suppress(OSError):  # the folder is gone, or worse: whoever saves next will say so
            for temp, target in orphans(self._root):
                if _is_of_run(target, self._run_name) and sweep(temp):
                    _LOGGER.info(_LEFT, temp)
            for path in sweep_folders(self._root, lambda name: _is_of_run(name, self._run_name)):
                _LOGGER.info(_LEFT, path)

    def _check_writer(self) -> None:
        if not self._is_writer:
            raise ValueError(
                "is_writer: this store is not the writer; it can save_sharded, with that of rank 0"
            )

    def _path(self, epoch: int, iteration: int, metadata: str, *, is_sharded: bool = False) -> Path:
        return self._root / format_name(
            CheckpointName(self._run_name, epoch, iteration, metadata, is_sharded=is_sharded)
        )

    def _write(self, state: State, path: Path, score: float | None, *, in_background: bool) -> None:
        from helios.chkpt._sharded.ranks import Ranks  # as in `save`

        write_state(state, path, score=score, in_background=in_background)
        self._finish(path, Ranks(), lambda: verify(path, digests=False))

    def _finish(self, path: Path, ranks: Ranks, check: Callable[[], None]) -> None:
        """In each process that saved there: if the new one is good, the writer deletes older ones; then it sweeps."""
        self._newest = path
        if ranks.agree(lambda: self._is_writer and self._retention.deletes)[0]:
            try:
                check()
                ranks.agree(lambda: self._remember(path))
            except FileNotFoundError:
                # Another process that keeps this run has newer ones. Nothing of ours is a reason to delete then.
                _LOGGER.warning("%s was deleted by somebody else as soon as it was saved", path)
            else:
                ranks.agree(self._prune)
        self._sweep()

    def _remember(self, path: Path) -> None:
        if self._is_writer:
            self._verified[path] = identity(path)

    def _prune(self) -> builtins.list[Path]:
        if not (self._is_writer and self._retention.deletes):
            return []
        newest_first = [
            Candidate(f.path, f.name.iteration) for f in reversed(listed(self._root, self._run_name))
        ]
        found = deletable(newest_first, self._retention, is_good=self._is_good, score=read_score)
        return [path for path in reversed(found) if path != self._newest and self._delete(path)]

    def _is_good(self, path: Path) -> bool:
        """Whether a file verifies; one that did and has not changed is not read again."""
        try:
            found = identity(path)
        except OSError:
            return False
        if self._verified.get(path) == found:
            return True
        if verifies(path):
            self._verified[path] = found
            return True
        return False

    def _delete(self, path: Path) -> bool:
        self._verified.pop(path, None)
        try:
            delete(path)
        except OSError as error:  # the new checkpoint is safe, so training need not stop for this
            _LOGGER.warning("could not delete %s: %s", path, error)
            return False
        return True


def _is_of_run(target: str, run_name: str) -> bool:
    name = parse_name(target)
    if name is not None:
        return name.run_name == run_name
    start = f"{run_name}_epoch_"  # a name that was cut off
    return target.startswith(start) or start.startswith(target)
