"""Tensors come back bit for bit, tied as they were, without the bytes nobody refers to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helios import chkpt

# Quantised dtypes make no tensor without a scale; that such tensors are refused is tested below.
DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith("torch.q")},
    key=str,
)
MIB = 1 << 20
Views = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def stored_bytes(tensor: torch.Tensor) -> list[int]:
    return list(tensor.untyped_storage())


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def round_trip(state: dict[str, object], folder: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    loaded = chkpt.load(chkpt.save(state, folder / "a.pth"), mmap=mmap)
    chkpt.verify(folder / "a.pth")
    del loaded["version"]
    return loaded  # type: ignore[return-value]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_for_bit(dtype: torch.dtype, mmap: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some dtypes are deprecated or experimental
        storage = torch.arange(128, 192, dtype=torch.uint8).untyped_storage()
        x = torch.empty(0, dtype=dtype).set_(storage, 1, (2, 1), (1, 1))
        state = {"x": x, "empty": torch.empty(0, 3, dtype=dtype), "d0": x[0, 0]}
    try:
        loaded = round_trip(state, tmp_path, mmap=mmap)
    except TypeError as error:
        assert "cannot be stored; view it as torch.uint8" in str(error)
        return
    assert [loaded[k].dtype for k in loaded] == [dtype] * 3
    assert [tuple(loaded[k].shape) for k in loaded] == [(2, 1), (0, 3), ()]
    width = x.itemsize
    assert stored_bytes(loaded["x"]) == list(range(128 + width, 128 + 3 * width))
    assert same_memory(loaded["x"], loaded["d0"])


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex128", "uint64", "bool"]
)
def test_dtypes_that_have_to_work(dtype: str, tmp_path: Path) -> None:
    x = torch.tensor([0, 1, 1]).to(getattr(torch, dtype))
    assert torch.equal(round_trip({"x": x}, tmp_path)["x"].view(torch.uint8), x.view(torch.uint8))


def test_nan_payloads_and_signs(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1], dtype=torch.int32)
    assert torch.equal(round_trip({"x": bits.view(torch.float32)}, tmp_path)["x"].view(torch.int32), bits)


def test_lazy_conjugates_and_negatives_are_resolved(tmp_path: Path) -> None:
    x = torch.tensor([1 + 2j, 3 - 4j])
    loaded = round_trip({"conj": x.conj(), "neg": x.conj().imag, "both": x.conj()[1:].conj()}, tmp_path)
    assert torch.equal(loaded["conj"], x.conj().resolve_conj()) and not loaded["conj"].is_conj()
    assert torch.equal(loaded["neg"], torch.tensor([-2.0, 4.0])) and not loaded["neg"].is_neg()
    assert torch.equal(loaded["both"], x[1:])


def test_stored_plain_detached_and_without_extras(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.note = "x"  # type: ignore[attr-defined]
    weight.register_hook(lambda grad: grad)
    buffer = torch.nn.Buffer(torch.ones(2))
    loaded = round_trip({"weight": weight, "buffer": buffer, "result": weight * 2}, tmp_path)
    for tensor in loaded.values():
        assert type(tensor) is torch.Tensor
        assert not tensor.requires_grad and not vars(tensor)
    assert weight.requires_grad and vars(weight)["note"] == "x"


@pytest.mark.parametrize(
    "scope", [torch.inference_mode, torch.enable_grad, torch.no_grad, lambda: torch.device("meta")]
)
def test_saving_in_any_scope(scope: type[torch.no_grad], tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    big = torch.arange(100.0)
    with scope():
        path = chkpt.save({"w": weight, "v": big[3:5], "c": torch.ones(2, device="cpu")}, tmp_path / "a.pth")
    loaded = chkpt.load(path)
    assert torch.equal(loaded["w"], torch.ones(4)) and torch.equal(loaded["v"], big[3:5])  # type: ignore[arg-type]


def test_strides_of_dense_tensors_are_kept(tmp_path: Path) -> None:
    state = {
        "t": torch.arange(6.0).reshape(2, 3).T,
        "cl": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).expand(4, 3),
        "part": torch.arange(60.0).reshape(6, 10).T[:, 2:4],
    }
    loaded = round_trip(dict(state), tmp_path)
    for key, tensor in state.items():
        assert torch.equal(loaded[key], tensor), key
        if key != "part":
            assert loaded[key].stride() == tensor.stride(), key
    assert loaded["expanded"].untyped_storage().nbytes() == 12


@pytest.mark.parametrize(
    "views",
    [
        lambda x: {"slice": x[10:20], "far": x[-3:], "none": x[:0]},
        lambda x: {"strided": x[::100_000]},
        lambda x: {"column": x.reshape(1024, 1024)[:, 7][:5], "tied": x.reshape(1024, 1024)[:5, 7]},
    ],
    ids=["disjoint", "strided", "column"],
)
def test_small_views_do_not_store_their_buffer(views: Views, tmp_path: Path) -> None:
    state = views(torch.arange(MIB, dtype=torch.float32))
    path = chkpt.save(state, tmp_path / "a.pth")
    loaded = chkpt.load(path)
    assert path.stat().st_size < 4096
    for key, tensor in state.items():
        assert torch.equal(loaded[key], tensor), key  # type: ignore[arg-type]


def test_overlapping_views_stay_tied_and_others_come_apart(tmp_path: Path) -> None:
    giant = torch.arange(MIB, dtype=torch.float32)
    state = {"a": giant[4:10], "b": giant[8:12], "far": giant[-8:], "far2": giant[-8:].view(2, 4)}
    for mmap in (False, True):
        loaded = round_trip(dict(state), tmp_path, mmap=mmap)
        assert same_memory(loaded["a"], loaded["b"]) or mmap
        assert loaded["a"].untyped_storage().nbytes() == 32
        loaded["a"][4] = -1
        loaded["far"][0] = -2
        assert loaded["b"][0] == -1 and loaded["far2"][0, 0] == -2
        assert torch.equal(loaded["b"][1:], giant[9:12])


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    state = {
        "a": weight,
        "b": weight,
        "data": weight.data,
        "t": weight.detach().T,
        "flat": weight.detach().view(-1),
    }
    loaded = round_trip(dict(state), tmp_path)
    assert loaded["a"] is loaded["b"]
    assert all(same_memory(loaded["a"], other) for other in loaded.values())
    assert loaded["t"].stride() == (1, 3)


def test_one_memory_in_two_storages_stays_tied(tmp_path: Path) -> None:
    memory = bytearray(range(64))
    state = {
        "a": torch.frombuffer(memory, dtype=torch.int32, count=8),
        "b": torch.frombuffer(memory, dtype=torch.int32, offset=16),
    }
    loaded = round_trip(dict(state), tmp_path)
    assert torch.equal(loaded["a"], state["a"]) and torch.equal(loaded["b"], state["b"])
    assert same_memory(loaded["a"], loaded["b"])


def test_memory_shared_as_two_dtypes_is_refused(tmp_path: Path) -> None:
    x = torch.arange(4.0)
    with pytest.raises(ValueError, match=r"^m\.x \(torch\.float32\) and m\.y \(torch\.int32\) share memory"):
        chkpt.save({"m": {"x": x, "y": x.view(torch.int32)}}, tmp_path / "a.pth")
    flat = torch.zeros(16, dtype=torch.uint8)
    parts = {"f": flat[:8].view(torch.float32), "i": flat[8:].view(torch.int64)}
    assert round_trip(dict(parts), tmp_path)["i"].dtype == torch.int64  # side by side is fine


def test_a_storage_that_is_no_multiple_of_the_dtype(tmp_path: Path) -> None:
    x = torch.empty(0, dtype=torch.float32).set_(
        torch.arange(11, dtype=torch.uint8).untyped_storage(), 1, (1,), (1,)
    )
    assert stored_bytes(round_trip({"x": x}, tmp_path)["x"]) == [4, 5, 6, 7]


def test_freed_memory_is_refused(tmp_path: Path) -> None:
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^x: .*freed"):
        chkpt.save({"x": x}, tmp_path / "a.pth")


def test_sparse_tensors(tmp_path: Path) -> None:
    dense = torch.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed layouts are "in beta"
        state = {
            "coo": torch.sparse_coo_tensor([[1, 1], [2, 2]], torch.tensor([1.0, 2.0]), (3, 3)),
            "csr": dense.to_sparse_csr(),
            "csc": dense.to_sparse_csc(),
            "bsr": dense.to_sparse_bsr((2, 2)),
            "bsc": dense.to_sparse_bsc((2, 2)),
        }
    loaded = round_trip(dict(state), tmp_path)
    assert not loaded["coo"].is_coalesced()
    for key, tensor in state.items():
        assert loaded[key].layout == tensor.layout
        assert torch.equal(loaded[key].to_dense(), tensor.to_dense())


def unsupported() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "meta": torch.empty(2, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            "mkldnn": torch.ones(2).to_mkldnn(),
        }


@pytest.mark.parametrize("kind", ["meta", "nested", "mkldnn"])
def test_other_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"^m\[0\]: .*{kind}"):
        chkpt.save({"m": [unsupported()[kind]]}, tmp_path / "a.pth")


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
def test_quantised_tensors(dtype: torch.dtype, mmap: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still there
        values = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
        scales, zeros = torch.tensor([0.1, 0.3], dtype=torch.float64), torch.tensor([0, 1])
        state = {
            "tensor": torch.quantize_per_tensor(values, 0.125, 3, dtype),
            "column": torch.quantize_per_tensor(values, 0.125, 3, dtype)[:, 1],
            "channel": torch.quantize_per_channel(values, scales, zeros, 0, dtype),
        }
        loaded = round_trip({**state, "same": state["tensor"]}, tmp_path, mmap=mmap)
        plain = torch.load(tmp_path / "a.pth", weights_only=True)
    for key, before in state.items():
        for after in (loaded[key], plain[key]):
            assert after.dtype == before.dtype and after.qscheme() == before.qscheme()
            assert torch.equal(after.int_repr(), before.int_repr())
            assert torch.equal(after.dequantize(), before.dequantize())
    assert loaded["same"] is loaded["tensor"]


def test_crcs_are_written_though_the_process_switched_them_off(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        chkpt.verify(chkpt.save({"x": torch.ones(3)}, tmp_path / "a.pth"))
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(before)
