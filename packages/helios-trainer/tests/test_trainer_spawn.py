"""Trainers in several processes, spawned and under torchrun. Real processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).parent / "spawn_job.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture
def scenario(tmp_path):
    """Run a scenario of spawn_job.py in a process of its own; return the file that has what it returned."""

    def run(name, *options):
        command = [sys.executable, "-W", "error", *options, JOB, name, tmp_path, tmp_path / "result.pt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        return tmp_path / "result.pt"

    return run


def test_fit_and_test_in_spawned_processes(scenario):
    result = torch.load(scenario("fit"))
    assert result["before"] == [0, 0, [], 0]
    assert result["finished"] is True and result["stopped by"] is None
    first, second, *plugins = result["items"]
    assert first[:2] == ["model", [0, 0, 0, 2, True, True]]  # each has a trainer, which its plug-ins know
    assert second[:2] == ["model", [1, 1, 1, 2, True, True]]
    assert first[2].shape == second[2].shape == (3, 4)  # parameters that were made in processes that are gone
    assert plugins == [["plugin", 0], ["plugin", 1]]
    assert result["is untouched"]
    assert result["prepared"][0] == "parent" and result["prepared"].count("parent") == 1
    assert result["test"] == [True, [["tested", 0], ["tested", 1]]]
    assert result["prepared to test"] == ["parent"]


@pytest.mark.long
def test_exceptions_of_spawned_processes(scenario):
    result = torch.load(scenario("exceptions"))
    kind, text, notes = result["fit"]
    # Its own type, by a list that a plug-in changed; and not that of rank 0, whose barrier failed for that reason.
    assert (kind, text) == ("PassedError", "in fit")
    assert notes.startswith("Raised in rank 1:\nTraceback") and "in on_training_end" in notes
    assert result["items"] == 4
    assert result["test"][:2] == ["RuntimeError", "testing failed: PassedError: in test"]
    assert result["flag"] == [-1, 15]  # a request without a signal does not hide one


@pytest.mark.long
def test_the_exception_that_came_first_is_raised(scenario):
    kind, text, notes = torch.load(scenario("first_failure"))["fit"]
    assert (kind, text) == ("PassedError", "came first")
    assert notes.startswith("Raised in rank 0:\nTraceback") and "in on_training_end" in notes


@pytest.mark.long
def test_requests_before_and_after_the_ranks_look(scenario):
    result = torch.load(scenario("asked"), weights_only=False)
    assert result["early"] == [False, 15]
    assert result["hasty"] == [False, None]
    assert result["late"] == [True, 15]


@pytest.mark.long
def test_ranks_of_torchrun(scenario):
    path = scenario("torchrun", *TORCHRUN)
    results = [torch.load(f"{path}{rank}") for rank in (0, 1)]
    for rank, result in enumerate(results):
        assert result["finished"] is result["tested"] is True
        assert result["seen"] == [[[0, 0, 2, 1], [1, 1, 2, 1]], None]
        # No group is left behind, not after a failure either; the user's own is.
        assert result["active"] == [False, True, False]
        assert result["rank"] == rank
    assert results[1]["failed"][:2] == ["AbortError", "on rank 1"]
    assert results[0]["failed"][0] == "RuntimeError"  # its barrier failed
