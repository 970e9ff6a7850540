"""Folders of checkpoints: whatever is in them, and whatever happens meanwhile, no file is lost."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt_migrator import (
    FileResult,
    Migration,
    _migrate,
    migrate_checkpoints_to_current_version,
)
from helios.chkpt_migrator._migrate import checkpoint_files, migrate_file, total_bytes

pytestmark = pytest.mark.long

LEGACY = Path(__file__).parent / "legacy"
OLD = LEGACY / "2.0.1" / "amp" / "tiny_epoch_1_iter_6.pth"
NAME = OLD.name


def contents(root: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return Path(shutil.copy(OLD, tmp_path / "root" / NAME))


def large(path: Path, mib: int = 24) -> Path:
    """An old file with real weights, as 0.3 wrote it."""
    state = torch.load(LEGACY / "0.3.0/epoch/tiny_epoch_2_iter_20.pth", weights_only=True)
    state["model"]["large"] = torch.arange(mib << 18, dtype=torch.int32)
    torch.save(state, path)
    return path


def failing(error: OSError) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


def test_good_and_bad_files_side_by_side(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(LEGACY / "1.4.1", root / "tiny")
    chkpt.save({"x": 1}, root / "r_epoch_1_iter_1.pth")
    whole = OLD.read_bytes()
    (root / "a_truncated.pth").write_bytes(whole[:-1])
    (root / "b_flipped.pth").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    torch.save({"x": 1, "version": "99.0"}, root / "c_newer.pth")
    torch.save({"weight": torch.ones(2)}, root / "d_weights.pth")
    (root / "e_empty.pth").write_bytes(b"")
    (root / "f_text.pth").write_text("hello")
    torch.save(torch.nn.Linear(2, 2), root / "g_module.pth")
    (root / "folder.pth").mkdir()
    os.mkfifo(root / "pipe.pth")
    (root / "broken_link.pth").symlink_to("nowhere")
    (root / "notes.txt").write_text("x")
    before = contents(root)
    report = migrate_checkpoints_to_current_version(root)
    results = {str(r.path.relative_to(root)): r for r in report.results}
    assert list(results) == sorted(results)
    reasons = {
        "a_truncated.pth": "TruncatedError: ",
        "b_flipped.pth": "CorruptError: ",
        "c_newer.pth": "VersionTooNewError: ",
        "d_weights.pth": "NotACheckpointError: found no 'training_state'",
        "e_empty.pth": "TruncatedError: |NotACheckpointError: ",
        "f_text.pth": "NotACheckpointError: ",
        "g_module.pth": "UnsafeError: |CorruptError: ",
    }
    for name, reason in reasons.items():
        assert results[name].outcome == "failed"
        assert results[name].reason.startswith(tuple(reason.split("|"))), results[name].reason
        assert results[name].target is results[name].backup is None
    assert {n for n, r in results.items() if r.outcome == "migrated"} == {
        n for n in results if n.startswith("tiny/")
    }
    assert results["r_epoch_1_iter_1.pth"] == FileResult(
        root / "r_epoch_1_iter_1.pth", "current", source=3, target=3
    )
    old = {name for name in before if name.startswith("tiny/") and name.endswith(".pth")}
    assert set(results) == {*reasons, "r_epoch_1_iter_1.pth", *old}
    assert not report.ok
    after = contents(root)
    assert {n: after[n] for n in before if not n.startswith("tiny/")} == {
        n: before[n] for n in before if not n.startswith("tiny/")
    }


def test_an_unsafe_value_is_named_by_its_place(old: Path) -> None:
    state = {**torch.load(LEGACY / "0.3.0/epoch/tiny_epoch_2_iter_20.pth", weights_only=True)}
    for value, place in (
        (io.BytesIO, "model.user.kind: found"),
        (frozenset({1}), "model.user.kind: found builtins.frozenset"),
    ):
        state["model"]["user"] = {"kind": value}
        torch.save(state, old)
        before = contents(old.parent)
        result = migrate_file(old)
        assert result.outcome == "failed"
        assert place in result.reason, result.reason
        assert contents(old.parent) == before


def test_a_reserved_plug_in_is_noted(old: Path) -> None:
    state = torch.load(LEGACY / "0.3.0/epoch/tiny_epoch_2_iter_20.pth", weights_only=True)
    torch.save({**state, "data": {"count": 3}}, old)
    (note,) = migrate_file(old).notes
    assert "plug-in 'data' is under 'data_plugin' now" in note
    assert chkpt.load(old)["data_plugin"] == {"count": 3}


def test_tensors_from_other_devices_come_to_the_cpu(old: Path) -> None:
    state = torch.load(LEGACY / "0.3.0/epoch/tiny_epoch_2_iter_20.pth", weights_only=True)
    torch.save(state, old)
    data = old.read_bytes()
    # As if the storages were on a GPU: the text is as long, so only sums have to be made anew.
    cuda = data.replace(b"X\x03\x00\x00\x00cpuq", b"X\x03\x00\x00\x00mpsq")
    assert cuda != data
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        crcs = [(i.CRC, source.read(i)) for i in source.infolist() if i.filename.endswith("data.pkl")]
    crc, pickle = crcs[0]
    new = zipfile.crc32(pickle.replace(b"cpuq", b"mpsq"))
    cuda = cuda.replace(crc.to_bytes(4, "little"), new.to_bytes(4, "little"))
    old.write_bytes(cuda)
    assert migrate_file(old).outcome == "migrated"
    torch.load(old, weights_only=True)
    assert b"mps" not in old.read_bytes()


# Backups


def test_without_backup(old: Path) -> None:
    result = migrate_file(old, backup=False)
    assert (result.outcome, result.backup) == ("migrated", None)
    assert [p.name for p in old.parent.iterdir()] == [NAME]


def test_another_backup_is_never_overwritten(old: Path) -> None:
    (old.parent / f"{NAME}.bak").write_text("mine")
    (old.parent / f"{NAME}.bak.2").symlink_to("nowhere")
    result = migrate_file(old)
    assert result.backup == old.with_name(f"{NAME}.bak.3")
    assert result.backup.read_bytes() == OLD.read_bytes()
    assert (old.parent / f"{NAME}.bak").read_text() == "mine"
    assert (old.parent / f"{NAME}.bak.2").is_symlink()


def test_the_backup_of_a_killed_migration_is_used(old: Path) -> None:
    os.link(old, old.with_name(f"{NAME}.bak"))
    assert migrate_file(old).backup == old.with_name(f"{NAME}.bak")
    assert len(list(old.parent.iterdir())) == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_there_are_no_hard_links_it_is_copied(
    old: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    old.chmod(0o640)
    times = old.stat()
    monkeypatch.setattr(os, "link", failing(OSError(code, os.strerror(code))))
    (old.parent / f"{NAME}.bak").write_text("mine")
    result = migrate_file(old)
    assert result.outcome == "migrated"
    assert result.backup == old.with_name(f"{NAME}.bak.2")
    assert result.backup.read_bytes() == OLD.read_bytes()
    status = result.backup.stat()
    assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, times.st_mtime_ns)


def test_a_backup_that_cannot_be_made_leaves_the_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(old.parent)
    monkeypatch.setattr(os, "link", failing(OSError(errno.EIO, "broken")))
    result = migrate_file(old)
    assert (result.outcome, result.reason[:13]) == ("failed", "OSError: [Err")
    assert contents(old.parent) == before


def test_backups_are_not_checkpoints(old: Path) -> None:
    migrate_file(old)
    assert checkpoint_files(old.parent) == [old]
    assert chkpt.find_last_checkpoint(old.parent) == old


# Files and folders


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_mode_and_time_stay(old: Path, mode: int) -> None:
    old.chmod(mode)
    os.utime(old, ns=(5, 1_600_000_000_123_456_789))
    migrate_file(old)
    assert old.stat().st_mode & 0o777 == mode
    assert old.stat().st_mtime_ns == 1_600_000_000_123_456_789


def test_a_link_stays_a_link(tmp_path: Path, old: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    link = other / "link_epoch_1_iter_1.pth"
    link.symlink_to(old)
    result = migrate_file(link)
    assert result.outcome == "migrated"
    assert link.is_symlink()
    assert chkpt.load(link)["version"] == chkpt.__version__
    assert result.backup == old.with_name(f"{NAME}.bak")
    assert [p.name for p in other.iterdir()] == [link.name]


def test_a_link_and_its_file_in_one_folder(old: Path) -> None:
    (old.parent / "a_link.pth").symlink_to(old.name)
    assert migrate_checkpoints_to_current_version(old.parent).counts()["migrated"] == 1
    assert migrate_checkpoints_to_current_version(old.parent).counts()["current"] == 2


def test_a_dry_run_writes_nothing_and_needs_no_leave_to(old: Path) -> None:
    flipped = bytearray(OLD.read_bytes())
    flipped[6000] ^= 1
    (old.parent / "z.pth").write_bytes(flipped)
    temp = old.parent / f".{NAME}.0123456789abcdef.tmp"
    temp.write_text("left by a killed writer")
    before = contents(old.parent)
    for path in (old, old.parent):
        path.chmod(0o555)
    try:
        report = migrate_checkpoints_to_current_version(old.parent, dry_run=True)
    finally:
        old.parent.chmod(0o755)
    assert contents(old.parent) == before
    good, bad = report.results
    assert (good.outcome, good.source, good.target, good.backup) == ("would migrate", 2, 3, None)
    assert (bad.outcome, bad.reason[:13]) == ("failed", "CorruptError:")  # every record was looked at


def test_what_killed_migrations_left_is_swept(old: Path) -> None:
    temp = old.parent / f".{NAME}.0123456789abcdef.tmp"
    other = old.parent / ".of_somebody_else.0123456789abcdef.tmp"
    for path in (temp, other):
        path.write_text("x")
    migrate_checkpoints_to_current_version(old.parent)
    assert not temp.exists()
    assert other.exists()


def test_progress_adds_up(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(LEGACY / "1.4.1", root)
    (root / "bad.pth").write_text("x" * 100)
    chkpt.save({"x": 1}, root / "current.pth")
    large(root / "large.pth", 9)
    total = total_bytes(checkpoint_files(root))
    for dry_run in (True, False):
        steps: list[int] = []
        migrate_checkpoints_to_current_version(root, dry_run=dry_run, progress=steps.append)
        assert sum(steps) == total
        assert min(steps) > 0
        assert dry_run or len(steps) > 7  # several for the large file


def test_roots_that_are_no_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        migrate_checkpoints_to_current_version(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        migrate_checkpoints_to_current_version(tmp_path / "file")
    with pytest.raises(TypeError, match="root"):
        migrate_checkpoints_to_current_version(3)  # type: ignore[arg-type]


# Faults


def test_a_step_that_fails_leaves_the_file(old: Path) -> None:
    def fail(state: dict[object, object]) -> dict[object, object]:
        raise ValueError("cannot")

    before = contents(old.parent)
    result = migrate_file(old, (Migration(2, 3, fail),))
    assert (result.outcome, result.reason) == ("failed", "ValueError: cannot")
    assert contents(old.parent) == before


def test_a_schema_without_a_way_is_refused(old: Path) -> None:
    result = migrate_file(old, ())
    assert "found schema 2; expected one that this release can migrate to 3" in result.reason


def test_a_tensor_that_was_damaged_meanwhile_is_not_believed(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips between disk and memory while a record is copied: the old file's CRC tells."""
    chunks = _migrate._Region.chunks

    def flipping(self: Any, chunk_bytes: int) -> Any:
        for piece in chunks(self, chunk_bytes):
            piece[0] ^= 1
            yield piece

    before = contents(old.parent)
    monkeypatch.setattr(_migrate._Region, "chunks", flipping)
    result = migrate_file(old)
    assert (result.outcome, result.reason[:13]) == ("failed", "CorruptError:")
    assert contents(old.parent) == before


def test_a_new_file_that_is_damaged_on_the_disk_does_not_take_the_place(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _migrate._verify

    def damaged(new: Any, path: Path, olds: Any) -> None:
        byte = os.pread(new.fileno(), 1, 4000)
        os.pwrite(new.fileno(), bytes([byte[0] ^ 1]), 4000)
        real(new, path, olds)

    before = contents(old.parent)
    monkeypatch.setattr(_migrate, "_verify", damaged)
    result = migrate_file(old)
    assert (result.outcome, result.reason[:13]) == ("failed", "CorruptError:")
    assert contents(old.parent) == before


@pytest.mark.parametrize("change", ["replaced", "touched", "deleted"])
def test_a_file_that_somebody_changes_meanwhile_is_theirs(
    old: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    real = _migrate._verify

    def changing(new: Any, path: Path, olds: Any) -> None:
        real(new, path, olds)
        if change == "replaced":
            chkpt.save({"x": 1}, old)
        elif change == "touched":
            os.utime(old, ns=(1, 1))
        else:
            old.unlink()

    monkeypatch.setattr(_migrate, "_verify", changing)
    result = migrate_file(old)
    if change == "replaced":  # by a file that is current: another migration was faster
        assert result.outcome == "current"
    else:
        assert result.outcome == "failed"
        assert "changed or replaced by somebody else" in result.reason
    assert [p.name for p in old.parent.iterdir()] == ([] if change == "deleted" else [NAME])
    if change == "replaced":
        assert chkpt.load(old)["x"] == 1


@pytest.mark.parametrize("name", ["pwrite", "fsync", "fchmod", "utime"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_errors_of_the_disk_leave_the_old_file(
    old: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    before = contents(old.parent)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(OSError(code, os.strerror(code))))
        result = migrate_file(old)
    assert result.outcome == "failed"
    assert os.strerror(code) in result.reason
    assert contents(old.parent) == before
    assert migrate_file(old).outcome == "migrated"


def test_the_order_of_what_reaches_the_disk(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New file, then its name as a backup of the old one, then the folder, then the new name, then the folder."""
    events: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)

        def noting(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            is_folder = name == "fsync" and Path(f"/dev/fd/{args[0]}").is_dir()
            events.append(f"{name} folder" if is_folder else name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, noting)
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("replace"), replace(self, to))[1])
    migrate_file(old)
    assert events == ["fsync", "fsync", "link", "fsync folder", "replace", "fsync folder"]


DRIVER = """
import os, sys
from pathlib import Path
from helios.chkpt_migrator import migrate_checkpoints_to_current_version
print("ready", flush=True)
migrate_checkpoints_to_current_version(Path(sys.argv[1]))
"""


def test_killed_at_any_instant_there_is_the_old_file_or_the_new(tmp_path: Path) -> None:
    """And the next migration ends it, sweeps what is left, and never makes a second backup."""
    moments, seen = random.Random(5), set()
    source = large(tmp_path / "large.pth", 16)
    whole = source.read_bytes()
    for number in range(25):
        root = tmp_path / str(number)
        root.mkdir()
        path = Path(shutil.copy(source, root / "r_epoch_1_iter_1.pth"))
        process = subprocess.Popen([sys.executable, "-c", DRIVER, str(root)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        is_old = path.read_bytes() == whole
        if not is_old:
            chkpt.verify(path)
            assert path.with_name(f"{path.name}.bak").read_bytes() == whole
        seen.add((is_old, len(list(root.iterdir()))))
        assert migrate_checkpoints_to_current_version(root).ok
        assert sorted(p.name for p in root.iterdir()) == [path.name, f"{path.name}.bak"]
        assert path.with_name(f"{path.name}.bak").read_bytes() == whole
        chkpt.verify(path)
        shutil.rmtree(root)
    assert len(seen) > 1  # or nothing was hit


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    code = """
import re, sys
from pathlib import Path
from helios.chkpt_migrator import migrate_checkpoints_to_current_version
report = migrate_checkpoints_to_current_version(Path(sys.argv[1]))
assert report.ok and report.counts()["migrated"] == 1, report
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
"""
    peaks = []
    for mib in (1, 300):
        root = tmp_path / str(mib)
        root.mkdir()
        large(root / "a.pth", mib)
        done = subprocess.run([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks
    assert peaks[1] < 200, peaks


def test_a_hostile_file_of_this_release_is_not_current(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    torch.save({"version": "3.0.0", "training_state": {}, "model": Evil(), "rng": {}}, tmp_path / "a.pth")
    (result,) = migrate_checkpoints_to_current_version(tmp_path).results
    assert result.outcome == "failed" and "posix.system" in result.reason
