"""Storm of kills: fork a child that overwrites one file in a loop, kill -9 it at a random instant, look.

Arguments: the folder, the writer ("helios" or "in_place"), the number of kills. Prints JSON. A program of its
own so that the children are forked from a process without threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from helios import chkpt

RUN = "run"
SHAPE = 1 << 18  # 1 MiB of float32


def state(step: int) -> dict[str, object]:
    return {"step": step, "w": torch.full((SHAPE,), float(step))}


def child(path: Path, writer: str, first: int, report: int) -> NoReturn:
    step = first
    while True:
        if writer == "helios":
            chkpt.save(state(step), path)
        else:
            torch.save({**state(step), "version": chkpt.__version__}, path)
        os.write(report, step.to_bytes(8, "little"))
        step += 1


def kill_one(path: Path, writer: str, first: int, delay_s: float) -> int:
    """The last step that the child reported as saved."""
    reader, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child(path, writer, first, report)
    os.close(report)
    with os.fdopen(reader, "rb") as pipe:
        done = pipe.read(8)  # the loop runs
        time.sleep(delay_s)  # the instant of the kill, not a synchronisation
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += pipe.read()
    return int.from_bytes(done[-8:], "little")


def main(folder: Path, writer: str, num_kills: int) -> None:
    torch.set_num_threads(1)
    path = folder / chkpt.format_name(chkpt.CheckpointName(RUN, 1, 1))
    rng = random.Random(20260101)
    torn = wrong = num_orphans = unswept = 0
    last = 0
    for _ in range(num_kills):
        last = kill_one(path, writer, last + 1, rng.uniform(0.0, 0.06))
        try:
            found = chkpt.load(path)
            step, weights = found["step"], found["w"]
            assert isinstance(step, int) and isinstance(weights, torch.Tensor)
            whole = bool((weights == step).all())
            wrong += not (whole and step in (last, last + 1))
            last = max(last, step)
        except chkpt.CheckpointError:
            torn += 1
        num_orphans += len(list(folder.glob(".*.tmp")))
        with chkpt.CheckpointStore(folder, RUN):
            unswept += len(list(folder.glob(".*")))
    print(json.dumps({"torn": torn, "wrong": wrong, "orphans": num_orphans, "unswept": unswept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
