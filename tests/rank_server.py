"""Runs jobs on several ranks that need not import torch again: one line of JSON in, one out; see fork_server.py.

The ranks get the environment that torchrun gives them. If one fails, the others have some time to notice, and are
killed then: how long they took is part of the answer. One that hangs on purpose is killed when the others have ended.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import rank_job
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard
from fork_server import run_in_child

assert torch._dynamo and torch.utils.tensorboard and torch.distributed.fsdp and torch.distributed.checkpoint
PATIENCE_S = 30.0


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def start_rank(job: rank_job.RankJob, rank: int, port: int) -> int:
    """Start a rank and return its process id."""
    child = os.fork()
    if child:
        return child
    if not job.has_group:
        run_in_child(lambda: rank_job.run(job), Path(job.root, f"rank{rank}"))
    size = str(job.world_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_in_child(lambda: rank_job.run(job), Path(job.root, f"rank{rank}"))
    raise AssertionError("run_in_child does not return")


def run(job: rank_job.RankJob) -> dict[str, object]:
    """Run a job, and return how it ended.

    Returns:
        `statuses` of the ranks; `was_killed`, whether one of them had not ended long after another had failed;
        `ended_s`, when the last one ended by itself, in seconds since 1970; `lived_s`, how long after the first that
        failed that was.
    """
    port = free_port()
    children = {start_rank(job, rank, port): rank for rank in range(job.world_size)}
    hanging = set(job.victims) if job.signal == "hang" and job.kill is not None else set()
    statuses: dict[int, int] = {}
    failed_s: float | None = None
    ended_s = 0.0
    was_killed = False
    while len(statuses) < job.world_size:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            statuses[rank] = os.waitstatus_to_exitcode(status)
            if statuses[rank] and failed_s is None:
                failed_s = time.time()
            if rank not in hanging:
                ended_s = time.time()
        elif set(children.values()) <= hanging or (
            failed_s is not None and time.time() > failed_s + PATIENCE_S
        ):
            was_killed |= not set(children.values()) <= hanging
            for each in children:
                os.kill(each, signal.SIGKILL)
            time.sleep(0.002)
        else:
            time.sleep(0.002)
    return {
        "statuses": [statuses[rank] for rank in range(job.world_size)],
        "lived_s": 0.0 if failed_s is None else ended_s - failed_s,
        "ended_s": ended_s,
        "was_killed": was_killed,
    }


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        values = json.loads(line)
        values["victims"] = tuple(values["victims"])
        try:
            answer = run(rank_job.RankJob(**values))
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
