"""States, files and clocks of the checkpoint themes."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import MIB

State = dict[str, Any]
TENSOR_MIB = 4


def large_state(mib: int, num_tensors: int | None = None) -> State:
    """Make a state of float32 tensors of 4 MiB, or of so many that are alike; no two hold the same bytes."""
    import torch

    num_tensors = num_tensors or mib // TENSOR_MIB
    first = torch.rand(mib * MIB // 4 // num_tensors)
    return {"model": {f"layer{index}": first + index for index in range(num_tensors)}, "step": 1}


def small_state(num_tensors: int = 10_000) -> State:
    """Make a state of many tensors of 1 KiB."""
    import torch

    return {"model": {f"layer{index}": torch.rand(256) for index in range(num_tensors)}, "step": 1}


@contextmanager
def scratch(mib: float) -> Iterator[Path]:
    """Give a new folder with room for so many MiB, where temporary files are, and delete it in the end."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / MIB
    if free < 1.2 * mib:
        raise OSError(
            f"{tempfile.gettempdir()} has {free:.0f} MiB free, {1.2 * mib:.0f} are needed; set TMPDIR or --mib"
        )
    with tempfile.TemporaryDirectory(prefix="helios-benchmark-") as folder:
        yield Path(folder)


def fsync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Took(NamedTuple):
    """Milliseconds: what a clock shows, and of processor time in this process, all threads."""

    wall: float
    cpu: float


def took(work: Callable[[], object]) -> Took:
    """Return how long some work takes."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    result = work()
    done = Took((time.perf_counter() - begin) * 1e3, (time.process_time() - cpu_begin) * 1e3)
    del result  # what is let go of is not timed
    return done


def size(mib: float) -> str:
    """Write a number of MiB."""
    return f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.3g} MiB"
