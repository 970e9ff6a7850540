"""What the README shows is so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from helios import chkpt
from helios.chkpt_migrator._command import helios_chkpt

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    steps: list[int] = []

    def train(model: torch.nn.Linear) -> None:
        with torch.no_grad():
            model.weight += 1
        steps.append(int(model.weight[0, 0]))
        if len(steps) == 5:
            raise KeyboardInterrupt

    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(KeyboardInterrupt):
        exec(block, {"model": model, "train": train})
    short = block.replace("1001", "9")
    assert short != block
    exec(short, {"model": torch.nn.Linear(1, 1), "train": train})
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"cifar10_epoch_1_iter_{step}.pth" for step in (6, 7, 8)]


@pytest.mark.parametrize("name", re.findall(r"`(test_\w+\.py)`", README))
def test_the_tests_it_names_are_there(name: str) -> None:
    assert (TESTS / name).is_file()


@pytest.mark.parametrize("command", re.findall(r"^helios-chkpt (\w+) ", README, re.MULTILINE))
def test_the_commands_take_the_options_it_shows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(rf"^helios-chkpt {command} (.*)$", README, re.MULTILINE)
    assert helios_chkpt([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in [*re.findall(r"--[a-z-]+", line), "--json"]:
        assert option in text, option


@pytest.mark.parametrize(
    ("name", "arguments"), re.findall(r"^\| `(?:store\.)?(\w+)\((.*?)\)`", README, re.MULTILINE)
)
def test_the_functions_take_the_arguments_it_shows(name: str, arguments: str) -> None:
    known = inspect.signature(getattr(chkpt, name)).parameters
    assert {argument.split("=")[0].strip() for argument in arguments.split(",")} <= set(known)
