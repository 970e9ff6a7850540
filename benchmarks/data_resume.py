"""Table 6: from a state to the first batch at 90% of ten million samples."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import Case, Options, cold_and_warm, enough_memory, in_fresh_process, table

TITLE = "Resume: from a state to the first batch, at 90% of 1e7 samples"
NOTES = (
    "Batches of 32 of a dataset that returns the index; a new iterator, its workers included, in a fresh process for "
    "each row. Cold, warm and MiB as in the first table. By hand: `torch.randperm` again, cut off, as the sampler of "
    "a new DataLoader. torchdata goes through the indices that were consumed; its state is one after two batches "
    "with the counters changed, checked on a small dataset against an honest one."
)
NUM_SAMPLES = 10**7
BATCH_SIZE = 32
NUM_CONSUMED = NUM_SAMPLES // BATCH_SIZE // 20 * 18 * BATCH_SIZE
PEER_MIB = {"helios": 0, "by hand": 700, "StatefulDataLoader": 1400}

First = tuple[Any, Iterator[Any]]


def helios(num_workers: int) -> dict[str, float]:
    """Our loader, restored from a state."""
    from helios.core.rng import seed_rngs
    from helios.data import create_dataloader

    seed_rngs(0)
    dataset = range(NUM_SAMPLES)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "shuffle": True, "num_workers": num_workers}
    source = create_dataloader(dataset, **options)
    loader = create_dataloader(dataset, **options)

    def state_in(epoch: int) -> Any:
        source.set_epoch(epoch + 1)
        source.sampler.start_iter = NUM_CONSUMED // BATCH_SIZE
        return source.state_dict()

    def resume(state: Any) -> First:
        loader.load_state_dict(state)
        batches = iter(loader)
        return next(batches), batches

    return cold_and_warm(state_in, resume)


def by_hand(num_workers: int) -> dict[str, float]:
    """Torch's loader over what is left of the permutation."""

    def resume(epoch: int) -> First:
        order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(epoch))
        left = order[NUM_CONSUMED:].tolist()
        loader = DataLoader(
            range(NUM_SAMPLES),  # type: ignore[arg-type]  # a range is a map-style dataset of ints
            batch_size=BATCH_SIZE,
            sampler=left,
            num_workers=num_workers,
        )
        batches = iter(loader)
        return next(batches), batches

    return cold_and_warm(lambda epoch: epoch, resume)


def stateful(num_workers: int) -> dict[str, float]:
    """Torchdata's loader, restored from a state."""
    from benchmarks.peers import stateful_loader, stateful_state

    check_stateful_state(num_workers)
    dataset = range(NUM_SAMPLES)
    state = stateful_state(dataset, BATCH_SIZE, num_workers, NUM_CONSUMED // BATCH_SIZE)

    def resume(epoch: int) -> First:
        loader = stateful_loader(dataset, BATCH_SIZE, num_workers)
        loader.load_state_dict(state)
        batches = iter(loader)
        return next(batches), batches

    return cold_and_warm(lambda epoch: epoch, resume)


def check_stateful_state(num_workers: int) -> None:
    """Make sure that the state with changed counters gives the batch that an honest one gives."""
    from benchmarks.peers import stateful_loader, stateful_state

    dataset, num_batches = range(100 * BATCH_SIZE), 90
    batches = iter(stateful_loader(dataset, BATCH_SIZE, num_workers))
    for _ in range(num_batches):
        next(batches)
    loader = stateful_loader(dataset, BATCH_SIZE, num_workers)
    loader.load_state_dict(stateful_state(dataset, BATCH_SIZE, num_workers, num_batches))
    if not torch.equal(next(batches), next(iter(loader))):
        raise RuntimeError("torchdata changed its state: the one made by hand is none")


CASES: dict[str, Callable[[int], dict[str, float]]] = {
    "helios": helios,
    "by hand": by_hand,
    "StatefulDataLoader": stateful,
}


def run_case(case: Case) -> dict[str, float]:
    """Measure one row; runs in a process of its own."""
    return CASES[case["who"]](case["num_workers"])


def run(options: Options) -> str:
    """Measure all and return the table."""
    rows: list[list[object]] = []
    for who in CASES:
        for num_workers in (0, 2):
            if not enough_memory(PEER_MIB[who]):
                rows.append([who, num_workers, f"- (needs {PEER_MIB[who]} MiB)", None, None])
                continue
            found = in_fresh_process("data_resume", {"who": who, "num_workers": num_workers})
            if isinstance(found, str):
                rows.append([who, num_workers, f"- ({found})", None, None])
            else:
                rows.append([who, num_workers, found["cold"], found.get("warm"), found["mib"]])
    return table(["", "workers", "cold, ms", "warm, ms", "MiB"], rows)
