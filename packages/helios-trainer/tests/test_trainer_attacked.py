"""What was once wrong, found by those who tried to break it."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from helios.chkpt import find_last_checkpoint, load
from helios.core import rng
from helios.trainer import Model, Plugin

CHILD = """
import multiprocessing, os, signal, sys, time
import helios.trainer as hlt
from helios.data import DataModule
def sleep(): time.sleep(1000)
class M(hlt.Model):
    def setup(self, fast_init=False):
        context = multiprocessing.get_context("fork")
        self.child = context.Process(target=sleep, daemon=True)  # ended when the interpreter ends
        self.child.start()
        other = context.Process(target=sleep)
        other.start()
        other.terminate()
        other.join()
        print("terminated", other.exitcode, flush=True)
    def train_step(self, batch, state): pass
class D(DataModule):
    def setup(self): self._train_dataset = self._create_dataset(list(range(4)), {})
print(hlt.Trainer("r", total_steps=1, use_cpu=True, chkpt_frequency=1, chkpt_root="c").fit(M("m"), D()), flush=True)
"""


def test_children_of_the_user_can_be_terminated(tmp_path):
    """They are forked with our handlers, and must not be deaf."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"terminated {-signal.SIGTERM}" in done.stdout
    assert done.stdout.splitlines()[-1] == "True"


class Alias(Model):
    """Gives a part of its network another name in epoch 2, and freezes it, or leaves a gradient on it."""

    def __init__(self, abort_in=None, freezes=True):
        super().__init__("alias")
        self.active = None  # before `net` among the attributes: it will name the parameters first
        self.abort_in, self.freezes = abort_in, freezes

    def setup(self, fast_init=False):
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state, fast_init=False):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    def on_training_epoch_start(self, epoch):
        if epoch == 2:
            self.active = self.net[:2]
            self.active[1].eval()
            if self.freezes:
                self.active.requires_grad_(False)

    def train_step(self, batch, state):
        if state.global_epoch == self.abort_in:
            raise KeyboardInterrupt
        self.optimizer.zero_grad()
        self.net(batch[0]).square().mean().backward()
        self.optimizer.step()


def fit_alias(kit, root, **options):
    model = Alias(**options)
    kit.trainer(total_steps=4, chkpt_frequency=1, chkpt_root=root).fit(model, kit.Data(train=4, batch_size=3))
    return kit.bits(model.state_dict())


@pytest.mark.parametrize("freezes", [True, False])
def test_a_part_that_got_another_name_in_mid_run(kit, tmp_path, freezes):
    whole = fit_alias(kit, tmp_path / "whole", freezes=freezes)
    with pytest.raises(KeyboardInterrupt):
        fit_alias(kit, tmp_path / "two", abort_in=3, freezes=freezes)
    own = load(find_last_checkpoint(tmp_path / "two"))["training_state"]["trainer"]
    assert own["aliases"]["active.0.weight"] == ["net.0.weight"]
    assert fit_alias(kit, tmp_path / "two", freezes=freezes) == whole


def test_control_without_its_other_names_it_is_refused(kit, tmp_path, monkeypatch):
    monkeypatch.setattr("helios.trainer._checkpoint.aliases_of", lambda owner: {})
    with pytest.raises(KeyboardInterrupt):
        fit_alias(kit, tmp_path, abort_in=3)
    with pytest.raises(
        RuntimeError, match=r"has a (gradient|frozen parameter) .*active\.0\.\w+, which the model lacks"
    ):
        fit_alias(kit, tmp_path)


class Drawing:
    """Draws from every generator where a checkpoint is made."""

    def draw(self):
        torch.rand(3), random.random(), rng.get_default_numpy_rng().generator.random()

    def state_dict(self):
        self.draw()
        return super().state_dict()

    def append_metadata_to_chkpt_name(self, chkpt_name):
        self.draw()
        return "x"


def test_one_checkpoint_more_changes_nothing(kit, tmp_path):
    """A request to stop makes one, and so does another frequency."""

    class Net(Drawing, kit.Net):
        pass

    def fit(root, frequency, stop_at=None):
        model = Net(stop=lambda m: m.state.global_iteration == stop_at and bool(m.trainer.request_stop()))
        trainer = kit.trainer(kit.ITERATION, 8, chkpt_root=root, chkpt_frequency=frequency)
        return trainer.fit(model, kit.Data()) and kit.end_of(model)

    whole = fit(tmp_path / "whole", 100)
    assert fit(tmp_path / "often", 1) == whole
    assert fit(tmp_path / "stopped", 100, stop_at=5) is False
    assert fit(tmp_path / "stopped", 100) == whole


class Keeping(Plugin):
    def state_dict(self):
        return {"n": 1}


def test_what_saves_must_load(kit, tmp_path):
    class Forgetful(kit.Net):
        load_state_dict = Model.load_state_dict

    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1)
    with pytest.raises(
        RuntimeError, match=r"the model \(Forgetful\) overrides state_dict, but not load_state_dict"
    ):
        trainer.fit(Forgetful(), kit.Data())
    trainer.plugins.append(Keeping("keeping"))
    with pytest.raises(
        RuntimeError, match=r"the plug-in 'keeping' \(Keeping\) overrides state_dict, but not"
    ):
        trainer.fit(kit.Net(), kit.Data())
    assert kit.trainer().fit(Forgetful(), kit.Data())  # without checkpoints nothing is to come back


def test_a_handler_of_the_user_that_asks_for_a_stop_when_the_workers_die(kit, tmp_path):
    """Torch hears of the workers' death in the middle of anything, also of the saving."""
    model = kit.Net()
    trainer = kit.trainer(kit.ITERATION, 9, chkpt_root=tmp_path / "two", chkpt_frequency=100)
    step = model.train_step

    def signalled(batch, state):
        step(batch, state)
        if state.global_iteration == 4:
            # The workers first: it is heard of before anybody asks for a stop.
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                child.join()
            signal.raise_signal(signal.SIGTERM)

    model.train_step = signalled
    before = signal.signal(signal.SIGTERM, lambda *args: trainer.request_stop())
    try:
        assert not trainer.fit(model, kit.Data(train=9, num_workers=2))
    finally:
        signal.signal(signal.SIGTERM, before)
    rest, whole = kit.Net(), kit.Net()
    for each, root in ((rest, "two"), (whole, "whole")):
        trainer = kit.trainer(kit.ITERATION, 9, chkpt_root=tmp_path / root, chkpt_frequency=100)
        assert trainer.fit(each, kit.Data(train=9))
        each.end = kit.end_of(each)
    assert model.batches + rest.batches == whole.batches
    assert rest.end == whole.end


def test_another_seed_that_is_accepted_is_used(kit, tmp_path):
    def begin(root):
        with pytest.raises(kit.AbortError):
            kit.trainer(chkpt_root=root, chkpt_frequency=1, total_steps=3).fit(
                kit.Net(abort_at=30), kit.Data()
            )

    ends = []
    for seed in (6691, 7, 8):
        root = tmp_path / str(seed)
        begin(root)
        model = kit.Net()
        trainer = kit.trainer(
            chkpt_root=root,
            chkpt_frequency=1,
            total_steps=3,
            random_seed=seed,
            accept_on_resume=["random_seed"],
        )
        trainer.fit(model, kit.Data())
        ends.append(model.end if hasattr(model, "end") else kit.end_of(model))
    assert ends[0] != ends[1] != ends[2] != ends[0]


def test_data_that_is_accepted_after_the_end_of_a_run(kit, tmp_path):
    kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, total_steps=2).fit(kit.Net(), kit.Data())
    model = kit.Net()
    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, total_steps=3, accept_on_resume=["data"])
    trainer.fit(model, kit.Data(train=5))
    assert [call[1] for call in model.trace if call[0] == "on_training_epoch_start"] == [3]
    assert len(model.batches) == 5


@pytest.mark.parametrize(
    ("name", "options", "data"),
    [
        ("batch_size", {}, {"train": 6, "batch_size": 1}),
        ("valid_frequency", {"valid_frequency": 2}, {}),
        ("early_stop_cycles", {"valid_frequency": 1, "early_stop_cycles": 3}, {}),
        ("enable_deterministic", {"enable_deterministic": True}, {}),
    ],
)
def test_what_may_differ_is_said(kit, tmp_path, capsys, name, options, data):
    for at in (30, 40):
        with pytest.raises(kit.AbortError):
            kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, total_steps=9).fit(
                kit.Net(abort_at=at), kit.Data()
            )
    assert "WARNING" not in capsys.readouterr().out  # control
    kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, total_steps=9, **options).fit(
        kit.Net(), kit.Data(**data)
    )
    assert f"was written with {name}=" in capsys.readouterr().out


def test_a_model_that_is_trained_again_begins_anew(kit):
    ends = []
    model, trainer = kit.Net(), kit.trainer(valid_frequency=1)
    for _ in range(2):
        model.trace.clear()
        trainer.fit(model, kit.Data())
        ends.append([call for call in model.trace if call[0] == "on_validation_end"])
    assert ends[0] == ends[1]


def test_a_signal_when_all_is_done_is_told(kit, tmp_path):
    class Late(kit.Net):
        def on_training_end(self):
            signal.raise_signal(signal.SIGUSR1)

    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1)
    assert trainer.fit(Late(), kit.Data())
    assert trainer.stopped_by is signal.SIGUSR1


def test_a_handler_that_a_hook_installs_stays(kit, tmp_path):
    def mine(*args):
        pass

    class Installing(kit.Net):
        def on_training_start(self):
            signal.signal(signal.SIGUSR1, mine)

    try:
        kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1).fit(Installing(), kit.Data())
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_renamed_checkpoint_is_not_believed(kit, tmp_path):
    kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1).fit(kit.Net(), kit.Data())
    path = find_last_checkpoint(tmp_path, "net")
    path.rename(path.with_name("net_epoch_9_iter_99.pth"))
    with pytest.raises(RuntimeError, match=r"net_epoch_9_iter_99.pth was written in epoch 2, at iteration 6"):
        kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, total_steps=3).fit(kit.Net(), kit.Data())


def test_a_folder_that_was_deleted_is_made_for_the_last_checkpoint(kit, tmp_path, capsys):
    class Deleting(kit.Net):
        def on_training_epoch_start(self, epoch):
            if epoch == 2:
                for path in (tmp_path / "c").iterdir():
                    path.unlink()
                (tmp_path / "c").rmdir()

    kit.trainer(chkpt_root=tmp_path / "c", chkpt_frequency=1, total_steps=4).fit(Deleting(), kit.Data())
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["net_epoch_4_iter_12.pth"]
    assert capsys.readouterr().out.count("could not be written") == 3


def test_one_loader_for_training_and_validation_is_refused(kit):
    class Same(kit.Data):
        def train_dataloader(self):
            self.loader = super().train_dataloader()
            return self.loader

        def valid_dataloader(self):
            return self.loader

    with pytest.raises(RuntimeError, match="Same has one loader for training and validation"):
        kit.trainer(valid_frequency=1).fit(kit.Net(), Same())


def test_a_stop_before_there_is_a_score_for_the_name(kit, tmp_path, capsys):
    class Scoring(kit.Net):
        def append_metadata_to_chkpt_name(self, chkpt_name):
            return f"sum_{round(self._val_scores['sum'].item(), 4)}"

    def fit(root, stop_at=None):
        model = Scoring(stop=lambda m: m.state.global_iteration == stop_at and bool(m.trainer.request_stop()))
        trainer = kit.trainer(chkpt_root=root, chkpt_frequency=1, valid_frequency=1)
        return trainer.fit(model, kit.Data()) and kit.end_of(model)

    whole = fit(tmp_path / "whole")
    assert fit(tmp_path / "two", 2) is False
    assert "append_metadata_to_chkpt_name failed" in capsys.readouterr().out
    assert (tmp_path / "two" / "net_epoch_1_iter_2.pth").exists()
    assert fit(tmp_path / "two") == whole
    with pytest.raises(RuntimeError, match="KeyError: 'sum'"):  # control: one that is due must have its name
        kit.trainer(chkpt_root=tmp_path / "x", chkpt_frequency=1).fit(Scoring(), kit.Data())


def test_a_signal_after_a_request_is_the_first(kit, tmp_path):
    def ask(model):
        if model.state.global_iteration == 2:
            model.trainer.request_stop()
            signal.raise_signal(signal.SIGTERM)
        return False

    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1)
    assert not trainer.fit(kit.Net(stop=ask), kit.Data())
    assert trainer.stopped_by is signal.SIGTERM


def test_damaged_checkpoints_are_not_replaced(kit, tmp_path):
    options = {"chkpt_root": tmp_path, "chkpt_frequency": 1, "keep_last": 1, "total_steps": 3}
    kit.trainer(**options).fit(kit.Net(), kit.Data())
    (path,) = tmp_path.glob("*.pth")
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(RuntimeError, match=r"run net has 1 checkpoints in .*, and none is good"):
        kit.trainer(**options).fit(kit.Net(), kit.Data())
    path.write_bytes(good)
    assert kit.trainer(**options).fit(kit.Net(), kit.Data())


@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_teardown_that_fails_hides_no_other_error(kit, run):
    class Failing(kit.Data):
        def teardown(self):
            raise KeyError("teardown")

    trainer = kit.trainer()
    with pytest.raises(kit.AbortError) as caught:
        getattr(trainer, run)(kit.Net(abort_at=5), Failing())
    assert caught.value.__notes__ == ["Besides, teardown failed: KeyError: 'teardown'"]
    with pytest.raises(RuntimeError, match="KeyError: 'teardown'"):
        getattr(trainer, run)(kit.Net(), Failing())


def test_all_is_seeded_before_plugins_configure_the_trainer(kit):
    drawn = []

    class Early(Plugin):
        def configure_trainer(self, trainer):
            drawn.append([torch.rand(()).item(), random.random()])

    for _ in range(2):
        trainer = kit.trainer()
        trainer.plugins.append(Early("early"))
        trainer.fit(kit.Net(), kit.Data())
    assert drawn[0] == drawn[1]


def test_a_plugin_whose_configuration_failed_is_configured_again(kit):
    class Once(Plugin):
        calls = 0

        def configure_trainer(self, trainer):
            self.calls += 1
            if self.calls == 1:
                raise OSError("first")

    trainer = kit.trainer()
    trainer.plugins.append(once := Once("once"))
    with pytest.raises(RuntimeError, match="OSError: first"):
        trainer.fit(kit.Net(), kit.Data())
    assert trainer.fit(kit.Net(), kit.Data())
    assert once.calls == 2


@pytest.mark.parametrize("answer", [None, (), "no", torch.ones(2), 1])
@pytest.mark.parametrize("hook", ["have_metrics_improved", "should_training_stop"])
def test_answers_that_are_neither_yes_nor_no(kit, hook, answer):
    model = type("Answering", (kit.Net,), {hook: lambda self: answer})()
    with pytest.raises(RuntimeError, match=rf"TypeError: {hook} must return True or False, found "):
        kit.trainer(valid_frequency=1, early_stop_cycles=2).fit(model, kit.Data())


@pytest.mark.parametrize("answer", [np.bool_(True), torch.tensor(True), torch.tensor([1.0]), True])
def test_answers_that_are_yes(kit, answer):
    model = type("Answering", (kit.Net,), {"should_training_stop": lambda self: answer})()
    kit.trainer().fit(model, kit.Data())
    assert len(model.batches) == 1


def test_a_banner_that_is_no_text(kit):
    model = type("Silent", (kit.Net,), {"append_to_banner": lambda self, banner: None})()
    with pytest.raises(RuntimeError, match="append_to_banner must return a str, found NoneType None"):
        kit.trainer(print_banner=True).fit(model, kit.Data())


def test_attributes_that_hold_themselves(kit, tmp_path):
    class Tree(kit.Net):
        def setup(self, fast_init=False):
            super().setup()
            self.root = {"child": {}, "nets": [self.net]}
            self.root["child"]["parent"] = self.root

    assert kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1).fit(Tree(), kit.Data())
