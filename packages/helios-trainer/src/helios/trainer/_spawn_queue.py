"""What spawned processes send to their parent: a pipe for each, and the queue made of them.

A pipe holds 64 KB, so the parent reads while it waits for the processes to end. What was sent before a process ended,
in whatever way, is in its pipe then, and so nothing is missed. One pipe for each process needs no lock between them,
which one that is killed would never let go.
"""

import os
import pickle
import struct
import threading
from collections import deque
from multiprocessing.connection import Connection
from queue import Empty
from typing import Any

_HEADER = struct.Struct("!cQ")  # kind and length of a message
_CHUNK_BYTES = 1 << 20


class PipeWriter:
    """The end of a pipe that messages are written to, in the process that it belongs to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._process_id = os.getpid()
        self._lock = threading.Lock()

    def send(self, kind: bytes, content: bytes) -> None:
        """Write a message; returns when the parent has read it, or the pipe has room.

        Raises:
            RuntimeError: the process is another one, forked from the one that the pipe belongs to.
        """
        if os.getpid() != self._process_id:
            raise RuntimeError(
                "trainer.queue is used in a process forked from a rank, such as a loader's worker: use it in the rank"
            )
        with self._lock:
            for part in (_HEADER.pack(kind, len(content)), content):
                view = memoryview(part)
                while view:
                    view = view[os.write(self._connection.fileno(), view) :]


class PipeReader:
    """The other end, in the parent. Never waits, not even for the rest of a message whose writer was killed.

    Attributes:
        connection: to wait for.
        is_closed: nobody has the end that is written to.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_closed = False
        self._received = bytearray()
        os.set_blocking(connection.fileno(), False)

    def receive(self) -> list[tuple[bytes, bytes]]:
        """Return the kinds and contents of the messages that are complete by now."""
        messages = []
        while not self.is_closed:
            try:
                chunk = os.read(self.connection.fileno(), _CHUNK_BYTES)
            except BlockingIOError:
                break
            self.is_closed = not chunk
            self._received += chunk
            messages += self._complete()
        return messages

    def _complete(self) -> list[tuple[bytes, bytes]]:
        messages, begin, received = [], 0, self._received
        while len(received) - begin >= _HEADER.size:
            kind, length = _HEADER.unpack_from(received, begin)
            end = begin + _HEADER.size + length
            if len(received) < end:
                break
            messages.append((kind, bytes(received[begin + _HEADER.size : end])))
            begin = end
        del received[:begin]
        return messages


class SpawnQueue:
    """A queue that spawned processes put into, and that their parent reads when they have ended.

    It has what is used of a `multiprocessing.Queue`. Items are copied when they are put, tensors too, and those of one
    process keep their order. All that was put before the processes ended is there as soon as they have.
    """

    def __init__(self, writer: PipeWriter | None = None) -> None:
        self._writer = writer
        self._items: deque[bytes] = deque()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put an item in; `block` and `timeout` have no meaning, as there is no limit.

        Raises:
            Exception: the item cannot be pickled; whatever pickle raises.
        """
        content = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        if self._writer is None:
            self._items.append(content)
        else:
            self._writer.send(ITEM, content)

    put_nowait = put

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first item out. Never waits: when the processes have ended, no more will come.

        Raises:
            queue.Empty: there is none.
            RuntimeError: this is not the parent.
        """
        self._need_parent("get")
        if not self._items:
            raise Empty
        return pickle.loads(self._items.popleft())  # noqa: S301  # from our own processes

    get_nowait = get

    def empty(self) -> bool:
        """Return whether there are no items. RuntimeError if this is not the parent."""
        return self.qsize() == 0

    def qsize(self) -> int:
        """Return how many items there are. RuntimeError if this is not the parent."""
        self._need_parent("qsize")
        return len(self._items)

    def receive(self, content: bytes) -> None:
        """Append an item that a process has put in."""
        self._items.append(content)

    def _need_parent(self, name: str) -> None:
        if self._writer is not None:
            raise RuntimeError(
                f"queue.{name} was called in a spawned process: they put, and the parent reads after fit or test"
            )


BEGUN, ITEM, ANSWER, FAILING, FAILURE = b"b", b"i", b"a", b"u", b"f"
"""Kinds of messages: the process has begun, put an item into the queue, has done its work, is about to fail and lets go
of what it has, has failed."""
