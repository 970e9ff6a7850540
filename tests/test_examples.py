"""The example of characters ends with the same bits, whole or killed twice; and does not if a part is forgotten."""

from pathlib import Path

import pytest
from prove_resume import digest, read_scalars
from script_runner import run_whole_and_killed

from helios.chkpt import find_last_checkpoint, load

EXAMPLE = Path(__file__).parent.parent / "examples" / "characters.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def said(folder):
    """What the example said, and the same script with a schedule that is not saved: the control."""
    control, source = folder / "control.py", EXAMPLE.read_text(encoding="utf-8")
    for ours, forgetful in (
        (', "scheduler": self.scheduler}', "}"),
        ("self.save_all(", 'self.save_all(omit=["scheduler"], '),
    ):
        assert source.count(ours) == 1
        source = source.replace(ours, forgetful)
    control.write_text(source, encoding="utf-8")
    said = run_whole_and_killed(folder, "helios.trainer", EXAMPLE, control, options=("--steps", 12))
    return said[:6], said[6:]


def evidence(root):
    """Digests of all that must be the same, by name."""
    path = find_last_checkpoint(root / "checkpoints")
    last = load(path)
    counters = {key: value for key, value in last["training_state"].items() if key != "average_iter_time"}
    del counters["trainer"]["event_sizes"]  # of files that a restart continues in another file
    parts = {**last["model"], **last["rng"], "data": last["data"], "counters": counters}
    parts |= {"name": path.name, "scalars": read_scalars(root / "tensorboard")}
    return {name: digest(part) for name, part in parts.items()}


def test_it_survives_sigkill(folder, said):
    whole, *statuses, resumed, _ = said[0]
    assert statuses == ["0", "-9", "-9"]
    assert resumed == whole
    first, second = (evidence(folder / f"characters-{name}") for name in ("whole", "killed"))
    assert first == second
    assert {"net", "optimizer", "scheduler", "best", "torch", "scalars"} <= set(first)


def test_control_a_forgotten_schedule_is_found(said):
    whole, *statuses, resumed, _ = said[1]
    assert statuses == ["0", "-9", "-9"]
    assert whole == said[0][0]
    assert resumed != whole
