"""The state of a sampler or loader: a small plain dict, and the checks before it is believed."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

FORMAT_VERSION = 1


class LoaderState(TypedDict):
    """Where an epoch stands. The same on every rank; plain values, less than 1 KiB.

    Attributes:
        format: version of this dict.
        algorithm: name of what orders the samples.
        seed: seed of the order and, in a loader, of the randomness in samples.
        order_seed: in a loader, the seed of its sampler, which may have been given another one.
        epoch: epoch in progress, or to come if the last one ended; from 0.
        consumed: samples of that epoch that the training loop has received, over all ranks.
        num_samples: samples in the dataset.
        tail: "pad", "drop" or "exact"; with "+full" if partial batches are left out.
        fingerprint: what the user gave to identify the dataset, or None.
    """

    format: int
    algorithm: str
    seed: int
    order_seed: NotRequired[int]
    epoch: int
    consumed: int
    num_samples: int
    tail: str
    fingerprint: str | None


class LoaderStateError(ValueError):
    """A state that does not fit the loader or sampler it was given to; nothing was changed."""


def check_state(state: object, expected: LoaderState) -> LoaderState:
    """Return `state` if it continues what `expected` describes.

    Args:
        state: what the user loads.
        expected: the state of the object it is loaded into.

    Raises:
        LoaderStateError: a key is missing or malformed, or a value that must agree does not; both values
            are named.
    """
    if not isinstance(state, Mapping):
        raise LoaderStateError(f"state must be a dict as state_dict() gives it, found {type(state).__name__}")
    if "format" in state:  # first: another format may have other keys
        _check_agrees("format", state, expected)
    missing = [key for key in expected if key not in state]
    if missing:
        raise LoaderStateError(f"state lacks {missing[0]!r}; it has {sorted(map(str, state))}")
    for key in _MUST_AGREE:
        if key in expected:
            _check_agrees(key, state, expected)
    for key in ("epoch", "consumed"):
        _check_position(key, state[key])
    if state["consumed"] > expected["num_samples"]:
        raise LoaderStateError(
            f"consumed: the state has {state['consumed']}, more than the {expected['num_samples']} samples"
        )
    checked: Any = {key: state[key] for key in expected}
    return checked  # type: ignore[no-any-return]  # just checked, key by key


_MUST_AGREE = {
    "format": "It was written by another release of helios-data.",
    "algorithm": "Use the sampler, and the release, that the run began with.",
    "seed": "Use the seed that the run began with.",
    "order_seed": "Use the seed that the run's sampler began with.",
    "num_samples": "It belongs to another dataset, or the dataset changed.",
    "tail": "Use the drop_last and tail that the run began with.",
    "fingerprint": "It belongs to another dataset, or the dataset changed.",
}


def _check_agrees(key: str, state: Mapping[str, Any], expected: LoaderState) -> None:
    found, wanted = state[key], expected[key]  # type: ignore[literal-required]
    if type(found) is not type(wanted) or found != wanted:
        raise LoaderStateError(f"{key}: the state has {found!r}, here it is {wanted!r}. {_MUST_AGREE[key]}")


def _check_position(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LoaderStateError(f"{key} must be an int of 0 or more, the state has {value!r}")
