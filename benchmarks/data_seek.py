"""Table 1: how long it takes, and what memory, to go to 90% of a shuffled epoch."""

from collections.abc import Callable
from itertools import islice
from typing import Any

from benchmarks.harness import Case, Options, cold_and_warm, count, enough_memory, in_fresh_process, table

TITLE = "Seek: the first index at 90% of a shuffled epoch"
NOTES = (
    "In a fresh process for each row. Cold: the first time in the process; warm: median of 25 more, each in "
    "another epoch, so that nothing is left over; as many as a second allows. MiB: growth of the resident "
    "memory at its peak, the first time. Peers that hold the whole order are not run above the sizes given "
    "here: -. The loaders take a batch of 32 without workers and, ours, re-key for each of its samples."
)
SIZES = [10**6, 10**8, 10**10, 10**12]
BATCH_SIZE = 32
# What holds the whole order needs this much at its peak; measured, with room to spare.
BYTES_PER_SAMPLE = {"randperm": 16, "RandomSampler": 60, "StatefulDataLoader": 140}


def helios_sampler(num_samples: int) -> dict[str, float]:
    """Restore our sampler from a state and take an index."""
    from helios.data import ResumableRandomSampler

    dataset = range(num_samples)
    source, sampler = ResumableRandomSampler(dataset), ResumableRandomSampler(dataset)

    def state_in(epoch: int) -> Any:
        source.set_epoch(epoch + 1)
        source.start_iter = num_samples // 10 * 9
        return source.state_dict()

    def seek(state: Any) -> None:
        sampler.load_state_dict(state)
        next(iter(sampler))

    return cold_and_warm(state_in, seek)


def helios_loader(num_samples: int) -> dict[str, float]:
    """Restore our loader from a state and take a batch."""
    from helios.core.rng import seed_rngs
    from helios.data import create_dataloader

    seed_rngs(0)  # as a training script does; else our re-keying makes a NumPy generator for itself
    dataset = range(num_samples)
    source = create_dataloader(dataset, batch_size=BATCH_SIZE, shuffle=True)
    loader = create_dataloader(dataset, batch_size=BATCH_SIZE, shuffle=True)

    def state_in(epoch: int) -> Any:
        source.set_epoch(epoch + 1)
        source.sampler.start_iter = num_samples // BATCH_SIZE // 20 * 18
        return source.state_dict()

    def seek(state: Any) -> None:
        loader.load_state_dict(state)
        next(iter(loader))

    return cold_and_warm(state_in, seek)


def randperm(num_samples: int) -> dict[str, float]:
    """Draw torch's permutation again and cut off what was consumed: the best that can be done by hand."""
    import torch

    def seek(epoch: int) -> None:
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(epoch))
        next(iter(order[num_samples // 10 * 9 :].tolist()))

    return cold_and_warm(lambda epoch: epoch, seek)


def random_sampler(num_samples: int) -> dict[str, float]:
    """Iterate torch's RandomSampler again and skip what was consumed."""
    import torch

    def seek(epoch: int) -> None:
        sampler = torch.utils.data.RandomSampler(
            range(num_samples), generator=torch.Generator().manual_seed(epoch)
        )
        next(islice(sampler, num_samples // 10 * 9, None))

    return cold_and_warm(lambda epoch: epoch, seek)


def stateful_dataloader(num_samples: int) -> dict[str, float]:
    """Restore torchdata's loader from a state and take a batch."""
    from benchmarks.peers import stateful_loader, stateful_state

    state = stateful_state(range(num_samples), BATCH_SIZE, 0, num_samples // BATCH_SIZE // 20 * 18)

    def seek(epoch: int) -> None:
        loader = stateful_loader(range(num_samples), BATCH_SIZE, 0)
        loader.load_state_dict(state)
        next(iter(loader))

    return cold_and_warm(lambda epoch: epoch, seek)


def grain_map(num_samples: int) -> dict[str, float]:
    """Ask Grain's shuffled dataset for the element at the position."""
    import grain

    def seek(epoch: int) -> None:
        grain.MapDataset.range(num_samples).shuffle(seed=epoch)[num_samples // 10 * 9]

    return cold_and_warm(lambda epoch: epoch, seek)


def grain_index_shuffle(num_samples: int) -> dict[str, float]:
    """Call the function that Grain's shuffle is made of."""
    from grain.experimental import index_shuffle

    def seek(epoch: int) -> None:
        index_shuffle(index=num_samples // 10 * 9, max_index=num_samples - 1, seed=epoch, rounds=4)

    return cold_and_warm(lambda epoch: epoch, seek)


CASES: dict[str, Callable[[int], dict[str, float]]] = {
    "helios sampler": helios_sampler,
    "helios loader": helios_loader,
    "Grain MapDataset.shuffle": grain_map,
    "Grain index_shuffle": grain_index_shuffle,
    "randperm": randperm,
    "RandomSampler": random_sampler,
    "StatefulDataLoader": stateful_dataloader,
}


def run_case(case: Case) -> dict[str, float]:
    """Measure one row; runs in a process of its own."""
    return CASES[case["who"]](case["num_samples"])


def run(options: Options) -> str:
    """Measure all and return the table."""
    rows: list[list[object]] = []
    for who in CASES:
        holds_all = who in BYTES_PER_SAMPLE
        sizes = [10**6, 10**7] + [10**8] * options.large if holds_all else SIZES
        for num_samples in sizes:
            needed = BYTES_PER_SAMPLE.get(who, 0) * num_samples / 2**20
            if not enough_memory(needed):
                rows.append([who, count(num_samples), f"- (needs {needed / 1024:.0f} GiB)", None, None])
                continue
            found = in_fresh_process("data_seek", {"who": who, "num_samples": num_samples})
            if isinstance(found, str):
                rows.append([who, count(num_samples), f"- ({found})", None, None])
            else:
                rows.append([who, count(num_samples), found["cold"], found.get("warm"), found["mib"]])
    return table(["", "N", "cold, ms", "warm, ms", "MiB"], rows)
