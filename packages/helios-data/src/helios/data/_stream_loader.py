"""A loader of iterable-style datasets that can say where they stand themselves."""

import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from helios.core.rng import derive_seed
from helios.data._checks import check_int
from helios.data._earlier import is_earlier
from helios.data._loader import ResumableDataLoader
from helios.data._machinery import Fetcher, torch_options
from helios.data._samplers import rank_and_world
from helios.data._state import FORMAT_VERSION, LoaderStateError, StreamLoaderState, check_stream_state
from helios.data._streams import StreamBatch, StreamCursor, StreamDataset

ALGORITHM = "stream"


class StreamDataLoader(ResumableDataLoader):
    """A loader of an IterableDataset with `state_dict` and `load_state_dict`. Made by `create_dataloader`.

    Each worker iterates a copy of the dataset of its own, a stream; without workers there is one. The dataset
    divides its samples among workers and ranks itself (`get_worker_info()`), as with torch's DataLoader, and the
    batches come from the workers in turn. With every batch a worker sends its dataset's state, so that the loader's
    state is that of the batches which the loop has received. Each rank has its own, of the size of the datasets'
    states. It continues with any batch size and prefetch depth, and with as many workers (0 and 1 are one stream both).

    Every epoch begins with the state that the dataset had when the loader was made; if the dataset has `set_epoch`, it
    is called with the epoch. Randomness is re-keyed before each sample by (seed, epoch, rank, stream, samples before).
    What a dataset draws before its first sample must be part of its state, which is asked for after every batch. The
    dataset is one sample ahead of the loop (with drop_last, one batch), so that an epoch is known to end with its last
    batch.

    Args:
        dataset: the dataset.
        batch_size: samples in a batch.
        drop_last: leave out the last batch of each stream if it is smaller.
        seed: seed of the randomness in samples and collation.
        is_distributed: the dataset divides its samples among the ranks of torch.distributed.
        is_keyed: re-key the generators before each sample; else each worker is seeded once.
        fingerprint: identifies the dataset; kept in the state and compared when it is loaded.
        collate_fn: merges samples into a batch; None is torch's `default_collate`.
        worker_init_fn: runs in each worker after Helios has seeded it.
        pin_memory: copy batches to pinned memory; without an accelerator there is nothing to pin for.
        **options: as torch's DataLoader takes them.

    Raises:
        TypeError: the batch size is not an int.
        ValueError: it is less than 1.
        RuntimeError: `is_distributed` without a process group.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        drop_last: bool,
        seed: int,
        is_distributed: bool,
        is_keyed: bool,
        fingerprint: str | None,
        collate_fn: Callable[[list[Any]], Any] | None,
        worker_init_fn: Callable[[int], None] | None,
        pin_memory: bool,
        **options: Any,
    ) -> None:
        self._options = torch_options(pin_memory, worker_init_fn, options)
        # Not ResumableDataLoader's, which sets up a sampler.
        DataLoader.__init__(
            self,
            dataset,
            batch_size=check_int("batch_size", batch_size, 1),
            drop_last=drop_last,
            collate_fn=collate_fn,
            **self._options,
        )
        self._seed = seed
        self._rank, self._num_replicas = rank_and_world() if is_distributed else (0, 1)
        self._is_distributed = is_distributed
        self._is_keyed = is_keyed
        self._fingerprint = fingerprint
        self._initial_state = pickle.dumps(dataset.state_dict())
        self._go_to(StreamCursor.at_beginning(0, max(self.num_workers, 1)))
        self._fetcher: Fetcher | None = None  # type: ignore[assignment]  # made when it is known where to begin

    def _go_to(self, cursor: StreamCursor, is_resumed: bool = False) -> None:
        self._cursor = cursor
        self._is_resumed = is_resumed  # the next iteration goes on here, instead of beginning the epoch
        self._iteration: object = None  # the current one; others are refused

    def _is_for_all_ranks(self) -> bool:
        return self._is_distributed

    @property
    def epoch(self) -> int:
        """The epoch in progress or, after a completed pass, to come; from 0."""
        return self._cursor.epoch

    @property
    def is_epoch_over(self) -> bool:
        """Whether the batch that was handed over last is the last one of its epoch, for this process."""
        return self._cursor.is_over

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, which begins at its beginning.

        Choosing the epoch that is in progress changes nothing.

        Args:
            epoch: 0 or more.

        Raises:
            TypeError: the epoch is not an int.
            ValueError: the epoch is negative.
            RuntimeError: a state of a later epoch was loaded, and no batch was taken since.
        """
        number = check_int("epoch", epoch, 0)
        if self._is_resumed and number < self._cursor.epoch:
            raise RuntimeError(
                f"a state of epoch {self._cursor.epoch} was loaded, and set_epoch({number}) goes back before it was "
                f"used. Begin the loop over epochs at loader.epoch, or set no epochs: a completed pass goes on "
                f"to the next one"
            )
        if self._cursor.is_over:
            self._go_to(self._cursor.settled())
        if number != self._cursor.epoch:
            self._go_to(self._cursor.of_epoch(number))

    def state_dict(self) -> StreamLoaderState:  # type: ignore[override]  # a stream's state has other keys
        """Return where the streams stand: the batches that the loop has received count.

        Returns:
            A dict with the states of the streams' datasets in it. It differs between ranks.
        """
        cursor = self._cursor.settled()
        return {
            "format": FORMAT_VERSION,
            "algorithm": ALGORITHM,
            "seed": self._seed,
            "rank": self._rank,
            "num_replicas": self._num_replicas,
            "epoch": cursor.epoch,
            "turn": cursor.turn,
            "num_samples": list(cursor.num_samples),
            "dataset_states": [
                None if state is None else pickle.loads(state)  # noqa: S301  # of our own worker
                for state in cursor.dataset_states
            ],
            "has_ended": list(cursor.has_ended),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken.

        Args:
            state: what `state_dict` returned.

        Raises:
            LoaderStateError: the state is malformed, of another dataset or seed, or of another number of
                streams; nothing was changed.
        """
        if is_earlier(state):
            raise LoaderStateError(
                "the run was begun by an earlier release of Helios, whose files do not say where the streams of an "
                "iterable-style dataset stood: it cannot go on exactly. Begin a new run, with its weights"
            )
        checked = check_stream_state(state, self.state_dict())
        states = tuple(None if each is None else pickle.dumps(each) for each in checked["dataset_states"])
        num_samples, has_ended = tuple(checked["num_samples"]), tuple(checked["has_ended"])
        cursor = StreamCursor(checked["epoch"], checked["turn"], num_samples, states, has_ended)
        self._go_to(cursor, is_resumed=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the iteration under way, workers and what they fetched."""
        return {**self.__dict__, "_iteration": None, "_fetcher": None, "_streams": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin the next iteration where the original stood when it was pickled or copied."""
        self.__dict__.update(state)
        self._is_resumed = True

    def __len__(self) -> int:
        """Batches of this process in a whole epoch, if the dataset has a length: what torch's DataLoader says."""
        return DataLoader.__len__(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own iterator class
        if self._cursor.is_over:  # and the loop asked for no more
            self._go_to(self._cursor.settled())
        elif not self._is_resumed:  # an epoch that was broken off begins anew
            self._go_to(self._cursor.of_epoch(self._cursor.epoch))
        if self._is_resumed or self._fetcher is None or not self.persistent_workers:
            # Another one, since workers that persist could not be told where to go on.
            seed = self._seed if self._is_keyed else None
            assert self.batch_size is not None, "checked when the loader was made"
            self._streams = StreamDataset(
                self.dataset,
                self.collate_fn,
                self.batch_size,
                self.drop_last,
                seed,
                self._rank,
                self._initial_state,
                self._cursor,
            )
            self._fetcher = Fetcher(self._streams, self._options)
        self._streams.epoch.fill_(self._cursor.epoch)
        self._iteration = object()  # still resumed until the first batch: it may be begun and dropped
        # Only for sample_rng="worker": other random numbers in every epoch, and after a resume.
        base_seed = derive_seed(
            self._seed, "worker", self._cursor.epoch, self._rank, *self._cursor.num_samples
        )
        return self._receive_streams(self._fetcher, self._fetcher.begin(base_seed), self._iteration)

    def _receive_streams(
        self, fetcher: Fetcher, batches: Iterator[StreamBatch], iteration: object
    ) -> Iterator[Any]:
        """Hand over the batches, counting each when the loop gets it."""
        is_over = False
        try:
            while not is_over or self._iteration is iteration:
                if self._iteration is not iteration:
                    raise RuntimeError(
                        "this iteration cannot go on: another one was begun on the same loader, or its epoch or state "
                        "was set. Begin a new iteration, or make a second loader"
                    )
                try:
                    received = fetcher.next_batch(batches)
                except StopIteration:
                    break
                self._cursor = self._cursor.after(received)
                self._is_resumed, is_over = False, self._cursor.is_over
                if received.is_real:
                    yield received.batch
        finally:  # also when it is broken off
            if self._iteration is iteration and not self.num_workers:
                self._streams.put_back()
        if self._iteration is iteration:
            self._go_to(self._cursor.of_epoch(self._cursor.epoch + 1))
