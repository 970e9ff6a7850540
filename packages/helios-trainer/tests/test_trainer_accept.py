"""A checkpoint that does not fit is refused, by name; what the user accepts is gone on with, and the log says so."""

import pytest
import torch
from torch import nn

from helios.chkpt import find_last_checkpoint, load, save
from helios.trainer import CUDAPlugin, Model


def begin(kit, root, at=14, **options):
    """A run that ends with an exception in the middle of its second epoch; return its checkpoint's path."""
    options = {"unit": kit.ITERATION, "total_steps": 8, "chkpt_frequency": 2, **options}
    with pytest.raises(kit.AbortError):
        kit.trainer(chkpt_root=root, **options).fit(kit.Net(abort_at=at), kit.Data())
    return find_last_checkpoint(root, "net")


def go_on(kit, root, plugin=None, data=None, **options):
    options = {"unit": kit.ITERATION, "total_steps": 8, "chkpt_frequency": 2, **options}
    trainer = kit.trainer(chkpt_root=root, **options)
    model = kit.Net(accumulation=options.get("accumulation_steps", 1))
    if plugin:
        trainer.plugins.append(kit.NotingPlugin(model.trace, plugin))
    assert trainer.fit(model, data or kit.Data())
    return model


def without(path, key, change=None):
    state = load(path)
    del state["version"]
    part = state.pop(key)
    if change is not None:
        state[key] = change(part)
    save(state, path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random_seed", {"random_seed": 7}, "random_seed=6691, this trainer has random_seed=7"),
        ("accumulation_steps", {"accumulation_steps": 2}, "accumulation_steps=1, this trainer has"),
        ("train_unit", {"train_unit": "EPOCH", "total_steps": 4}, "train_unit=ITERATION, this trainer has"),
    ],
)
def test_settings(kit, tmp_path, capsys, name, options, message):
    begin(kit, tmp_path, 18)
    if "train_unit" in options:
        options = {"unit": kit.EPOCH, "total_steps": options["total_steps"]}
    with pytest.raises(RuntimeError, match=rf"{message}.*accept_on_resume=\['{name}'\]"):
        go_on(kit, tmp_path, **options)
    model = go_on(kit, tmp_path, **options, accept_on_resume=[name])
    assert f"accept_on_resume has '{name}'" in capsys.readouterr().out
    assert model.state.global_iteration == {"accumulation_steps": 14, "train_unit": 12}.get(name, 8)
    assert model.batches  # it went on, and did not begin anew
    assert model.trace[3][0] == "on_training_batch_start"


def test_a_run_by_epoch_goes_on_by_iteration(kit, tmp_path):
    options = {"unit": kit.EPOCH, "total_steps": 4, "chkpt_frequency": 1}
    path = begin(kit, tmp_path, 24, **options)
    assert path.name == "net_epoch_1_iter_3.pth"
    model = go_on(kit, tmp_path, total_steps=8, accept_on_resume=["train_unit"])
    assert [call for call in model.trace if call[0].startswith("on_training_epoch")][:2] == [
        ("on_training_epoch_end", 1),
        ("on_training_epoch_start", 2),
    ]
    assert model.state.global_iteration == 8


def test_a_plugin_that_was_not_there(kit, tmp_path):
    begin(kit, tmp_path)
    with pytest.raises(RuntimeError, match=r"no state of the plug-in 'new'.*accept_on_resume=\['new'\]"):
        go_on(kit, tmp_path, "new")
    go_on(kit, tmp_path, "new", accept_on_resume=("new",))


def test_a_plugin_that_keeps_nothing_may_come_and_go(kit, tmp_path, capsys):
    begin(kit, tmp_path)
    trainer = kit.trainer(chkpt_root=tmp_path, unit=kit.ITERATION, total_steps=8, chkpt_frequency=2)
    trainer.plugins.append(CUDAPlugin())
    assert trainer.fit(kit.Net(), kit.Data())
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [None, lambda part: {**part, "torch": torch.zeros(3)}])
def test_generators(kit, tmp_path, change):
    without(begin(kit, tmp_path), "rng", change)
    with pytest.raises(RuntimeError, match=r"(lacks 'rng'|generators: torch: ).*accept_on_resume=\['rng'\]"):
        go_on(kit, tmp_path)
    go_on(kit, tmp_path, accept_on_resume={"rng"})


def test_generators_of_gpus_that_are_not_here(kit, tmp_path):
    path = begin(kit, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    without(path, "rng", lambda part: {**part, "cuda": [torch.zeros(16, dtype=torch.uint8)]})
    with pytest.raises(RuntimeError, match=r"generators: cuda: .*accept_on_resume=\['rng.cuda'\]"):
        go_on(kit, tmp_path / "a", accept_on_resume=["rng"])
    accepted = go_on(kit, tmp_path / "a", accept_on_resume=["rng.cuda"])
    # The others were put back: it is the run that was never interrupted.
    assert kit.bits(accepted.state_dict()) == kit.bits(go_on(kit, tmp_path / "b").state_dict())


@pytest.mark.parametrize("missing", [True, False])
def test_the_loader(kit, tmp_path, missing):
    path = begin(kit, tmp_path, 29)
    assert path.name == "net_epoch_2_iter_4.pth"
    data = None if missing else kit.Data(train=2)  # other data
    if missing:
        without(path, "data")
    with pytest.raises(RuntimeError, match=r"(lacks 'data'|num_samples).*accept_on_resume=\['data'\]"):
        go_on(kit, tmp_path, data=data)
    model = go_on(kit, tmp_path, data=data, accept_on_resume=["data"])
    first = next(call for call in model.trace if call[0] == "on_training_batch_start")
    assert first == ("on_training_batch_start", (5, 5, 2, 1))  # the epoch in progress, from its beginning


@pytest.mark.parametrize("key", ["training_state", "model"])
def test_what_cannot_be_accepted(kit, tmp_path, key):
    without(begin(kit, tmp_path), key)
    with pytest.raises(RuntimeError, match=f"lacks '{key}'"):
        go_on(kit, tmp_path, accept_on_resume=["rng", "data"])


def test_names_that_mean_nothing(kit, tmp_path):
    trainer = kit.trainer(accept_on_resume=["rgn"])
    with pytest.raises(RuntimeError, match=r"accept_on_resume can have train_unit, .*; found 'rgn'"):
        trainer.fit(kit.Net(), kit.Data())


class Other(Model):
    """Has other parts than the model that wrote the checkpoint."""

    def setup(self, fast_init=False):
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1), nn.Linear(1, 1))
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1)

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": 0.5}

    def load_state_dict(self, state, fast_init=False):
        self.net.load_state_dict(state["net"])

    def train_step(self, batch, state):
        pass


@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_checkpoint_of_another_model(kit, tmp_path, run):
    path = begin(kit, tmp_path)
    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=2, unit=kit.ITERATION, total_steps=8)
    with pytest.raises(RuntimeError) as caught:
        getattr(trainer, run)(Other("net"), kit.Data())
    said = str(caught.value)
    assert f"{path} is of another model than Other is now, whose load_state_dict raised RuntimeError" in said
    assert "missing there: ema, net.3.bias, net.3.weight; unexpected: cycle, schedule." in said
    assert "net.0.weight" not in said.split("missing there")[1]  # what both have


def test_a_load_state_dict_that_fails_for_another_reason(kit, tmp_path):
    class Failing(kit.Net):
        def load_state_dict(self, state, fast_init=False):
            raise OSError("on purpose")

    begin(kit, tmp_path)
    trainer = kit.trainer(chkpt_root=tmp_path, unit=kit.ITERATION, total_steps=8)
    with pytest.raises(RuntimeError, match=r"^training failed: OSError: on purpose$"):
        trainer.fit(Failing(), kit.Data())
