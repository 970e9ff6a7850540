"""`diff` finds what differs, all of it and nothing else, down to the bits of a tensor."""

from __future__ import annotations

import copy
import math
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios import chkpt
from helios.chkpt import DifferenceKind as Kind
from helios.chkpt import diff
from helios.chkpt._comparison._walk import compare_states
from helios.chkpt._format.values import Call, Global
from helios.chkpt_migrator import migrate_checkpoints_to_current_version

OTHER_SIDE = {Kind.ONLY_IN_A: Kind.ONLY_IN_B, Kind.ONLY_IN_B: Kind.ONLY_IN_A}
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32),
    *(torch.uint64, torch.bool),
]


def saved(path: Path, state: dict[str, Any]) -> Path:
    return chkpt.save(state, path)


def torch_saved(path: Path, state: dict[str, Any]) -> Path:
    torch.save({**state, "version": chkpt.__version__}, path)
    return path


def compared(a: dict[str, Any], b: dict[str, Any], folder: Path) -> list[chkpt.Difference]:
    """What differs, the same for every way in which the two may have been written."""
    found = [
        diff(write_a(folder / "a.pth", a), write_b(folder / "b.pth", b))
        for write_a in (saved, torch_saved)
        for write_b in (saved, torch_saved)
    ]
    assert found[0] == found[1] == found[2] == found[3]
    return found[0]


def texts(differences: list[chkpt.Difference]) -> list[str]:
    return [str(difference) for difference in differences]


def keyed_by_text(state: dict[str, Any]) -> None:
    of_optimizer = state["model"]["opt"]["state"]
    of_optimizer["0"] = of_optimizer.pop(0)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "training_state.loss: value: 0.1 -> 0.2": lambda s: s["training_state"].update(loss=0.2),
    "training_state.loss: type: float 0.1 -> int 1": lambda s: s["training_state"].update(loss=1),
    "training_state.name: only in a: str 'run'": lambda s: s["training_state"].pop("name"),
    "model.x: only in b: list [1]": lambda s: s["model"].update(x=[1]),
    "model.opt.betas: type: tuple (0.9, 0.99) -> list [0.9, 0.99]": lambda s: s["model"]["opt"].update(
        betas=[0.9, 0.99]
    ),
    "model.opt.betas: value: (0.9, 0.99), length 2 -> (0.9,), length 1": lambda s: s["model"]["opt"].update(
        betas=(0.9,)
    ),
    "rng.rand[1]: value: 2 of 5 differ, first [2]: 2 -> 9": lambda s: s["rng"].update(
        rand=(3, (0, 1, 9, 9, 4), None)
    ),
    "rng.rand[2]: only in a: None": lambda s: s["rng"].update(rand=(3, (0, 1, 2, 3, 4))),
    "checkpoint: order of keys: 'model' -> 'rng'": lambda s: s.update(rng=s.pop("rng"), model=s.pop("model")),
    "model.net._metadata[''].version: value: 1 -> 2": lambda s: vars(s["model"]["net"])["_metadata"][
        ""
    ].update(version=2),
    "model.net.weight: values: float32 [2, 3]: 6 of 6 differ, by at most 0.5": lambda s: s["model"]["net"][
        "weight"
    ].add_(0.5),
    "model.net.weight: shape: [2, 3] -> [6]": lambda s: s["model"]["net"].update(weight=torch.arange(6.0)),
    "model.net.bias: dtype: float32 -> float16": lambda s: s["model"]["net"].update(
        bias=torch.zeros(2).half()
    ),
    "model.net.bias: type: tensor float32 [2] -> None": lambda s: s["model"]["net"].update(bias=None),
    "model.net.bias: values: float32 [2]: 1 of 2 differ, in nothing but the sign of 0": lambda s: s["model"][
        "net"
    ]["bias"].abs_(),
    "model.net.bias: values: float32 [2]: 2 of 2 differ, 2 with nan": lambda s: s["model"]["net"][
        "bias"
    ].fill_(math.nan),
    "model.opt.state[0]: only in a: dict {'step': float32 []}\n"
    "model.opt.state.0: only in b: dict {'step': float32 []}": keyed_by_text,
}


@pytest.mark.parametrize("expected", CHANGES)
def test_what_is_said(expected: str, state: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(state)
    CHANGES[expected](changed)
    there = compared(state, changed, tmp_path)
    assert "\n".join(texts(there)) == expected
    back = {(d.path, d.kind) for d in compared(changed, state, tmp_path)}
    assert back == {(d.path, OTHER_SIDE.get(d.kind, d.kind)) for d in there}


def test_two_files_that_differ_in_version_and_time_only(
    state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state["training_state"]["average_iter_time"] = 0.25
    a = chkpt.save(state, tmp_path / "a.pth")
    state["training_state"]["average_iter_time"] = 0.5
    monkeypatch.setattr("helios.chkpt._write.__version__", "3.0.1")
    b = chkpt.save(state, tmp_path / "b.pth")
    assert [d.path for d in diff(a, b)] == ["training_state.average_iter_time", "version"]


def test_scores(tmp_path: Path, state: dict[str, Any]) -> None:
    with chkpt.CheckpointStore(tmp_path, "run") as store:
        a, b = (store.save(state, epoch=0, iteration=i, score=i) for i in (1, 2))
    assert texts(diff(a, b)) == ["manifest.score: value: 1.0 -> 2.0"]


def extremes(dtype: torch.dtype) -> tuple[object, object, object]:
    """Two numbers of a dtype, and how far they are apart."""
    if dtype is torch.bool:
        return False, True, 1
    if dtype.is_complex:
        return 0j, 3 + 4j, 5.0
    if dtype is torch.float8_e8m0fnu:
        return 1.0, 4.0, 3.0
    if dtype.is_floating_point:
        return -2.0, 4.0, 6.0
    info = torch.iinfo(dtype)
    return info.min, info.max, info.max - info.min


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    low, high, distance = extremes(dtype)
    a = torch.tensor([low, low, low], dtype=dtype)
    b = torch.tensor([low, high, low], dtype=dtype)
    (found,) = compared({"x": a}, {"x": b}, tmp_path)
    assert (found.kind, found.num_elements, found.num_differing) == (Kind.VALUES, 3, 1)
    assert (found.max_abs, type(found.max_abs)) == (distance, type(distance))
    assert compared({"x": a}, {"x": a.clone()}, tmp_path) == []


@pytest.mark.parametrize(
    ("a", "b", "max_abs", "num_nan"),
    [
        (math.inf, 1.0, math.inf, 0),
        (math.inf, -math.inf, math.inf, 0),
        (math.nan, 1.0, None, 1),
        (0.0, -0.0, 0.0, 0),
        (1.7e308, 1.0, 1.7e308, 0),
        (5e-324, 0.0, 5e-324, 0),
    ],
)
def test_numbers_that_are_none(
    a: float, b: float, max_abs: float | None, num_nan: int, tmp_path: Path
) -> None:
    pair = (torch.tensor([7.0, x], dtype=torch.float64) for x in (a, b))
    (found,) = compared({"x": next(pair)}, {"x": next(pair)}, tmp_path)
    assert (found.num_differing, found.max_abs, found.num_nan) == (1, max_abs, num_nan)
    (found,) = compared({"x": a}, {"x": b}, tmp_path)  # plain numbers, too
    assert found.kind is Kind.VALUE and found.a != found.b


def test_nans_are_told_apart_by_their_bits(tmp_path: Path) -> None:
    quiet, other = (struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 + i))[0] for i in (0, 1))
    assert compared({"x": quiet}, {"x": quiet}, tmp_path) == []
    (found,) = compared({"x": quiet}, {"x": other}, tmp_path)
    assert found.b == "nan (bits 7ff8000000000001)"
    x, y = torch.tensor([quiet], dtype=torch.float64), torch.tensor([1], dtype=torch.int64)
    y = x.clone().view(torch.int64).add_(y).view(torch.float64)
    (found,) = compared({"x": x}, {"x": y}, tmp_path)
    assert (found.num_differing, found.max_abs, found.num_nan) == (1, None, 1)
    assert compared({"x": x}, {"x": x.clone()}, tmp_path) == []


def test_an_infinite_part_of_a_complex_number(tmp_path: Path) -> None:
    a, b = (torch.tensor([complex(math.inf, part)]) for part in (1.0, 2.0))
    (found,) = compared({"x": a}, {"x": b}, tmp_path)
    assert (found.num_differing, found.max_abs, found.num_nan) == (1, 1.0, 0)


def test_texts_that_differ_far_behind(tmp_path: Path) -> None:
    (found,) = compared({"x": "y" * 5000 + "a"}, {"x": "y" * 5000 + "b"}, tmp_path)
    assert found.a == f"[4980:] '{'y' * 20}a'"
    (found,) = compared({"x": 10**500}, {"x": 10**500 + 1}, tmp_path)
    assert found.a != found.b


def test_ties(tmp_path: Path) -> None:
    w, flat = torch.ones(3), torch.zeros(6)
    tied = {"a": w, "b": w, "c": flat[:3], "d": flat[3:]}
    untied = {"a": w, "b": w.clone(), "c": torch.zeros(3), "d": torch.zeros(3)}
    assert texts(compared(tied, untied, tmp_path)) == ["b: tied differently: tied to a -> untied"]
    assert texts(compared(untied, tied, tmp_path)) == ["b: tied differently: untied -> tied to a"]
    inner: dict[str, object] = {"x": 1}
    found = compared({"a": inner, "b": inner}, {"a": inner, "b": {"x": 1}}, tmp_path)
    assert texts(found) == ["b: tied differently: the same as a -> one of its own"]
    # Of a tie of which one end is missing only that is said.
    assert texts(compared(tied, {**untied, "b": w, "a": None}, tmp_path))[0].startswith("a: type")


def test_a_tied_tensor_that_is_gone_is_one_difference(tmp_path: Path) -> None:
    w = torch.ones(3)
    assert texts(compared({"a": w, "b": w}, {"b": w}, tmp_path)) == ["a: only in a: tensor float32 [3]"]


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "whole": base,
        "transposed": base.t(),
        "part": base[3:7],
        "column": base[:, 2],
        "expanded": base[0, :1].expand(50),
    }


@pytest.mark.parametrize("chunk_bytes", [16, 64, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128, torch.uint8], ids=str)
def test_views_that_lie_differently(
    dtype: torch.dtype, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helios.chkpt._comparison._tensors.CHUNK_BYTES", chunk_bytes)
    if "helios.chkpt._comparison._numbers" in sys.modules:
        monkeypatch.setattr("helios.chkpt._comparison._numbers.CHUNK_BYTES", chunk_bytes)
    base = torch.arange(60).reshape(10, 6).to(dtype)
    for name, view in views(base).items():
        other = view.clone(memory_format=torch.contiguous_format)
        assert compared({"x": view}, {"x": other}, tmp_path) == [], name
        if name == "expanded":
            continue
        flat = other.view(-1)
        flat[0], flat[-1] = 100, 101
        (found,) = compared({"x": view}, {"x": other}, tmp_path)
        distance = torch.stack([(view - other).abs().max()]).to(torch.float64).item()
        if dtype is torch.uint8:
            distance = float((view.int() - other.int()).abs().max())
        assert (found.num_differing, found.max_abs) == (2, distance), name


def test_more_elements_than_bytes(tmp_path: Path) -> None:
    a = torch_saved(tmp_path / "a.pth", {"x": torch.zeros(1).expand(2**40)})
    b = torch_saved(tmp_path / "b.pth", {"x": torch.ones(1).expand(2**40)})
    assert texts(diff(a, b)) == [
        f"x: values: float32 [{2**40}]: not counted, since there are more elements than bytes"
    ]
    assert diff(a, torch_saved(tmp_path / "c.pth", {"x": torch.zeros(1).expand(2**40)})) == []


def shared_over_and_over(wrap: Callable[[object], object], bottom: int) -> dict[object, object]:
    """2**150 places, 150 objects."""
    value: object = {"x": bottom}
    for _ in range(150):
        value = wrap(value)
    return {"x": value}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: [value, value],
        lambda value: (value, value),
        lambda value: {"a": value, "b": value},
        lambda value: Call(Global("a", "b"), (), state={"a": value, "b": value}),
        lambda value: Call(Global("a", "b"), (value, value)),
    ],
)
def test_containers_that_are_shared_over_and_over(wrap: Callable[[object], object]) -> None:
    one, same, other = (shared_over_and_over(wrap, bottom) for bottom in (1, 1, 2))
    assert compare_states(one, same) == []
    (found,) = compare_states(one, other)
    assert isinstance(found, chkpt.Difference) and found.detail == "1 -> 2"


atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(min_size=1, max_size=5),
)
keys = st.one_of(st.text(max_size=4), st.integers(0, 3), st.tuples(st.integers(0, 3), st.booleans()))
values = st.recursive(
    st.one_of(
        atoms, st.lists(st.integers(-5, 5), max_size=4).map(lambda v: torch.tensor(v, dtype=torch.int16))
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)
states = st.dictionaries(st.text(max_size=4).filter(lambda key: key != "version"), values, max_size=4)
fast = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@fast
@given(state=states)
def test_equal_states_do_not_differ(state: dict[str, Any], tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a.pth", state), torch_saved(tmp_path / "b.pth", copy.deepcopy(state))
    assert diff(a, a) == []
    assert diff(a, b) == diff(b, a) == []


@fast
@given(state=states, other=states)
def test_the_other_way_round_the_same_differs(
    state: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    a, b = saved(tmp_path / "a.pth", state), saved(tmp_path / "b.pth", other)
    there = {(d.path, OTHER_SIDE.get(d.kind, d.kind), d.b, d.a) for d in diff(a, b) if d.num_elements is None}
    back = {(d.path, d.kind, d.a, d.b) for d in diff(b, a) if d.num_elements is None}
    assert there == back
    assert len(diff(a, b)) == len(diff(b, a))


@fast
@given(state=states, data=st.data())
def test_a_single_change_is_the_only_difference(
    state: dict[str, Any], data: st.DataObject, tmp_path: Path
) -> None:
    state = {**state, "planted": data.draw(st.lists(values, max_size=2))}
    changed = copy.deepcopy(state)
    places = list(leaves(changed))
    container, key = data.draw(st.sampled_from(places)) if places else (changed, "more")
    value = container.get(key) if isinstance(container, dict) else container[key]
    container[key] = value + 1 if isinstance(value, torch.Tensor) and value.numel() else [["planted"]]
    a, b = saved(tmp_path / "a.pth", state), saved(tmp_path / "b.pth", changed)
    (found,) = diff(a, b)
    assert found.kind in (Kind.TYPE, Kind.VALUES, Kind.ONLY_IN_B, Kind.VALUE)


def leaves(container: Any) -> Any:
    """Places in dicts and lists that hold neither dicts nor lists nor tuples."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value)
        elif not isinstance(value, tuple):
            yield container, key


def test_files_of_earlier_releases(legacy: Path) -> None:
    folder = legacy / "2.0.1" / "iteration"
    a, b = folder / "tiny_epoch_1_iter_6.pth", folder / "tiny_epoch_2_iter_12.pth"
    assert diff(a, a) == []
    found = {d.path: d for d in diff(a, b)}
    assert found["training_state.global_iteration"].detail == "6 -> 12"
    assert found["model.user.net.weight"].kind is Kind.VALUES
    assert "version" not in found
    assert texts(diff(a, legacy / "0.2.0" / "iteration" / "tiny_epoch_1_iter_6.pth"))


def test_a_file_and_what_it_was_migrated_to(legacy: Path, tmp_path: Path) -> None:
    old = legacy / "2.0.1" / "amp" / "tiny_epoch_1_iter_6.pth"
    shutil.copy(old, tmp_path)
    migrate_checkpoints_to_current_version(tmp_path, backup=False)
    found = texts(diff(old, tmp_path / old.name))
    assert "rng: type: key helios.trainer._CheckpointKeys('rng') -> key 'rng'" in found
    assert (
        "training_state: type: helios.trainer.TrainingState helios.trainer.TrainingState() -> dict"
        in "".join(found)
    )
    assert not [text for text in found if text.startswith(("training_state.", "rng.torch"))]


def flip(path: Path, pattern: bytes) -> None:
    """Change a bit in the bytes that begin with a pattern."""
    raw = bytearray(path.read_bytes())
    assert raw.count(pattern) == 1
    raw[raw.index(pattern)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("write", [saved, torch_saved])
def test_what_is_read_is_verified(write: Callable[[Path, dict[str, Any]], Path], tmp_path: Path) -> None:
    x = torch.arange(100.0)
    a = write(tmp_path / "a.pth", {"x": x, "y": torch.zeros(3)})
    b = write(tmp_path / "b.pth", {"x": x + 1, "y": torch.zeros(3)})
    flip(a, struct.pack("<3f", 50, 51, 52))
    for pair in ((a, b), (b, a)):
        with pytest.raises(chkpt.CorruptError, match=r"a\.pth.*data/0"):
            diff(*pair)


def test_what_has_equal_digests_is_not_read(tmp_path: Path) -> None:
    a, b = (saved(tmp_path / name, {"x": torch.arange(100.0)}) for name in ("a.pth", "b.pth"))
    flip(a, struct.pack("<3f", 50, 51, 52))
    assert diff(a, b) == []  # as the docstring says; `verify` is what finds it
    with pytest.raises(chkpt.CorruptError):
        chkpt.verify(a)


def test_files_of_later_releases_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = saved(tmp_path / "a.pth", {"x": 1})
    monkeypatch.setattr("helios.chkpt._write.SCHEMA", 99)
    b = saved(tmp_path / "b.pth", {"x": 1})
    for pair in ((a, b), (b, a)):
        with pytest.raises(chkpt.VersionTooNewError):
            diff(*pair)


def test_bad_arguments(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.pth", {"x": 1})
    with pytest.raises(TypeError, match="b: expected"):
        diff(a, 3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        diff(a, tmp_path / "b.pth")


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    state = {"x": torch.ones(1 << 24), "y": torch.ones(1 << 12, 1 << 12).t()}  # 64 MiB each
    a, b = torch_saved(tmp_path / "a.pth", state), torch_saved(tmp_path / "b.pth", state)
    tracemalloc.start()
    try:
        assert diff(a, b) == []
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 << 20


@pytest.mark.parametrize(("other", "expected"), [(1.0, "False"), (2.0, "True")])  # the second: the control
def test_torch_is_imported_for_tensors_that_differ_only(other: float, expected: str, tmp_path: Path) -> None:
    x = torch.ones(1000)
    a = torch_saved(tmp_path / "a.pth", {"x": x, "y": 1})
    b = torch_saved(tmp_path / "b.pth", {"x": x * other, "y": 2})
    code = (
        "import sys; from helios.chkpt import diff; assert diff(*sys.argv[1:]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, a, b], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
