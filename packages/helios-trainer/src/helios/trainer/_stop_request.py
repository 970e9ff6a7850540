"""Asking a run to stop after the iteration in progress: by a signal, or by `Trainer.request_stop`."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What Python does with these signals unless somebody wants something else; a handler of the user's own stays.
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class StopRequest:
    """Whether somebody asked the run to stop, to go on another time.

    Attributes:
        is_made: somebody did. A plain attribute, since the loop reads it after every batch.
        signal: the signal that did, or None.
    """

    def __init__(self) -> None:
        self.is_made = False
        self.signal: signal.Signals | None = None

    def make(self, received: signal.Signals | None = None) -> None:
        """Ask."""
        self.is_made, self.signal = True, received

    def withdraw(self) -> None:
        """Forget that somebody asked: another run begins."""
        self.is_made, self.signal = False, None

    def __str__(self) -> str:
        return "request_stop()" if self.signal is None else self.signal.name


def _do_nothing(number: int, frame: FrameType | None) -> None:
    # For SIGCHLD. With SIG_DFL in its place Python prints an error if it was on its way already.
    pass


@contextmanager
def listening_to_signals(request: StopRequest) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for a stop inside; a second one does what it always did, at once.

    A signal that is ignored, or for which the user has a handler, is left alone. So are all of them outside the main
    thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process_id = os.getpid()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before: dict[signal.Signals, Any] = {
        number: handler for number, handler in handlers.items() if handler in _DEFAULTS
    }

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process_id:  # a loader's worker: Ctrl-C and `kill -TERM -group` reach it too
            return
        if request.is_made:
            put_back()
            signal.raise_signal(number)
            return
        request.make(signal.Signals(number))
        # The loader's workers may get the signal too. For that, torch raises an error in the middle of whatever the
        # main thread does, when it hears of their death by SIGCHLD. It must hear of it when it waits for a batch.
        before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, _do_nothing))
        # Not through a logger: the signal may have come in the middle of its writing.
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(
                2, f"\n{request}: the run stops after this iteration; once more ends it at once\n".encode()
            )

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        put_back()
