"""Runs jobs in real processes that need not import torch again: one line of JSON in, one out.

Importing torch takes seconds and a job a tenth of one, so this process imports everything, does nothing
else, and forks for every job. A job that kills itself dies like any process.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import job
import torch._dynamo
import torch.utils.tensorboard

assert torch._dynamo and torch.utils.tensorboard  # imported for the jobs: an optimizer imports the former


def run_in_child(run: Callable[[], bool], root: Path) -> NoReturn:
    """Run a job in a process group, with its output in a file, and leave without the parent's clean-up."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had us ignore
    root.mkdir(parents=True, exist_ok=True)
    output = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        status = 0 if run() else os.EX_TEMPFAIL
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            started = job.Job(**json.loads(line))
            run_in_child(lambda: job.run(started), Path(started.root))  # noqa: B023  # called at once
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
