"""One progress bar: drawn and redrawn in a terminal, or a plain line now and then anywhere else."""

import contextlib
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    _Tqdm = tqdm[Any]  # generic in its type stubs alone
else:
    _Tqdm = tqdm


class Bar(Protocol):
    """What counts something and shows it."""

    def show(self, text: str) -> None:
        """Have something shown beside the count, from the next drawing on."""

    def count(self) -> bool:
        """Count one, and return whether it is time to draw."""

    def draw(self) -> object:
        """Show where the bar stands."""

    def update(self, n: int = 1) -> object:
        """Count so many, and draw if it is time."""

    def close(self) -> None:
        """Take the bar down."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> object: ...


class TerminalBar(_Tqdm):
    """A bar that is drawn over itself, at most every `mininterval` seconds (0.1 by default).

    Args:
        stream: the terminal.
        name: what stands before it.
        unit: what it counts.
        total: where it ends; None if nobody knows.
        done: where it starts.
        stays: leave it on the screen when it is closed.
    """

    # No thread that looks after bars whose steps became slow: `count` looks at the clock.
    monitor_interval = 0

    def __init__(
        self, stream: TextIO, name: str, *, unit: str, total: float | None, done: int, stays: bool
    ) -> None:
        size: dict[str, Any] = {"dynamic_ncols": True}
        if not _has_size(stream):
            size = {"ncols": 79, "nrows": 24}
        forgiving: Any = _Forgiving(stream)
        super().__init__(
            desc=name, unit=unit, total=total, initial=done, leave=stays, file=forgiving, miniters=0, **size
        )

    def show(self, text: str) -> None:
        """Have something shown beside the count, from the next drawing on."""
        self.postfix = text

    def count(self) -> bool:
        """Count one, and return whether it is time to draw."""
        if self.disable:
            return False
        self.n += 1
        return bool(time.time() - self.last_print_t >= self.mininterval)

    def draw(self) -> object:
        """Draw where the bar stands, if it is time."""
        return self.update(0)


class PlainBar:
    """A bar for a file or a pipe: whole lines, without control characters, and few of them.

    There is a line when `interval_s` have passed since the bar began or since its last line; and one where it ended,
    if it has lasted that long.

    Args:
        stream: where to write.
        name: what stands before it.
        unit: what it counts.
        total: where it ends; None if nobody knows.
        done: where it starts.
        interval_s: seconds between two lines.
        clock: the seconds that have passed since some moment.
    """

    def __init__(
        self,
        stream: TextIO,
        name: str,
        *,
        unit: str,
        total: float | None,
        done: int,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text = ""
        self._stream = _Forgiving(stream)
        self._format = {
            "prefix": name, "unit": unit, "total": total, "initial": done, "ascii": True, "ncols": None
        }  # fmt: skip
        self._interval_s = interval_s
        self._clock = clock
        self._count = done
        self._began_s = clock()
        self._due_s = self._began_s + interval_s
        self._said: int | None = None  # the count in the last line

    def show(self, text: str) -> None:
        """Have something shown beside the count, from the next line on."""
        self._text = text

    def count(self) -> bool:
        """Count one, and return whether it is time for a line."""
        self._count += 1
        return self._clock() >= self._due_s

    def draw(self) -> None:
        """Write a line."""
        now_s = self._clock()
        values: dict[str, Any] = {**self._format, "postfix": self._text}
        line = tqdm.format_meter(n=self._count, elapsed=now_s - self._began_s, **values)
        # In one piece, for others may write to the same file.
        self._stream.write(line + "\n")
        self._stream.flush()
        self._due_s = now_s + self._interval_s
        self._said = self._count

    def update(self, n: int = 1) -> None:
        """Count so many, and write a line if it is time."""
        self._count += n - 1
        if self.count():
            self.draw()

    def close(self) -> None:
        """Write where the bar ended, if it wrote a line before, of elsewhere."""
        if self._said is not None and self._said != self._count:
            self.draw()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class NoBar:
    """A bar that nobody wants to see."""

    def show(self, text: str) -> None:
        """Show nothing."""

    def count(self) -> bool:
        """Count nothing."""
        return False

    def draw(self) -> None:
        """Draw nothing."""

    def update(self, n: int = 1) -> None:
        """Count nothing."""

    def close(self) -> None:
        """Close nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Forgiving:
    """A stream whose other end may be gone or full: that must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    # For tqdm, which clears the bars of a stream before it writes something else there.
    def __eq__(self, other: object) -> bool:
        return self._stream == other

    def __hash__(self) -> int:
        return hash(self._stream)


def is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn over itself on a stream."""
    # A dumb one, an editor's shell say, shows cursor movements as text.
    return hasattr(stream, "isatty") and stream.isatty() and os.environ.get("TERM") != "dumb"


def _has_size(stream: TextIO) -> bool:
    # A pseudo-terminal that nobody gave a size says that it has no columns, and tqdm would draw nothing.
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError, AttributeError):  # not a real one: tqdm finds something
        return True
