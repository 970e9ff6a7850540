"""Runs that the real torchrun starts, and starts again when a rank dies."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from job_runner import HERE, differing
from rank_job import RankJob
from rank_runner import evidence, num_kills, run_killed
from rank_server import free_port

SEED = 11
NUM_BATCHES = 12
JOB = RankJob("", "iteration", NUM_BATCHES, 1, valid_frequency=3, chkpt_frequency=2)


@pytest.fixture(scope="session")
def expected(run_ranks, tmp_path_factory):
    """Evidence of the run that nothing happens to."""
    root = tmp_path_factory.mktemp("whole")
    run_killed(run_ranks, dataclasses.replace(JOB, root=str(root)), [])
    return evidence(root)


def start(
    root: Path, *options: str, fates: tuple[tuple[int, int, str], ...] = (), log: str = "log.txt"
) -> "subprocess.Popen[bytes]":
    """Start torchrun with the job, which is told what becomes of its attempts: (victim, batch, signal)."""
    values = {**dataclasses.asdict(JOB), "root": str(root), "fates": fates}
    command = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}", *options]
    with (root / log).open("w") as output:
        return subprocess.Popen(
            [*command, str(HERE / "torchrun_job.py"), json.dumps(values)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def random_kills(num_kills: int) -> tuple[tuple[int, int, str], ...]:
    """Return who is killed in which batch, each some batches after the one before."""
    chance = random.Random(SEED)
    batches = sorted(chance.sample(range(2, NUM_BATCHES, 2), num_kills))
    return tuple((chance.randrange(2), batch + chance.randrange(2), "SIGKILL") for batch in batches)


def test_torchrun_starts_a_run_again_until_it_ends_with_the_same_bits(tmp_path, expected):
    fates = random_kills(2)
    process = start(tmp_path, "--nproc-per-node=2", "--max-restarts=3", fates=fates)
    assert process.wait() == 0, (tmp_path / "log.txt").read_text()
    job = dataclasses.replace(JOB, root=str(tmp_path))
    assert [num_kills(job, rank) for rank in (0, 1)] == [
        sum(victim == rank for victim, *_ in fates) for rank in (0, 1)
    ]
    assert differing(evidence(tmp_path), expected) == []


def test_an_error_in_one_rank_ends_all_and_is_told(tmp_path):
    process = start(tmp_path, "--nproc-per-node=2", fates=((1, 5, "raise"),))
    assert process.wait() != 0
    log = (tmp_path / "log.txt").read_text()
    assert "raised on purpose" in log and "rank      : 1" in log


def test_two_machines_with_a_process_each_get_the_bits_of_one(tmp_path, expected):
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=static", endpoint)
    nodes = [start(tmp_path, *options, f"--node-rank={n}", log=f"log{n}.txt") for n in (0, 1)]
    logs = [tmp_path / f"log{n}.txt" for n in (0, 1)]
    assert [node.wait() for node in nodes] == [0, 0], "\n".join(log.read_text() for log in logs)
    numbers = [(tmp_path / f"rank{rank}" / "numbers.txt").read_text() for rank in (0, 1)]
    assert numbers == ["0 0", "1 0"]
    assert differing(evidence(tmp_path), expected) == []
