"""The README's example runs as it stands, goes on when it is run again, and its tables name what there is."""

import inspect
import re
from pathlib import Path

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
