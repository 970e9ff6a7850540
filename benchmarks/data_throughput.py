"""Table 2: what an index costs when an epoch is iterated."""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from statistics import median

import torch

from benchmarks.harness import (
    Case,
    Options,
    count,
    cpu_timed,
    enough_memory,
    in_fresh_process,
    interleave,
    ratio,
    table,
)
from helios.data import Permutation, ResumableRandomSampler

TITLE = "Throughput: nanoseconds an index"
NOTES = (
    "The whole epoch at 1e5 and 1e7; at 1e9 a window of 1e7 positions in the middle, and the peers that hold the "
    "whole order are left out: they would need 8 GiB for the numbers and 32 GiB for Python's ints. As ints: iterating "
    "the sampler, or the list. As an array: `Permutation.indices`, or the tensor. Grain: asking its shuffled "
    "MapDataset for one element after another, 2e4 of them. Processor time; medians, and of the ratios of "
    "neighbouring rounds."
)
SIZES = [10**5, 10**7, 10**9]
WINDOW = 10**7
GRAIN_WINDOW = 20_000
PEER_BYTES = 60  # a sample: int64, the list, and the ints in it


def consume(indices: Iterable[int]) -> None:
    """Iterate as fast as Python can."""
    deque(indices, maxlen=0)


def contenders(num_samples: int, window: int) -> dict[str, Callable[[], float]]:
    """Return what is run, by name; each returns nanoseconds an index."""
    sampler = ResumableRandomSampler(range(num_samples))
    permutation = Permutation(num_samples, 0, 0)
    begin = (num_samples - window) // 2

    def ints() -> None:
        sampler.start_iter = begin
        consume(islice(sampler, window))

    runs: dict[str, Callable[[], object]] = {
        "ints": ints,
        "array": lambda: permutation.indices(begin, begin + window),
    }
    if window == num_samples and enough_memory(PEER_BYTES * num_samples / 2**20):
        peer = torch.utils.data.RandomSampler(range(num_samples))
        runs["randperm.tolist"] = lambda: consume(torch.randperm(num_samples).tolist())
        runs["randperm"] = lambda: torch.randperm(num_samples)
        runs["RandomSampler"] = lambda: consume(peer)
    return {name: _nanoseconds(work, window) for name, work in runs.items()}


def _nanoseconds(work: Callable[[], object], units: int) -> Callable[[], float]:
    return lambda: cpu_timed(work, units) * 1e3


def grain_element(num_samples: int) -> Callable[[], float]:
    """Return what asks Grain for elements."""
    import grain

    shuffled = grain.MapDataset.range(num_samples).shuffle(seed=0)
    return _nanoseconds(lambda: consume(shuffled[index] for index in range(GRAIN_WINDOW)), GRAIN_WINDOW)


def run_case(case: Case) -> dict[str, float]:
    """Measure one row; runs in a process of its own, since lists of 1e7 ints leave their mark on the heap."""
    torch.set_num_threads(1)
    num_samples = case["num_samples"]
    runs = contenders(num_samples, min(num_samples, WINDOW))
    runs["Grain"] = grain_element(num_samples)
    results = interleave(runs, seconds=4, min_rounds=3)
    found = {name: median(values) for name, values in results.items()}
    for peer in ("randperm.tolist", "RandomSampler"):
        if peer in results:
            found[f"over {peer}"] = ratio(results[peer], results["ints"])
    return found


def run(options: Options) -> str:
    """Measure all and return the table."""
    names = ["ints", "array", "randperm.tolist", "randperm", "RandomSampler", "Grain"]
    names += ["over randperm.tolist", "over RandomSampler"]
    rows: list[list[object]] = []
    for num_samples in SIZES:
        found = in_fresh_process("data_throughput", {"num_samples": num_samples})
        if isinstance(found, str):
            rows.append([count(num_samples), f"- ({found})"] + [None] * (len(names) - 1))
        else:
            rows.append([count(num_samples), *(found.get(name) for name in names)])
    head = ["N", "helios, ints", "helios, array", "`randperm.tolist()`", "`randperm`", "RandomSampler"]
    return table([*head, "Grain", "faster than `tolist`", "than RandomSampler"], rows)
