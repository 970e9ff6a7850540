"""What is read is what was written, bit for bit, and what plain torch.load makes of the same file."""

from __future__ import annotations

import math
import struct
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helios import chkpt

SETTINGS = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FLOATS = st.one_of(
    st.floats(), st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("<d", n.to_bytes(8, "little"))[0])
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=5)  # lone surrogates too
INTS = st.one_of(st.integers(), st.integers(-(2**2039), 2**2039 - 1))
ATOMS = st.one_of(st.none(), st.booleans(), INTS, FLOATS, TEXT, st.binary(max_size=9), st.complex_numbers())
KEYS = st.recursive(
    st.one_of(st.none(), st.booleans(), INTS, TEXT, st.binary(max_size=3)),
    lambda inner: st.tuples(inner, inner),
    max_leaves=3,
)
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint8,
    torch.float8_e5m2,
]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A view of some bytes: any dtype, shape and strides."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = max(1, math.prod(shape))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)[: math.prod(shape)]
    tensor = flat.reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


def containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    dicts = st.dictionaries(KEYS, inner, max_size=3)
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=4).map(tuple),
        dicts,
        dicts.map(OrderedDict),
        st.lists(inner, min_size=1, max_size=2).map(lambda items: [items, items, (items,)]),  # shared
        st.dictionaries(TEXT, st.integers(0, 9), max_size=2).map(Counter),
    )


VALUES = st.recursive(st.one_of(ATOMS, tensors()), containers, max_leaves=12)
STATES = st.dictionaries(TEXT.filter(lambda key: key != "version"), VALUES, max_size=4)


def torch_load(path: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, **options)


def values_of(value: object) -> object:
    """The values of a state without the strides and the sharing of its tensors, which a view may lose."""
    if isinstance(value, torch.Tensor):
        flat = value.resolve_conj().contiguous().reshape(-1)
        return (
            str(value.dtype),
            tuple(value.shape),
            bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b"",
        )
    if isinstance(value, dict):
        items = [(values_of(key), values_of(item)) for key, item in value.items()]
        return (type(value).__name__, items)
    if isinstance(value, list | tuple):
        return type(value).__name__, [values_of(item) for item in value]
    if isinstance(value, float):
        return struct.pack(">d", value)
    if isinstance(value, complex):
        return struct.pack(">2d", value.real, value.imag)
    return type(value).__name__, value


@SETTINGS
@given(state=STATES)
def test_any_state_comes_back_and_plain_torch_agrees(state: dict[str, object], kit: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = chkpt.save(state, Path(folder) / "a.pth")
        chkpt.verify(path)
        found = chkpt.load(path)
        assert values_of(found) == values_of({**state, "version": chkpt.__version__})
        assert kit.same(torch_load(path), found)
        assert kit.same(torch_load(path, mmap=True), found)
        mapped = chkpt.load(path, mmap=True)
        assert kit.same(mapped, found)
        # And what was read is written as it was.
        for again in (found, mapped):
            del again["version"]
            other = chkpt.save(again, Path(folder) / "b.pth")
            assert other.read_bytes() == path.read_bytes()


@SETTINGS
@given(state=STATES)
def test_what_torch_saves_is_read_as_torch_reads_it(state: dict[str, object], kit: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        state = {**state, "version": chkpt.__version__}
        try:
            torch.save(state, path)
            expected = torch_load(path)
        except Exception:
            return  # an int of more than 255 bytes, or what weights_only does not read
        chkpt.verify(path)
        assert kit.same(chkpt.load(path), expected)
        assert kit.same(chkpt.load(path, mmap=True), expected)


def many_tensors() -> dict[str, object]:
    base = torch.arange(60.0)
    shared = [base[:10], base[5:20].reshape(3, 5), base[30:]]
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 3, generator=torch.Generator().manual_seed(1))).sum().backward()
    optimizer.step()
    return {
        "shared": shared,
        "again": shared,
        "same": [base, base],
        "transposed": torch.arange(6).reshape(2, 3).T,
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3, dtype=torch.int8),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "half": [torch.ones(3, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)],
        "unsigned": torch.tensor([2**63], dtype=torch.uint64),
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "needs grad": torch.ones(2, requires_grad=True),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
    }


LOCATIONS: dict[str, Any] = {
    "None": None,
    "str": "cpu",
    "device": torch.device("cpu"),
    "dict": {"cpu": "cpu"},
    "dict of others": {"cuda:0": "cpu"},
    "function": lambda storage, location: storage,
    "function of None": lambda storage, location: None,
    "meta": "meta",
    "meta device": torch.device("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_map_location_is_that_of_torch(writer: str, location: str, kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    state = many_tensors()
    if location.startswith("meta"):
        state = {key: state[key] for key in ("shared", "empty", "scalar", "half", "parameter")}
    if writer == "ours":
        chkpt.save(state, path)
    else:
        torch.save({**state, "version": chkpt.__version__}, path)
    chosen = LOCATIONS[location]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse layouts that are in beta
        expected = torch_load(path, map_location=chosen)
        for mmap in (False, True):
            found = chkpt.load(path, map_location=chosen, mmap=mmap)
            if location.startswith("meta"):
                assert repr(found) == repr(expected)
            else:
                assert kit.same(found, expected)
        part = chkpt.load(path, map_location=chosen, keys=["shared", "scalar"])
    assert repr(part) == repr({key: expected[key] for key in ("shared", "scalar")})


def text_of(value: object) -> str:
    """The repr; of a set without its order, which hashes of text and the way it was filled make."""
    return repr(sorted(map(repr, value))) if isinstance(value, set) else repr(value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {torch.ones(1)},
        lambda: {1, "a", (2, None)},
        lambda: bytearray(b"abc\xff"),
        lambda: bytearray(),
        lambda: [torch.float32, torch.Size([1, 2]), torch.device("cpu"), torch.device("cuda", 1)],
        lambda: [set, complex, bytearray, OrderedDict, Counter],
        lambda: Counter(a=2),
        lambda: {(1, ("a", torch.Size([2]))): 1},
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.qint8),
        lambda: torch.quantize_per_channel(
            torch.ones(2, 3), torch.tensor([0.5, 0.1]), torch.tensor([0, 1]), 0, torch.quint8
        ),
    ],
)
def test_other_values_that_torch_reads(make: Callable[[], object], kit: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"x": make(), "version": chkpt.__version__}, tmp_path / "a.pth")
        expected, found = torch_load(tmp_path / "a.pth"), chkpt.load(tmp_path / "a.pth")
    assert text_of(found["x"]) == text_of(expected["x"]) and type(found["x"]) is type(expected["x"])


def test_written_tensors_are_private_when_they_are_mapped(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(100)}, tmp_path / "a.pth")
    before = path.read_bytes()
    mapped = chkpt.load(path, mmap=True)["x"]
    assert isinstance(mapped, torch.Tensor)
    mapped.fill_(1)
    assert path.read_bytes() == before
    chkpt.verify(path)


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    """Whatever the interpreter shares, and whatever the file is called."""
    one = {"a": ["key" + "s", 1000, (1, 2)], "b": "keys", "c": (1, 2), "w": torch.arange(10.0)[2:4]}
    text = "".join(["ke", "ys"])
    numbers = (1, 2)
    other = {"a": [text, int("1000"), numbers], "b": text, "c": numbers, "w": torch.tensor([2.0, 3.0])}
    files = [chkpt.save(state, tmp_path / name) for name, state in (("a.pth", one), ("other.pth", other))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (
        chkpt.save({"a": 1, "b": 2}, files[0]).read_bytes()
        != chkpt.save({"b": 2, "a": 1}, files[1]).read_bytes()
    )
