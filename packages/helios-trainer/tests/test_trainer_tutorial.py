"""The tutorial: its program is put together as a reader would, every command is run, and what it prints is compared."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.long

PAGE = Path(__file__).parents[1].joinpath("docs", "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash|text)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)

RUNNER = """
import json, os, runpy, sys, traceback
import torch
import helios.trainer
torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports much
for settings, script in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        try:
            os.environ.update(settings)
            runpy.run_path(script, run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def name_of(statement):
    """What a statement defines that a later one may replace."""
    if isinstance(statement, ast.If):
        return "the end"
    is_definition = isinstance(statement, ast.FunctionDef | ast.ClassDef)
    return statement.name if is_definition else ast.unparse(statement)


def merged(old, new):
    """The statements of a file or a class with a block added: what appears again is replaced."""
    statements = {name_of(each): each for each in old}
    for each in new:
        before = statements.get(name_of(each))
        if isinstance(before, ast.ClassDef):
            each.body = merged(before.body, each.body)
        statements[name_of(each)] = each
    if "the end" in statements:
        statements["the end"] = statements.pop("the end")
    return list(statements.values())


def programs():
    """Each command of the page with the program as it is there: settings, status to expect, source."""
    program = []
    for kind, text in BLOCKS:
        if kind == "python":
            program = merged(program, ast.parse(text).body)
        elif kind == "bash":
            source = ast.unparse(ast.Module(program, []))
            for line in text.splitlines():
                *settings, python, file = shlex.split(line)
                assert (python, file) == ("python", "digits.py")
                settings = dict(setting.split("=") for setting in settings)
                yield settings, "-9" if "DIE_AT" in settings else "0", source


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the program, and what it said on standard output."""
    folder = tmp_path_factory.mktemp("tutorial")
    runs = []
    for number, (settings, _, source) in enumerate(programs()):
        (folder / f"{number}.py").write_text(source)
        runs.append((settings, f"{number}.py"))
    quiet = [
        "-W",
        "error",
        "-W",
        "ignore:This process:DeprecationWarning",
    ]  # fork beside threads, from 3.12 on
    command = [sys.executable, *quiet, "-c", RUNNER, json.dumps(runs)]
    log = folder / "log.txt"
    with log.open("w") as output:  # a file, since the workers of a killed run keep a pipe open for seconds
        done = subprocess.run(command, cwd=folder, env={**os.environ}, stdout=output, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    said = [line for line in log.read_text().splitlines() if not line.startswith(("[", " "))]
    return folder, said, done.stderr.decode()


def test_each_command_ends_as_it_should(ran):
    _, said, errors = ran
    statuses = [line.split()[1] for line in said if line.startswith("status")]
    assert statuses == [status for _, status, _ in programs()], errors[-2000:]


def test_it_prints_what_the_page_shows(ran):
    """Numbers and hashes may be others, but where the page shows the same hash twice, so does the program."""
    shown = [line for kind, text in BLOCKS if kind == "text" for line in text.splitlines()]
    printed = [line for line in ran[1] if not line.startswith("status")]
    number = re.compile(r"[0-9a-f]{64}|\d\.\d{3}")
    assert [number.sub("#", line) for line in printed] == [number.sub("#", line) for line in shown]
    hashes = [
        [word for line in lines for word in re.findall(r"[0-9a-f]{64}", line)] for lines in (shown, printed)
    ]
    pairs = set(zip(*hashes, strict=True))
    assert len(pairs) == len(set(hashes[0])) == len(set(hashes[1])) == 2


def test_what_it_says_of_the_rest(ran):
    folder, said, _ = ran
    names = [path.name for path in (folder / "runs" / "checkpoints").iterdir()]
    epochs = {
        run: sorted(int(name.split("_")[2]) for name in names if name.startswith(f"{run}_epoch_"))
        for run in ("first", "stopped", "logged")
    }
    assert epochs["first"] == list(range(1, 9))
    assert 3 < max(epochs["stopped"]) < 100
    assert epochs["logged"] == [4, 5]
    (events,) = (folder / "runs" / "tensorboard").glob("logged_*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [scalar.step for scalar in accumulator.Scalars("valid/accuracy")] == [1, 2, 3, 4, 5]
    accuracies = [float(line.split()[2]) for line in said if "accuracy" in line]
    assert len(accuracies) == 3
    assert min(accuracies) > 0.85
