"""Several processes on this machine that work as one: started, waited for, and ended together."""

import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch.distributed as dist

from helios.trainer._execution import Execution
from helios.trainer._rank_process import ByValue, Failure, GroupPlace, SpawnContext, revive, run_rank
from helios.trainer._spawn_queue import ANSWER, BEGUN, FAILING, FAILURE, ITEM, PipeReader, SpawnQueue
from helios.trainer._stop_request import SIGNALS, listening_to_signals

T = TypeVar("T")

GRACE_S = 5.0
"""How long the others may take to end by themselves when one has failed."""
UNWINDING_S = 30.0
"""How long those may take that have said that they fail: they may be tearing down, or finishing a checkpoint."""
_POLL_S = 0.1  # a process that is dead is not always heard of: its own children may hold its files open
_STOP_WITHOUT_SIGNAL = -1


def make_stop_flag() -> Any:
    """Make an int that processes share: the number of the signal that asked for a stop, -1 without one, else 0."""
    return multiprocessing.get_context("spawn").RawValue("i", 0)


def request_stop(stop_flag: Any, received: signal.Signals | None = None) -> None:
    """Ask for a stop, because of a signal or without one."""
    stop_flag.value = received or stop_flag.value or _STOP_WITHOUT_SIGNAL


def refuse_while_importing() -> None:
    """Refuse to start processes while this one, which was spawned itself, imports the script.

    Raises:
        RuntimeError: it does.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "the script is imported by the processes that it spawns, and would spawn more: put what it does below "
            'the line `if __name__ == "__main__":`'
        )


def launch(
    run: Callable[[Execution, SpawnContext], T],
    executions: Sequence[Execution],
    *,
    queue: SpawnQueue,
    timeout_s: float | None,
    stop_flag: Any,
    listens: bool,
) -> T:
    """Run a function in new processes, one for each execution, that form a group.

    It returns or raises when all of them have ended. If one fails, the others are given some seconds to end by
    themselves, and are then killed. They are also killed if this process dies (on Linux), or is interrupted.

    Args:
        run: what to call in each; it must be picklable, and is copied with all that it holds.
        executions: by rank.
        queue: gets what the processes put into theirs, also if they fail.
        timeout_s: how long the processes wait for one another; None is torch's default.
        stop_flag: from `make_stop_flag`.
        listens: whether SIGTERM, SIGUSR1 and Ctrl-C set the flag. A second one kills the processes and does what it
            always did.

    Returns:
        What `run` returned in rank 0.

    Raises:
        TypeError: `run` cannot be pickled.
        RuntimeError: a process died, or its exception cannot be brought here.
        BaseException: the first exception that was raised in one of the processes, with its traceback as a note.
    """
    refuse_while_importing()
    with ExitStack() as stack:
        store, port = _host_store(len(executions))
        ranks = _Ranks(queue)
        stack.callback(ranks.close)
        if listens:
            stack.enter_context(listening_to_signals(partial(request_stop, stop_flag), ranks.kill))
        ranks.start(run, executions, GroupPlace(port, timeout_s), stop_flag, listens=listens)
        ranks.wait()
        del store  # it was needed until now
        return pickle.loads(ranks.answer())  # type: ignore[no-any-return]  # noqa: S301  # from our own process


class _Ranks:
    """The processes, and what came of them."""

    def __init__(self, queue: SpawnQueue) -> None:
        self._queue = queue
        self._processes: list[SpawnProcess] = []
        self._readers: list[PipeReader] = []
        self._begun: set[int] = set()
        self._answers: dict[int, bytes] = {}
        self._failures: dict[int, Failure] = {}
        self._failing: set[int] = set()
        self._killed: set[int] = set()

    def start(
        self,
        run: Callable[[Execution, SpawnContext], object],
        executions: Sequence[Execution],
        place: GroupPlace,
        stop_flag: Any,
        *,
        listens: bool,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # or it is started with the first process, and lets in what is held back
        for execution in executions:
            reader, writer = context.Pipe(duplex=False)
            self._readers.append(PipeReader(reader))
            arguments = (ByValue(run), execution, place, stop_flag, writer, os.getpid())
            process = context.Process(target=run_rank, args=arguments, name=f"rank {execution.rank}")
            with writer, _held_back(SIGNALS if listens else {signal.SIGINT}):
                try:
                    process.start()
                except BrokenPipeError as error:
                    raise RuntimeError(_never_begun(execution.rank, "ended")) from error
                self._processes.append(process)

    def wait(self) -> None:
        """Wait until all have ended, soon after one has failed."""
        failed_s: float | None = None
        while alive := [process for process in self._processes if process.exitcode is None]:
            pipes = [reader.connection for reader in self._readers if not reader.is_closed]
            wait([*pipes, *(process.sentinel for process in alive)], timeout=_POLL_S)
            self._receive()
            if failed_s is None and self._has_failed():
                failed_s = time.monotonic()
            if failed_s is not None:
                self._kill_those_who_stay(time.monotonic() - failed_s)
        self._receive()

    def answer(self) -> bytes:
        """Return the answer of rank 0; raises what prevented it."""
        self._raise_deaths()
        if self._failures:
            error = _revived(min(self._failures.values(), key=lambda failure: failure.time_s))
            for rank, process in enumerate(self._processes):
                code = process.exitcode
                assert code is not None
                was_killed_by_others = code < 0 and rank not in self._killed
                if was_killed_by_others:  # perhaps not as a consequence
                    error.add_note(f"Besides, {self._death(rank, process.pid, code)}")
            raise error
        return self._answers[0]

    def kill(self) -> None:
        for rank in range(len(self._processes)):
            self._kill(rank)

    def _kill(self, rank: int) -> None:
        if self._processes[rank].exitcode is None:
            self._killed.add(rank)
            self._processes[rank].kill()

    def _kill_those_who_stay(self, elapsed_s: float) -> None:
        """Kill who has not ended so long after a failure."""
        for rank in range(len(self._processes)):
            if elapsed_s > (UNWINDING_S if rank in self._failing else GRACE_S):
                self._kill(rank)

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        self.kill()
        for process in self._processes:
            process.join()
        self._receive()
        for process in self._processes:
            process.close()
        for reader in self._readers:
            reader.connection.close()

    def _receive(self) -> None:
        for rank, reader in enumerate(self._readers):
            for kind, content in reader.receive():
                if kind == ITEM:
                    self._queue.receive(content)
                elif kind == ANSWER:
                    self._answers[rank] = content
                elif kind == FAILING:
                    self._failing.add(rank)
                    self._failures[rank] = pickle.loads(content)  # noqa: S301  # from our own process
                elif kind == FAILURE:
                    failure: Failure = pickle.loads(content)  # noqa: S301
                    first = self._failures.get(rank, failure)
                    self._failures[rank] = replace(failure, time_s=first.time_s)
                elif kind == BEGUN:
                    self._begun.add(rank)

    def _has_failed(self) -> bool:
        ended = [rank for rank, process in enumerate(self._processes) if process.exitcode is not None]
        return bool(self._failures) or any(
            rank not in self._answers or self._processes[rank].exitcode != 0 for rank in ended
        )

    def _raise_deaths(self) -> None:
        """Raise an error if a process died of anything but an exception."""
        for rank, process in enumerate(self._processes):
            code = process.exitcode
            assert code is not None
            # torch itself aborts a process when another one has failed.
            is_consequence = bool(self._failures) and code == -signal.SIGABRT
            if rank in self._killed or rank in self._failures or is_consequence:
                continue
            if code != 0 or rank not in self._answers:
                error = RuntimeError(self._death(rank, process.pid, code))
                for failure in self._failures.values():
                    error.add_note(f"Besides, rank {failure.rank} raised:\n{failure.traceback}")
                raise error

    def _death(self, rank: int, process_id: int | None, code: int) -> str:
        who = f"rank {rank} (process {process_id})"
        after = " while it ended, after its work was done" if rank in self._answers else ""
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            memory = "; out of memory?" if code == -signal.SIGKILL else ""
            return f"{who} was killed by {name}{after}{memory}"
        if after:
            return f"{who} ended with exit code {code}, not 0: something failed{after}"
        if rank not in self._begun:
            return _never_begun(rank, f"(process {process_id}) ended with exit code {code}")
        return f"{who} ended with exit code {code}, without an exception and before its work was done"


def _never_begun(rank: int, how: str) -> str:
    return (
        f"rank {rank} {how} before it began, see its traceback above. A spawned process imports the script: what the "
        'script does must be below the line `if __name__ == "__main__":`, and classes and functions that the run needs '
        "must be in a file, not in a notebook"
    )


def _revived(failure: Failure) -> BaseException:
    """Return the exception of a rank, of its own type if that is possible."""
    error: object = None
    if failure.pickled is not None:
        try:
            error = revive(failure.pickled)
        except Exception:
            error = None
    if not isinstance(error, BaseException) or type(error).__qualname__ != failure.type_name:
        error = RuntimeError(f"{failure.type_name}: {failure.text}")
    error.add_note(f"Raised in rank {failure.rank}:\n{failure.traceback}")
    return error


def _host_store(world_size: int) -> tuple[Any, int]:
    """Host the store through which the processes find one another, for this machine only, on a port that is free.

    Here and not in rank 0, so that its death does not take it away from the others.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=30),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return store, port


@contextmanager
def _held_back(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Hold signals back inside, Ctrl-C at least: a process that is being started would be forgotten.

    In that process they are held back until it says itself what to do with them, and do not kill it before.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_ours = callable(handler) and threading.current_thread() is threading.main_thread()
    received: list[int] = []
    if is_ours:  # another thread, of torch's, may get the signal although this one does not
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_ours:
            signal.signal(signal.SIGINT, handler)
            for number in received[:1]:
                signal.raise_signal(number)
