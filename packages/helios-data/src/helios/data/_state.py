"""The state of a sampler or loader: a small plain dict, and the checks before it is believed."""

from collections.abc import Iterable, Mapping
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
        num_samples: positions in an epoch: the samples in the dataset, unless the order has more or fewer.
        tail: "pad", "drop" or "exact"; with "+full" if partial batches are left out.
        order_digest: name of what the order was made of, such as weights, if there is anything.
        adopted: True if the order is not the loader's own but that of an earlier release of Helios, which began the
            run; else absent.
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
    order_digest: NotRequired[str]
    adopted: NotRequired[bool]
    fingerprint: str | None


class StreamLoaderState(TypedDict):
    """Where the streams of an iterable-style dataset stand, on this rank.

    Attributes:
        format: version of this dict.
        algorithm: "stream".
        seed: seed of the randomness in samples.
        rank: the rank whose streams these are.
        num_replicas: how many ranks there are.
        epoch: epoch in progress, or to come if the last one ended; from 0.
        turn: the stream whose batch comes next.
        num_samples: of each stream, samples of that epoch that the training loop has received.
        dataset_states: of each stream, what its dataset's `state_dict` gave; None at the beginning of an epoch.
        has_ended: of each stream, whether it has no more batches.
        fingerprint: what the user gave to identify the dataset, or None.
    """

    format: int
    algorithm: str
    seed: int
    rank: int
    num_replicas: int
    epoch: int
    turn: int
    num_samples: list[int]
    dataset_states: list[Any]
    has_ended: list[bool]
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
    agreeing = (
        "format",
        "algorithm",
        "seed",
        "order_seed",
        "num_samples",
        "order_digest",
        "tail",
        "fingerprint",
    )
    checked = _checked(state, expected, agreeing)
    check_count("epoch", checked["epoch"])
    check_count("consumed", checked["consumed"])
    if checked["consumed"] > expected["num_samples"]:
        raise LoaderStateError(
            f"consumed: the state has {checked['consumed']}, more than the {expected['num_samples']} samples"
        )
    return checked  # type: ignore[no-any-return]  # just checked, key by key


def check_stream_state(state: object, expected: StreamLoaderState) -> StreamLoaderState:
    """Return `state` if it continues the streams that `expected` describes.

    Args:
        state: what the user loads.
        expected: the state of the object it is loaded into.

    Raises:
        LoaderStateError: as `check_state`; or the state has another number of streams.
    """
    checked = _checked(
        state, expected, ("format", "algorithm", "seed", "rank", "num_replicas", "fingerprint")
    )
    check_count("epoch", checked["epoch"])
    check_count("turn", checked["turn"])
    num_streams = len(expected["num_samples"])
    for key in ("num_samples", "dataset_states", "has_ended"):
        if not isinstance(checked[key], list):
            raise LoaderStateError(f"{key} must be a list, the state has {type(checked[key]).__name__}")
        if len(checked[key]) != num_streams:
            raise LoaderStateError(
                f"{key}: the state has {len(checked[key])} streams, here there are {num_streams}. An iterable-style "
                f"dataset is divided among its workers: use the num_workers that the run began with"
            )
    for each in checked["num_samples"]:
        check_count("num_samples", each)
    if any(
        n and state is None
        for n, state in zip(checked["num_samples"], checked["dataset_states"], strict=True)
    ):
        raise LoaderStateError("dataset_states: the state has None for a stream that is under way")
    for each in checked["has_ended"]:
        if not isinstance(each, bool):
            raise LoaderStateError(f"has_ended must be True or False of each stream, the state has {each!r}")
    if checked["turn"] >= num_streams:
        raise LoaderStateError(f"turn: the state has {checked['turn']}, here there are {num_streams} streams")
    return checked  # type: ignore[no-any-return]  # just checked, key by key


def _checked(state: object, expected: Mapping[str, Any], agreeing: Iterable[str]) -> Any:
    """Return what `expected` has of the keys, if the values that must agree do."""
    if not isinstance(state, Mapping):
        raise LoaderStateError(f"state must be a dict as state_dict() gives it, found {type(state).__name__}")
    for key in ("format", "algorithm"):  # first: another one may have other keys
        if key in state:
            _check_agrees(key, state, expected)
    if "order_digest" in state and "order_digest" not in expected:
        raise LoaderStateError(
            f"order_digest: the state has {state['order_digest']!r}, here the order has none. "
            f"{_MUST_AGREE['order_digest']}"
        )
    missing = [key for key in expected if key not in state]
    if missing:
        raise LoaderStateError(f"state lacks {missing[0]!r}; it has {sorted(map(str, state))}")
    for key in agreeing:
        if key in expected:
            _check_agrees(key, state, expected)
    return {key: state[key] for key in expected}


_MUST_AGREE = {
    "format": "It was written by another release of helios-data.",
    "algorithm": "Use the sampler, and the release, that the run began with.",
    "seed": "Use the seed that the run began with.",
    "rank": "Each rank's streams are its own: keep the state of every rank.",
    "num_replicas": "An iterable-style dataset is divided among its ranks: use as many as the run began with.",
    "order_seed": "Use the seed that the run's sampler began with.",
    "num_samples": "It belongs to another dataset, or the dataset changed.",
    "order_digest": "Use the weights, lengths or indices that the run began with.",
    "tail": "Use the drop_last and tail that the run began with.",
    "fingerprint": "It belongs to another dataset, or the dataset changed.",
}


def _check_agrees(key: str, state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found, wanted = state[key], expected[key]
    if type(found) is not type(wanted) or found != wanted:
        raise LoaderStateError(f"{key}: the state has {found!r}, here it is {wanted!r}. {_MUST_AGREE[key]}")


def check_count(key: str, value: object) -> int:
    """Return an int of 0 or more; LoaderStateError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LoaderStateError(f"{key} must be an int of 0 or more, the state has {value!r}")
    return value
