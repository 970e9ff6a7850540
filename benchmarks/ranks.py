"""Cases that take several ranks: each in a process of its own, as torchrun starts them."""

import importlib
import json
import os
import socket
import subprocess
import sys
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import ROOT, Case


def in_ranks(module: str, world_size: int, case: Case) -> Any:
    """Run `run_case(case)` of a module of this folder in so many ranks, and return what rank 0 has to say."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    size = str(world_size)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.ranks", module, json.dumps(case)]
    processes = [
        subprocess.Popen(  # noqa: S603  # our own interpreter and our own module
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate()[0] for process in processes]
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    """Be a rank."""
    module = importlib.import_module(f"benchmarks.{sys.argv[1]}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answer = module.run_case(json.loads(sys.argv[2]))
    dist.destroy_process_group()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
