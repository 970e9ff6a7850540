"""torch's DataLoader, set up to fetch for ours: it sees whole batches as samples, and draws its own seeds."""

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from helios.data._keyed import WorkerInit, pass_through


def torch_options(
    pin_memory: bool, worker_init_fn: Callable[[int], None] | None, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of torch's DataLoader that concern workers and memory.

    Args:
        pin_memory: copy batches to pinned memory, if there is an accelerator.
        worker_init_fn: the user's, to run after ours.
        others: go through as they are.
    """
    return {
        **others,
        "worker_init_fn": WorkerInit(worker_init_fn),
        # Asked to pin memory without an accelerator, torch warns at every iteration.
        "pin_memory": pin_memory and torch.accelerator.is_available(),
    }


class Fetcher:
    """Fetches batches, with torch's machinery where there are workers, and draws nothing from the global generators.

    Args:
        dataset: its samples are whole batches.
        options: of `torch_options`.
        sampler: what to ask the dataset for; None if it is iterable.
    """

    def __init__(
        self, dataset: Any, options: Mapping[str, Any], sampler: Iterable[Any] | None = None
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._has_workers = options["num_workers"] > 0
        # torch takes the base seed of its workers from the global generator if it has none of its own.
        self._base_seeds = torch.Generator()
        self._options = options
        self._loader: DataLoader[Any] | None = None

    def begin(self, base_seed: int) -> Iterator[Any]:
        """Begin an iteration.

        Args:
            base_seed: torch seeds worker w with base_seed + w.
        """
        if self._has_workers or self._options["pin_memory"]:
            self._base_seeds.manual_seed(base_seed)
            if self._loader is None:
                self._loader = self._make_loader()
            try:
                return iter(self._loader)
            except BaseException:
                self._loader = None
                raise
        # In this process torch would only call the dataset, and take longer for it than for a small batch.
        return iter(self._dataset) if self._sampler is None else map(self._dataset.__getitem__, self._sampler)

    def _make_loader(self) -> DataLoader[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of the options it said to the outer loader
            return DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._sampler,
                collate_fn=pass_through,
                generator=self._base_seeds,
                **self._options,
            )

    def next_batch(self, batches: Iterator[Any]) -> Any:
        """Return the next batch of an iteration; StopIteration at its end, and any error of the dataset."""
        try:
            return next(batches)
        except BaseException as error:
            if self._has_workers:
                # torch re-raises from a frame that holds the error: a cycle, and workers that the
                # garbage collector ends are waited for ten seconds. The lines of the traceback stay.
                traceback.clear_frames(error.__traceback__)
            if not isinstance(error, StopIteration):
                # A worker may be dead, or hang. One that persists would be asked for ever.
                self._loader = None
                if self._has_workers and _is_of_the_connection(error):
                    # To a worker that died before all that it sent was read. The signal which says so comes a
                    # moment later: torch's handler then raises here, and not in the middle of what the caller does.
                    for _ in range(100):  # a signal that another thread receives does not wake this one
                        time.sleep(0.01)
                    raise RuntimeError("a DataLoader worker exited unexpectedly") from error
            raise


def _is_of_the_connection(error: BaseException) -> bool:
    """Say whether it is not of the dataset, whose errors torch raises anew in `ExceptionWrapper.reraise`."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (OSError, EOFError)) and frames[-1].name != "reraise"
