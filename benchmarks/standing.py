"""Processes that stand by and do a turn when they are told.

So contenders take turns that cannot be in one process: one needs another interpreter, or what one imports would slow
the others. Their standard error is a terminal, as it is where progress bars are watched.
"""

import contextlib
import importlib
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import warnings
from collections.abc import Callable
from typing import Any, Self

from benchmarks.harness import ROOT, Case


class Standing:
    """A process that does the turns of a module.

    For every case the module's `contender(case)` is called once, in the process; what it returns does one turn and
    returns its result, which JSON must be able to carry.

    Args:
        module: of this folder.
        python: the interpreter; None is this one.
    """

    def __init__(self, module: str, python: str | None = None) -> None:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (50, 120))
        # Another interpreter finds its own packages, not ours.
        options = ["-W", "ignore"] if python is None else ["-W", "ignore", "-E"]
        command = [python or sys.executable, *options, "-m", "benchmarks.standing", module]
        self._process = subprocess.Popen(  # noqa: S603  # an interpreter and our own module
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, text=True
        )
        os.close(theirs)
        self._terminal = threading.Thread(target=_drain, args=(ours,), daemon=True)
        self._terminal.start()

    def turn(self, case: Case) -> Any:
        """Have a turn done and return its result.

        Raises:
            RuntimeError: it failed; says why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"the process ended with {self._process.wait()}"}
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.communicate()
        self._terminal.join()


def _drain(terminal: int) -> None:
    """Read what is shown on a terminal, so that nobody waits to write to it."""
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while os.read(terminal, 65536):
            pass
    os.close(terminal)


def main() -> None:
    """Do the turns that standard input asks for."""
    module = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print there, too
    warnings.simplefilter("ignore")  # what peers have to say about deprecations
    contenders: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        try:
            if line not in contenders:
                contenders[line] = module.contender(json.loads(line))
            answer = {"result": contenders[line]()}
        except Exception as error:  # whatever a library raises is the reason that it was not measured
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
