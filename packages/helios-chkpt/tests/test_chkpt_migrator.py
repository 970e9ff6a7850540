"""Files are brought to the current version by a checked chain; what cannot be is left as it was."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helios import chkpt
from helios.chkpt_migrator import MIGRATIONS, Migration, check_chain, migrate_checkpoints_to_current_version
from helios.chkpt_migrator.__main__ import main
from helios.chkpt_migrator._migrate import migrate_file


def same(state: dict[str, object]) -> dict[str, object]:
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
        (((3, 3),), "later version"),
        (((3, 2), (2, 3)), "later version"),
    ],
)
def test_bad_chains(pairs: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_chain(chain(*pairs), head=3)


def test_the_chain_of_this_release() -> None:
    check_chain(MIGRATIONS)


@pytest.fixture
def root(tmp_path: Path, legacy: Path) -> Path:
    """Current, old, broken and foreign files, in folders as earlier releases made them."""
    shutil.copytree(legacy, tmp_path / "root")
    root = tmp_path / "root"
    chkpt.save({"x": 1}, root / "r_epoch_1_iter_1.pth")
    whole = chkpt.save({"x": 1}, root / "broken.pth").read_bytes()
    (root / "broken.pth").write_bytes(whole[:-1])
    torch.save({"x": 1, "version": "99.0"}, root / "new.pth")
    (root / "notes.txt").write_text("x")
    (root / "folder.pth").mkdir()
    return root


def contents(root: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def test_what_cannot_be_migrated_is_reported_and_untouched(root: Path) -> None:
    before = contents(root)
    report = migrate_checkpoints_to_current_version(root)
    assert contents(root) == before
    results = {str(result.path.relative_to(root)): result for result in report.results}
    assert [result.path for result in report.results] == sorted(result.path for result in report.results)
    assert results["r_epoch_1_iter_1.pth"].outcome == "current"
    assert results["r_epoch_1_iter_1.pth"].reason == ""
    reasons = {
        "broken.pth": "TruncatedError: ",
        "new.pth": "VersionTooNewError: ",
        "0.2.0/logging/tiny_epoch_2_iter_6.pth": "no migration from a release that wrote no version in this",
        "1.0.0/user_keys/tiny_epoch_1_iter_6.pth": "no migration from 1.0.0 in this release (3.",
        "1.4.1/plugin/tiny_epoch_1_iter_6.pth": "no migration from 1.4.1 in this release (3.",
        "2.0.1/amp/tiny_epoch_1_iter_6.pth": "no migration from 2.0.1 in this release (3.",
    }
    assert set(results) == {*reasons, "r_epoch_1_iter_1.pth"}
    for name, reason in reasons.items():
        assert results[name].outcome == "failed"
        assert results[name].reason.startswith(reason)
    assert not report.ok
    assert report.counts() == {"current": 1, "migrated": 0, "failed": 6}


def test_steps_are_applied_from_where_the_file_is(tmp_path: Path) -> None:
    def add(key: str) -> Migration:
        source = {"one": 1, "two": 2}[key]
        return Migration(source, source + 1, lambda state: {**state, key: True})

    path = tmp_path / "a.pth"
    for version, expected in (("1.5", {"one": True, "two": True}), ("2.0", {"two": True})):
        torch.save({"x": 1, "version": version}, path)
        assert migrate_file(path, (add("one"), add("two"))).outcome == "migrated"
        assert chkpt.load(path) == {"x": 1, **expected, "version": chkpt.__version__}
    before = contents(tmp_path)
    assert migrate_file(path, (add("one"), add("two"))).outcome == "current"
    assert contents(tmp_path) == before
    torch.save({"x": 1, "version": "0.3"}, path)
    assert migrate_file(path, (add("one"), add("two"))).reason.startswith("no migration from 0.3")


def test_a_step_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"x": 1, "version": "2.0"}, path)
    before = contents(tmp_path)
    result = migrate_file(path, (Migration(2, 3, lambda state: {"x": set()}),))
    assert (result.outcome, result.reason[:13]) == ("failed", "TypeError: x:")
    assert contents(tmp_path) == before


def test_roots_that_are_no_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        migrate_checkpoints_to_current_version(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        migrate_checkpoints_to_current_version(tmp_path / "file")
    with pytest.raises(TypeError, match="root"):
        migrate_checkpoints_to_current_version(3)  # type: ignore[arg-type]


def test_the_command_prints_a_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root)]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 8
    assert lines[-1] == "7 files: 1 current, 0 migrated, 6 failed"
    assert any(line.split() == ["r_epoch_1_iter_1.pth", "current"] for line in lines)
    assert printed.err == ""  # no bar, since this is no terminal


def test_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    chkpt.save({}, tmp_path / "a.pth")
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path / "no")]) == 2
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    chkpt.save({}, tmp_path / "a.pth")
    command = [sys.executable, "-m", "helios.chkpt_migrator", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 files: 1 current, 0 migrated, 0 failed"
