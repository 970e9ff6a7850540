"""What the benchmarks share: interleaved rounds, measurements in fresh processes, and tables.

The machine may be busy with other things. So contenders take turns in short rounds, the order of the turns
rotates, and a ratio is the median of the ratios of turns that were neighbours in time.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
MIB = 2**20
Case = dict[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """What is asked for on the command line.

    Attributes:
        large: peers at sizes that take gigabytes and minutes, and longer rounds.
        mib: MiB of the state that checkpoints are made of.
    """

    large: bool
    mib: int


def interleave(
    runs: Mapping[str, Callable[[], Result]], seconds: float, min_rounds: int = 5
) -> dict[str, list[Result]]:
    """Let contenders take turns until the time is up; the first turn of each warms up and is not kept.

    Args:
        runs: by name, what does one turn and returns its result, for example us a batch.
        seconds: how long to go on, roughly.
        min_rounds: rounds that are done however long they take.

    Returns:
        The results of every contender; those at the same place are neighbours in time.
    """
    results: dict[str, list[Result]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    gc.collect()
    names, rounds, end = list(runs), 0, time.perf_counter() + seconds
    while rounds < min_rounds or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(runs[name]())
        rounds += 1
    return results


def ratio(own: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring turns."""
    return median(one / other for one, other in zip(own, others, strict=True))


def timed(work: Callable[[], object], units: int = 1) -> float:
    """Return how many microseconds a unit of the work takes."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) / units * 1e6


def cpu_timed(work: Callable[[], object], units: int = 1) -> float:
    """Return how many microseconds of this thread's processor time a unit of the work takes.

    The same as `timed` for work that never waits, but what other processes take does not count.
    """
    begin = time.thread_time()
    work()
    return (time.thread_time() - begin) / units * 1e6


def rss(field: str = "VmRSS") -> float:
    """Return the MiB of memory that this process has resident; "VmHWM" is the most it ever had. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_growth(work: Callable[[], object]) -> float:
    """Return by how many MiB the resident memory is larger, at its peak, than before the work."""
    gc.collect()
    # Importing torch took more at its peak than is resident now: begin the high-water mark anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = rss()
    work()
    return max(rss("VmHWM") - before, 0.0)


def cold_and_warm(
    prepare: Callable[[int], object],
    work: Callable[[Any], object],
    after: Callable[[Any], object] = lambda result: None,
    repeats: int = 25,
) -> dict[str, float]:
    """Measure some work for the first time in this process, then again and again with new inputs.

    Args:
        prepare: makes the input of the repetition with this number; not timed.
        work: what is timed.
        after: is given what `work` returned and cleans up; not timed.
        repeats: how often again; it ends after a second.

    Returns:
        Milliseconds of the first time ("cold") and the median of the others ("warm", absent if there are
        none), and the MiB that the first time took ("mib").
    """
    inputs = prepare(0)
    result: list[Any] = []
    took: list[float] = []
    grown = peak_growth(lambda: took.append(timed(lambda: result.append(work(inputs)))))
    after(result.pop())
    measured = {"cold": took[0] / 1e3, "mib": grown}
    warm: list[float] = []
    while len(warm) < repeats and took[0] + sum(warm) < 1e6:
        inputs = prepare(len(warm) + 1)
        warm.append(timed(lambda inputs=inputs: result.append(work(inputs))))  # type: ignore[misc]
        after(result.pop())
    return {**measured, "warm": median(warm) / 1e3} if warm else measured


def in_fresh_process(module: str, case: Case, timeout: float = 120) -> Any:
    """Run `run_case(case)` of a module of this folder in a new process.

    Returns:
        What it returned, which JSON must be able to carry; a str that says why if it failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.harness", module, json.dumps(case)]
    try:
        done = subprocess.run(  # noqa: S603  # our own interpreter and our own module
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"more than {timeout:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1][:80]
    return json.loads(done.stdout.splitlines()[-1])


def enough_memory(mib: float) -> bool:
    """Say whether so much memory is available, with a margin."""
    meminfo = Path("/proc/meminfo").read_text()
    available = int(meminfo.split("MemAvailable:")[1].split()[0]) / 1024
    return available > 1.5 * mib


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a markdown table; floats get three significant digits."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(map(show, row)) + " |" for row in rows]
    return "\n".join(lines)


def show(value: object) -> str:
    """Write a cell; None is nothing measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return str(value)


def count(number: int) -> str:
    """Write a power of ten as 1e7."""
    return f"{number:.0e}".replace("e+0", "e").replace("e+", "e")


def environment() -> str:
    """Say on what the measurements were made."""
    # Ours from the source: the metadata of an editable installation is that of the day it was made.
    ours = ("helios.data", "helios.core.rng", "helios.chkpt", "helios.trainer")
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in ours]
    peers = ("torchdata", "grain", "safetensors", "lightning", "pytorch-ignite", "accelerate")
    for name in ("torch", "numpy", *peers):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name}: not installed")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} cores "
        f"({platform.machine()}), load average {load} at the start; files on {file_system()}."
    )


def file_system() -> str:
    """Return the kind of file system that temporary files are on, which `TMPDIR` can change."""
    folder = Path(tempfile.gettempdir()).resolve()
    kinds = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        kinds[Path(place)] = kind
    return next(kinds[place] for place in (folder, *folder.parents) if place in kinds)


def main() -> None:
    """Run one case and print its result as JSON, for `in_fresh_process`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("case", type=json.loads)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # what peers have to say about deprecations
    print(json.dumps(importlib.import_module(f"benchmarks.{arguments.module}").run_case(arguments.case)))


if __name__ == "__main__":
    main()
