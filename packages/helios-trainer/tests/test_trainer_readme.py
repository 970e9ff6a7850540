"""The README's example runs as it stands, goes on when it is run again, and its tables name what there is."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from helios.trainer import Model, Plugin, Trainer

README = Path(__file__).parents[1].joinpath("README.md").read_text()


def test_the_example(python, tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    first = python(example)
    (loss,) = re.findall(r"^test loss ([0-9.e-]+)$", first, re.MULTILINE)
    assert float(loss) < 0.1
    assert "nothing to do" not in first
    assert len(list((tmp_path / "runs" / "chkpt").iterdir())) == 10
    again = python(example)
    assert "nothing to do: run sine finished before" in again
    assert re.findall(r"^test loss ([0-9.e-]+)$", again, re.MULTILINE) == [loss]
    assert len(list((tmp_path / "runs" / "logs").iterdir())) == 1


def test_the_tables():
    rows = re.search(r"## Arguments of Trainer\n(.*?)\nLogs are", README, re.DOTALL)[1]
    named = {
        name
        for row in rows.splitlines()
        for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert named == set(inspect.signature(Trainer).parameters)
    order = re.search(r"## The order of calls\n(.*?)\n## ", README, re.DOTALL)[1]
    hooks = {name for kind in (Model, Plugin) for name in vars(kind) if name.startswith(("on_", "process_"))}
    assert hooks <= set(re.findall(r"\w+", order))


def test_the_helpers(kit):
    """What it shows of save_all and load_all works on a model that has those parts."""
    methods, names = re.search(r"## Helpers\n.*?```python\n(.*?)```", README, re.DOTALL)[1], {}
    exec(textwrap.dedent(methods), names)

    class Net(kit.Net):
        state_dict, load_state_dict = names["state_dict"], names["load_state_dict"]

        def setup(self, fast_init=False):
            super().setup(fast_init)
            self.scheduler, self.best = self.schedule, 1.5

    model = Net()
    model.setup()
    state = model.state_dict()
    model.best = None
    model.load_state_dict(state)
    assert model.best == 1.5
    model.another = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="save_all was not given another: what has a state must be saved,"):
        model.state_dict()
