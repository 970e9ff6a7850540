"""The structures that checkpoints of Helios have had, and telling them apart.

| schema | releases | |
|---|---|---|
| 0 | before 1.1 | text keys; `training_state` is a dict |
| 1 | 1.1 to 1.x | `training_state` is a pickled `helios.trainer.TrainingState`; plug-ins have keys |
| 2 | 2.x | keys of the release's own are members of an enum; `model` is nested, paths are below `loggers` |
| 3 | helios-chkpt 3.x | text keys and plain values only; `data` |

The text under `version` tells releases, not structures: 2.0's own tool left it in the files that it rewrote, with old
keys as they were, and with a flat `model` if that had a key `user`.
"""

from __future__ import annotations

from collections.abc import Mapping

from helios.chkpt._errors import NotACheckpointError
from helios.chkpt._format.manifest import SCHEMA
from helios.chkpt._format.values import Call
from helios.chkpt._versions import MAJOR, major_of

FIELDS: Mapping[str, type] = {
    "current_iteration": int,
    "global_iteration": int,
    "global_epoch": int,
    "validation_cycles": int,
    "dataset_iter": int,
    "early_stop_count": int,
    "average_iter_time": float,
    "running_iter": int,
}
"""The fields of `training_state`, the same in all earlier releases."""

REQUIRED = ("training_state", "model", "rng")


def schema_of(state: Mapping[object, object]) -> int:
    """Return the number of the structure that the values of a file have.

    Args:
        state: what the pickle of the file holds.

    Raises:
        NotACheckpointError: it is of no release of Helios; says what is missing.
    """
    by_name = {name_of(key): value for key, value in state.items()}
    major = major_of(by_name.get("version"))
    if major is not None and major >= MAJOR:
        return SCHEMA
    missing = [name for name in REQUIRED if name not in by_name]
    if missing:
        raise NotACheckpointError(
            f"found no {missing[0]!r} among the keys {sorted(map(str, by_name))[:9]}; expected a checkpoint of Helios, "
            f"which has {', '.join(REQUIRED)}. If it is a plain state dict, use torch.load"
        )
    training_state, model, rng = (by_name[name] for name in REQUIRED)
    if not isinstance(rng, dict) or not isinstance(model, dict):
        raise NotACheckpointError(
            "found a 'model' or 'rng' that is no dict; expected those of a checkpoint of Helios"
        )
    if "python" in rng and isinstance(training_state, dict):
        return SCHEMA
    if any(is_member(key, "_CheckpointKeys") for key in state) or any(
        is_member(key, "_InternalStateKeys") for key in model
    ):
        return 2
    if is_training_state(training_state):
        return 1
    if isinstance(training_state, dict):
        return 0
    raise NotACheckpointError(
        f"found a 'training_state' that is a {kind_of(training_state)}; expected a dict, or a TrainingState of an "
        "earlier release. A plug-in whose id was 'training_state' would have overwritten it"
    )


def name_of(key: object) -> object:
    """Return the text of a key, be it a str or a member of an earlier release's enums; else the key itself."""
    if isinstance(key, Call) and any(
        is_member(key, enum) for enum in ("_CheckpointKeys", "_InternalStateKeys")
    ):
        return key.args[0]
    return key


def is_member(key: object, enum: str) -> bool:
    """Say whether a key is a member of an enum of an earlier release, such as `_CheckpointKeys`."""
    if not isinstance(key, Call) or key.function.name != enum or not _is_of_helios(key):
        return False
    return len(key.args) == 1 and isinstance(key.args[0], str)


def is_training_state(value: object) -> bool:
    """Say whether a value is a pickled `helios.trainer.TrainingState`."""
    return (
        isinstance(value, Call)
        and value.function.name == "TrainingState"
        and _is_of_helios(value)
        and isinstance(value.state, dict)
    )


def kind_of(value: object) -> str:
    """Return the name of what a value is, or of what it would be made by."""
    return str(value.function) if isinstance(value, Call) else type(value).__name__


def _is_of_helios(call: Call) -> bool:
    return call.function.module.partition(".")[0] == "helios"
