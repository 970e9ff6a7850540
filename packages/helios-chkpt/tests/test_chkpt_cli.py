"""The command line, as processes: tables, JSON, exit statuses, and how it ends when nobody listens."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from helios import chkpt
from helios.chkpt._cli._output import Column, mib_text, shortened, size_text, table
from helios.chkpt_migrator import _command

# torch itself warns where NumPy is not installed.
STRICT = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy"]
PROGRAM = [*STRICT, "-m", "helios.chkpt_migrator._command"]
MIGRATOR = [*STRICT, "-m", "helios.chkpt_migrator"]
VERSION = chkpt.__version__


def call(*arguments: object, cwd: Path, program: list[str] = PROGRAM) -> subprocess.CompletedProcess[str]:
    """Run the program in a folder; it must end without a traceback."""
    command = [*program, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "TZ": "UTC"})
    assert "Traceback" not in done.stderr
    return done


def check(expected_status: int, *arguments: object, cwd: Path) -> str:
    """What the program prints when it ends as expected; errors go to stderr."""
    done = call(*arguments, cwd=cwd)
    assert done.returncode == expected_status, done.stderr
    return done.stdout


def check_json(expected_status: int, *arguments: object, cwd: Path) -> Any:
    return json.loads(check(expected_status, *arguments, "--json", cwd=cwd))


def flip(path: Path) -> None:
    """Damage a tensor: change one bit in the middle of the file's largest record."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def state(x: float = 0.0) -> dict[str, object]:
    weight = torch.full((50, 40), x)
    return {"training_state": {"n": 1}, "model": {"a.weight": weight, "head": weight}, "rng": {}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with two runs, a damaged file, one of an earlier release, and one that is something else."""
    root = tmp_path / "runs"
    with chkpt.CheckpointStore(root, "cifar") as store:
        for iteration in (5, 10, 20):
            score = 0.5 if iteration == 5 else iteration / 100
            store.save(state(), epoch=1, iteration=iteration, score=score)
    with chkpt.CheckpointStore(root, "base") as store:
        store.save(state(1.0), epoch=2, iteration=7, metadata="warm")
    flip(root / "cifar_epoch_1_iter_20.pth")
    shutil.copy(Path(__file__).parent / "legacy/2.0.1/amp/tiny_epoch_1_iter_6.pth", root)
    (root / "notes.pth").write_bytes(b"hello")
    (root / "notes.txt").write_bytes(b"hello")
    for number, path in enumerate(sorted(root.iterdir())):
        os.utime(path, (1_800_000_000 + 60 * number,) * 2)
    return tmp_path


def test_ls(runs: Path) -> None:
    version = f"{'VERSION':<{max(7, len(VERSION))}}"
    ours, old, none = (f"{text:<{len(version)}}" for text in (VERSION, "2.0.1", "-"))
    total = sum(path.stat().st_size for path in runs.glob("runs/*.pth"))
    assert check(1, "ls", "runs", cwd=runs) == (
        f"   NAME                          EPOCH  ITER  {version}    MiB  CHANGED           SCORE  STATE\n"
        f"   notes.pth                         -     -  {none}  0.000  2027-01-15 08:04      -  no checkpoint\n"
        f"*  base_epoch_2_iter_7_warm.pth      2     7  {ours}  0.010  2027-01-15 08:00      -  readable\n"
        f"   cifar_epoch_1_iter_5.pth          1     5  {ours}  0.010  2027-01-15 08:03    0.5  readable\n"
        f"   cifar_epoch_1_iter_10.pth         1    10  {ours}  0.010  2027-01-15 08:01    0.1  readable\n"
        f"*  cifar_epoch_1_iter_20.pth         1    20  {ours}  0.010  2027-01-15 08:02    0.2  readable\n"
        f"*  tiny_epoch_1_iter_6.pth           1     6  {old}  0.013  2027-01-15 08:06      -  to migrate\n"
        "\n"
        "notes.pth: NotACheckpointError: found the first bytes b'hell'; expected the zip that torch.save writes. "
        "Check the path.\n"
        "1 file to migrate: helios-chkpt migrate runs\n"
        f"6 files, {size_text(total)}. * is what a resume takes, if its data is whole: --verify reads it.\n"
    )


def test_ls_of_a_run_verified(runs: Path) -> None:
    lines = check(1, "ls", "runs", "--run", "cifar", "--verify", cwd=runs).splitlines()
    assert [(line[0], line.split()[-1]) for line in lines[1:4]] == [
        (" ", "good"),
        ("*", "good"),
        (" ", "bad"),
    ]
    assert lines[5].startswith("cifar_epoch_1_iter_20.pth: CorruptError: found the CRC-32")
    assert lines[6].endswith("* is what a resume takes.")
    taken = chkpt.find_last_checkpoint(runs / "runs", "cifar")
    assert taken is not None and taken.name in lines[2]


def test_ls_as_json(runs: Path) -> None:
    found = check_json(1, "ls", "runs", "--verify", cwd=runs)
    assert [(f["run_name"], f["iteration"], f["state"], f["resume"]) for f in found] == [
        (None, None, "no checkpoint", False),
        ("base", 7, "good", True),
        ("cifar", 5, "good", False),
        ("cifar", 10, "good", True),
        ("cifar", 20, "bad", False),
        ("tiny", 6, "to migrate", True),
    ]
    assert (found[1]["metadata"], found[1]["version"], found[1]["score"]) == ("warm", VERSION, None)
    assert found[1]["changed"] == "2027-01-15T08:00:00+00:00"
    assert found[1]["bytes"] == (runs / found[1]["path"]).stat().st_size


def test_ls_of_good_files_and_of_none(runs: Path) -> None:
    check(0, "ls", "runs", "--run", "base", cwd=runs)
    assert check(0, "ls", "runs", "--run", "nobody", cwd=runs) == "no checkpoints\n"
    assert "cifar" not in check(0, "ls", ".", cwd=runs)
    assert "runs/cifar_epoch_1_iter_5.pth" in check(1, "ls", ".", "--recursive", cwd=runs)
    assert "No such file" in call("ls", "nowhere", cwd=runs).stderr
    check(2, "ls", "nowhere", cwd=runs)
    check(2, "ls", "runs/notes.txt", cwd=runs)


def test_ls_of_earlier_and_later_releases(tmp_path: Path, legacy: Path) -> None:
    shutil.copytree(legacy, tmp_path / "old")
    found = check_json(0, "ls", "old", "--recursive", "--verify", cwd=tmp_path)
    assert {f["state"] for f in found} == {"to migrate"} and len(found) > 20
    torch.save({"version": "99.0", "x": torch.ones(3)}, tmp_path / "r_epoch_1_iter_1.pth")
    (found,) = check_json(0, "ls", ".", cwd=tmp_path)
    assert (found["state"], found["resume"]) == ("too new", True)
    assert "helios-chkpt>=99.0" in found["reason"]


def test_inspect(runs: Path) -> None:
    path = "runs/cifar_epoch_1_iter_5.pth"
    digest = chkpt.inspect(runs / path).digest
    size = (runs / path).stat().st_size
    expected = (
        f"file      {path}\n"
        "run       cifar, epoch 1, iteration 5\n"
        f"version   {VERSION}, schema 3\n"
        f"size      {size_text(size)} ({size:,} bytes)\n"
        f"digest    sha256 {digest}\n"
        "score     0.5\n"
        "keys      training_state, model, rng, version\n"
        "tensors   2, 7.8 KiB, 2,000 elements under model\n"
        "others    3\n"
    )
    assert check(0, "inspect", path, cwd=runs) == expected
    expected += (
        "\n"
        "TENSOR          DTYPE    SHAPE        SIZE  SHARES MEMORY WITH\n"
        "model.a.weight  float32  [50, 40]  7.8 KiB\n"
        "model.head      float32  [50, 40]  7.8 KiB  model.a.weight\n"
    )
    assert check(0, "inspect", path, "--tensors", cwd=runs) == expected
    expected += (
        "\n"
        "VALUE             KIND  CONTENT\n"
        "training_state.n  int   1\n"
        "rng               dict  {}\n"
        f"version           str   '{VERSION}'\n"
    )
    assert check(0, "inspect", path, "--all", cwd=runs) == expected


def test_inspect_of_other_files(runs: Path) -> None:
    text = check(0, "inspect", "runs/tiny_epoch_1_iter_6.pth", "--all", cwd=runs)
    assert "version   2.0.1, no manifest\n" in text
    assert "load      VersionTooOldError: found version 2.0.1" in text
    assert "helios.trainer.TrainingState" in text and "(named in the file, not imported)" in text
    found = check_json(0, "inspect", "runs/tiny_epoch_1_iter_6.pth", cwd=runs)
    assert {"path": "training_state.dataset_iter", "kind": "int", "value": "6"}.items() <= found["entries"][
        6
    ].items()
    assert "found the first bytes" in call("inspect", "runs/notes.pth", cwd=runs).stderr
    check(1, "inspect", "runs/notes.pth", cwd=runs)
    check(2, "inspect", "runs", cwd=runs)
    check(2, "inspect", "nothing.pth", cwd=runs)


def test_verify(runs: Path) -> None:
    good, bad = "runs/cifar_epoch_1_iter_5.pth", "runs/cifar_epoch_1_iter_20.pth"
    assert check(0, "verify", good, cwd=runs) == f"ok          {good}\n"
    assert check(1, "verify", bad, good, cwd=runs).startswith(
        f"bad         {bad}: CorruptError: found the CRC-32"
    )
    text = check(1, "verify", "runs", cwd=runs)
    assert text.endswith("\n6 files: 4 ok, 2 bad, 0 unreadable\n")
    assert check(2, "verify", "runs", "nothing.pth", cwd=runs).endswith(
        "7 files: 4 ok, 2 bad, 1 unreadable\n"
    )
    found = check_json(1, "verify", bad, good, "--fast", cwd=runs)
    assert [result["state"] for result in found] == ["bad", "ok"]
    check(1, "verify", ".", "--recursive", cwd=runs)
    (runs / "empty").mkdir()
    assert check(2, "verify", "empty", cwd=runs) == "0 files: 0 ok, 0 bad, 0 unreadable\n"


def test_diff(runs: Path) -> None:
    a, b = "runs/cifar_epoch_1_iter_5.pth", "runs/base_epoch_2_iter_7_warm.pth"
    assert check(1, "diff", a, b, cwd=runs) == (
        "PLACE           DIFFERENCE  A -> B\n"
        "manifest.score  value       0.5 -> None\n"
        "model.a.weight  values      float32 [50, 40]: 2000 of 2000 differ, by at most 1\n"
        "model.head      values      float32 [50, 40]: 2000 of 2000 differ, by at most 1\n"
        "\n"
        "3 differences\n"
    )
    assert check(0, "diff", a, a, cwd=runs) == "no difference\n"
    found = check_json(1, "diff", b, a, cwd=runs)
    assert found[0] == {
        "path": "manifest.score",
        "difference": "value",
        "a": "None",
        "b": "0.5",
        "elements": None,
        "differing": None,
        "max_abs": None,
        "nan": 0,
    }
    assert found[1]["max_abs"] == 1.0
    assert check_json(0, "diff", a, a, cwd=runs) == []
    chkpt.save(state(float("inf")), runs / "inf.pth")
    assert check_json(1, "diff", a, "inf.pth", cwd=runs)[-1]["max_abs"] == "inf"


def test_diff_of_what_cannot_be_compared(runs: Path) -> None:
    a, damaged = "runs/base_epoch_2_iter_7_warm.pth", "runs/cifar_epoch_1_iter_20.pth"
    for other, text in (
        (damaged, "CRC-32"),
        ("runs/notes.pth", "first bytes"),
        ("nothing.pth", "No such file"),
    ):
        done = call("diff", a, other, cwd=runs)
        assert (done.returncode, done.stdout) == (2, "")
        assert text in done.stderr and done.stderr.count("\n") == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_prune(runs: Path) -> None:
    before = names(runs / "runs")
    arguments = ("prune", "runs", "--run", "cifar", "--keep-last", "1")
    size = size_text((runs / "runs/cifar_epoch_1_iter_5.pth").stat().st_size)
    done = call(*arguments, "--dry-run", cwd=runs)
    assert done.stdout == (
        "would delete  cifar_epoch_1_iter_5.pth\n"
        "kept          cifar_epoch_1_iter_10.pth\n"
        "kept          cifar_epoch_1_iter_20.pth\n"
        f"3 files: 2 kept ({size_text(2 * chkpt.inspect(runs / 'runs/cifar_epoch_1_iter_10.pth').num_bytes)}), "
        f"1 would delete ({size})\n"
    )
    # The damaged one is not the last good one, and stays for somebody to look at.
    assert done.stderr.count("skipped") == 1 and "cifar_epoch_1_iter_20.pth" in done.stderr
    assert names(runs / "runs") == before
    check(0, *arguments, "--keep-best", "1", cwd=runs)
    check(0, *arguments, "--keep-every", "5", cwd=runs)
    assert names(runs / "runs") == before  # of iteration 5, and of the best score
    found = check_json(0, *arguments, cwd=runs)
    assert [result["outcome"] for result in found] == ["deleted", "kept", "kept"]
    assert set(before) - set(names(runs / "runs")) == {"cifar_epoch_1_iter_5.pth"}


def test_prune_never_deletes_the_last_good_file(runs: Path) -> None:
    for iteration in (5, 10):
        flip(runs / f"runs/cifar_epoch_1_iter_{iteration}.pth")
    before = names(runs / "runs")
    check(0, "prune", "runs", "--run", "cifar", "--keep-last", "1", cwd=runs)
    check(0, "prune", "runs", "--run", "base", "--keep-last", "1", cwd=runs)
    assert names(runs / "runs") == before


def test_prune_says_what_it_cannot_delete(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    root = str(runs / "runs")
    assert _command.helios_chkpt(["prune", root, "--run", "cifar", "--keep-last", "1"]) == 1
    assert "not deleted   cifar_epoch_1_iter_5.pth: Permission denied\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("nowhere", "--run", "cifar", "--keep-last", "1"),
        ("runs", "--run", "cifra", "--keep-last", "1"),
        ("runs", "--run", "cifar", "--keep-last", "0"),
        ("runs", "--run", "cifar"),
        ("runs", "--keep-last", "1"),
    ],
)
def test_prune_with_wrong_arguments(arguments: tuple[str, ...], runs: Path) -> None:
    before = names(runs / "runs")
    check(2, "prune", *arguments, cwd=runs)
    assert names(runs / "runs") == before and not (runs / "nowhere").exists()


def test_migrate(tmp_path: Path, legacy: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(legacy / "2.0.1" / "amp", folder)
    (old, other) = sorted(folder.glob("*.pth"))
    other.write_bytes(other.read_bytes()[:-1])
    before = names(folder)
    text = check(1, "migrate", "runs", "--dry-run", cwd=tmp_path)
    assert text.startswith(
        "FILE                           SCHEMA  OUTCOME        BACKUP\n"
        "tiny/tiny_epoch_1_iter_6.pth   2 -> 3  would migrate\n"
        "tiny/tiny_epoch_2_iter_12.pth  ?       failed\n"
        "\n"
        "tiny/tiny_epoch_2_iter_12.pth: TruncatedError: "
    )
    assert names(folder) == before
    found = check_json(1, "migrate", "runs", cwd=tmp_path)
    assert [(result["outcome"], result["source"], result["target"]) for result in found] == [
        ("migrated", 2, 3),
        ("failed", None, None),
    ]
    assert Path(found[0]["backup"]).samefile(f"{old}.bak")
    assert chkpt.load(old)["version"] == VERSION
    other.unlink()
    assert check(0, "migrate", "runs", cwd=tmp_path).endswith("\n1 file: 1 current\n")
    check(2, "migrate", "nowhere", cwd=tmp_path)


def test_the_migrator_is_the_same(tmp_path: Path, legacy: Path) -> None:
    shutil.copytree(legacy / "1.0.0", tmp_path / "runs")
    one, other = (call(*arguments, cwd=tmp_path, program=program) for program, arguments in (
        (PROGRAM, ("migrate", "runs", "--dry-run")), (MIGRATOR, ("runs", "--dry-run")),
    ))  # fmt: skip
    assert (one.returncode, one.stdout) == (other.returncode, other.stdout) == (0, one.stdout)
    assert one.stdout.count("would migrate") == 5
    done = call("runs", "--no-backup", cwd=tmp_path, program=MIGRATOR)
    assert done.returncode == 0 and list(tmp_path.rglob("*.bak*")) == []


def in_terminal(*arguments: str, cwd: Path, columns: int = 60) -> tuple[int, str]:
    """Exit status and what a terminal of that width is sent, by stdout and stderr."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    process = subprocess.Popen([*PROGRAM, *arguments], cwd=cwd, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    received = bytearray()
    while select.select([ours], [], [], 60)[0]:
        try:
            received += os.read(ours, 1 << 16) or b""
        except OSError:  # the other side is closed
            break
    os.close(ours)
    return process.wait(), received.decode()


def test_tables_fit_the_terminal(runs: Path) -> None:
    status, text = in_terminal("inspect", "runs/tiny_epoch_1_iter_6.pth", "--all", cwd=runs, columns=70)
    tables = text.replace("\r", "").split("\n\n", 1)[1]
    assert status == 0 and max(map(len, tables.splitlines())) <= 70
    assert "..." in tables
    assert "\x1b" not in text  # no colours, no cursor


def test_a_bar_is_for_terminals_only(tmp_path: Path, legacy: Path) -> None:
    shutil.copytree(legacy / "1.0.0", tmp_path / "runs")
    status, text = in_terminal("migrate", "runs", "--dry-run", cwd=tmp_path)
    assert status == 0 and "0%|" in text and "4 would migrate" in text
    assert call("migrate", "runs", cwd=tmp_path).stderr == ""


def test_names_cannot_move_the_cursor(tmp_path: Path) -> None:
    chkpt.save({"\x1b[2J": 1}, tmp_path / "\x1b[31m\udcff.pth")
    for arguments in (("ls", "."), ("verify", "."), ("inspect", "\x1b[31m\udcff.pth", "--all")):
        done = call(*arguments, cwd=tmp_path)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout and r"\x1b[31m\udcff.pth" in done.stdout
        check_json(0, *arguments, cwd=tmp_path)
    done = call("inspect", "\x1b[31m", cwd=tmp_path)
    assert "\x1b" not in done.stderr


def test_an_encoding_that_cannot_show_a_name(tmp_path: Path) -> None:
    chkpt.save({"x": 1}, tmp_path / "ä_epoch_1_iter_1.pth")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*PROGRAM, "ls", "."], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and r"\xe4_epoch_1_iter_1.pth" in done.stdout


@pytest.mark.parametrize("json_or_not", [(), ("--json",)])
def test_a_reader_that_goes_away(json_or_not: tuple[str, ...], tmp_path: Path) -> None:
    values = {f"key{i}": [i] * 3 for i in range(20_000)}  # more than a pipe holds
    path = chkpt.save(values, tmp_path / "a.pth")
    command = [*PROGRAM, "inspect", str(path), "--all", *json_or_not]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, tmp_path: Path, legacy: Path) -> None:
    shutil.copytree(legacy / "1.0.0", tmp_path / "runs")
    command = f"{shlex.join(PROGRAM)} migrate runs {closed}"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True).returncode == 0
    check(0, "verify", "runs", "--recursive", cwd=tmp_path)
    assert {f["state"] for f in check_json(0, "ls", "runs", "--recursive", cwd=tmp_path)} == {"readable"}


def test_a_full_disk(runs: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "ls", "runs"], cwd=runs, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_interrupted(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1 << 26), "version": VERSION}, tmp_path / "large.pth")
    command = [*PROGRAM, "verify", *["large.pth"] * 1000]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("ok")  # in the midst of it
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        while process.stdout.readline():
            assert time.monotonic() < started + 60
        # Before it Python may say of a file that the interrupt kept from being opened in full.
        assert process.stderr.read().endswith("helios-chkpt: interrupted\n")
    assert process.returncode == 130


COMMANDS = ["ls", "inspect", "verify", "diff", "migrate", "prune"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_the_exit_statuses_mean(command: str, tmp_path: Path) -> None:
    text = " ".join(check(0, command, "--help", cwd=tmp_path).split())
    for status in ("0 ", "1 ", "2 ", "130 ", "141 "):
        assert status in text.split("Exit statuses: ")[1]
    assert "--json" in text
    check(2, command, cwd=tmp_path)
    check(2, command, "--nonsense", cwd=tmp_path)


def test_help_of_the_program(tmp_path: Path) -> None:
    text = check(0, "--help", cwd=tmp_path)
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert check(0, "--version", cwd=tmp_path) == f"helios-chkpt {VERSION}\n"
    check(2, cwd=tmp_path)
    check(2, "nonsense", cwd=tmp_path)


def test_the_console_script_is_this_program() -> None:
    scripts = entry_points(group="console_scripts", name="helios-chkpt")
    assert {script.load() for script in scripts} == {_command.helios_chkpt}


AND_TORCH = """
import sys
from helios.chkpt_migrator._command import helios_chkpt
status = helios_chkpt()
print("torch" in sys.modules, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (("ls", "runs", "--verify"), 1, "False"),
        (("inspect", "runs/cifar_epoch_1_iter_5.pth", "--all"), 0, "False"),
        (("verify", "runs"), 1, "False"),
        (("diff", "runs/cifar_epoch_1_iter_5.pth", "runs/cifar_epoch_1_iter_10.pth"), 1, "False"),
        (("migrate", "runs"), 1, "False"),
        (("prune", "runs", "--run", "cifar", "--keep-last", "1"), 0, "False"),
        (
            ("diff", "runs/cifar_epoch_1_iter_5.pth", "runs/base_epoch_2_iter_7_warm.pth"),
            1,
            "True",
        ),  # the control
    ],
)
def test_torch_is_not_imported(arguments: tuple[str, ...], status: int, expected: str, runs: Path) -> None:
    done = call(*arguments, cwd=runs, program=[sys.executable, "-c", AND_TORCH])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, expected)


def test_columns() -> None:
    columns = (Column("NAME", shrinks=True), Column("N", is_number=True))
    rows = [("abcdefghijklmnopqrstuvwxyz", "1"), ("日本", "12"), ("\t", "3")]
    assert table(columns, rows) == [
        "NAME                         N",
        "abcdefghijklmnopqrstuvwxyz   1",
        "日本                        12",
        r"\t                           3",
    ]
    assert table(columns, rows, 20) == [
        "NAME               N",
        "abcdefg...uvwxyz   1",
        "日本              12",
        r"\t                 3",
    ]
    assert table(columns, [], 20) == ["NAME  N"]


@pytest.mark.parametrize(("width", "expected"), [(9, "aaaaabbbb"), (8, "aaa...bb"), (3, "..."), (0, "...")])
def test_shortened(width: int, expected: str) -> None:
    assert shortened("aaaaabbbb", width) == expected


def test_sizes() -> None:
    sizes = [0, 1023, 1536, 5 << 20, 3 << 29, 5 << 40]
    assert [size_text(size) for size in sizes] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "1.5 GiB",
        "5.0 TiB",
    ]
    assert [mib_text(size) for size in (0, 1 << 20, 25 << 20, 1 << 40)] == [
        "0.000",
        "1.000",
        "25.0",
        "1,048,576",
    ]
