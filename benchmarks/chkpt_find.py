"""Table 12: how long it takes to find the checkpoint to go on from."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.chkpt_states import large_state, scratch, took
from benchmarks.harness import Options, interleave, table

TITLE = "Find: milliseconds until the last good checkpoint is known"
NOTES = (
    "`find_last_checkpoint` in a folder of so many checkpoints of 4 MiB, repeated in one process, files in the page "
    "cache. All good: the newest is verified, the others are only names. Damaged: the ten newest lack their last "
    "byte. verify: of the newest alone, which has to be done in any case. scandir: listing the names."
)


def fill(folder: Path, num_files: int, num_damaged: int) -> Path:
    """Make the checkpoints, many names of two files, and return the newest good one."""
    from helios.chkpt import save

    folder.mkdir()
    good = save(large_state(4, 1), folder.with_suffix(".good"))
    damaged = folder.with_suffix(".damaged")
    damaged.write_bytes(good.read_bytes()[:-1])
    paths = [folder / f"bench_epoch_{1 + index // 10}_iter_{index}.pth" for index in range(num_files)]
    for index, path in enumerate(paths):
        path.hardlink_to(good if index < num_files - num_damaged else damaged)
    return paths[num_files - num_damaged - 1]


def listing(folder: Path) -> list[str]:
    """List the names."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def measure(folder: Path, newest: Path, seconds: float) -> dict[str, float]:
    """Return milliseconds of finding, verifying and listing."""
    from helios.chkpt import find_last_checkpoint, verify

    if find_last_checkpoint(folder, "bench") != newest:
        raise RuntimeError("find_last_checkpoint found another file than the newest good one")
    works: dict[str, Callable[[], object]] = {
        "find": lambda: find_last_checkpoint(folder, "bench"),
        "verify": lambda: verify(newest),
        "scandir": lambda: listing(folder),
    }
    turns = interleave({name: partial(took, work) for name, work in works.items()}, seconds)
    return {name: median(each.wall for each in own) for name, own in turns.items()}


def run(options: Options) -> str:
    """Measure all and return the table."""
    import logging

    logging.getLogger("helios.chkpt").setLevel(logging.ERROR)  # it reports each damaged file
    rows: list[list[object]] = []
    with scratch(64) as place:
        for num_files, num_damaged in ((10, 0), (100, 0), (1000, 0), (100, 10)):
            folder = place / f"{num_files}_{num_damaged}"
            newest = fill(folder, num_files, num_damaged)
            found = measure(folder, newest, 6 if options.large else 2)
            state = f"{num_damaged} newest damaged" if num_damaged else "all good"
            rows.append([num_files, state, found["find"], found["verify"], found["scandir"]])
    return table(["checkpoints", "", "find, ms", "verify, ms", "scandir, ms"], rows)
