"""Table 3: memory while iterating, and the size of a state."""

import json
import pickle
import tracemalloc
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from benchmarks.harness import MIB, Case, Options, count, in_fresh_process, peak_growth, table
from helios.data import ResumableRandomSampler, create_dataloader

TITLE = "Memory: growth at the peak while a million indices are iterated, and the size of a state"
NOTES = (
    "In a fresh process for each number. Allocated: Python's and NumPy's allocations, by tracemalloc. Resident: the "
    "high-water mark of the process, in which what C libraries take shows too, in whole pages and with the code "
    "that is used for the first time; and the same after 1e5 indices were iterated already, when only growth with what "
    "is iterated would be left. State: of a loader in mid-epoch, without and with a fingerprint of 256 characters, "
    "the longest allowed."
)
NUM_INDICES = 10**6
NUM_BEFORE = 10**5
SIZES = [10**6, 10**8, 10**10, 10**12]


def helios(num_samples: int) -> Iterable[int]:
    """Return our sampler, from the middle of the epoch if that is longer."""
    sampler = ResumableRandomSampler(range(num_samples))
    sampler.start_iter = max(num_samples - NUM_INDICES - NUM_BEFORE, 0) // 2
    return sampler


def torch_sampler(num_samples: int) -> Iterable[int]:
    """Return torch's sampler."""
    return torch.utils.data.RandomSampler(range(num_samples))


def run_case(case: Case) -> float:
    """Return the growth in MiB; runs in a process of its own."""
    sampler = {"helios": helios, "RandomSampler": torch_sampler}[case["who"]](case["num_samples"])
    how = case["how"]
    if how == "resident":
        return peak_growth(lambda: consume(iter(sampler), NUM_INDICES))
    if how == "resident later":
        indices = iter(sampler)
        consume(indices, NUM_BEFORE)
        return peak_growth(lambda: consume(indices, NUM_INDICES - NUM_BEFORE))
    tracemalloc.start()
    consume(iter(sampler), NUM_INDICES)
    return tracemalloc.get_traced_memory()[1] / MIB


def consume(indices: Iterator[int], number: int) -> None:
    """Iterate without keeping anything."""
    deque(islice(indices, number), maxlen=0)


def state_sizes() -> list[list[object]]:
    """Return the bytes of a state as JSON and as a pickle."""
    rows: list[list[object]] = []
    for num_samples, fingerprint in ((10**6, None), (10**12, None), (10**12, "f" * 256)):
        loader = create_dataloader(range(num_samples), batch_size=32, shuffle=True, fingerprint=fingerprint)
        loader.set_epoch(1000)
        loader.sampler.start_iter = num_samples // 64
        state = loader.state_dict()
        name = f"{count(num_samples)}{', with a fingerprint' if fingerprint else ''}"
        rows.append([name, len(json.dumps(state)), len(pickle.dumps(state))])
    return rows


def run(options: Options) -> str:
    """Measure all and return the tables."""
    plan = [("helios", size) for size in SIZES]
    plan += [("RandomSampler", size) for size in [10**6, 10**7] + [10**8] * options.large]
    rows = []
    for who, num_samples in plan:
        case = {"who": who, "num_samples": num_samples}
        hows = ("allocated", "resident", "resident later")
        found = [in_fresh_process("data_memory", {**case, "how": how}) for how in hows]
        rows.append([who, count(num_samples), *found])
    memory = table(["", "N", "allocated, MiB", "resident, MiB", "resident after 1e5, MiB"], rows)
    return memory + "\n\n" + table(["state at N", "JSON, bytes", "pickle, bytes"], state_sizes())
