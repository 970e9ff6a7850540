"""What checkpoints are named and hold, how many are kept, and the end of a run."""

import json

import pytest
import torch

from helios.chkpt import load
from helios.trainer import TrainingState


def files(root):
    return sorted(path.name for path in root.iterdir())


def fit(kit, root, *, unit="EPOCH", total_steps=2, model=None, **options):
    options.setdefault("chkpt_frequency", 1)
    model = model or kit.Net()
    kit.trainer(getattr(kit, unit), total_steps, chkpt_root=root, **options).fit(model, kit.Data())
    return model


def was_only_loaded(model):
    """Whether a model was set up (and given its state), and no hook was called."""
    return [call[0] for call in model.trace] == ["setup"]


def test_a_checkpoint_opens_without_helios(kit, tmp_path, python):
    trainer = kit.trainer(
        total_steps=1,
        run_name="run",
        chkpt_root=tmp_path / "c",
        chkpt_frequency=1,
        valid_frequency=1,
        enable_file_logging=True,
        log_path=tmp_path / "l",
        enable_tensorboard=True,
        run_path=tmp_path / "t",
    )
    trainer.plugins.append(kit.NotingPlugin([]))
    trainer.fit(kit.Net(), kit.Data())
    code = """if True:
        import json, sys, torch
        c = torch.load(sys.argv[1], weights_only=True)
        assert not [m for m in sys.modules if m.startswith("helios")]
        def plain(x):
            if isinstance(x, dict):
                return all(type(k) in (str, int) and plain(v) for k, v in x.items())
            if isinstance(x, (list, tuple)):
                return all(map(plain, x))
            return x is None or type(x) in (str, int, float, bool, torch.Tensor)
        assert plain(dict(c)), "not plain"
        print(json.dumps([sorted(c), sorted(c["rng"]), c["plug"], c["log_path"], c["run_path"]]))
    """
    keys, rng_keys, plug, log_path, run_path = json.loads(
        python(code, tmp_path / "c" / "run_epoch_1_iter_3.pth")
    )
    always = ["data", "log_path", "model", "plug", "rng", "run_path", "training_state", "version"]
    assert keys == always
    assert rng_keys == ["numpy", "python", "torch"] or torch.cuda.is_available()
    assert plug == {"count": 1}
    assert [log_path] == [str(p) for p in (tmp_path / "l").iterdir()]
    assert [run_path] == [str(p) for p in (tmp_path / "t").iterdir()]


def test_without_logs_and_plugins_only_what_is_always_there(kit, tmp_path):
    fit(kit, tmp_path)
    checkpoint = load(tmp_path / "net_epoch_1_iter_3.pth")
    assert sorted(checkpoint) == ["data", "model", "rng", "training_state", "version"]
    state = TrainingState(**checkpoint["training_state"])  # the object comes back
    assert (state.current_iteration, state.global_iteration, state.global_epoch) == (3, 3, 1)


def test_names_have_epoch_and_iteration(kit, tmp_path):
    fit(kit, tmp_path / "e", run_name="r")
    assert files(tmp_path / "e") == ["r_epoch_1_iter_3.pth", "r_epoch_2_iter_6.pth"]
    fit(
        kit,
        tmp_path / "i",
        unit="ITERATION",
        total_steps=4,
        chkpt_frequency=2,
        accumulation_steps=2,
        run_name="r",
    )
    assert files(tmp_path / "i") == ["r_epoch_2_iter_4.pth", "r_epoch_3_iter_8.pth"]


@pytest.mark.parametrize("name", ["run_epoch_3_iter_4", "a b.c", "ünïcode"])
def test_any_run_name_is_found_again(kit, tmp_path, name):
    fit(kit, tmp_path, run_name=name)
    again = fit(kit, tmp_path, run_name=name)
    assert was_only_loaded(again)  # finished before
    assert not was_only_loaded(fit(kit, tmp_path, run_name="run"))  # control: another run in the same folder


def test_without_a_run_name_the_save_name_is_used(kit, tmp_path):
    fit(kit, tmp_path, total_steps=1, model=kit.Net(save_name="vgg"))
    assert files(tmp_path) == ["vgg_epoch_1_iter_3.pth"]


@pytest.mark.parametrize("style", ["text", "name with text", "with extension"])
def test_metadata(kit, tmp_path, style):
    class Named(kit.Net):
        def append_metadata_to_chkpt_name(self, chkpt_name):
            assert chkpt_name == "net_epoch_1_iter_3"
            text = "accuracy_0.25"
            return {"text": text, "name with text": f"{chkpt_name}_{text}", "with extension": f"{text}.pth"}[
                style
            ]

    fit(kit, tmp_path, total_steps=1, model=Named())
    assert files(tmp_path) == ["net_epoch_1_iter_3_accuracy_0.25.pth"]


def test_metadata_must_be_text(kit, tmp_path):
    model = kit.Net()
    model.append_metadata_to_chkpt_name = lambda name: 3
    with pytest.raises(RuntimeError, match="append_metadata_to_chkpt_name must return a str, found int 3"):
        fit(kit, tmp_path, model=model)


def test_keep_last(kit, tmp_path):
    fit(kit, tmp_path, total_steps=5, keep_last=2)
    assert files(tmp_path) == ["net_epoch_4_iter_12.pth", "net_epoch_5_iter_15.pth"]


@pytest.mark.parametrize("missing", ["chkpt_root", "chkpt_frequency"])
def test_nothing_is_saved_unless_both_root_and_frequency_are_given(kit, tmp_path, missing):
    fit(kit, **{"root": tmp_path, missing.replace("chkpt_root", "root"): None})
    assert files(tmp_path) == []


def test_the_end_is_saved_though_nothing_is_due(kit, tmp_path):
    fit(kit, tmp_path, total_steps=3, chkpt_frequency=2)
    assert files(tmp_path) == ["net_epoch_2_iter_6.pth", "net_epoch_3_iter_9.pth"]
    stops = {name: load(tmp_path / name)["training_state"]["trainer"]["stop"] for name in files(tmp_path)}
    assert stops == {"net_epoch_2_iter_6.pth": None, "net_epoch_3_iter_9.pth": "TOTAL_STEPS"}


def test_a_finished_run_does_nothing_and_says_so(kit, tmp_path, capsys):
    fit(kit, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    data, model = kit.Data(), kit.Net()
    assert kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1).fit(model, data) is True
    assert was_only_loaded(model)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    said = capsys.readouterr().out
    assert "nothing to do: run net finished before (epoch 2, iteration 6; total_steps reached)" in said


@pytest.mark.parametrize("reason", ["stop", "early"])
def test_a_run_that_was_stopped_stays_finished_with_more_steps(kit, tmp_path, reason):
    options = {"valid_frequency": 1, "early_stop_cycles": 1}
    never = {"improved": {1: False}} if reason == "early" else {"stop": lambda model: True}
    fit(kit, tmp_path, total_steps=5, model=kit.Net(**never), **options)
    assert was_only_loaded(fit(kit, tmp_path, total_steps=9, model=kit.Net(**never), **options))


@pytest.mark.parametrize(("unit", "few", "many"), [("EPOCH", 2, 4), ("ITERATION", 6, 12)])
def test_more_steps_go_on(kit, tmp_path, unit, few, many):
    options = {"unit": unit, "valid_frequency": 2, "chkpt_frequency": 2}
    whole = fit(kit, tmp_path / "whole", total_steps=many, **options)
    fit(kit, tmp_path / "two", total_steps=few, **options)
    rest = fit(kit, tmp_path / "two", total_steps=many, **options)
    assert kit.bits(rest.state_dict()) == kit.bits(whole.state_dict())
    assert rest.batches == whole.batches[6:]


def test_state_is_copied_before_the_next_step_changes_it(kit, tmp_path):
    """state_dict returns references into the model; the background writer must not see later values."""

    snapshots = []

    class Live(kit.Net):
        def state_dict(self):
            snapshots.append(kit.bits(super().state_dict()))
            return super().state_dict()

    model = Live()
    trainer = kit.trainer(kit.ITERATION, 5, chkpt_root=tmp_path, chkpt_frequency=1, async_chkpt=True)
    trainer.fit(model, kit.Data())
    paths = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
    saved = [kit.bits(load(path)["model"]) for path in paths]
    assert saved == [*snapshots[:4], snapshots[-1]]
    assert saved[0] != saved[1]


def test_a_value_that_cannot_be_stored_is_named(kit, tmp_path):
    class Foreign(kit.Net):
        def state_dict(self):
            return {"table": {"bad": object()}}

    with pytest.raises(RuntimeError, match=r"model\.table\.bad"):
        fit(kit, tmp_path, model=Foreign())


def test_a_state_dict_must_return_a_dict(kit, tmp_path):
    model = kit.Net()
    model.state_dict = lambda: None
    with pytest.raises(RuntimeError, match="state_dict of the model must return a dict, found NoneType"):
        fit(kit, tmp_path, model=model)
    assert files(tmp_path) == []


def test_a_model_that_saves_nothing_is_warned_of(kit, tmp_path, capsys):
    model = kit.Net()
    model.state_dict = dict
    fit(kit, tmp_path, model=model)
    assert capsys.readouterr().out.count("Net.state_dict() is empty, though the model has networks") == 1
    fit(kit, tmp_path / "control")
    assert "is empty" not in capsys.readouterr().out


def test_versions_of_modules_come_back(kit, tmp_path):
    """torch keeps them in an attribute of what state_dict of a network returns; modules decide by them what is old."""
    found = []

    class Bare(kit.Net):
        def state_dict(self):
            return self.net.state_dict()

        def load_state_dict(self, state, fast_init=False):
            found.append(state._metadata)

    for steps in (1, 2):
        model = Bare()
        assert kit.trainer(total_steps=steps, chkpt_root=tmp_path, chkpt_frequency=1).fit(model, kit.Data())
    assert found == [model.net.state_dict()._metadata]
