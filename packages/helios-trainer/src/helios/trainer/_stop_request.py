"""Asking a run to stop after the iteration in progress: by a signal, or by `Trainer.request_stop`."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What Python does with these signals unless somebody wants something else; a handler of the user's own stays.
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class StopRequest:
    """Whether somebody asked the run to stop, to go on another time.

    Attributes:
        is_made: somebody did. A plain attribute, since the loop reads it after every batch.
        signal: the signal that did, or None; another process may have got it.
        of_parent: in a spawned process, what the parent sets its `value` of to the number of a signal that reached it.
    """

    def __init__(self) -> None:
        self.is_made = False
        self.signal: signal.Signals | None = None
        self.of_parent: Any = None

    def make(self, received: signal.Signals | None = None) -> None:
        """Ask."""
        quiet_workers()
        self.is_made, self.signal = True, received

    def hear(self, received: signal.Signals | None) -> None:
        """Take over what another process of the run was asked, if nobody asked this one."""
        if not self.is_made:
            self.is_made, self.signal = True, received

    def withdraw(self) -> None:
        """Forget that somebody asked: another run begins."""
        self.is_made, self.signal = False, None

    def __str__(self) -> str:
        return "request_stop()" if self.signal is None else self.signal.name


class _Deaf:
    """A handler that does nothing. With SIG_DFL in its place Python prints an error if a signal was on its way."""

    def __init__(self, instead_of: Any) -> None:
        self.instead_of = instead_of

    def __call__(self, number: int, frame: FrameType | None) -> None:
        pass


def quiet_workers() -> None:
    """Have the death of a loader's worker noticed when a batch is waited for, not before; call it once there are some.

    A signal to all processes of a job kills the workers. When it hears of that by SIGCHLD, torch raises an error in
    the middle of whatever the main thread does, a hook or the saving of a checkpoint. Whoever waits for a batch notices
    too, within seconds.
    """
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if (getattr(handler, "__module__", None) or "").startswith("torch."):
            signal.signal(signal.SIGCHLD, _Deaf(handler))


@contextmanager
def hearing_of_workers() -> Iterator[None]:
    """Undo `quiet_workers` at the end."""
    try:
        yield
    finally:
        handler = signal.getsignal(signal.SIGCHLD)
        if isinstance(handler, _Deaf) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler.instead_of)


class _Children:
    """Gives forked children the SIGTERM back that they would have without us: whoever terminates them must succeed.

    That cannot be left to a handler. Python forgets a signal that comes before the child has begun, so it is held back
    until the handler is the old one.

    Attributes:
        sigterm: the old handler, while there is another.
    """

    def __init__(self) -> None:
        self.sigterm: Any = None
        self._of_thread = threading.local()
        os.register_at_fork(before=self._before, after_in_child=self._in_child, after_in_parent=self._after)

    def _before(self) -> None:
        self._of_thread.mask = None
        if self.sigterm is not None:
            self._of_thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _in_child(self) -> None:
        if self._of_thread.mask is not None:
            signal.signal(signal.SIGTERM, self.sigterm)
            self.sigterm = None
        self._after()

    def _after(self) -> None:
        if self._of_thread.mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._of_thread.mask)


@cache
def _children() -> _Children:
    # One for the process: what is registered for forks stays so.
    return _Children()


@contextmanager
def signals_let_in() -> Iterator[None]:
    """Let in what a parent that listens held back when it started this process, and hold it back again afterwards.

    A signal to all processes of a job then neither kills one that does not listen yet, nor one that does no more.
    """
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def listening_to_signals(
    ask: Callable[[signal.Signals], None], give_up: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) ask for a stop inside; a second one does what it always did, at once.

    A signal that is ignored, or for which the user has a handler, is left alone. So are all of them outside the main
    thread, where Python allows no handlers.

    Args:
        ask: is told the first signal.
        give_up: is called before the second one acts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process_id, is_asked = os.getpid(), False
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler in _DEFAULTS}

    def put_back() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is on_signal:  # else somebody has another one since
                signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if os.getpid() != process_id:
            return  # a forked child, such as a loader's worker: Ctrl-C reaches it too, and we decide what it means
        if is_asked:
            give_up()
            put_back()
            signal.raise_signal(number)
            return
        is_asked, received = True, signal.Signals(number)
        ask(received)
        # Not through a logger: the signal may have come in the middle of its writing.
        said = f"\n{received.name}: the run stops after this iteration; once more ends it at once\n"
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, said.encode())

    for number in before:
        signal.signal(number, on_signal)
    if signal.SIGTERM in before:
        _children().sigterm = before[signal.SIGTERM]
    try:
        yield
    finally:
        _children().sigterm = None
        put_back()
