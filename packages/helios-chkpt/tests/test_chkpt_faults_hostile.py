"""A hostile pickle runs nothing, whatever opcode it tries and whoever reads it; the error names what it asked for."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pathlib
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt_migrator import migrate_checkpoints_to_current_version

V = chkpt.__version__


def find(path: Path) -> object:
    found = chkpt.find_last_checkpoint(path.parent)
    if found is None:
        chkpt.verify(path)
    return found


READERS: dict[str, Callable[[Path], object]] = {
    "load": chkpt.load,
    "load unverified": lambda path: chkpt.load(path, verify=False, mmap=True),
    "verify": chkpt.verify,
    "find_last_checkpoint": find,
}


class Attack:
    """What its pickle calls."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def opcodes(mark: Path) -> dict[str, bytes]:
    """``{"x": os.system("touch mark"), "version": ...}``, by each opcode that can import or call."""
    command = f"touch {mark}"
    line = command.encode()
    ends = b"s" + text("version") + text(V) + b"s."
    start = b"}" + text("x")
    two, four = b"\x80\x02" + start, b"\x80\x04" + start
    named = text("posix") + text("system") + b"\x93"
    return {
        "GLOBAL REDUCE": two + b"cposix\nsystem\n" + text(command) + b"\x85R" + ends,
        "GLOBAL only": two + b"cposix\nsystem\n" + ends,
        "GLOBAL popped": two + b"cposix\nsystem\n0N" + ends,
        "GLOBAL NEWOBJ": two + b"cposix\nsystem\n" + text(command) + b"\x85\x81" + ends,
        "GLOBAL BUILD": two + b"cposix\nsystem\n" + text(command) + b"\x85R}b" + ends,
        "GLOBAL OBJ": two + b"(cposix\nsystem\n" + text(command) + b"o" + ends,
        "INST": two + b"(" + text(command) + b"iposix\nsystem\n" + ends,
        "INST protocol 0": b"(dS'x'\n(S'" + line + b"'\niposix\nsystem\ns.",
        "protocol 0": b"(dS'x'\ncposix\nsystem\n(S'" + line + b"'\ntRs.",
        "protocol 1": b"}U\x01xcposix\nsystem\n(U" + bytes([len(line)]) + line + b"tRs.",
        "STACK_GLOBAL REDUCE": four + named + text(command) + b"\x85R" + ends,
        "STACK_GLOBAL from the memo": b"\x80\x04" + text("posix") + b"\x94" + text("system") + b"\x9400"
        + start + text("collections") + text("OrderedDict") + b"00h\x00h\x01\x93" + text(command) + b"\x85R" + ends,
        "NEWOBJ_EX": four + named + text(command) + b"\x85}\x92" + ends,
        "two protocols": b"\x80\x02\x80\x04" + start + named + text(command) + b"\x85R" + ends,
        "short strings": b"\x80\x04}\x8c\x01x\x8c\x05posix\x8c\x06system\x93" + text(command) + b"\x85R" + ends,
        "a frame": b"\x80\x04\x95" + struct.pack("<Q", 1000) + start + named + text(command) + b"\x85R" + ends,
        "as a key": b"\x80\x02}cposix\nsystem\n" + text(command) + b"\x85RK\x01" + ends,
        "deep in a list": two + b"](](](cposix\nsystem\n" + text(command) + b"\x85Reee" + ends,
        "as a version": b"\x80\x02}" + text("version") + b"cposix\nsystem\n" + text(command) + b"\x85Rs.",
        "as the dictionary": b"\x80\x02cposix\nsystem\n" + text(command) + b"\x85R.",
        "after the end": two + b"cposix\nsystem\n" + text(command) + b"\x85R" + ends + b"cposix\nsystem\n.",
    }  # fmt: skip


NAMES = list(opcodes(Path("mark")))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_opcode_that_can_import_or_call(name: str, reader: str, kit: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    data = opcodes(mark)[name]
    path = tmp_path / "r_epoch_1_iter_1.pth"
    for make in (kit.archive, kit.torch_archive):
        before = make(path, data).read_bytes()
        with pytest.raises(chkpt.UnsafeError, match=r"posix\.system"):
            READERS[reader](path)
        assert not mark.exists() and path.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_migration_runs_nothing_either(name: str, kit: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "r_epoch_1_iter_1.pth"
    before = kit.torch_archive(path, opcodes(mark)[name]).read_bytes()
    for dry_run in (True, False):
        (result,) = migrate_checkpoints_to_current_version(tmp_path, dry_run=dry_run).results
        assert result.outcome in ("failed", "current")  # never "migrated"
    assert not mark.exists()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_control_the_same_pickles_run_when_they_are_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    ran = set()
    for name, data in opcodes(mark).items():
        with contextlib.suppress(Exception):
            pickle.loads(data)
        if mark.exists():
            ran.add(name)
            mark.unlink()
    # What only names it does not run it, and a function is no class that `NEWOBJ` could make.
    assert set(NAMES) - ran == {"GLOBAL only", "GLOBAL popped", "GLOBAL NEWOBJ", "NEWOBJ_EX", "a frame"}


CALLS: list[tuple[Callable[..., object], tuple[object, ...], str]] = [
    (os.system, ("touch mark",), "posix.system"),
    (eval, ("open('mark', 'w')",), "builtins.eval"),
    (exec, ("open('mark', 'w')",), "builtins.exec"),
    (getattr, (os, "system"), "builtins.getattr"),
    (__import__, ("os",), "builtins.__import__"),
    (open, ("mark", "w"), "open"),
    (torch.load, ("mark",), "torch.serialization.load"),
    (torch.save, (1, "mark"), "torch.serialization.save"),
    (torch.hub.load, ("a/b", "c"), "torch.hub.load"),
    (torch.from_file, ("mark", True, 10), "getattr"),
    (torch.set_num_threads, (1,), "set_num_threads"),
    (torch.ones, (2,), "getattr"),
    (torch.empty, (1 << 40,), "getattr"),
    (torch.nn.Linear, (1, 1), "torch.nn.modules.linear.Linear"),
    (pathlib.PurePosixPath, ("a",), "PurePosixPath"),
    (chkpt.save, ({}, "mark"), "helios.chkpt._write.save"),
    (copyreg._reconstructor, (Attack, object, None), "_reconstructor"),  # type: ignore[attr-defined]
]


@pytest.mark.parametrize("protocol", range(6))
def test_calls_of_anything_in_any_protocol(protocol: int, kit: Any, tmp_path: Path) -> None:
    for function, arguments, name in CALLS:
        value = Attack(
            function, *(str(tmp_path / "mark") if a == "mark" else a for a in arguments if a is not os)
        )
        data = pickle.dumps({"version": V, "x": value}, protocol)
        ours = kit.archive(tmp_path / "a.pth", data)
        for read in (chkpt.load, chkpt.verify):
            with pytest.raises(chkpt.CheckpointError) as caught:
                read(ours)
            is_old = isinstance(caught.value, chkpt.VersionTooOldError)
            assert isinstance(caught.value, chkpt.UnsafeError) or is_old, (name, caught.value)
            assert name in str(caught.value), caught.value
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_extensions(opcode: bytes, kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(opcode))
    copyreg.add_extension("posix", "system", 1)
    try:
        for read in (chkpt.load, chkpt.verify):
            with pytest.raises(chkpt.UnsafeError, match=r"extension\.1"):
                read(path)
    finally:
        copyreg.remove_extension("posix", "system", 1)


@pytest.mark.parametrize(
    "value",
    [
        b"Pos.system\n",  # PERSID
        b"N" + b"Q",  # BINPERSID of what is no storage
        text("module") + b"Q",
        b"(X\x06\x00\x00\x00modulecposix\nsystem\nK\x01K\x01K\x01tQ",
        b"(X\x07\x00\x00\x00storagecposix\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x00tQ",
        b"(X\x07\x00\x00\x00storagectorch\nload\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x00tQ",
    ],
)
def test_persistent_references(value: bytes, kit: Any, tmp_path: Path) -> None:
    path = kit.archive(tmp_path / "a.pth", kit.pickled(value), b"")
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises((chkpt.UnsafeError, chkpt.CorruptError)) as caught:
            read(path)
        if b"posix" in value:
            assert isinstance(caught.value, chkpt.UnsafeError) and "posix.system" in str(caught.value)


@pytest.mark.parametrize("version", [None, "1.0.0", V, "99.0.0", "nonsense"])
def test_no_version_makes_it_run(version: str | None, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    state: dict[str, object] = {
        "x": Attack(os.system, f"touch {mark}"),
        "training_state": 1,
        "model": 1,
        "rng": 1,
    }
    torch.save(state if version is None else {**state, "version": version}, tmp_path / "r_epoch_1_iter_1.pth")
    for read in READERS.values():
        with pytest.raises(chkpt.UnsafeError, match=r"posix\.system"):
            read(tmp_path / "r_epoch_1_iter_1.pth")
    assert not mark.exists()


def test_names_below_helios_are_read_and_not_imported(tmp_path: Path, kit: Any) -> None:
    """They are in files of earlier releases; a module of that name may be there, planted."""
    for name in (b"chelios.planted\nrun\n)R", b"chelios.chkpt\nsave\n)R", b"cpathlib\nPath\n)R"):
        path = kit.archive(tmp_path / "a.pth", kit.pickled(name))
        with pytest.raises((chkpt.UnsafeError, chkpt.VersionTooOldError)):
            chkpt.load(path)
    assert "helios.planted" not in sys.modules


def test_a_message_holds_no_command_of_the_file(kit: Any, tmp_path: Path) -> None:
    """The remedy of a newer version is a command that people copy to a shell."""
    evil = "99'; touch mark #"
    path = kit.archive(
        tmp_path / "a.pth",
        kit.pickled(),
        manifest=lambda data: data.replace(b'"schema": 3', b'"schema": 4').replace(V.encode(), evil.encode()),
    )
    with pytest.raises(chkpt.VersionTooNewError) as caught:
        chkpt.load(path)
    assert "touch" not in str(caught.value).partition("expected")[2]
    torch.save({"version": "99\x1b[2J\n0"}, path)
    with pytest.raises(chkpt.NotACheckpointError) as other:
        chkpt.load(path)
    assert str(other.value).isprintable()


class Mine:
    def __init__(self, x: object = 1) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)


class WithState(Mine):
    def __setstate__(self, state: dict[str, object]) -> None:
        self.x = ["set", state["x"]]


class Reduced(Mine):
    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return Reduced, (self.x,)


class MyDict(dict[str, object]):
    pass


class MyList(list[object]):
    pass


class Slots:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = 1


@pytest.mark.parametrize(
    "value", [Mine([1]), WithState(2), Reduced((3,)), MyDict(a=1), MyList([1, 2]), Slots()]
)
def test_types_may_be_allowed_for_one_call(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "r_epoch_1_iter_1.pth"
    torch.save({"x": [value, torch.ones(2)], "version": V}, path)
    before = set(torch.serialization.get_safe_globals())  # torch has some of its own
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(chkpt.UnsafeError, match=type(value).__name__):
            read(path)
    chkpt.verify(path, safe_types=[type(value)])
    assert chkpt.find_last_checkpoint(tmp_path) is None
    assert chkpt.find_last_checkpoint(tmp_path, safe_types=[type(value)]) == path
    (found, ones) = chkpt.load(path, safe_types=[type(value)])["x"]  # type: ignore[misc]
    expected = pickle.loads(pickle.dumps(value))
    assert type(found) is type(expected) and torch.equal(ones, torch.ones(2))
    assert found == expected or found.x == expected.x
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(chkpt.UnsafeError):
        chkpt.load(path)


def test_an_allowed_type_does_not_allow_another(tmp_path: Path) -> None:
    torch.save({"x": [Mine(), MyList()], "version": V}, tmp_path / "a.pth")
    with pytest.raises(chkpt.UnsafeError, match="MyList"):
        chkpt.load(tmp_path / "a.pth", safe_types=[Mine])
    torch.save({"x": Mine(Attack(os.system, f"touch {tmp_path / 'mark'}")), "version": V}, tmp_path / "a.pth")
    with pytest.raises(chkpt.UnsafeError, match=r"posix\.system"):
        chkpt.load(tmp_path / "a.pth", safe_types=[Mine])
    assert not (tmp_path / "mark").exists()


def test_an_old_pickle_without_a_zip_is_not_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    mark = tmp_path / "mark"
    for data in (
        pickle.dumps({"x": Attack(os.system, f"touch {mark}")}),
        pickle.dumps(Attack(os.system, f"touch {mark}"), 0),
    ):
        path.write_bytes(data)
        with pytest.raises(chkpt.NotACheckpointError):
            chkpt.load(path)
    buffer = io.BytesIO()
    torch.save({"x": 1, "version": V}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(chkpt.NotACheckpointError):
        chkpt.load(path)
    assert not mark.exists()
