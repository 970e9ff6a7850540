"""kill -9 at any instant of a save, a background save, retention and a migration: nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helios import chkpt

pytestmark = pytest.mark.long

DRIVER = Path(__file__).parent / "storm_driver.py"
OPERATIONS = ["overwrite", "async", "retention", "migrate"]


def storm(folder: Path, *arguments: str) -> dict[str, int]:
    command = [sys.executable, str(DRIVER), str(folder), *arguments]
    done = subprocess.run(command, check=True, capture_output=True)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_before_and_after_every_call_that_changes_a_file(operation: str, tmp_path: Path) -> None:
    counts = storm(tmp_path, operation, "calls")
    assert counts["kills"] >= 30
    assert counts["orphans"] > 0, "no kill fell into a write, so nothing was shown"
    assert (counts["lost"], counts["wrong"], counts["unswept"]) == (0, 0, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_kills_at_random_instants(operation: str, tmp_path: Path) -> None:
    counts = storm(tmp_path, operation, "random", "12")
    assert counts["kills"] == 12
    assert (counts["lost"], counts["wrong"], counts["unswept"]) == (0, 0, 0)


def test_control_the_same_storm_tears_what_torch_writes_in_place(tmp_path: Path) -> None:
    assert storm(tmp_path, "in_place", "random", "12")["lost"] > 0


EXIT = """
import atexit, sys, torch
from helios.chkpt import CheckpointStore, load, save
state = {"x": torch.ones(1 << 20), "y": torch.ones(1 << 20)}
store = CheckpointStore(sys.argv[1], "run", keep_last=1)
store.save(state, epoch=1, iteration=0)
if sys.argv[2] == "atexit":
    @atexit.register
    def last():
        load(store.save(state, epoch=1, iteration=1))
else:
    store.save_async(state, epoch=1, iteration=1)
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 3), ("atexit", 0)])
def test_the_interpreter_finishes_a_save_and_its_retention_before_it_exits(
    how: str, status: int, tmp_path: Path
) -> None:
    quiet = ["-W", "ignore:Failed to initialize NumPy"]  # torch says so where it is not installed
    command = [sys.executable, *quiet, "-c", EXIT, str(tmp_path), how]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (status, b"")
    (path,) = tmp_path.iterdir()
    assert path.name == "run_epoch_1_iter_1.pth"
    chkpt.verify(path)
