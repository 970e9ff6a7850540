"""Table 5: what re-keying the generators for each sample costs, and of what that is made."""

import random
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.harness import Options, cpu_timed, interleave, table
from benchmarks.workloads import Rows, epoch_of, helios_loader, num_batches_for
from helios.core.rng import (
    derive_bytes,
    get_default_numpy_rng,
    preserve_host_rng_state,
    rekey_host_rngs,
    seed_rngs,
)

TITLE = "Re-keying: microseconds a sample"
NOTES = (
    'What our loader takes with `sample_rng="sample"` (or "batch") more than with "worker", for cheap samples that '
    "draw nothing, divided by the samples: median over neighbouring turns. CPU: of processor time in the main process, "
    "from which other processes cannot take away; without workers that is all, with them the work is elsewhere. "
    "With 2 workers the clock shows less where both have a core. Below: the parts, alone in a loop, in "
    "processor time; the loader takes the first once a batch (without workers only), the second for every sample."
)
BATCH_SIZES = [1, 8, 32, 256]
WORKERS = [0, 2]
SECONDS_PER_TURN = 0.05


def compare(batch_size: int, num_workers: int, seconds: float) -> list[object]:
    """Return the cells of a row after those that say what is measured."""
    num_batches = num_batches_for(SECONDS_PER_TURN, 0, batch_size, num_workers)
    dataset = Rows(num_batches * batch_size)
    modes = ("worker", "sample", "batch")
    loaders = {mode: helios_loader(dataset, batch_size, num_workers, mode) for mode in modes}
    results = interleave({mode: epoch_of(loader) for mode, loader in loaders.items()}, seconds)

    def added(mode: str, clock: str) -> float:
        pairs = zip(results[mode], results["worker"], strict=True)
        return median(getattr(keyed, clock) - getattr(plain, clock) for keyed, plain in pairs) / batch_size

    return [
        *(median(turn.wall for turn in results[mode]) for mode in modes),
        added("sample", "wall"),
        added("sample", "cpu") if num_workers == 0 else None,
        added("batch", "cpu") if num_workers == 0 else None,
        len(results["sample"]),
    ]


def parts() -> dict[str, Callable[[], object]]:
    """Return what re-keying is made of, by name."""
    key = derive_bytes(0, "benchmark")
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    bit_generator = get_default_numpy_rng().generator.bit_generator
    numpy_state = bit_generator.state

    def scope() -> None:
        with preserve_host_rng_state():
            pass

    return {
        "`preserve_host_rng_state`": scope,
        "`rekey_host_rngs`": lambda: rekey_host_rngs(key),
        "`derive_bytes`": lambda: derive_bytes(0, "benchmark", 3, 1000),
        "`random.getstate`": random.getstate,
        "`random.setstate`": lambda: random.setstate(python_state),
        "`random.seed`": lambda: random.seed(0x123456789ABCDEF0),
        "torch get_state": torch.default_generator.get_state,
        "torch set_state": lambda: torch.default_generator.set_state(torch_state),
        "torch manual_seed": lambda: torch.default_generator.manual_seed(0x123456789ABCDEF0),
        "NumPy get state": lambda: bit_generator.state,
        "NumPy set state": lambda: setattr(bit_generator, "state", numpy_state),
    }


def breakdown(seconds: float) -> str:
    """Measure the parts and return their table."""
    repeats = 300

    def repeated(work: Callable[[], object]) -> Callable[[], float]:
        def loop() -> None:
            for _ in range(repeats):
                work()

        return lambda: cpu_timed(loop, repeats)

    results = interleave({name: repeated(work) for name, work in parts().items()}, seconds)
    rows = [[name, median(values), min(values)] for name, values in results.items()]
    return table(["part", "median, us", "fastest, us"], rows)


def run(options: Options) -> str:
    """Measure all and return the tables."""
    torch.set_num_threads(1)
    seed_rngs(0)
    seconds = 12 if options.large else 4
    rows: list[list[object]] = []
    for num_workers in WORKERS:
        for batch_size in BATCH_SIZES:
            rows.append([num_workers, batch_size, *compare(batch_size, num_workers, seconds)])
    head = ["workers", "batch", "worker, us a batch", "sample, us a batch", "batch, us a batch"]
    head += ["sample, us a sample", "CPU", "batch, CPU us a sample", "turns"]
    return table(head, rows) + "\n\n" + breakdown(seconds)
