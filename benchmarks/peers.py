"""How the peers are used, where that takes more than a line."""

from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader


def stateful_loader(dataset: Any, batch_size: int, num_workers: int) -> StatefulDataLoader:
    """Make torchdata's loader, shuffled with a seed that is always the same."""
    generator = torch.Generator().manual_seed(0)
    return StatefulDataLoader(
        dataset, batch_size=batch_size, shuffle=True, num_workers=num_workers, generator=generator
    )


def stateful_state(dataset: Any, batch_size: int, num_workers: int, num_batches: int) -> dict[str, Any]:
    """Return the state of torchdata's loader after so many batches, an even number.

    To come there honestly would take minutes: the counters in a state after two batches are changed.
    `data_resume` checks, on a small dataset, that this is the state that the loader would have given.
    """
    assert num_batches % 2 == 0, "the state is that of a moment at which the last of two workers was heard"
    loader = stateful_loader(dataset, batch_size, num_workers)
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    del batches  # ends the workers
    counters = {
        "samples_yielded": num_batches * batch_size,
        "yielded": num_batches * batch_size,
        "_sampler_iter_yielded": num_batches,
        "_num_yielded": num_batches,
        "_snapshot_step": num_batches,
    }
    return _replace(state, counters)


def _replace(state: dict[str, Any], values: dict[str, int]) -> dict[str, Any]:
    """Return a nested dict with the values under some keys replaced."""
    return {
        key: _replace(value, values) if isinstance(value, dict) else values.get(key, value)
        for key, value in state.items()
    }
