"""What runs in a spawned process: it joins the group, does its work, and tells the parent how that ended."""

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist

from helios.trainer._execution import Execution
from helios.trainer._spawn_queue import ANSWER, BEGUN, FAILING, FAILURE, PipeWriter, SpawnQueue
from helios.trainer.distributed import default_backend, init_dist, shutdown_dist

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class SpawnContext:
    """What a spawned process has in common with its parent.

    Attributes:
        stop_flag: a shared int whose `value` is not 0 when the parent was asked to stop.
        queue: to put items into.
        fails: tells the parent of an exception that will end the process, as soon as it is seen: to let go of what the
            process has may take a while, in which others fail because of it.
    """

    stop_flag: Any
    queue: SpawnQueue
    fails: Callable[[BaseException], None]


@dataclass(frozen=True)
class Failure:
    """An exception that ended a rank.

    Attributes:
        rank: number of the process.
        time_s: when, on the clock that all processes of the machine share.
        type_name: name of its type.
        text: what it says.
        traceback: with all causes.
        pickled: the exception, for `revive`, or None if its type cannot be pickled.
    """

    rank: int
    time_s: float
    type_name: str
    text: str
    traceback: str
    pickled: bytes | None

    @staticmethod
    def of(rank: int, error: BaseException) -> "Failure":
        """Describe an exception."""
        pickled = _pickled(error)
        lines = "".join(traceback.format_exception(error))
        return Failure(rank, time.monotonic(), type(error).__qualname__, _text(error), lines, pickled)


def _pickled(error: BaseException) -> bytes | None:
    """Pickle an exception.

    If pickle cannot, or cannot put the same together again, which needs an `__init__` that takes what `args` has, it is
    made of its type, its args and its attributes, without those that cannot be pickled.
    """
    with suppress(Exception):
        content = pickle.dumps(error)
        copy = pickle.loads(content)  # noqa: S301  # our own
        if type(copy) is type(error) and copy.args == error.args:
            return content
    attributes: dict[str, Any] = {}
    for name, value in vars(error).items():
        with suppress(Exception):
            pickle.loads(pickle.dumps(value))  # noqa: S301
            attributes[name] = value
    with suppress(Exception):
        return pickle.dumps(_Remade(type(error), error.args, attributes))
    return None


@dataclass(frozen=True)
class _Remade:
    """An exception that is made again without its `__init__`."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]

    def make(self) -> BaseException:
        error = self.kind.__new__(self.kind, *self.args)
        vars(error).update(self.attributes)
        return error


def revive(pickled: bytes) -> object:
    """Return the exception of a `Failure`; raises what pickle raises if this process lacks its type."""
    found = pickle.loads(pickled)  # noqa: S301  # from our own process
    return found.make() if isinstance(found, _Remade) else found


class ByValue:
    """An object that is copied into a spawned process.

    What `multiprocessing` does else: its locks and queues are shared as always. But torch would put the memory of
    tensors into all processes, and those of all ranks, and of the parent, would be the same.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> Any:
        """Pickle the object now; `Pickled` puts it together later, where errors can be reported."""
        buffer = BytesIO()
        try:
            _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(self._value)
        except Exception as error:
            raise TypeError(
                "what is given to spawned processes cannot be pickled: "
                f"{type(error).__name__}: {error}. Model, DataModule, plug-ins and all that they hold before setup "
                "must be: no lambdas, local functions or classes, open files or loggers; make those in setup, or in "
                "prepare_data what others can read"
            ) from error
        return Pickled, (buffer.getvalue(),)


class Pickled:
    """The bytes of an object that was copied here."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def open(self) -> Any:
        """Return the object.

        Raises:
            RuntimeError: the process lacks a class or a module of it.
        """
        try:
            return pickle.loads(self._content)  # noqa: S301  # from our parent
        except Exception as error:
            raise RuntimeError(
                f"a spawned process cannot make its own copy of what it is to run: {type(error).__name__}: {error}. It "
                "imports classes and functions from the files they are defined in: a class defined in a notebook, or "
                'in a script below `if __name__ == "__main__":`, must move to a module, or above that line'
            ) from error


class _Pickler(ForkingPickler):
    """Pickles as `multiprocessing` does, but tensors with their contents."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        table: dict[type, Callable[..., Any]] = dict(self.dispatch_table)
        self.dispatch_table = {
            kind: reduce
            for kind, reduce in table.items()
            if reduce.__module__ != "torch.multiprocessing.reductions"
        }


@dataclass(frozen=True)
class GroupPlace:
    """Where the ranks find one another.

    Attributes:
        port: of the store that the parent hosts on this machine.
        timeout_s: how long they wait for one another; None is torch's default.
    """

    port: int
    timeout_s: float | None


def run_rank(
    work: Pickled,
    execution: Execution,
    place: GroupPlace,
    stop_flag: Any,
    connection: Connection,
    parent_id: int,
) -> None:
    """Do the work of a rank; called in a new process.

    Args:
        work: called with the execution and a SpawnContext; of rank 0 the answer is sent to the parent.
        execution: of this process.
        place: where to find the others.
        stop_flag: see `SpawnContext`.
        connection: a pipe to the parent.
        parent_id: process id of the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides what it means
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with(parent_id)
    writer = PipeWriter(connection)
    writer.send(BEGUN, b"")
    try:
        if execution.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, num_usable_cores() // execution.local_world_size))
        run = work.open()
        _join_group(execution, place)
        fails = partial(_tell, writer, FAILING, execution.rank)
        answer = run(execution, SpawnContext(stop_flag, SpawnQueue(writer), fails))
        content = pickle.dumps(answer if execution.rank == 0 else None)
    except BaseException as error:
        # First of all: what comes after may be stuck with those who wait for this process.
        _tell(writer, FAILURE, execution.rank, error)
        shutdown_dist(has_failed=True)
        sys.exit(1)
    shutdown_dist()
    writer.send(ANSWER, content)


def _tell(writer: PipeWriter, kind: bytes, rank: int, error: BaseException) -> None:
    writer.send(kind, pickle.dumps(Failure.of(rank, error)))


def num_usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _join_group(execution: Execution, place: GroupPlace) -> None:
    is_on_cuda = execution.device.type == "cuda"
    if is_on_cuda:
        torch.cuda.set_device(execution.device)  # nccl communicates on the current device
    address = ("127.0.0.1", place.port)
    store = dist.TCPStore(*address, execution.world_size, is_master=False)  # type: ignore[attr-defined]
    init_dist(
        backend=default_backend(is_on_cuda),
        rank=execution.rank,
        world_size=execution.world_size,
        store=store,
        timeout_s=place.timeout_s,
    )


def _die_with(parent_id: int) -> None:
    """Be killed when the parent dies, where the system can do that (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent_id:  # it died before
        os._exit(1)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"(its text raised {type(other).__name__})"
