"""A rehearsal goes through every hook, and leaves nothing behind."""

import pytest
import torch

from helios.trainer.logging import get_tensorboard_writer

pytestmark = pytest.mark.long


def rehearse(kit, tmp_path, unit, num_batches, model=None, **options):
    options = {
        "unit": unit, "total_steps": 50, "valid_frequency": 7, "chkpt_frequency": 5, "print_frequency": 9,
        "chkpt_root": tmp_path / "c", "enable_file_logging": True, "log_path": tmp_path / "l",
        "enable_tensorboard": True, "run_path": tmp_path / "t", "dry_run": num_batches, **options,
    }  # fmt: skip
    model = model or kit.Net(accumulation=options.get("accumulation_steps", 1))
    trainer = kit.trainer(**options)
    trainer.plugins.append(kit.ClaimingPlugin(model.trace))
    data = kit.Data(train=9, valid=9, test=9)
    assert trainer.fit(model, data)
    assert trainer.test(model, data)
    assert kit.names(model.trace).count("test_step") == num_batches
    assert list(tmp_path.iterdir()) == []
    return model


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_every_hook(kit, tmp_path, unit):
    model = rehearse(kit, tmp_path, getattr(kit, unit), 3)
    names = kit.names(model.trace)
    assert names.count("train_step") == 3
    assert names.count("valid_step") == 3
    hooks = {
        name
        for kind in (kit.Net, kit.ClaimingPlugin)
        for name in vars(kind)
        if name.startswith(("on_", "process_", "have_", "should_", "setup", "train", "eval", "valid_"))
    }
    assert hooks <= {name.removeprefix("plug.") for name in names}
    assert any(call[0] == "on_training_batch_end" and call[2] for call in model.trace)  # should_log


def test_accumulating(kit, tmp_path):
    model = rehearse(kit, tmp_path, kit.ITERATION, 4, accumulation_steps=2)
    assert kit.names(model.trace).count("train_step") == 4
    assert model.state.current_iteration == 2


def test_fewer_batches_than_one_iteration_has(kit, tmp_path):
    model = rehearse(kit, tmp_path, kit.ITERATION, 1, accumulation_steps=2)
    assert model.state.current_iteration == 1


def test_nothing_is_resumed(kit, tmp_path):
    chkpt_root = tmp_path / "c"
    kit.trainer(total_steps=2, chkpt_frequency=1, chkpt_root=chkpt_root).fit(kit.Net(), kit.Data())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    model = kit.Net()
    kit.trainer(total_steps=2, chkpt_frequency=1, chkpt_root=chkpt_root, dry_run=2).fit(model, kit.Data())
    assert len(model.batches) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_state_that_cannot_be_saved_is_found(kit, tmp_path):
    class Bad(kit.Net):
        def state_dict(self):
            return {"path": tmp_path}

    with pytest.raises(RuntimeError, match=r"TypeError: model\.path|TypeError: .*'path'"):
        rehearse(kit, tmp_path, kit.EPOCH, 2, Bad())


def test_hooks_find_the_writer_that_they_have_in_a_run(kit, tmp_path):
    class Writing(kit.Net):
        def train_step(self, batch, state):
            super().train_step(batch, state)
            get_tensorboard_writer().add_scalar("loss", 1.0, state.global_iteration)
            self.log("more", torch.ones(()))

        def test_step(self, batch, step):
            super().test_step(batch, step)
            get_tensorboard_writer().add_scalar("test", 1.0, step)

    rehearse(kit, tmp_path, kit.EPOCH, 2, Writing())
