"""No bit of a file may change, and no byte be missing or too many, without `verify` and `load` saying so."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt

pytestmark = pytest.mark.long

SMALL: dict[str, object] = {"w": torch.arange(4.0), "n": {"x": [1, 2.5, "a"]}}
READERS: dict[str, Callable[[Path], object]] = {
    "load": chkpt.load,
    "mmap": lambda path: chkpt.load(path, mmap=True),
    "verify": chkpt.verify,
    "verify without digests": lambda path: chkpt.verify(path, digests=False),
}


def torch_load(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True)


def torch_save(state: dict[str, object], path: Path) -> Path:
    torch.save({**state, "version": chkpt.__version__}, path)
    return path


Writer = Callable[[dict[str, object], Path], Path]
both_writers = pytest.mark.parametrize("writer", [chkpt.save, torch_save], ids=["ours", "torch"])


@pytest.mark.parametrize("reader", READERS)
def test_every_bit_of_a_small_file(reader: str, kit: Any, tmp_path: Path) -> None:
    path = chkpt.save(SMALL, tmp_path / "a.pth")
    before, read = path.read_bytes(), READERS[reader]
    found = kit.flipped(path, range(8 * len(before)), read, read(path))
    assert found == {"CorruptError": 8 * len(before)}
    assert path.read_bytes() == before


def test_control_torch_reads_the_same_flips_and_says_nothing(kit: Any, tmp_path: Path) -> None:
    path = chkpt.save(SMALL, tmp_path / "a.pth")
    positions = range(0, 8 * path.stat().st_size, 5)
    found = kit.flipped(path, positions, torch_load, torch_load(path), lambda error: True)
    assert found["undetected"] > 10 and found["identical"] > len(positions) // 2


@pytest.mark.parametrize("reader", ["load", "verify"])
def test_every_bit_of_a_file_of_torch(reader: str, kit: Any, tmp_path: Path) -> None:
    """It has no manifest, and fields that nobody reads: an error, or the identical state."""
    path = torch_save(SMALL, tmp_path / "a.pth")
    num_bits = 8 * path.stat().st_size

    def read(path: Path) -> object:
        READERS[reader](path)
        return chkpt.load(path)

    found = kit.flipped(path, range(num_bits), read, read(path))
    assert set(found) == {"CorruptError", "NotACheckpointError", "identical"}
    assert found["NotACheckpointError"] < 8 * len("data.pkl") * 2  # the name of the record that makes it one


def test_bits_of_a_large_file(kit: Any, tmp_path: Path) -> None:
    state = {str(i): torch.randn(1 << 18, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    path = chkpt.save(state, tmp_path / "a.pth")
    positions = random.Random(4).sample(range(8 * path.stat().st_size), 100)
    assert kit.flipped(path, positions, chkpt.load, chkpt.load(path)) == {"CorruptError": 100}
    assert kit.flipped(path, positions[:20], chkpt.verify, None) == {"CorruptError": 20}


@both_writers
def test_every_truncation(writer: Writer, tmp_path: Path) -> None:
    path = writer({"w": torch.arange(4.0)}, tmp_path / "a.pth")
    for length in reversed(range(path.stat().st_size)):
        with path.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(chkpt.TruncatedError, match=f"found {length} bytes"):
            chkpt.load(path)
        with pytest.raises(chkpt.TruncatedError):
            chkpt.verify(path)


JUNK = [b"\0", b"x" * 22, b"x" * 100, bytes(70_000), b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(26)]


@both_writers
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: f"{len(junk)}")
def test_bytes_before_behind_and_between(junk: bytes, writer: Writer, tmp_path: Path) -> None:
    path = writer(SMALL, tmp_path / "a.pth")
    raw = path.read_bytes()
    middle = raw.index(b"PK\x03\x04", 1)  # the second record
    for changed in (raw + junk, junk + raw, raw[:middle] + junk + raw[middle:]):
        path.write_bytes(changed)
        for read in (chkpt.verify, chkpt.load, lambda path: chkpt.load(path, verify=False)):
            with pytest.raises(chkpt.CheckpointError):
                read(path)


def test_control_torch_loads_with_bytes_behind(tmp_path: Path) -> None:
    path = chkpt.save(SMALL, tmp_path / "a.pth")
    path.write_bytes(path.read_bytes() + b"x" * 100)
    torch_load(path)


@both_writers
def test_two_archives_in_one_file(writer: Writer, tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        writer({"w": torch.full((100,), value)}, tmp_path / name)
    first, second = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    path = tmp_path / "c.pth"
    for both in (first + second, second + first, first + first):
        path.write_bytes(both)
        for read in (chkpt.verify, chkpt.load):
            with pytest.raises(chkpt.CorruptError):
                read(path)


@both_writers
def test_zeroed_swapped_and_repeated_pages(writer: Writer, tmp_path: Path) -> None:
    path = writer({"x": torch.arange(1, 8193, dtype=torch.float32)}, tmp_path / "a.pth")
    raw = path.read_bytes()
    pages = [raw[start : start + 4096] for start in range(0, len(raw), 4096)]
    for i in range(len(pages)):
        damages = [[*pages[:i], bytes(len(pages[i])), *pages[i + 1 :]]]
        if i:
            damages += [
                [pages[i], *pages[1:i], pages[0], *pages[i + 1 :]],
                [*pages[:i], pages[i - 1], *pages[i + 1 :]],
            ]
        for damage in damages:
            path.write_bytes(b"".join(damage))
            for read in (chkpt.verify, chkpt.load):
                with pytest.raises(chkpt.CheckpointError):
                    read(path)


@pytest.mark.parametrize("content", [b"", b"P", b"PK\x03\x04"])
def test_the_beginning_of_a_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(chkpt.TruncatedError, match=f"found {len(content)} bytes"):
        chkpt.load(tmp_path / "a.pth")


def test_verify_can_be_switched_off_by_name(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(1000)}, tmp_path / "a.pth")
    raw = bytearray(path.read_bytes())
    raw[raw.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(raw)
    for mmap in (False, True):
        with pytest.raises(chkpt.CorruptError, match=r"CRC-32 .* in the record 'data/0'"):
            chkpt.load(path, mmap=mmap)
        changed = chkpt.load(path, verify=False, mmap=mmap)["x"]
        assert isinstance(changed, torch.Tensor) and changed.count_nonzero() == 1
    torch_load(path)


def test_only_what_is_asked_for_is_verified(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(1000), "y": torch.ones(3)}, tmp_path / "a.pth")
    raw = bytearray(path.read_bytes())
    raw[raw.index(bytes(4000)) + 2000] ^= 1
    path.write_bytes(raw)
    found = chkpt.load(path, keys=["y", "version"])
    assert list(found) == ["y", "version"]
    with pytest.raises(chkpt.CorruptError):
        chkpt.load(path, keys=["x"])


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = chkpt.save({"x": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    preadv = os.preadv

    def cut(descriptor: int, memory: list[memoryview], position: int) -> int:
        if position > 4096:
            os.truncate(path, 1 << 16)
        return preadv(descriptor, memory, position)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(chkpt.CorruptError, match="cuts short"):
        chkpt.load(path)
