"""A save in the background."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

_LOGGER = logging.getLogger("helios.chkpt")


class SaveJob(threading.Thread):
    """One save in the background. Not a daemon: the interpreter finishes it before it exits.

    Args:
        path: the file, for messages.
        save: writes it.

    Attributes:
        error: what `save` raised, once the job is done; None if nothing.
    """

    def __init__(self, path: Path, save: Callable[[], None]) -> None:
        super().__init__(name=f"save {path.name}", daemon=False)
        self._path = path
        self._save: Callable[[], None] | None = save
        self._claim = threading.Lock()  # of the thread; or of `wait`, if an interrupt kept it from starting
        self._is_started = False
        self._pid = os.getpid()
        self._is_done = threading.Event()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        super().start()
        self._is_started = True

    def wait(self) -> None:
        """Return when the thread reads the state no more.

        Not by `join`: in Python before 3.13 one that Ctrl-C interrupts takes the thread for ended ever after, and the
        interpreter does not finish it when it exits.
        """
        if self._pid != os.getpid():
            return  # a process that was forked off has the store, but not its thread
        if self._is_started or not self._claim.acquire(blocking=False):
            self._is_done.wait()

    def run(self) -> None:
        """Save; what goes wrong is kept for whoever asks, and logged, since nobody may ask again."""
        if not self._claim.acquire(blocking=False):
            return  # whoever called `save_async` was interrupted, and has been told so
        try:
            assert self._save is not None
            self._save()
        except BaseException as error:
            self.error = error
            _LOGGER.error("%s was not saved: %s: %s", self._path, type(error).__name__, error)
        finally:
            self._save = None  # and with it the state
            self._is_done.set()
