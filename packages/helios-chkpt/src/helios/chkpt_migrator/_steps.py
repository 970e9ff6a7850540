"""The steps from each structure to the next: pure functions from the values of a file to others.

Values are what `helios.chkpt._format.values` describes. A step shares what it does not change with its argument, and
changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from helios.chkpt._errors import NotACheckpointError
from helios.chkpt._format.values import Call, Global, Tensor
from helios.chkpt_migrator._rewrite import path_text, plain, rewritten
from helios.chkpt_migrator._schema import FIELDS, is_member, is_training_state, kind_of, name_of

Values = dict[object, object]

RESERVED = frozenset({"training_state", "model", "rng", "version", "log_path", "run_path", "data"})
"""What no plug-in may be called in this schema."""

_TRAINING_STATE = Global("helios.trainer", "TrainingState")
_CHECKPOINT_KEYS = Global("helios.trainer", "_CheckpointKeys")
_INTERNAL_KEYS = Global("helios.model.model", "_InternalStateKeys")
_PATHS = {"log_path": ("root", "log_file"), "run_path": ("tensorboard", "run_path")}
_OF_EVERY_RELEASE = ("version", "training_state", "model", "rng")


def pickle_training_state(state: Values) -> Values:
    """0 to 1: the counters become an object."""
    fields = state["training_state"]
    return {**state, "training_state": Call(_TRAINING_STATE, (), state=fields, is_new=True)}


def nest(state: Values) -> Values:
    """1 to 2: own keys become members of an enum, the user's state goes one level down, paths go below `loggers`.

    What is under another key is a plug-in's state; also under one of ours, if no release wrote such a value there.
    """
    out: Values = {}
    loggers: dict[str, dict[str, object]] = {"root": {"log_file": None}}
    for key, value in state.items():
        if key in _PATHS and _is_path(value):
            logger, name = _PATHS[str(key)]
            loggers.setdefault(logger, {})[name] = value
        elif key == "model":
            out[_own_key("model")] = {Call(_INTERNAL_KEYS, ("user",)): value}
        elif key in _OF_EVERY_RELEASE and not (key == "version" and not isinstance(value, str)):
            out[_own_key(str(key))] = value
        else:
            out[key] = value
    return {**out, _own_key("loggers"): loggers, _own_key("datamodule"): {}}


def flatten(state: Values) -> Values:
    """2 to 3: text keys and plain values; says where the run stood in its data."""
    own, plug_ins = _divided(state)
    training_state = _fields_of(own["training_state"])
    model, scaler = _user_state(own["model"])
    loggers, datamodule = own.get("loggers", {}), own.get("datamodule", {})
    out: Values = {
        "training_state": training_state,
        "model": model,
        "rng": _rng(own["rng"]),
        "data": _data(training_state),
    }
    for key, (logger, name) in _PATHS.items():
        nested = _get(_get(loggers, logger), name)
        text = _path_in(own.get(key) if nested is None else nested)
        if text is not None:
            out[key] = text
    for plug_id, new_id in plug_in_names(state).items():
        out[new_id] = plug_ins[plug_id]
    left: dict[str, object] = {"amp_scaler": scaler, "loggers": _not_carried_over(loggers)}
    if datamodule != {"phase": 0}:  # what a run begins with
        left["datamodule"] = datamodule or None
    left.update((name, value) for name, value in own.items() if name not in _KNOWN)
    for name, value in left.items():
        if value is not None:
            out[_free(name, {*out, *plug_ins})] = value
    return cast("Values", rewritten(out, plain))


def plug_in_names(state: Mapping[object, object]) -> dict[str, str]:
    """Return what the plug-ins of a state of schema 2 are called in schema 3, by their ids.

    A plug-in may have had an id that is reserved now. Its state is kept, under a name that a plug-in may have.
    """
    plug_ins = _divided(state)[1]
    taken = RESERVED | plug_ins.keys()
    return {p: p if p not in RESERVED else _free(f"{p}_plugin", taken) for p in plug_ins}


_KNOWN = frozenset({*_OF_EVERY_RELEASE, *_PATHS, "loggers", "datamodule"})


def _own_key(name: str) -> Call:
    return Call(_CHECKPOINT_KEYS, (name,))


def _divided(state: Mapping[object, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Return what Helios keeps of a state of schema 2, and the states of plug-ins, both by name."""
    own: dict[str, object] = {}
    others: dict[str, object] = {}
    for key, value in state.items():
        if is_member(key, "_CheckpointKeys"):
            own[str(name_of(key))] = value
        elif isinstance(key, str):
            others[key] = value
        else:
            raise NotACheckpointError(f"found the key {kind_of(key)} at the top of the file; expected text")
    for name in _KNOWN:
        if name not in own and name in others and _is_own(name, others[name]):
            own[name] = others.pop(name)  # in files that 2.0's own tool rewrote old keys are text still
        elif name in own and not _is_own(name, own[name]):
            others[name] = own.pop(name)  # a plug-in of that name took the place of ours
    return own, others


def _is_own(name: str, value: object) -> bool:
    """Say whether a value under one of Helios's keys is what a release writes there, as far as that can be told."""
    if name in ("training_state", "model", "rng"):
        return True
    if name == "version":
        return isinstance(value, str)
    if name in _PATHS:
        return _is_path(value)
    if not isinstance(value, dict):
        return False
    if name == "datamodule":
        return not value or (value.keys() == {"phase"} and type(value["phase"]) is int)
    return value.keys() <= {"root", "tensorboard", "wandb"} and all(
        isinstance(v, dict) for v in value.values()
    )


def _fields_of(value: object) -> dict[str, object]:
    fields = value.state if isinstance(value, Call) and is_training_state(value) else value
    if not isinstance(fields, dict):
        raise NotACheckpointError(f"found a training_state that is a {kind_of(value)}; expected its fields")
    if fields.keys() != FIELDS.keys():
        wrong = ", ".join(sorted(map(str, fields.keys() ^ FIELDS.keys())))
        raise NotACheckpointError(
            f"training_state: missing or unknown: {wrong}; expected {', '.join(FIELDS)}"
        )
    out = cast("dict[str, object]", rewritten(fields, plain))
    for name, kind in FIELDS.items():
        found = out[name]
        is_number = type(found) is int or (kind is float and type(found) is float)
        if not is_number or cast("float", found) < 0:
            raise NotACheckpointError(
                f"training_state.{name}: found {found!r:.80}; expected {kind.__name__}, 0 or more"
            )
    return out


def _user_state(model: object) -> tuple[dict[object, object], object]:
    """Return the user's own dict, with the scaler's state in it if there is room, and the scaler's state if not."""
    if not isinstance(model, dict):
        raise NotACheckpointError(f"found a model that is a {kind_of(model)}; expected a dict")
    inner = {str(name_of(key)): value for key, value in model.items() if is_member(key, "_InternalStateKeys")}
    if not inner:
        return model, None
    user, scaler = inner.pop("user", {}), inner.pop("amp_scaler", None)
    if (
        inner
        or not isinstance(user, dict)
        or len(model) != sum(is_member(k, "_InternalStateKeys") for k in model)
    ):
        raise NotACheckpointError(
            "found a model with more beside the user's state; expected that of a release 2.x"
        )
    if scaler is None or "amp_scaler" in user:
        return user, scaler
    copy = _copy(user)
    copy["amp_scaler"] = scaler
    return copy, None


def _copy(values: dict[object, object]) -> dict[object, object]:
    copy = values.copy()  # an OrderedDict loses the attributes that a module's state has
    if hasattr(values, "__dict__"):
        vars(copy).update(vars(values))
    return copy


def _rng(rng: object) -> dict[str, object]:
    if not isinstance(rng, dict):
        raise NotACheckpointError(f"found an rng that is a {kind_of(rng)}; expected a dict")
    out: dict[str, object] = {"python" if name == "rand" else str(name): state for name, state in rng.items()}
    for name, kind in {"torch": Tensor, "python": tuple, "numpy": dict}.items():
        if not isinstance(out.get(name), kind):
            found = "nothing" if name not in out else f"a {kind_of(out[name])}"
            raise NotACheckpointError(f"rng: found {found} for the generator of {name}; expected its state")
    if isinstance(out.get("cuda"), Tensor):
        out["cuda"] = [out["cuda"]]  # of the current device; now of each
    return out


def _data(training_state: Mapping[str, object]) -> dict[str, object]:
    """Return where the run stood in its data: earlier releases left that to the counters."""
    begun, batches = cast("int", training_state["global_epoch"]), cast("int", training_state["dataset_iter"])
    if batches and not begun:
        raise NotACheckpointError(
            f"training_state: found dataset_iter {batches} in global_epoch 0; expected 0"
        )
    epoch = begun - 1 if batches else begun
    return {"format": 0, "algorithm": "torch-randperm-v1", "epoch": epoch, "batches": batches}


def _not_carried_over(loggers: object) -> object:
    """Return what `loggers` holds besides paths; None if there is nothing."""
    carried = set(_PATHS.values())
    left: dict[object, object] = {}
    for logger, values in cast("dict[object, dict[object, object]]", loggers).items():
        kept = {name: v for name, v in values.items() if (logger, name) not in carried and v is not None}
        if kept:
            left[logger] = kept
    return left or None


def _get(values: object, key: str) -> object:
    return values.get(key) if isinstance(values, dict) else None


def _path_in(value: object) -> str | None:
    """Return a path as text; None if there is none.

    Raises:
        NotACheckpointError: it is something else.
    """
    text = value if value is None or isinstance(value, str) else path_text(value)
    if text is None and value is not None:
        raise NotACheckpointError(f"found a log path that is a {kind_of(value)}; expected a path")
    return text


def _is_path(value: object) -> bool:
    return value is None or isinstance(value, str) or path_text(value) is not None


def _free(name: str, taken: Iterable[object]) -> str:
    used, number, free = set(taken), 2, name
    while free in used:
        free, number = f"{name}_{number}", number + 1
    return free
