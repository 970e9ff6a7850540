"""Ending a loader's worker when the process that it works for is killed.

torch looks for that too, but every five seconds, and not at all if that process was dead before it looked for the first
time. Until the worker ends it holds what it has inherited: in a group of processes the connections of a dead rank, for
which the others wait.
"""

import multiprocessing
import os
import threading
import time
from multiprocessing.context import ForkServerProcess

_LOOK_AGAIN_S = 0.5


def end_with_parent() -> None:
    """Let this worker end, from now on, soon after the process that started it has died."""
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_watch, name="helios orphans", daemon=True).start()


def _watch() -> None:
    while has_parent():
        time.sleep(_LOOK_AGAIN_S)
    os._exit(1)


def has_parent() -> bool:
    """Whether the process that started this one is alive."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    if isinstance(multiprocessing.current_process(), ForkServerProcess):
        return parent.is_alive()  # by a pipe, which this one has not inherited: a server has started it
    return os.getppid() == parent.pid
