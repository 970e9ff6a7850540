"""test(): what is tested, and where it is logged."""

import random
import warnings

import pytest
import torch

from helios.trainer.logging import get_root_logger, get_tensorboard_writer


def fit(kit, root, **options):
    trainer, model = kit.trainer(chkpt_root=root, chkpt_frequency=1, **options), kit.Net()
    trainer.fit(model, kit.Data())
    return trainer, model


def test_after_fit_the_trained_weights_are_tested(kit):
    trainer, model = kit.trainer(), kit.Net()
    trainer.fit(model, kit.Data())
    weights = kit.bits(model.state_dict()["net"])
    model.trace.clear()
    assert trainer.test(model, kit.Data()) is True
    assert ("setup", False) not in model.trace
    assert kit.bits(model.state_dict()["net"]) == weights


def test_a_fresh_trainer_tests_the_last_checkpoint(kit, tmp_path, capsys):
    trainer, trained = fit(kit, tmp_path)
    trainer.test(trained, kit.Data())
    fresh = kit.Net()
    kit.trainer(chkpt_root=tmp_path).test(fresh, kit.Data())
    assert kit.bits(fresh.state_dict()) == kit.bits(trained.state_dict())
    assert fresh._test_scores == trained._test_scores
    assert f"testing the model of {tmp_path / 'net_epoch_2_iter_6.pth'}" in capsys.readouterr().out
    assert kit.names(fresh.trace)[:2] == ["setup", "load_for_testing"]
    # Control: without the folder it is an untrained model, and that is said.
    control = kit.Net()
    kit.trainer().test(control, kit.Data())
    assert control._test_scores != trained._test_scores
    assert "testing the model as it was set up: no checkpoint of the run was found" in capsys.readouterr().out


def test_another_model_is_not_taken_for_the_trained_one(kit):
    trainer, model = kit.trainer(), kit.Net()
    trainer.fit(model, kit.Data())
    other = kit.Net()
    trainer.test(other, kit.Data())
    assert other.trace[0] == ("setup", False)


def test_a_finished_run_that_is_fitted_again_is_loaded(kit, tmp_path):
    _, trained = fit(kit, tmp_path)
    trainer, again = fit(kit, tmp_path)
    trainer.test(again, kit.Data())
    assert kit.bits(again.state_dict()) == kit.bits(trained.state_dict())


def test_scores_are_cleared(kit):
    trainer, model = kit.trainer(), kit.Net()
    trainer.test(model, kit.Data())
    first = dict(model._test_scores)
    trainer.test(model, kit.Data())
    assert model._test_scores == first


def test_plugins_have_their_state(kit, tmp_path):
    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, valid_frequency=1)
    plugin = kit.ClaimingPlugin([])
    trainer.plugins.append(plugin)
    model = kit.Net()
    trainer.fit(model, kit.Data())
    plugin.trace.clear()
    trainer.plugins.append(kit.NotingPlugin(plugin.trace, "plug2"))  # one that only tests
    trainer.test(model, kit.Data(test=1))
    names = kit.names(plugin.trace)
    assert "plug.setup" not in names and "plug.configure_model" not in names  # as fit left it
    assert "plug2.setup" in names
    fresh, other = kit.trainer(chkpt_root=tmp_path), kit.ClaimingPlugin([])
    fresh.plugins.append(other)
    fresh.plugins.append(kit.NotingPlugin([], "plug2"))
    fresh.test(kit.Net(), kit.Data())
    assert other.count == plugin.count == 2


def speaking(kit):
    class Speaking(kit.Net):
        def on_testing_end(self):
            super().on_testing_end()
            get_root_logger().info("tested: %s", self._test_scores)
            get_tensorboard_writer().add_scalar("test", 1.0, 0)

    return Speaking()


@pytest.mark.parametrize("is_fresh", [True, False])
def test_logs_of_the_run_go_on(kit, tmp_path, is_fresh):
    logs = {
        "enable_file_logging": True, "log_path": tmp_path / "logs",
        "enable_tensorboard": True, "run_path": tmp_path / "runs",
    }  # fmt: skip
    options = {"chkpt_root": tmp_path / "c", "chkpt_frequency": 1, **logs}
    trainer, model = kit.trainer(**options), speaking(kit)
    trainer.fit(model, kit.Data())
    if is_fresh:
        trainer, model = kit.trainer(**options), speaking(kit)
    trainer.test(model, kit.Data())
    (log,), (folder,) = (tmp_path / "logs").iterdir(), (tmp_path / "runs").iterdir()
    assert "tested: {'sum':" in log.read_text() and "finished: total_steps" in log.read_text()
    assert len(list(folder.iterdir())) == 2  # event files, one of each call
    assert get_tensorboard_writer() is None


def test_testing_again_after_a_restart_is_the_same_test(kit, tmp_path):
    """Same scores though the test draws numbers, every scalar once, and a usable model after `fit`."""

    class Drawing(kit.Net):
        def test_step(self, batch, step):
            super().test_step(batch, step)
            drawn = torch.rand(()).item() + random.random()
            self._test_scores["drawn"] = self._test_scores.get("drawn", 0) + drawn
            get_tensorboard_writer().add_scalar("test", drawn, step)

    def fit_and_test():
        logs = {"enable_tensorboard": True, "run_path": tmp_path / "tb"}
        trainer, model = kit.trainer(chkpt_root=tmp_path / "chkpt", chkpt_frequency=1, **logs), Drawing()
        trainer.fit(model, kit.Data())
        drawn_after_fit = torch.rand(()).item()
        trainer.test(model, kit.Data())
        return kit.bits(model.state_dict()), dict(model._test_scores), drawn_after_fit

    first = fit_and_test()
    assert fit_and_test() == first  # fit finds a finished run
    fresh = Drawing()
    logs = {"enable_tensorboard": True, "run_path": tmp_path / "tb"}
    kit.trainer(chkpt_root=tmp_path / "chkpt", **logs).test(fresh, kit.Data())
    assert (kit.bits(fresh.state_dict()), dict(fresh._test_scores)) == first[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    (folder,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(folder), purge_orphaned_data=False)
    events.Reload()
    assert [event.step for event in events.Scalars("test")] == [0, 1]
