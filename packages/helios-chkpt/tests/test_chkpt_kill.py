"""kill -9 at any instant of an overwrite leaves the old file or the new one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helios import chkpt

DRIVER = Path(__file__).parent / "storm_driver.py"
NUM_KILLS = 20


def storm(folder: Path, writer: str) -> dict[str, int]:
    command = [sys.executable, str(DRIVER), str(folder), writer, str(NUM_KILLS)]
    done = subprocess.run(command, check=True, capture_output=True)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    counts = storm(tmp_path, "helios")
    assert (counts["torn"], counts["wrong"], counts["unswept"]) == (0, 0, 0)
    assert counts["orphans"] > 0, "no kill fell into a write, so nothing was shown"
    (path,) = tmp_path.iterdir()
    chkpt.verify(path)


def test_control_the_same_storm_tears_what_torch_writes_in_place(tmp_path: Path) -> None:
    assert storm(tmp_path, "in_place")["torn"] > 0


EXIT = """
import sys, torch
from helios.chkpt import CheckpointStore
store = CheckpointStore(sys.argv[1], "run")
store.save_async({"x": torch.ones(1 << 20)}, epoch=1, iteration=1)
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("return", 0), ("raise", 3)])
def test_the_interpreter_finishes_a_save_before_it_exits(how: str, status: int, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EXIT, str(tmp_path), how], check=False, timeout=60)
    assert done.returncode == status
    (path,) = tmp_path.iterdir()
    chkpt.verify(path)
