"""What the README shows runs, and does what it says."""

import re
from pathlib import Path

import pytest
import torch

from helios.core.rng import preserve_rng_state

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


class Killed(BaseException):
    pass


def run(folder, monkeypatch, num_saves=None):
    """Execute the first block in a folder; killed right after so many saves. The weights and how many saves."""
    folder.mkdir(exist_ok=True)
    saves, save = 0, torch.save

    def counting_save(*args):
        nonlocal saves
        save(*args)
        saves += 1
        if saves == num_saves:
            raise Killed

    names = {}
    with preserve_rng_state(), monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch, "save", counting_save)
        exec(BLOCKS[0], names)
    return names["model"].state_dict(), saves


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# 32 batches an epoch: killed at the first, in mid-epoch, around the end of an epoch, and at the very end.
@pytest.mark.parametrize("num_saves", [1, 17, 31, 32, 33, 80, 96])
def test_the_first_block_is_exact_when_it_is_killed(tmp_path, monkeypatch, num_saves):
    expected, saves = run(tmp_path / "whole", monkeypatch)
    assert saves == 3 * 32
    with pytest.raises(Killed):
        run(tmp_path / "killed", monkeypatch, num_saves)
    found, rest = run(tmp_path / "killed", monkeypatch)
    assert rest == saves - num_saves
    assert equal(found, expected)


def test_the_first_block_needs_the_state_of_the_loader(tmp_path, monkeypatch):
    """The control: without the loader's state the run ends with other weights."""
    expected, _ = run(tmp_path / "whole", monkeypatch)
    with pytest.raises(Killed):
        run(tmp_path / "killed", monkeypatch, 17)
    file = tmp_path / "killed" / "run.pth"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "loader": {**saved["loader"], "consumed": 0}}, file)
    assert not equal(run(tmp_path / "killed", monkeypatch)[0], expected)


def test_the_other_blocks_run():
    assert len(BLOCKS) == 2
    names = {}
    exec(BLOCKS[1], names)
    assert [i for batch in names["loader"] for i in batch.tolist()] == list(range(100))[::-1]
