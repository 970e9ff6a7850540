"""The data of a run: made ready once, and a loader for each split that suits the run."""

from contextlib import nullcontext
from typing import Any

from helios.core.rng import preserve_rng_state
from helios.data import DataModule, ResumableDataLoader, Tail
from helios.trainer._execution import Execution
from helios.trainer._hooks import length_of
from helios.trainer._modules import named_networks
from helios.trainer._ranks import Ranks
from helios.trainer._replicas import is_sharded
from helios.trainer.distributed import is_dist_active


def prepare(datamodule: DataModule, ranks: Ranks, execution: Execution) -> None:
    """Let one process make the data ready, while the others wait; if processes were spawned, their parent has."""
    if not execution.is_spawned:
        ranks.on_first(lambda: _prepare(datamodule))


def _prepare(datamodule: DataModule) -> None:
    """Call the hook, and drop what it may return by mistake: it would be sent to the other ranks.

    In a group its draws must not count, or what `setup` draws, such as weights, would be another on the other ranks.
    """
    with preserve_rng_state() if is_dist_active() else nullcontext():
        datamodule.prepare_data()


def checked_loader(datamodule: DataModule, split: str, loader: Any) -> ResumableDataLoader:
    """Return the loader of a split, of which there must be one, with batches.

    Raises:
        TypeError: it is another loader.
        ValueError: there is none, or it has no batches.
    """
    where = f"{type(datamodule).__name__}.{split}_dataloader()"
    if loader is None:
        raise ValueError(
            f"{where} is None, but the {split} split is needed: setup must assign self._{split}_dataset"
        )
    if not isinstance(loader, ResumableDataLoader):
        raise TypeError(f"{where} must be a ResumableDataLoader, found {type(loader).__name__}")
    if length_of(loader) == 0:
        raise ValueError(
            f"{where} has no batches: drop_last leaves nothing of {loader.sampler.num_samples} samples in batches of "
            f"{loader.batch_size}"
        )
    return loader


def check_shares(loader: ResumableDataLoader, ranks: Ranks) -> None:
    """Check that the training loader deals the samples out to the ranks, and comes out even.

    Raises:
        ValueError: each rank would train on all samples, or one would wait for the others at the end of an epoch.
    """
    if ranks.world_size == 1:
        return
    sharding = getattr(loader.sampler, "sharding", None)  # streams have none, and ranks of their own
    if sharding is not None and sharding.num_replicas != ranks.world_size:
        raise ValueError(
            f"the sampler of the training loader ({type(loader.sampler).__name__}) deals its samples out to "
            f"{sharding.num_replicas} rank(s), and the run has {ranks.world_size}: each would train on the same. Use a "
            "ResumableDistributedSampler, or no sampler of your own"
        )
    # What comes out even from the beginning need not do so from where another number of ranks has stopped.
    is_exact = sharding is not None and sharding.tail is Tail.EXACT
    lengths = ranks.all_gather(length_of(loader))
    if is_exact or len(set(lengths)) > 1:
        raise ValueError(
            f"the training loader has {'tail=exact, and ' if is_exact else ''}{_by_rank(lengths)} batches: ranks train "
            "in step, so it must have as many on each. Use tail='pad' or 'drop', which tail=None means; 'exact' is for "
            "evaluation"
        )


def check_batches(split: str, loader: ResumableDataLoader, ranks: Ranks, model: object) -> None:
    """Check that ranks which evaluate a network in parts together have as many batches.

    Raises:
        ValueError: one has more, for which it would wait for the others for ever.
    """
    lengths = ranks.all_gather(length_of(loader))
    sharded = [name for name, network in named_networks(model) if is_sharded(network)]
    if len(set(lengths)) > 1 and sharded:
        raise ValueError(
            f"the {split} loader has {_by_rank(lengths)} batches, and {sharded[0]} is in parts on the ranks, which all "
            "have to take part in each batch. Use another batch_size with tail='exact', or tail='pad'"
        )


def _by_rank(lengths: list[int | None]) -> str:
    return ", ".join(f"{length} (rank {rank})" for rank, length in enumerate(lengths))
