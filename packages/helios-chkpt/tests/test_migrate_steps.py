"""The steps: pure, by structure, on every form that the tables of the fixtures' README allow."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios.chkpt import NotACheckpointError, __version__
from helios.chkpt._format.values import Call, Global, Storage, Tensor, walk
from helios.chkpt_migrator import MIGRATIONS, Migration, check_chain
from helios.chkpt_migrator._chain import steps_from
from helios.chkpt_migrator._rewrite import misfits, path_text, plain, rewritten, with_storages
from helios.chkpt_migrator._schema import FIELDS, schema_of
from helios.chkpt_migrator._steps import RESERVED, flatten, nest, pickle_training_state, plug_in_names

pytestmark = pytest.mark.long

COUNTERS = dict(zip(FIELDS, (12, 24, 3, 3, 4, 2, 0.005, 0), strict=True))
SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 7,
}


def member(name: str) -> Call:
    return Call(Global("helios.trainer", "_CheckpointKeys"), (name,))


def inner(name: str) -> Call:
    return Call(Global("helios.model.model", "_InternalStateKeys"), (name,))


def path(*parts: str, module: str = "pathlib", kind: str = "PosixPath") -> Call:
    return Call(Global(module, kind), parts)


def tensor(key: str, dtype: str = "float32", location: str = "cpu") -> Tensor:
    return Tensor(Storage(key, dtype, location, 16), dtype, 0, (4,), (1,))


def counters_object(**changes: Any) -> Call:
    return Call(Global("helios.trainer", "TrainingState"), (), state={**COUNTERS, **changes}, is_new=True)


def rng() -> dict[str, Any]:
    numpy = {"bit_generator": "PCG64", "state": {"state": 2**127, "inc": 3}, "has_uint32": 1, "uinteger": 5}
    return {"torch": tensor("0", "uint8"), "rand": (3, (1, 2), None), "numpy": numpy}


def user() -> dict[str, Any]:
    net: OrderedDict[str, Any] = OrderedDict(weight=tensor("1"))
    net.__dict__["_metadata"] = OrderedDict({"": {"version": 1}})
    return {"net": net, "betas": (0.8, 0.95), "best": 0.5}


def of_schema(
    schema: int,
    *,
    log: Call | None = None,
    run: Call | None = None,
    model: dict[Any, Any] | None = None,
    scaler: dict[str, Any] | None = None,
    plug_ins: dict[str, Any] | None = None,
    version: str | None = "x",
    phase: int | None = 0,
    wandb: Any = None,
) -> dict[Any, Any]:
    """A file's values as a release of the schema writes them."""
    own = user() if model is None else model
    state: dict[Any, Any] = {} if version is None else {"version": version}
    state |= {"training_state": COUNTERS if schema == 0 else counters_object(), "model": own, "rng": rng()}
    if schema < 2:
        state |= {} if log is None else {"log_path": log}
        state |= {} if run is None else {"run_path": run}
    else:
        state["model"] = {inner("user"): own} | ({} if scaler is None else {inner("amp_scaler"): scaler})
        state["loggers"] = {"root": {"log_file": log}}
        state["loggers"] |= {} if run is None else {"tensorboard": {"run_path": run}}
        state["loggers"] |= {} if wandb is None else {"wandb": {"run_id": wandb}}
        state["datamodule"] = {} if phase is None else {"phase": phase}
        state = {member(key): value for key, value in state.items()}
    return state | (plug_ins or {})


def mixed(state: dict[Any, Any]) -> dict[Any, Any]:
    """What 2.0's own migration tool makes of an older file, as the fixtures' README describes it."""
    out = {key: value for key, value in state.items() if key not in ("log_path", "run_path")}
    fields = out["training_state"]
    out["training_state"] = fields if isinstance(fields, Call) else counters_object()
    if "user" not in out["model"]:
        out["model"] = {inner("user"): out["model"]}
    loggers: dict[str, Any] = {}
    if "log_path" in state:
        loggers["root"] = {"log_file": state["log_path"]}
    if "run_path" in state:
        loggers["tensorboard"] = {"run_path": state["run_path"]}
    # A plug-in's text key is equal to the member of that name, and stays.
    for name, value in {"version": "2.0.1", "loggers": loggers, "datamodule": {}}.items():
        if name in out:
            out[name] = out[name] if name == "version" else value
        else:
            out[member(name)] = value
    return out


def migrated(state: dict[Any, Any]) -> dict[str, Any]:
    out: Any = state
    for migration in steps_from(schema_of(state), MIGRATIONS):
        out = migration.step(out)
    return dict(out)


def same(state: dict[object, object]) -> dict[object, object]:
    return state


def chain(*pairs: tuple[int, int]) -> tuple[Migration, ...]:
    return tuple(Migration(source, target, same) for source, target in pairs)


@pytest.mark.parametrize("pairs", [(), ((2, 3),), ((0, 1), (1, 2), (2, 3)), ((0, 2), (2, 3)), ((0, 3),)])
def test_good_chains(pairs: tuple[tuple[int, int], ...]) -> None:
    check_chain(chain(*pairs), head=3)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (((0, 1), (2, 3)), "no gap"),
        (((2, 3), (1, 2)), "no gap"),
        (((1, 3), (2, 3)), "no gap"),
        (((0, 1), (0, 3)), "two steps"),
        (((0, 1), (1, 2)), "ends at 2"),
        (((2, 4),), "ends at 4"),
        (((3, 3),), "later schema"),
        (((3, 2), (2, 3)), "later schema"),
    ],
)
def test_bad_chains(pairs: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_chain(chain(*pairs), head=3)


def test_the_chain_of_this_release_begins_at_the_first() -> None:
    check_chain(MIGRATIONS)
    assert [(m.source, m.target) for m in MIGRATIONS] == [(0, 1), (1, 2), (2, 3)]


LOG, RUN = path("/", "tmp", "run", "logs", "a.log"), path("/", "tmp", "run", "runs", "a")
FLAGS = (False, True)
FORMS = [
    (schema, is_mixed, *rest, has_plug_in)
    for schema, is_mixed, has_plug_in, *rest in itertools.product(
        (0, 1, 2), FLAGS, FLAGS, (None, LOG), (None, RUN), FLAGS
    )
    if not (schema == 2 and is_mixed) and not (schema == 0 and has_plug_in)  # no release wrote these
]


@pytest.mark.parametrize(("schema", "is_mixed", "log", "run", "has_user_keys", "has_plug_in"), FORMS)
def test_every_pair_of_release_and_variant(
    schema: int, is_mixed: bool, log: Call | None, run: Call | None, has_user_keys: bool, has_plug_in: bool
) -> None:
    keys = {"user": {"name": "operator-7"}, "version": "model-schema-3"} if has_user_keys else {}
    own = {**user(), **keys}
    plug_ins = {"batch_counter": {"count": 12, "average": tensor("9")}} if has_plug_in else {}
    for version in ("2.0.1", "0.3.0", None):
        state = of_schema(schema, log=log, run=run, model=own, plug_ins=plug_ins, version=version)
        if is_mixed:
            state = mixed(state)
        assert schema_of(state) == (2 if is_mixed else schema)
        out = migrated(state)
        assert out.pop("version", None) is None
        assert out.pop("training_state") == COUNTERS
        result = out.pop("model")
        assert result == own
        assert list(result) == list(own)
        assert vars(result["net"]) == vars(own["net"])
        assert out.pop("rng").keys() == {"torch", "python", "numpy"}
        assert out.pop("data") == {"format": 0, "algorithm": "torch-randperm-v1", "epoch": 2, "batches": 4}
        assert out.pop("log_path", None) == (None if log is None else "/tmp/run/logs/a.log")
        assert out.pop("run_path", None) == (None if run is None else "/tmp/run/runs/a")
        assert out == plug_ins


@pytest.mark.parametrize("phase", [None, 0, 1, 7])
def test_the_data_phase_is_kept_if_it_says_something(phase: int | None) -> None:
    out = migrated(of_schema(2, phase=phase))
    assert out.get("datamodule") == ({"phase": phase} if phase else None)


def test_the_run_of_wandb_is_kept() -> None:
    assert migrated(of_schema(2, log=LOG, wandb="abc123"))["loggers"] == {"wandb": {"run_id": "abc123"}}
    state = of_schema(2, log=LOG)
    state[next(k for k in state if getattr(k, "args", None) == ("loggers",))]["wandb"] = {"run_id": None}
    assert "loggers" not in migrated(state)


def test_the_scaler_goes_to_the_user_unless_its_place_is_taken() -> None:
    out = migrated(of_schema(2, scaler=SCALER))
    assert out["model"] == {**user(), "amp_scaler": SCALER} | {"net": out["model"]["net"]}
    assert "amp_scaler" not in out
    own = {**user(), "amp_scaler": "mine"}
    out = migrated(of_schema(2, model=own, scaler=SCALER))
    assert out["model"]["amp_scaler"] == "mine"
    assert out["amp_scaler"] == SCALER
    out = migrated(of_schema(2, model=own, scaler=SCALER, plug_ins={"amp_scaler": {"a": 1}}))
    assert (out["amp_scaler"], out["amp_scaler_2"]) == ({"a": 1}, SCALER)
    assert migrated(of_schema(2, scaler={}))["model"]["amp_scaler"] == {}  # one that is disabled


FREE_IDS = ["amp_scaler", "user", "trainer", "version2", "", "ü.x"]


@pytest.mark.parametrize(
    ("schema", "plug_id"),
    [(1, "loggers"), (1, "datamodule"), *itertools.product((1, 2), FREE_IDS)],  # in 2.x the two are not free
)
def test_ids_of_plug_ins_that_are_free_now(schema: int, plug_id: str) -> None:
    value = {"count": 3}
    out = migrated(of_schema(schema, log=LOG, plug_ins={plug_id: value}))
    assert out[plug_id] == value
    assert out["log_path"] == "/tmp/run/logs/a.log"


@pytest.mark.parametrize("plug_id", ["loggers", "datamodule"])
def test_a_plug_in_that_took_the_place_of_a_key_of_2(plug_id: str) -> None:
    """In 2.x the text is equal to the member of that name: the plug-in's state is what is under the member."""
    state = of_schema(2, log=LOG)
    state[next(k for k in state if getattr(k, "args", None) == (plug_id,))] = {"count": 3}
    out = migrated(state)
    assert out[plug_id] == {"count": 3}
    assert ("log_path" in out) is (plug_id != "loggers")  # which the plug-in overwrote then


def test_the_tool_of_2_took_the_place_of_a_plug_in() -> None:
    out = migrated(mixed(of_schema(1, log=LOG, plug_ins={"loggers": {"count": 3}, "other": {"a": 1}})))
    assert out["log_path"] == "/tmp/run/logs/a.log"
    assert "loggers" not in out
    assert out["other"] == {"a": 1}


@pytest.mark.parametrize("schema", [1, 2])
def test_a_plug_in_whose_id_is_reserved_now_is_kept_under_another(schema: int) -> None:
    value, other = {"count": 3}, {"count": 4}
    state = of_schema(schema, plug_ins={"data": value, "data_plugin": other})
    out = migrated(state)
    assert out["data"]["format"] == 0
    assert out["data_plugin"] == other
    assert out["data_plugin_2"] == value
    assert plug_in_names(state if schema == 2 else nest(state)) == {
        "data": "data_plugin_2",
        "data_plugin": "data_plugin",
    }


@pytest.mark.parametrize("plug_id", ["log_path", "run_path", "version"])
def test_a_plug_in_that_took_the_place_of_a_key_of_1(plug_id: str) -> None:
    out = migrated({**of_schema(1, log=LOG), plug_id: {"count": 3}})
    assert out[f"{plug_id}_plugin"] == {"count": 3}
    assert plug_id not in out


@pytest.mark.parametrize("plug_id", ["training_state", "rng"])
def test_a_plug_in_that_took_the_place_of_the_run_itself_is_refused(plug_id: str) -> None:
    with pytest.raises(NotACheckpointError, match=f"training_state|{plug_id}"):
        migrated({**of_schema(1), plug_id: {"count": 3}})


def test_no_plug_in_has_a_reserved_name_afterwards() -> None:
    plug_ins = {key: {"a": 1} for key in sorted(RESERVED - {"training_state", "model", "rng"})}
    out = migrated({**of_schema(1), **plug_ins})
    assert {key for key in out if key in RESERVED} == {"training_state", "model", "rng", "data"}
    assert sum(value == {"a": 1} for value in out.values()) == len(plug_ins)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (path("/", "tmp", "run"), "/tmp/run"),
        (path("logs", "a.log"), "logs/a.log"),
        (path(), "."),
        (path("/tmp/run", module="pathlib._local"), "/tmp/run"),
        (path("/tmp/run", kind="PurePosixPath"), "/tmp/run"),
        (path("C:\\", "runs", "a", kind="WindowsPath"), "C:\\runs\\a"),
        (path("C:\\runs\\a", module="pathlib._local", kind="WindowsPath"), "C:\\runs\\a"),
        (path("C:\\", "runs", kind="PureWindowsPath"), "C:\\runs"),
    ],
)
def test_paths_of_every_python_and_system(found: Call, text: str) -> None:
    assert path_text(found) == text
    for schema in (0, 1, 2):
        out = migrated(of_schema(schema, log=found, run=found, model={**user(), "where": [found]}))
        assert out["log_path"] == out["run_path"] == text
        assert out["model"]["where"] == [text]


@pytest.mark.parametrize(
    "other",
    [
        path("/", kind="PathHelper"),
        path("/", module="os"),
        Call(Global("pathlib", "PosixPath"), (3,)),
        "x",
        None,
        3,
    ],
)
def test_what_is_no_path(other: object) -> None:
    assert path_text(other) is None


def test_a_log_path_that_is_none_of_these_is_refused() -> None:
    state = of_schema(2)
    state[next(k for k in state if getattr(k, "args", None) == ("loggers",))]["root"]["log_file"] = {"x": 1}
    with pytest.raises(NotACheckpointError, match="found a log path that is a dict"):
        migrated(state)


@pytest.mark.parametrize(
    ("epoch", "batches", "index"), [(0, 0, 0), (1, 0, 1), (4, 0, 4), (1, 1, 0), (1, 10, 0), (3, 4, 2)]
)
def test_where_the_run_stood(epoch: int, batches: int, index: int) -> None:
    fields = {**COUNTERS, "global_epoch": epoch, "dataset_iter": batches}
    out = migrated({**of_schema(0), "training_state": fields})
    assert (out["data"]["epoch"], out["data"]["batches"]) == (index, batches)


def test_cuda_generators_become_a_list() -> None:
    one = {**rng(), "cuda": tensor("7", "uint8", "cuda:0")}
    assert migrated({**of_schema(0), "rng": one})["rng"]["cuda"] == [one["cuda"]]


def test_numpys_numbers_become_pythons() -> None:
    def scalar(code: str, data: bytes, module: str = "numpy._core.multiarray", order: str = "<") -> Call:
        kind = Call(
            Global("numpy", "dtype"), (code, False, True), state=(3, order, None, None, None, -1, -1, 0)
        )
        return Call(Global(module, "scalar"), (kind, data))

    double = b"\\x00\\x00\\x00\\x00\\x00\\x00\\xf8\\x3f".decode("unicode_escape").encode("latin1")
    found = [
        scalar("f8", double), scalar("f8", double, "numpy.core.multiarray"), scalar("f4", b"\x00\x00\xc0?"),
        scalar("i8", (-3).to_bytes(8, "little", signed=True)), scalar("u1", b"\xff", order="|"),
        scalar("b1", b"\x01", order="|"),
    ]  # fmt: skip
    numbers = migrated(of_schema(0, model={"best": found}))["model"]["best"]
    assert numbers == [1.5, 1.5, 1.5, -3, 255, True]
    assert [type(number) for number in numbers] == [float, float, float, int, int, bool]
    big_endian, unknown = scalar("f8", double, order=">"), scalar("M8", double)
    assert rewritten([big_endian, unknown], plain) != [1.5, 1.5]  # left for the check that refuses it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_state": {**COUNTERS, "extra": 1}}, "missing or unknown: extra"),
        ({"training_state": {k: v for k, v in COUNTERS.items() if k != "running_iter"}}, "unknown: running_iter"),
        ({"training_state": {**COUNTERS, "global_epoch": "3"}}, "training_state.global_epoch: found '3'"),
        ({"training_state": {**COUNTERS, "global_epoch": True}}, "training_state.global_epoch: found True"),
        ({"training_state": {**COUNTERS, "global_epoch": -1}}, "training_state.global_epoch: found -1"),
        ({"training_state": {**COUNTERS, "global_epoch": 0}}, "dataset_iter 4 in global_epoch 0"),
        ({"training_state": [1]}, "a 'training_state' that is a list"),
        ({"rng": [1]}, "'model' or 'rng' that is no dict"),
        ({"model": None}, "'model' or 'rng' that is no dict"),
        ({"rng": {"torch": tensor("0", "uint8"), "rand": (3, (), None)}}, "nothing for the generator of numpy"),
        ({"rng": {**rng(), "rand": [3]}}, "a list for the generator of python"),
    ],
)  # fmt: skip
def test_what_cannot_be_migrated_says_why(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NotACheckpointError, match=message):
        migrated({**of_schema(0), **change})


@pytest.mark.parametrize("state", [{}, {"weight": 1}, {"version": "1.0", "model": {}}, {3: 4}])
def test_what_is_no_checkpoint_is_not_taken_for_one(state: dict[Any, Any]) -> None:
    with pytest.raises(NotACheckpointError, match="expected a checkpoint of Helios"):
        schema_of(state)


def test_current_files_are_known() -> None:
    assert schema_of({"version": __version__, "x": 1}) == 3
    assert schema_of(migrated(of_schema(2))) == 3  # by its structure
    assert schema_of({**of_schema(0), "version": "garbage"}) == 0


def names(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    known = [*RESERVED, "loggers", "datamodule", "amp_scaler", "user", "root", "data_plugin"]
    return text | st.sampled_from(sorted(known))


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
    | st.builds(lambda k: tensor(str(k)), st.integers(1, 3)) | st.builds(lambda p: path("/", p), st.text(max_size=3))
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(inner, inner)
        | inner.map(lambda x: [x, x])
        | st.dictionaries(st.text(max_size=2), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)
dicts = st.dictionaries(names(st.text(max_size=3)), trees, max_size=4)


def frozen(value: object) -> object:
    """A copy to compare with afterwards; calls and tensors are compared by what they say."""
    if isinstance(value, Call):
        return "call", value.function, frozen(value.args), frozen(value.state), frozen(value.items)
    if isinstance(value, Tensor):
        return "tensor", repr(value)
    if isinstance(value, dict):
        items = [(frozen(key), frozen(item)) for key, item in value.items()]
        return type(value), items, frozen(getattr(value, "_metadata", None))
    if isinstance(value, list | tuple):
        return type(value), [frozen(item) for item in value]
    return type(value), repr(value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    schema=st.sampled_from([0, 1, 2]),
    own=dicts,
    plug_ins=st.dictionaries(names(st.text(max_size=3)), dicts, max_size=3),
)
def test_steps_are_pure_and_keep_everything(
    schema: int, own: dict[str, Any], plug_ins: dict[str, Any]
) -> None:
    taken = ("training_state", "model", "rng", "loggers", "datamodule")  # see the tests above
    plug_ins = {key: value for key, value in plug_ins.items() if key not in taken}
    state = of_schema(schema, log=LOG, run=RUN, model=own, plug_ins=plug_ins if schema else None)
    before = frozen(state)
    for migration in steps_from(schema, MIGRATIONS):
        if migration.source == 2:
            renamed = plug_in_names(state)
        state = migration.step(state)
    assert (
        frozen(of_schema(schema, log=LOG, run=RUN, model=own, plug_ins=plug_ins if schema else None))
        == before
    )
    assert frozen(state["model"]) == frozen(rewritten(own, plain))
    if schema:
        assert renamed.keys() == plug_ins.keys()
        for old, new in renamed.items():
            assert frozen(state[new]) == frozen(rewritten(plug_ins[old], plain))
    assert all(type(key) is str for key in state)
    assert not [item for item in walk(state) if isinstance(item, Call)]


@pytest.mark.parametrize("step", [pickle_training_state, nest, flatten])
def test_one_step_at_a_time_changes_nothing_of_what_it_is_given(step: Any) -> None:
    schema = {pickle_training_state: 0, nest: 1, flatten: 2}[step]
    state = of_schema(schema, log=LOG, run=RUN, plug_ins={"data": {"a": [LOG]}}, scaler=SCALER, wandb="x")
    before, parts = frozen(state), [id(item) for item in walk(state)]
    kept = copy.copy(state)
    step(state)
    assert frozen(state) == before
    assert [id(item) for item in walk(state)] == parts
    assert kept == state


def test_control_an_impure_step_is_seen() -> None:
    state = of_schema(1)
    before = frozen(state)
    state["model"]["net"]["weight"] = None
    assert frozen(state) != before


def test_what_is_shared_stays_shared() -> None:
    shared, tied = [path("/", "a")], tensor("1")
    out: Any = rewritten({"a": shared, "b": [shared, tied], "c": (tied,)}, plain)
    assert out["a"] is out["b"][0]
    assert out["b"][1] is out["c"][0] is tied
    assert out["a"] == ["/a"]


def test_storages_go_to_the_cpu_under_new_keys() -> None:
    a, b = tensor("7", location="cuda:1"), tensor("7", location="cuda:1")
    out: Any
    out, keys = with_storages([a, b, a, tensor("3")])
    assert keys == ("7", "3")
    assert [t.storage.key for t in out] == ["0", "0", "0", "1"]
    assert {t.storage.location for t in out} == {"cpu"}
    assert out[0] is out[2]
    assert out[0] is not out[1]
    assert out[0].storage is out[1].storage
    assert a.storage.location == "cuda:1"


def test_misfits_are_named_by_their_place() -> None:
    strange = Call(Global("evil", "run"), ())
    state = {
        "model": {"user": [1, {"x": strange}], 3: {1, 2}},
        "ok": Call(Global("torch", "device"), ("cpu",)),
    }
    assert list(misfits(state, frozenset({"evil.run"}))) == [
        ("model.user[1].x", "evil.run"),
        ("model.3", "a set"),
    ]
