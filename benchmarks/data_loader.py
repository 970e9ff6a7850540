"""Table 4: what our loader costs over torch's on the same work."""

from statistics import median

import torch

from benchmarks.harness import Options, interleave, ratio, table
from benchmarks.workloads import (
    Rows,
    calibrate,
    epoch_of,
    helios_loader,
    num_batches_for,
    stateful_loader,
    torch_loader,
)
from helios.core.rng import seed_rngs

TITLE = "Loader: microseconds a batch, against torch's DataLoader"
NOTES = (
    'Ours with `sample_rng="worker"`, which does not re-key: exactly the work of torch\'s loader, shuffled, one '
    "thread, whole epochs, worker processes already running. The contenders take turns; a ratio is the median of "
    "the ratios of neighbouring turns. Control: another loader of torch's; how far it is from 1 is the noise. CPU: of "
    "processor time in the main process, from which other processes cannot take away. Samples: a row of a small "
    "tensor, alone and with about 100 us of work."
)
BATCH_SIZES = [1, 32, 256]
WORKERS = [0, 2]
SECONDS_PER_TURN = 0.1


def compare(work: int, batch_size: int, num_workers: int, seconds: float) -> list[object]:
    """Return the cells of a row after those that say what is measured."""
    num_batches = num_batches_for(SECONDS_PER_TURN, work, batch_size, num_workers)
    dataset = Rows(num_batches * batch_size, work)
    loaders = {
        "torch": torch_loader(dataset, batch_size, num_workers),
        "control": torch_loader(dataset, batch_size, num_workers),
        "helios": helios_loader(dataset, batch_size, num_workers, "worker"),
        "stateful": stateful_loader(dataset, batch_size, num_workers),
    }
    results = interleave({name: epoch_of(loader) for name, loader in loaders.items()}, seconds)

    def over_torch(name: str, clock: str) -> str:
        own, others = ([getattr(turn, clock) for turn in results[each]] for each in (name, "torch"))
        return f"{ratio(own, others):.3f}"

    return [
        median(turn.wall for turn in results["torch"]),
        median(turn.wall for turn in results["helios"]),
        *(over_torch(name, clock) for name in ("helios", "control", "stateful") for clock in ("wall", "cpu")),
        len(results["torch"]),
    ]


def run(options: Options) -> str:
    """Measure all and return the table."""
    torch.set_num_threads(1)
    seed_rngs(0)
    seconds = 15 if options.large else 5
    rows: list[list[object]] = []
    for name, work in (("cheap", 0), ("100 us", calibrate(100))):
        for num_workers in WORKERS:
            for batch_size in BATCH_SIZES:
                cells = compare(work, batch_size, num_workers, seconds)
                rows.append([name, num_workers, batch_size, *cells])
    head = ["samples", "workers", "batch", "torch", "helios", "helios/torch", "CPU", "control", "CPU"]
    return table([*head, "StatefulDataLoader", "CPU", "turns"], rows)
