"""Going on with runs that an earlier release of Helios began.

Their files, once migrated, say which epoch a run was in and how many of its batches it had received. They do not say
the seed, the length of the dataset or the batch size, so those are taken to be the loader's own. Earlier releases knew
two orders, torch's `randperm` and that of the dataset, both dealt out to ranks as PyTorch's DistributedSampler does.

A loader that goes on with such a run takes that order instead of its own: it *adopts* it. Its states say so, so that
the next resume does the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from helios.data._state import LoaderState, LoaderStateError, check_count, check_state
from helios.data.orders import Order, RandomOrder, SequentialOrder, TorchOrder

if TYPE_CHECKING:
    from helios.data._samplers import ResumableSampler

EARLIER_FORMAT = 0


class EarlierState(TypedDict):
    """Where a run of an earlier release stood, as the migration of its checkpoint tells it.

    Attributes:
        format: 0.
        algorithm: "torch-randperm-v1".
        epoch: epoch in progress, from 0.
        batches: batches of that epoch that the run had received, on each rank.
    """

    format: int
    algorithm: str
    epoch: int
    batches: int


def restore_sampler(sampler: ResumableSampler, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Put a sampler where `state` was taken, in the order that the run had.

    Args:
        sampler: the sampler.
        state: of this release, or an `EarlierState`.
        own: what a loader keeps in its state besides that of its sampler.

    Raises:
        LoaderStateError: the state is malformed or does not fit; nothing was changed.
    """
    order = _order_of_run(state, sampler)
    target = sampler if order is sampler.order else sampler.in_order(order)
    expected: Any = {**target.state_dict(), **own}
    if is_earlier(state):
        target.restore(_begun(state, target, expected))
    else:
        target.restore(check_state(state, expected))
    if target is not sampler:
        vars(sampler).update(vars(target))


def is_earlier(state: object) -> bool:
    """Say whether a state is an `EarlierState`."""
    return isinstance(state, Mapping) and type(f := state.get("format")) is int and f == EARLIER_FORMAT


def _order_of_run(state: object, sampler: ResumableSampler) -> Order | None:
    """Return the order in which `sampler` goes on from `state`."""
    given = sampler.given_order
    is_begun_earlier = is_earlier(state)
    if not is_begun_earlier and not (isinstance(state, Mapping) and state.get("adopted") is True):
        return given
    if isinstance(given, TorchOrder) and not sampler.has_own_algorithm:
        return given
    if type(given) not in (RandomOrder, SequentialOrder) or sampler.has_own_algorithm:
        found = sampler.algorithm or type(sampler).__name__
        raise LoaderStateError(
            f"algorithm: the run was begun by an earlier release of Helios, in the order of torch's randperm or that "
            f"of the dataset; here it is {found!r}. Go on with shuffle=True or shuffle=False, as it began, and without "
            f"an order or a sampler"
        )
    if is_begun_earlier and type(given) is SequentialOrder and sampler.sharding.num_replicas == 1:
        return given  # the same samples, under the name that they have today
    return TorchOrder(sampler.num_samples, shuffle=type(given) is RandomOrder)


def _begun(state: Mapping[str, Any], sampler: ResumableSampler, expected: LoaderState) -> LoaderState:
    """Return the state of this release that an earlier one would have written."""
    missing = [key for key in EarlierState.__annotations__ if key not in state]
    if missing:
        raise LoaderStateError(
            f"state lacks {missing[0]!r}, which one of format {EARLIER_FORMAT} has; it has {sorted(map(str, state))}"
        )
    if state["algorithm"] != (known := TorchOrder.SHUFFLED):
        raise LoaderStateError(
            f"algorithm: the state has {state['algorithm']!r}, one of format {EARLIER_FORMAT} has {known!r}. A newer "
            f"helios-data may know it"
        )
    epoch, batches = check_count("epoch", state["epoch"]), check_count("batches", state["batches"])
    num_batches = sampler.sharding.steps_from(0, epoch)
    if batches > num_batches:
        raise LoaderStateError(
            f"batches: the state has {batches}, here an epoch of {sampler.num_samples} samples has {num_batches}. Use "
            f"the dataset, batch_size, drop_last and number of ranks that the run began with"
        )
    if batches == num_batches:
        epoch, batches = epoch + 1, 0
    return {**expected, "epoch": epoch, "consumed": sampler.sharding.cursor_after(batches, epoch)}
