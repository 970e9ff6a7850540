"""Runs Python scripts in processes that need not import torch again: one line of JSON in, one out.

A line asks for some processes at once: it has a dict for each, with its `code`, `name`, `arguments`, `folder`, `env`,
and the files for its `stdout` and `stderr`. The answer has their statuses; negative is a signal. Importing torch takes
seconds, so this process imports everything, does nothing else, and forks. A child then runs its script as the
interpreter does, and leaves as it does.
"""

import contextlib
import json
import os
import signal
import sys
import time
from types import ModuleType
from typing import Any

import torch.optim
import torch.utils.tensorboard

import helios.trainer

assert torch.optim and torch.utils.tensorboard and helios.trainer
PATIENCE_S = 120.0


def fork(request: dict[str, Any]) -> int:
    """Return the number of a new process; in that, 0, when it is as it was asked for."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had us ignore
    os.chdir(request["folder"])
    os.environ |= request["env"]
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [request["name"], *request["arguments"]]
    return 0


def statuses_of(children: list[int]) -> list[int]:
    """Wait for processes, which are killed if they take too long."""
    found: dict[int, int] = {}
    deadline_s = time.monotonic() + PATIENCE_S
    while len(found) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            found[child] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline_s:
            for each in set(children) - set(found):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(each, signal.SIGKILL)
        else:
            time.sleep(0.002)
    return [found[child] for child in children]


def serve() -> dict[str, Any] | None:
    """Serve until standard input ends; in a child, return what it is to do."""
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            child = fork(request)
            if child == 0:
                return request
            children.append(child)
        print(json.dumps(statuses_of(children)), flush=True)
    return None


if __name__ == "__main__":
    todo = serve()
    if todo is not None:
        sys.modules["__main__"] = script = ModuleType("__main__")
        script.__file__ = todo["name"]
        exec(compile(todo["code"], todo["name"], "exec"), vars(script))
