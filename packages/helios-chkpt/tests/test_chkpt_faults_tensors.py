"""Tensors that a file describes and that its bytes do not hold are an error, and no memory is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helios import chkpt


def refused(path: Path, kind: type[Exception] = chkpt.CorruptError, match: str | None = None) -> None:
    for read in (chkpt.load, chkpt.verify, lambda path: chkpt.load(path, verify=False)):
        with pytest.raises(kind, match=match):
            read(path)


TENSORS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "too long": ((5,), (1,), 0),
    "too far": ((4,), (1,), 1),
    "too wide": ((2,), (4,), 0),
    "negative size": ((-1,), (1,), 0),
    "negative stride": ((4,), (-1,), 3),
    "negative offset": ((1,), (1,), -1),
    "other ranks": ((4,), (1, 1), 0),
    "2**80": ((2**80,), (1,), 0),
    "2**80 in strides": ((2,), (2**80,), 0),
    "2**80 in two dimensions": ((2**40, 2**40), (0, 0), 0),
    "2**62 steps": ((2**31, 2**31), (2**31, 2**31), 0),
    "the end overflows": ((3,), (2**62,), 2**62),
    "elements without end": ((2**62, 4), (0, 0), 0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_reach_beyond_their_bytes(name: str, kit: Any, tmp_path: Path) -> None:
    shape, stride, offset = TENSORS[name]
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(kit.tensor(shape, stride, offset)), bytes(16)))
    of = kit.storage(b"QInt8Storage", 4)
    quantised = (
        b"ctorch._utils\n_rebuild_qtensor\n(" + of + kit.number(offset) + kit.numbers(*shape) + kit.numbers(*stride)
        + b"ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\x00\x87\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(quantised), bytes(4)))


@pytest.mark.parametrize("count", [0, 3, 5, 2**31, 2**62, 2**70, -1])
def test_storages_of_another_size_than_they_say(count: int, kit: Any, tmp_path: Path) -> None:
    of = kit.storage(count=count)
    refused(kit.archive(tmp_path / "a.pth", kit.pickled(kit.tensor((4,), (1,), of=of)), bytes(16)))


@pytest.mark.parametrize(
    "value", ["gradients of ints", "a sparse tensor", "a state for a size", "items for a size", "a device"]
)
def test_what_torch_itself_refuses_is_a_fault_of_the_file(value: str, kit: Any, tmp_path: Path) -> None:
    coo = b"ctorch.serialization\n_get_layout\nX\x10\x00\x00\x00torch.sparse_coo\x85R"
    indices = kit.tensor((1, 1), (1, 1), of=kit.storage(b"LongStorage", 2))
    opcodes = {
        "gradients of ints": kit.tensor((2,), (1,), of=kit.storage(b"LongStorage", 2), grad=b"\x88"),
        "a sparse tensor": b"ctorch._utils\n_rebuild_sparse_tensor\n" + coo + b"(" + indices + indices
        + b"ctorch\nSize\n(K\x00K\x00K\x00t\x85R\x89t\x86R",
        "a state for a size": b"ctorch\nSize\n(K\x01t\x85R}b",
        "items for a size": b"ctorch\nSize\n(K\x01t\x85RK\x01a",
        "a device": b"ctorch\ndevice\nX\x03\x00\x00\x00abc\x85R",
    }[value]  # fmt: skip
    path = kit.archive(tmp_path / "a.pth", kit.pickled(opcodes), b"\x09" + bytes(15))
    with pytest.raises(chkpt.CorruptError):
        chkpt.load(path)
