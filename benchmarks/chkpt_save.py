"""Table 7: what a save costs over writing the same bytes."""

import os
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.chkpt_states import (
    TENSOR_MIB,
    State,
    Took,
    large_state,
    remove,
    scratch,
    size,
    small_state,
    took,
)
from benchmarks.chkpt_writers import WRITERS, Write
from benchmarks.harness import Case, Options, in_fresh_process, interleave, peak_growth, ratio, table

TITLE = "Save: milliseconds until a state is on the disk"
NOTES = (
    "Each saves the same state under a new name, until the file is synced, on a disk that is at rest (`sync` before "
    "each turn). write + fsync: the bytes of the tensors alone, in blocks of 4 MiB, synced and renamed; control: the "
    "same again, and how far it is from 1 is the noise. Ratios: medians over neighbouring turns. CPU: processor "
    "time of all threads. Peak: growth of the resident memory while saving, in a fresh process that has saved "
    "something small before. Sums: what is in the file to find damage with; torch never looks at its own. "
    "Synced: by the contender itself, or by the benchmark. The file of safetensors has tensors only; "
    "torch.distributed.checkpoint makes a folder."
)


def turn(write: Write, path: Path) -> Callable[[], Took]:
    """Return what saves once and returns how long it took."""

    def one_turn() -> Took:
        remove(path)
        os.sync()
        return took(lambda: write(path))

    return one_turn


def make_state(kind: str, mib: int) -> State:
    """Make the state of a table."""
    return large_state(mib) if kind == "large" else small_state()


def run_case(case: Case) -> float:
    """Return the growth in MiB at the peak of one save; runs in a process of its own."""
    made_for = WRITERS[case["who"]].made_for
    folder = Path(case["folder"])
    made_for(large_state(TENSOR_MIB))(folder / "first")  # what it imports is not what is asked
    write = made_for(make_state(case["kind"], case["mib"]))
    grown = peak_growth(lambda: write(folder / "second"))
    for name in ("first", "second"):
        remove(folder / name)
    return grown


def compare(kind: str, mib: int, seconds: float, folder: Path) -> list[list[object]]:
    """Return the rows of a table."""
    state = make_state(kind, mib)
    runs = {
        who: turn(writer.made_for(state), folder / f"state{index}")
        for index, (who, writer) in enumerate(WRITERS.items())
    }
    results = interleave(runs, seconds, min_rounds=5)
    for index in range(len(runs)):
        remove(folder / f"state{index}")
    del state
    wall = {who: [each.wall for each in turns] for who, turns in results.items()}
    return [
        [
            who,
            median(wall[who]),
            f"{ratio(wall[who], wall['write + fsync']):.2f}",
            f"{ratio(wall[who], wall['torch.save(path)']):.2f}",
            median(each.cpu for each in results[who]),
            in_fresh_process("chkpt_save", {"who": who, "kind": kind, "mib": mib, "folder": str(folder)}),
            writer.sums,
            writer.syncs,
        ]
        for who, writer in WRITERS.items()
    ]


def run(options: Options) -> str:
    """Measure all and return the tables."""
    seconds = 120 if options.large else 40
    head = ["ms", "over write + fsync", "over torch.save(path)", "CPU, ms", "peak, MiB", "sums", "synced"]
    tables = []
    with scratch((len(WRITERS) + 1) * options.mib) as folder:
        for kind, name, longest in (
            ("large", f"{size(options.mib)} in {options.mib // TENSOR_MIB} tensors", seconds),
            ("small", "10,000 tensors of 1 KiB", seconds / 4),
        ):
            tables.append(table([name, *head], compare(kind, options.mib, longest, folder)))
    return "\n\n".join(tables)
