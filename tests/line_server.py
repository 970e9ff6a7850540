"""A process of its own that answers one line of JSON with one line, started once for many questions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent


class LineServer:
    """A script of this folder that reads lines from standard input. A context manager, which ends it.

    Args:
        script: name of the script.
    """

    def __init__(self, script: str) -> None:
        self._script = HERE / script

    def __enter__(self) -> Self:
        command = [sys.executable, str(self._script)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # closes the pipes, at which it ends
            pass

    def ask(self, question: object) -> Any:
        """Send a question and wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
