"""A damaged, hostile or foreign file ends in the right error; nothing of it is believed or run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helios import chkpt
from helios.chkpt._peek import peek

NEWER = f"{int(chkpt.__version__.split('.')[0]) + 1}.2.3"


def equal(a: object, b: object) -> bool:
    """The same types, values, keys in the same order, and tensors of the same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a) and vars_of(a) == vars_of(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def vars_of(value: object) -> object:
    return vars(value) if isinstance(value, OrderedDict) else None


def data_ranges(path: Path) -> list[range]:
    """Where the entries' data is in a file."""
    raw = path.read_bytes()
    found = []
    for entry in zipfile.ZipFile(path).infolist():
        sizes = raw[entry.header_offset + 26 : entry.header_offset + 30]
        start = (
            entry.header_offset
            + 30
            + int.from_bytes(sizes[:2], "little")
            + int.from_bytes(sizes[2:], "little")
        )
        found.append(range(start, start + entry.file_size))
    return found


def test_every_single_bit_flip_of_a_small_file(tmp_path: Path) -> None:
    path = chkpt.save({"w": torch.arange(4.0), "n": {"x": [1, 2.5, "a"]}}, tmp_path / "a.pth")
    expected = chkpt.load(path)
    raw = path.read_bytes()
    data = {position for positions in data_ranges(path) for position in positions}
    outcomes: Counter[str] = Counter()
    with path.open("r+b", buffering=0) as file:
        for position in range(len(raw)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([raw[position] ^ (1 << bit)]), position)
                try:
                    found = chkpt.load(path)
                except chkpt.CheckpointError as error:
                    outcomes[type(error).__name__] += 1
                else:
                    assert equal(found, expected), (position, bit)
                    assert position not in data, (position, bit)  # every bit of the data is covered by a CRC
                    outcomes["identical"] += 1
            os.pwrite(file.fileno(), raw[position : position + 1], position)
    assert outcomes.total() == 8 * len(raw)
    # What goes unnoticed is in fields that nothing reads: padding, times and versions of the zip.
    assert outcomes["identical"] < outcomes.total() // 2


def test_every_truncation(tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(chkpt.TruncatedError, match=str(length)):
            chkpt.load(path)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 22, b"x" * 100, b"\0" * 70_000, b"PK\x05\x06" + bytes(18)])
def test_appended_and_prepended_bytes(extra: bytes, tmp_path: Path, state: dict[str, object]) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    raw = path.read_bytes()
    path.write_bytes(raw + extra)
    with pytest.raises(chkpt.CheckpointError):
        chkpt.load(path, verify=False)
    path.write_bytes(extra + raw)
    with pytest.raises(chkpt.CheckpointError):
        chkpt.load(path, verify=False)


def test_two_archives_in_one_file(tmp_path: Path) -> None:
    first = chkpt.save({"x": 1}, tmp_path / "a.pth").read_bytes()
    second = chkpt.save({"x": 2}, tmp_path / "b.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(first + second)
    with pytest.raises(chkpt.CorruptError):
        chkpt.load(tmp_path / "c.pth")


def test_zeroed_pages(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.full((8192,), 1.5)}, tmp_path / "a.pth")
    raw = path.read_bytes()
    for start in range(0, len(raw), 4096):
        page = raw[start : start + 4096]
        path.write_bytes(raw[:start] + bytes(len(page)) + raw[start + len(page) :])
        with pytest.raises(chkpt.CheckpointError):
            chkpt.verify(path)


def test_verify_can_be_switched_off_by_name(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(1000)}, tmp_path / "a.pth")
    raw = bytearray(path.read_bytes())
    raw[max(data_ranges(path), key=len)[400]] ^= 1
    path.write_bytes(raw)
    with pytest.raises(chkpt.CorruptError, match=r"CRC in the entry 'archive/data/0'"):
        chkpt.load(path)
    changed = chkpt.load(path, verify=False)["x"]
    assert isinstance(changed, torch.Tensor) and changed.count_nonzero() == 1


def rezip(
    source: Path, target: Path, change: Callable[[list[tuple[str, bytes]]], None], method: int = 0
) -> Path:
    with zipfile.ZipFile(source) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    change(entries)
    with zipfile.ZipFile(target, "w", compression=method) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = 0, method
            archive.writestr(info, data)
            info.external_attr = 0
    return target


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda entries: entries.append(entries[0]), chkpt.CorruptError),
        (lambda entries: entries.append(("other/x", b"x")), chkpt.CorruptError),
        (lambda entries: entries.append(("archive/constants.pkl", b"x")), chkpt.NotACheckpointError),
        (lambda entries: entries.pop(0), chkpt.NotACheckpointError),
        (lambda entries: entries.clear(), chkpt.CheckpointError),
        (lambda entries: entries.remove(next(e for e in entries if "data/0" in e[0])), chkpt.CorruptError),
        (lambda entries: entries.insert(0, ("archive/data.pkl", b"")) or entries.pop(1), chkpt.CorruptError),
    ],
)
def test_archives_with_other_entries(
    change: Callable[[list[tuple[str, bytes]]], None],
    kind: type[Exception],
    tmp_path: Path,
    state: dict[str, object],
) -> None:
    path = chkpt.save(state, tmp_path / "a.pth")
    chkpt.load(rezip(path, tmp_path / "same.pth", lambda entries: None))
    with pytest.raises(kind):
        chkpt.load(rezip(path, tmp_path / "b.pth", change))


def test_compressed_archives_are_refused_before_they_expand(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    bomb = rezip(path, tmp_path / "b.pth", lambda entries: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(chkpt.CorruptError, match="compression"):
        chkpt.load(bomb, verify=False)


@pytest.mark.parametrize("content", [b"hello, world", b"\x80\x02}q\x00.", b"GIF89a" + bytes(100), b"PX"])
def test_other_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(chkpt.NotACheckpointError, match="first bytes"):
        chkpt.load(tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == content


@pytest.mark.parametrize("content", [[1], torch.ones(2), 3, OrderedDict(a=1)])
def test_archives_that_hold_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(chkpt.NotACheckpointError, match="found a"):
        chkpt.load(tmp_path / "a.pth")


def test_what_is_no_file(tmp_path: Path) -> None:
    for read in (chkpt.load, chkpt.verify):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "no.pth")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)
    os.mkfifo(tmp_path / "fifo.pth")
    with pytest.raises(chkpt.NotACheckpointError, match="no regular file"):
        chkpt.load(tmp_path / "fifo.pth")


class Attack:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("version", [None, "1.0.0", chkpt.__version__, NEWER])
def test_a_hostile_pickle_runs_nothing(version: str | None, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for call in (Attack(os.system, f"touch {mark}"), Attack(eval, f"open({str(mark)!r}, 'w')")):
        state = {"x": call} if version is None else {"x": call, "version": version}
        torch.save(state, tmp_path / "a.pth")
        for read in (chkpt.load, chkpt.verify):
            with pytest.raises(chkpt.UnsafeError, match=r"posix\.system|eval"):
                read(tmp_path / "a.pth")
        assert not mark.exists()


def test_newer_protocols_are_refused_without_a_crash(tmp_path: Path) -> None:
    torch.save({"x": 2**4000, "version": chkpt.__version__}, tmp_path / "a.pth")
    with pytest.raises(chkpt.UnsafeError, match="Unsupported operand"):
        chkpt.load(tmp_path / "a.pth")


class Mine:
    def __init__(self) -> None:
        self.x = 1


def test_types_may_be_allowed_for_one_call(tmp_path: Path) -> None:
    torch.save({"x": Mine(), "version": chkpt.__version__}, tmp_path / "a.pth")
    with pytest.raises(chkpt.UnsafeError, match="Mine"):
        chkpt.load(tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())  # torch has some of its own
    found = chkpt.load(tmp_path / "a.pth", safe_types=[Mine])["x"]
    assert isinstance(found, Mine) and found.x == 1
    assert set(torch.serialization.get_safe_globals()) == before
    with torch.serialization.safe_globals([Mine]):
        chkpt.load(tmp_path / "a.pth", safe_types=[Mine])
        assert set(torch.serialization.get_safe_globals()) == {
            *before,
            Mine,
        }  # still the caller's
    with pytest.raises(chkpt.UnsafeError):
        chkpt.load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("version", "kind", "message"),
    [
        ("3.99.0", None, ""),
        ("3.0.0rc1", None, ""),
        ("3.1.0.dev1+local", None, ""),
        ("2.0.1", chkpt.VersionTooOldError, "python -m helios.chkpt_migrator"),
        ("0.3", chkpt.VersionTooOldError, "python -m helios.chkpt_migrator"),
        (NEWER, chkpt.VersionTooNewError, f"helios-chkpt>={NEWER}"),
        ("10.0", chkpt.VersionTooNewError, r"helios-chkpt>=10\.0"),
        ("1!1.0", chkpt.VersionTooOldError, "migrator"),
        ("three", chkpt.NotACheckpointError, "'three'"),
        (3, chkpt.NotACheckpointError, "int"),
        (None, chkpt.NotACheckpointError, "NoneType"),
    ],
)
def test_versions(version: object, kind: type[Exception] | None, message: str, tmp_path: Path) -> None:
    torch.save({"x": 1, "unknown": 2, "version": version}, tmp_path / "a.pth")
    chkpt.verify(tmp_path / "a.pth")
    if kind is None:
        assert chkpt.load(tmp_path / "a.pth") == {"x": 1, "unknown": 2, "version": version}
    else:
        with pytest.raises(kind, match=message):
            chkpt.load(tmp_path / "a.pth")


def test_no_version(tmp_path: Path) -> None:
    torch.save({"x": 1}, tmp_path / "a.pth")
    with pytest.raises(chkpt.VersionTooOldError, match="no key 'version'") as caught:
        chkpt.load(tmp_path / "a.pth")
    assert caught.value.version is None


LEGACY = {"0.2.0/logging": None, "1.0.0/user_keys": "1.0.0", "1.4.1/plugin": "1.4.1", "2.0.1/amp": "2.0.1"}


@pytest.mark.parametrize("variant", LEGACY)
def test_files_of_earlier_releases_are_old_not_unsafe(variant: str, legacy: Path) -> None:
    (path,) = (legacy / variant).iterdir()
    with pytest.raises(chkpt.VersionTooOldError, match="chkpt_migrator") as caught:
        chkpt.load(path)
    assert caught.value.version == LEGACY[variant]
    chkpt.verify(path)  # whole, though not of this version


def test_errors_survive_being_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(chkpt.VersionTooOldError("text", "1.0")))
    assert (str(error), error.version) == ("text", "1.0")


@pytest.mark.parametrize("location", ["cuda:0", "nonsense"])
def test_a_device_that_is_not_there_is_no_fault_of_the_file(location: str, tmp_path: Path) -> None:
    if location == "cuda:0" and torch.cuda.is_available():
        pytest.skip("it is there")
    path = chkpt.save({"x": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(RuntimeError):
        chkpt.load(path, map_location=location)


def test_map_location_and_mmap(tmp_path: Path) -> None:
    path = chkpt.save({"x": torch.ones(2)}, tmp_path / "a.pth")
    on_meta = chkpt.load(path, map_location="meta")["x"]
    assert isinstance(on_meta, torch.Tensor) and on_meta.device.type == "meta"
    by_function = chkpt.load(path, map_location=lambda storage, _: storage, mmap=True)["x"]
    assert isinstance(by_function, torch.Tensor) and by_function.sum() == 2


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"path": 3}, TypeError),
        ({"path": io.BytesIO()}, TypeError),
        ({"path": ""}, ValueError),
        ({"mmap": 1}, TypeError),
        ({"verify": None}, TypeError),
        ({"safe_types": "Mine"}, TypeError),
        ({"safe_types": Mine}, TypeError),
        ({"safe_types": ["Mine"]}, TypeError),
    ],
)
def test_bad_arguments(arguments: dict[str, object], kind: type[Exception], tmp_path: Path) -> None:
    path = chkpt.save({}, tmp_path / "a.pth")
    with pytest.raises(kind, match=next(iter(arguments))):
        chkpt.load(**{"path": path, **arguments})  # type: ignore[arg-type]


def test_a_peek_agrees_with_the_pickle_and_never_raises() -> None:
    state = {"a": {"version": "inner"}, "l": [1, (2,), {3: 4}], "o": OrderedDict(x=1), "version": "1.2"}
    for protocol in range(1, 6):  # 0 makes its dicts by an opcode that torch never reads
        data = pickle.dumps(state, protocol)
        found = peek(data)
        assert found is not None and found.version == "1.2" and found.keys == set(state)
        for length in range(len(data)):
            assert peek(data[:length]) is None
    assert peek(pickle.dumps([1])) is not None
    assert peek(pickletools.optimize(pickle.dumps(os.system))).globals == ("posix.system",)  # type: ignore[union-attr]
