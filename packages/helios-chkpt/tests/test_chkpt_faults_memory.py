"""What a hostile file costs is in proportion to its size, whatever it says of sizes."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helios import chkpt

PROBE = """
import sys, time
from helios import chkpt

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

before = peak()
try:
    chkpt.verify(sys.argv[1])
    outcome = "verified"
except chkpt.CheckpointError as error:
    outcome = type(error).__name__
print(peak() - before, outcome)
"""


def measured(path: Path) -> tuple[int, str]:
    """How many bytes a process of its own grew by, and what became of the file."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)], check=True, capture_output=True, text=True
    )
    grown, outcome = done.stdout.split()
    return int(grown), outcome


def test_a_bomb_is_refused_before_it_expands(kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "archive/data.pkl", kit.pickled(kit.tensor((1 << 26,), (1,), of=kit.storage(count=1 << 26)))
        )
        archive.writestr("archive/data/0", bytes(1 << 28))
    assert path.stat().st_size < 1 << 20
    grown, _ = measured(path)
    assert grown < 16 << 20
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.CorruptError):
            read(path)


GREEDY: dict[str, Callable[[int], bytes]] = {
    "empty lists": lambda n: b"](" + b"]" * n + b"e",
    "empty dicts": lambda n: b"](" + b"}" * n + b"e",
    "lists of lists": lambda n: b"](" + b"]]a" * (n // 3) + b"e",
    "tuples": lambda n: b"](" + b"N\x85" * (n // 2) + b"e",
    "marks": lambda n: b"(" * n,
    "ordered dicts": lambda n: b"ccollections\nOrderedDict\nq\x00](" + b"h\x00)R" * (n // 4) + b"e",
    "sizes": lambda n: b"ctorch\nSize\nq\x00](" + b"h\x00)R" * (n // 4) + b"e",
    "names": lambda n: b"](" + b"".join(b"ca\n%d\n" % i for i in range(n // 9)) + b"e",
    "memo": lambda n: b"]" + b"".join(b"r" + struct.pack("<I", i) for i in range(n // 5)),
    "numbers": lambda n: b"](" + b"K\x01" * (n // 2) + b"e",
}


@pytest.mark.parametrize("kind", GREEDY)
def test_memory_is_a_small_multiple_of_the_pickle(kind: str, kit: Any, tmp_path: Path) -> None:
    """An empty dict is one byte of a pickle and 64 of memory, so less than that times two is what there can be."""
    path = kit.archive(tmp_path / "a.pth", kit.pickled(GREEDY[kind](500_000)))
    grown, _ = measured(path)
    assert grown < 128 * path.stat().st_size + (8 << 20), grown / path.stat().st_size


@pytest.mark.parametrize("where", ["behind the manifest", "a pickle that is a hole"])
def test_a_sparse_file_of_a_gigabyte_costs_no_gigabyte(where: str, kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled())
    raw = path.read_bytes()
    end = raw[-98:]
    with path.open("r+b") as file:
        if where == "behind the manifest":
            file.seek(len(raw) - 98 + (1 << 30))
            file.write(end)
        else:
            file.truncate(1 << 30)
    assert path.stat().st_size >= 1 << 30
    grown, outcome = measured(path)
    assert outcome in ("CorruptError", "TruncatedError") and grown < 32 << 20
