"""Every plain value comes back, from plain torch, and everything else is refused by its place."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import pathlib
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helios import chkpt
from helios.chkpt import _snapshot

PLAIN = {
    "atoms": [True, False, None, 0, -1, 1.5, -0.0, 1e400, 2 + 3j, "", "é\n", "\ud800", b"", b"\x00\xff"],
    "ints": [2**31, -(2**31) - 1, 2**63, 2**128, 2**2039 - 1, -(2**2039)],
    "nested": {"list": [1, [2, (3, {"x": []})]], "tuple": (), "dict": {}, "od": OrderedDict(b=1, a=2)},
    "keys": {1: 1, "1": 2, 1.5: 3, None: 4, (1, ("a", None)): 5, b"": 6, b"k": 7, 2j: 8, False: 9},
    "a b": 1,
}

PLAIN_TORCH = """
import json, sys
sys.modules["helios"] = None  # nothing of Helios can be imported
import torch
state = torch.load(sys.argv[1], weights_only=True)
assert state.pop("version") == sys.argv[2]
print(json.dumps({"repr": ascii(state), "od": type(state["nested"]["od"]).__name__}))
"""


def test_plain_torch_without_helios_opens_everything(tmp_path: pathlib.Path) -> None:
    path = chkpt.save(PLAIN, tmp_path / "a.pth")
    arguments = [sys.executable, "-c", PLAIN_TORCH, str(path), chkpt.__version__]
    shown = json.loads(subprocess.run(arguments, check=True, capture_output=True, cwd=tmp_path).stdout)
    assert shown == {"repr": ascii(PLAIN), "od": "OrderedDict"}
    assert chkpt.load(path) == {**PLAIN, "version": chkpt.__version__}


def test_nan_and_the_sign_of_zero(tmp_path: pathlib.Path) -> None:
    state = chkpt.load(chkpt.save({"x": [math.nan, -0.0, complex(-0.0, math.nan)]}, tmp_path / "a.pth"))
    nan, zero, both = state["x"]  # type: ignore[misc]
    assert math.isnan(nan) and math.copysign(1, zero) == -1
    assert math.copysign(1, both.real) == -1 and math.isnan(both.imag)


def test_the_metadata_of_a_module_is_kept(tmp_path: pathlib.Path) -> None:
    module = torch.nn.BatchNorm1d(2)
    state = chkpt.load(chkpt.save({"net": module.state_dict()}, tmp_path / "a.pth"))
    net = state["net"]
    assert isinstance(net, OrderedDict)
    assert net._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    torch.nn.BatchNorm1d(2).load_state_dict(net)


def test_any_mapping_will_do_at_the_top(tmp_path: pathlib.Path) -> None:
    state = defaultdict(int, a=1)
    assert chkpt.load(chkpt.save(state, tmp_path / "a.pth")) == {"a": 1, "version": chkpt.__version__}


def test_numpy_scalars_become_numbers(tmp_path: pathlib.Path) -> None:
    np = pytest.importorskip("numpy")
    scalars = [np.float64(0.1), np.float32(0.1), np.int64(-3), np.uint8(7), np.bool_(True), np.complex64(1j)]
    state = chkpt.load(chkpt.save({"x": scalars, "k": {np.int64(3): 1}}, tmp_path / "a.pth"))
    values, keys = state["x"], state["k"]
    assert isinstance(values, list) and isinstance(keys, dict)
    assert [type(v) for v in values] == [float, float, int, int, bool, complex]
    assert values == [s.item() for s in scalars]
    assert [type(k) for k in keys] == [int]
    for foreign in (np.datetime64("2020"), np.longdouble(1), np.zeros(2)):
        with pytest.raises(TypeError, match=r"x\[0\]: numpy\."):
            chkpt.save({"x": [foreign]}, tmp_path / "b.pth")


class Colour(enum.Enum):
    RED = "red"


class Text(str):
    pass


@dataclasses.dataclass
class Data:
    x: int = 1


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({1}, "set"),
        (frozenset(), "frozenset"),
        (Colour.RED, "Colour"),
        (Text("a"), "Text"),
        (Data(), "Data"),
        (pathlib.PurePosixPath("a"), "PurePosixPath"),
        (namedtuple("Point", "x y")(1, 2), "Point"),
        (defaultdict(int), "defaultdict"),
        (bytearray(b"a"), "bytearray"),
        (range(3), "range"),
        (print, "builtin_function_or_method"),
        (Data, "type"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (torch.Size([1]), "torch.Size"),
        (torch.nn.Linear(1, 1), "Linear"),
        (torch.ones(1).as_subclass(Subclass), "Subclass"),  # type: ignore[no-untyped-call]
        (torch.Generator(), "Generator"),
    ],
)
def test_foreign_values_are_refused_by_their_place(value: object, kind: str, tmp_path: pathlib.Path) -> None:
    state = {"model": {"optimizer": {"state": [0, 1, 2, {"foo": value}]}}}
    with pytest.raises(TypeError, match=rf"^model\.optimizer\.state\[3\]\.foo: .*{kind}"):
        chkpt.save(state, tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"model": {"a b": [0, 1, set()]}}, r"^model\['a b'\]\[2\]: "),
        ({"a b": set()}, r"^\['a b'\]: "),
        ({"m": {3: set()}}, r"^m\[3\]: "),
        ({"m": {(1, "x"): set()}}, r"^m\[\(1, 'x'\)\]: "),
        ({"m": ((set(),),)}, r"^m\[0\]\[0\]: "),
        ({"m": {Colour.RED: 1}}, r"^m\[<Colour.RED: 'red'>\]: a key "),
        ({"m": {frozenset(): 1}}, r"a key of type frozenset"),
        ({1: 1}, r"^state: expected str keys"),
        ({Text("a"): 1}, r"^state: expected str keys"),
        ([], r"^state: expected a Mapping"),
    ],
)
def test_places_are_written_as_in_python(
    state: dict[str, object], place: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(TypeError, match=place):
        chkpt.save(state, tmp_path / "a.pth")


def test_attributes_of_an_ordered_dict(tmp_path: pathlib.Path) -> None:
    odd = OrderedDict(a=1)
    odd.__dict__["note"] = 1
    with pytest.raises(TypeError, match=r"^m\.note: "):
        chkpt.save({"m": odd}, tmp_path / "a.pth")
    odd = OrderedDict(a=1)
    odd.__dict__["_metadata"] = {"x": {1}}
    with pytest.raises(TypeError, match=r"^m\._metadata\.x: set"):
        chkpt.save({"m": odd}, tmp_path / "a.pth")


@pytest.mark.parametrize("number", [2**2039, -(2**2039) - 1])
def test_ints_that_weights_only_cannot_read(number: int, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"^x\[0\]: an int of 2040 bits"):
        chkpt.save({"x": [number]}, tmp_path / "a.pth")


def test_texts_that_weights_only_cannot_read(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_snapshot, "_MAX_TEXT", 4)
    chkpt.save({"x": "abcd"}, tmp_path / "a.pth")
    for value in ("abcde", b"abcde"):
        with pytest.raises(ValueError, match=r"^x: .* of length 5"):
            chkpt.save({"x": value}, tmp_path / "a.pth")


def test_the_version_key_is_ours(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'version'"):
        chkpt.save({"version": "1"}, tmp_path / "a.pth")


def test_cycles_are_named(tmp_path: pathlib.Path) -> None:
    loop: list[object] = [1]
    loop.append({"x": (loop,)})
    with pytest.raises(ValueError, match=r"^m\[1\]\.x\[0\]: this list contains itself"):
        chkpt.save({"m": loop}, tmp_path / "a.pth")


def test_shared_containers_stay_shared_and_cost_nothing(tmp_path: pathlib.Path) -> None:
    shared: object = []
    for _ in range(90):  # 2**90 lists if each were visited twice
        shared = [shared, shared]
    state = chkpt.load(chkpt.save({"a": shared, "b": shared}, tmp_path / "a.pth"))
    assert state["a"] is state["b"]
    assert isinstance(state["a"], list) and state["a"][0] is state["a"][1]


@pytest.mark.parametrize(
    "make", [lambda x: [x], lambda x: (x,), lambda x: {"a": x}, lambda x: OrderedDict(a=x)]
)
def test_the_limit_of_nesting(make: object, tmp_path: pathlib.Path) -> None:
    assert callable(make)
    value: object = 1
    for _ in range(_snapshot.MAX_DEPTH):
        value = make(value)
    assert chkpt.load(chkpt.save({"x": value}, tmp_path / "a.pth"))["x"] == value
    with pytest.raises(ValueError, match="nested more than 100"):
        chkpt.save({"x": make(value)}, tmp_path / "b.pth")
    for _ in range(20_000):
        value = make(value)
    with pytest.raises(ValueError, match="nested more than 100"):
        chkpt.save({"x": value}, tmp_path / "b.pth")


def test_a_stack_that_is_nearly_used_up(tmp_path: pathlib.Path) -> None:
    value: object = 1
    for _ in range(_snapshot.MAX_DEPTH):
        value = [value]
    outcomes: set[str] = set()

    def descend() -> None:
        try:
            descend()
        except RecursionError:
            pass
        else:
            return
        try:
            chkpt.save({"x": value}, tmp_path / "a.pth")
        except (ValueError, RecursionError) as error:
            outcomes.add(type(error).__name__)
            raise RecursionError from None
        outcomes.add("saved")

    descend()
    assert outcomes <= {"ValueError", "saved", "RecursionError"} and "saved" in outcomes
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    chkpt.verify(tmp_path / "a.pth")


def schedulers() -> dict[str, Callable[[torch.optim.Optimizer], object]]:
    s = torch.optim.lr_scheduler
    return {
        "step": lambda o: s.StepLR(o, 2),
        "multi-step": lambda o: s.MultiStepLR(o, [2, 4]),
        "cosine": lambda o: s.CosineAnnealingLR(o, 10),
        "warm restarts": lambda o: s.CosineAnnealingWarmRestarts(o, 3),
        "one cycle": lambda o: s.OneCycleLR(o, 0.1, total_steps=20),
        "plateau": lambda o: s.ReduceLROnPlateau(o),
        "lambda": lambda o: s.LambdaLR(o, lambda e: 0.9**e),
        "chained": lambda o: s.ChainedScheduler([s.ExponentialLR(o, 0.9), s.MultiStepLR(o, [2])]),
        "sequential": lambda o: s.SequentialLR(o, [s.ConstantLR(o), s.MultiStepLR(o, [2])], [3]),
    }


@pytest.mark.parametrize("kind", schedulers())
def test_the_state_of_every_scheduler_comes_back(kind: str, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = schedulers()[kind](optimizer)
    state = scheduler.state_dict()  # type: ignore[attr-defined]
    loaded = chkpt.load(chkpt.save({"s": state}, tmp_path / "a.pth"))["s"]
    assert loaded == state
    scheduler.load_state_dict(loaded)  # type: ignore[attr-defined]


def test_a_counter_stays_one(tmp_path: Path) -> None:
    path = chkpt.save({"c": Counter("abca")}, tmp_path / "a.pth")
    loaded = torch.load(path, weights_only=True)["c"]
    assert type(loaded) is Counter and loaded == Counter("abca")
