"""Table 8: for how long a save in the background stops training, and by how much it slows it down."""

import itertools
import os
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import NamedTuple

import torch

from benchmarks.chkpt_states import State, fsync, large_state, scratch, size, took
from benchmarks.chkpt_writers import blocks, write_blocks
from benchmarks.harness import MIB, Case, Options, in_fresh_process, interleave, ratio, table

TITLE = "Save in the background: for how long training stops, and how much slower it goes on"
NOTES = (
    "Stall: milliseconds that the call takes, from the second save on; the one before has ended, and every tensor was "
    "changed since. copy_: each tensor into one that is there already, with the same number of torch's threads; "
    "control: the same again. helios: with `keep_last=1`, so that it also sees to it that each file is good. clone: "
    "into new memory, then `torch.save` and fsync in a thread. torch.distributed.checkpoint: `async_save` in one "
    "process, with a stager that keeps its memory. "
    "Slowdown: steps of a small network with one thread of torch, for nine tenths of the time that the save takes when "
    "nothing else runs, so that it goes on all the while; and, before the call, for as long without one (alone). "
    "Median, 90th percentile and mean are those of the steps of a turn, and of them and their ratios the medians over "
    "the turns; the mean says what training loses. Worst: the turn in which the mean rose most. Nothing: no save at "
    "all; how far it is from 1 is the noise. crc32: a thread that computes sums of 4 MiB that stay where they are; if "
    "it is far from 1, the second core was not idle and the rows below say nothing. write + fsync: of the same "
    "bytes in a thread, without a copy and without sums: what the disk and the kernel take. The stalls with a number "
    "of threads, and the slowdowns of a state, are measured together in a fresh process."
)
STEP_MS = 7.0


class Saver(NamedTuple):
    """A save in the background: `start` is what training waits for, `finish` returns when it is on the disk."""

    start: Callable[[], object]
    finish: Callable[[], object]


def nothing() -> None:
    """Do nothing."""


def in_thread(work: Callable[[], object]) -> Saver:
    """Return a saver that does some work in a thread, whose error it raises."""
    executor = ThreadPoolExecutor(max_workers=1)
    running: list[Future[object]] = []
    return Saver(lambda: running.append(executor.submit(work)), lambda: running.pop().result())


def helios(state: State, folder: Path) -> Saver:
    """Our store, which keeps the last file and so verifies each."""
    from helios.chkpt import CheckpointStore

    store = CheckpointStore(folder / "helios", "bench", keep_last=1)
    iterations = itertools.count(1)
    return Saver(lambda: store.save_async(state, epoch=1, iteration=next(iterations)), store.wait)


def clone(state: State, folder: Path) -> Saver:
    """What is done by hand: copy, and let a thread save the copy."""
    copies: State = {}
    path = folder / "clone.pth"

    def write() -> None:
        torch.save(copies, path)
        fsync(path)
        copies.clear()

    writer = in_thread(write)

    def start() -> None:
        copies["model"] = {name: tensor.clone() for name, tensor in state["model"].items()}
        writer.start()

    return Saver(start, writer.finish)


def distributed(state: State, folder: Path) -> Saver:
    """The asynchronous save of torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import async_save

    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    futures = []

    def start() -> None:
        writer = FileSystemWriter(folder / "distributed")
        futures.append(async_save(state, storage_writer=writer, no_dist=True, async_stager=stager))

    return Saver(start, lambda: futures.pop().result())  # type: ignore[union-attr]  # a Future, with this stager


def copy_only(state: State, folder: Path) -> Saver:
    """The copy alone, into memory that is there."""
    sources = list(state["model"].values())
    targets = [torch.zeros_like(source) + 1 for source in sources]

    def start() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return Saver(start, nothing)


def plain(state: State, folder: Path) -> Saver:
    """The bytes alone, in a thread."""
    data = blocks(state)
    return in_thread(lambda: write_blocks(data, folder / "plain"))


def crc32(state: State, folder: Path) -> Saver:
    """A core at work, and nothing else."""
    block, done = bytes(4 * MIB), threading.Event()

    def work() -> None:
        while not done.is_set():
            zlib.crc32(block)

    thread = in_thread(work)

    def start() -> None:
        done.clear()
        thread.start()

    def finish() -> None:
        done.set()
        thread.finish()

    return Saver(start, finish)


SAVERS: dict[str, Callable[[State, Path], Saver]] = {
    "copy_": copy_only,
    "control": copy_only,
    "helios save_async": helios,
    "clone + torch.save": clone,
    "torch.distributed.checkpoint": distributed,
    "nothing": lambda state, folder: Saver(nothing, nothing),
    "crc32": crc32,
    "write + fsync": plain,
}
WITH_STALL = ["copy_", "control", "helios save_async", "clone + torch.save", "torch.distributed.checkpoint"]
WITH_STEPS = [
    "nothing",
    "crc32",
    "write + fsync",
    "helios save_async",
    "clone + torch.save",
    "torch.distributed.checkpoint",
]


def stalls(state: State, folder: Path, seconds: float) -> dict[str, list[float]]:
    """Return for each saver the milliseconds that the call took, and its ratio to `copy_`."""

    def turn(saver: Saver) -> float:
        for tensor in state["model"].values():
            tensor.add_(1)
        stall = took(saver.start).wall
        saver.finish()
        os.sync()
        return stall

    savers = {who: SAVERS[who](state, folder) for who in WITH_STALL}
    results = interleave({who: partial(turn, saver) for who, saver in savers.items()}, seconds)
    return {who: [median(own), max(own), ratio(own, results["copy_"])] for who, own in results.items()}


def training_step() -> Callable[[], object]:
    """Return a step that takes about `STEP_MS` here."""
    width = 512
    net = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step_of(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()

    def best(rows: int) -> float:
        batch = torch.rand(rows, width)
        return min(took(lambda: step_of(batch)).wall for _ in range(20))

    # Two sizes: what a step costs whatever the batch is, and what a row costs.
    few, many = best(32), best(256)
    rows = max(round(32 + (STEP_MS - few) / (many - few) * 224), 8)
    batch = torch.rand(rows, width)
    return lambda: step_of(batch)


def steps_for(step: Callable[[], object], seconds: float) -> list[float]:
    """Train for some time, and return the milliseconds of each step."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < end:
        found.append(took(step).wall)
    return found


class Slowed(NamedTuple):
    """Milliseconds of each step without a save, and with one."""

    quiet: list[float]
    busy: list[float]


def lasts(saver: Saver) -> float:
    """Return the seconds that a save goes on after the call, when nothing else runs; not the first save."""
    found = []
    for _ in range(3):
        os.sync()
        saver.start()
        found.append(took(saver.finish).wall / 1e3)
    return min(found[1:])


def slowdowns(state: State, folder: Path, seconds: float) -> dict[str, list[float]]:
    """Return for each saver the cells of its row."""
    torch.set_num_threads(1)
    step = training_step()

    def turn(saver: Saver, window: float) -> Slowed:
        os.sync()
        quiet = steps_for(step, window)
        saver.start()
        busy = steps_for(step, window)
        saver.finish()
        return Slowed(quiet, busy)

    savers = {who: SAVERS[who](state, folder) for who in WITH_STEPS}
    windows = {who: 0.9 * lasts(saver) for who, saver in savers.items()}
    windows["nothing"] = windows["crc32"] = windows["write + fsync"]
    runs = {who: partial(turn, saver, windows[who]) for who, saver in savers.items()}
    return {who: cells(turns, windows[who]) for who, turns in interleave(runs, seconds, min_rounds=7).items()}


def p90(steps: list[float]) -> float:
    """Return the 90th percentile."""
    return quantiles(steps, n=10, method="inclusive")[-1]


def cells(turns: list[Slowed], window: float) -> list[float]:
    """Return the cells of a row: of each turn median, 90th percentile and mean, and of these the medians."""
    row = [window, median(median(turn.quiet) for turn in turns)]
    for of in (median, p90, fmean):
        row.append(median(of(turn.busy) for turn in turns))
        row.append(ratio([of(turn.busy) for turn in turns], [of(turn.quiet) for turn in turns]))
    return [*row, max(fmean(turn.busy) / fmean(turn.quiet) for turn in turns), len(turns)]


def run_case(case: Case) -> dict[str, list[float]]:
    """Measure stalls or slowdowns; runs in a process of its own."""
    torch.set_num_threads(case["threads"])
    state, folder = large_state(case["mib"]), Path(case["folder"])
    return (slowdowns if case["slowdown"] else stalls)(state, folder, case["seconds"])


def run(options: Options) -> str:
    """Measure all and return the tables."""
    seconds = 90 if options.large else 20
    rows: list[list[object]] = []
    slowed: list[list[object]] = []
    for mib in (options.mib // 4, options.mib):
        with scratch(5 * mib) as folder:
            case: Case = {"mib": mib, "seconds": seconds, "folder": str(folder)}
            for threads in (1, 2):
                found = measure({**case, "threads": threads, "slowdown": False})
                for who in WITH_STALL:
                    rows.append([who, size(mib), threads, *found(who, 3)])
            found = measure({**case, "threads": 1, "slowdown": True})
            for who in WITH_STEPS:
                slowed.append([who, size(mib), *found(who, 10)])
    head = ["state", "threads", "stall, ms", "longest, ms", "over copy_"]
    slow_head = ["state", "measured, s a turn", "step alone, ms", "median, ms", "over alone"]
    slow_head += ["p90, ms", "over alone", "mean, ms", "over alone", "worst", "turns"]
    return table(["stall", *head], rows) + "\n\n" + table(["slowdown", *slow_head], slowed)


def measure(case: Case) -> Callable[[str, int], list[object]]:
    """Run a case, and return what gives the cells of a saver."""
    found = in_fresh_process("chkpt_async", case, timeout=900)
    if isinstance(found, str):
        return lambda who, num_cells: [f"- ({found})"] + [None] * (num_cells - 1)
    return lambda who, num_cells: found[who]
