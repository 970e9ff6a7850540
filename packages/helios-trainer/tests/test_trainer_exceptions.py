"""What becomes of exceptions: wrapped, or passed if they are listed; and everything is closed either way."""

import multiprocessing

import pytest

HOOKS_OF_FIT = [
    "setup", "load_state_dict", "train", "eval", "on_training_start", "on_training_epoch_start",
    "on_training_batch_start", "train_step", "on_training_batch_end", "should_training_stop",
    "on_validation_start", "on_validation_batch_start", "valid_step", "on_validation_batch_end",
    "on_validation_end", "have_metrics_improved", "append_metadata_to_chkpt_name", "state_dict",
    "on_training_epoch_end", "on_training_end",
]  # fmt: skip
HOOKS_OF_TEST = [
    "setup", "load_for_testing", "eval", "on_testing_start", "on_testing_batch_start", "test_step",
    "on_testing_batch_end", "on_testing_end",
]  # fmt: skip
HOOKS_OF_PLUGINS = [
    "configure_trainer", "setup", "configure_model", "on_training_start", "on_validation_start",
    "on_validation_end", "on_training_end", "process_training_batch", "process_validation_batch", "state_dict",
]  # fmt: skip


class MineError(Exception):
    pass


class MineTooError(MineError):
    pass


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def check(trainer, run, error, listed):
    """Run, and see that the exception comes out as it should."""
    if listed is not None:
        listed.append(MineError)
        with pytest.raises(MineTooError) as caught:
            run()
        assert caught.value is error
    else:
        with pytest.raises(
            RuntimeError, match=r"(training|testing) failed: MineTooError: on purpose"
        ) as caught:
            run()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("hook", HOOKS_OF_FIT)
def test_fit(kit, tmp_path, hook, is_listed):
    options = {"chkpt_root": tmp_path, "chkpt_frequency": 1, "valid_frequency": 1}
    if hook == "load_state_dict":
        kit.trainer(total_steps=1, **options).fit(kit.Net(), kit.Data())
    trainer, model, data, error = kit.trainer(**options), kit.Net(), kit.Data(), MineTooError("on purpose")
    setattr(model, hook, failing(error))
    check(trainer, lambda: trainer.fit(model, data), error, trainer.train_exceptions if is_listed else None)
    assert data.teardowns == 1


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("hook", HOOKS_OF_TEST)
def test_test(kit, hook, is_listed):
    trainer, model, data, error = kit.trainer(), kit.Net(), kit.Data(), MineTooError("on purpose")
    setattr(model, hook, failing(error))
    check(trainer, lambda: trainer.test(model, data), error, trainer.test_exceptions if is_listed else None)
    assert data.teardowns == 1


@pytest.mark.parametrize("hook", HOOKS_OF_PLUGINS)
def test_plugins(kit, tmp_path, hook):
    trainer = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, valid_frequency=1)
    plugin, error = kit.ClaimingPlugin([]), MineTooError("on purpose")
    setattr(plugin, hook, failing(error))
    trainer.plugins.append(plugin)
    check(trainer, lambda: trainer.fit(kit.Net(), kit.Data()), error, None)


@pytest.mark.parametrize(
    "hook", ["prepare_data", "setup", "train_dataloader", "valid_dataloader", "teardown"]
)
def test_data(kit, hook):
    trainer, data, error = kit.trainer(valid_frequency=1), kit.Data(), MineTooError("on purpose")
    setattr(data, hook, failing(error))
    check(trainer, lambda: trainer.fit(kit.Net(), data), error, None)


@pytest.mark.parametrize(("activity", "other"), [("train", "test"), ("test", "train")])
def test_the_lists_are_separate(kit, activity, other):
    trainer, model = kit.trainer(), kit.Net()
    getattr(trainer, f"{other}_exceptions").append(MineError)
    setattr(model, f"{activity}_step", failing(MineError("on purpose")))
    run = {"train": trainer.fit, "test": trainer.test}[activity]
    with pytest.raises(RuntimeError, match="on purpose"):
        run(model, kit.Data())
    getattr(trainer, f"{activity}_exceptions").append(MineError)  # control
    with pytest.raises(MineError):
        run(model, kit.Data())


def test_a_plugin_may_list_exceptions(kit):
    class Listing(kit.NotingPlugin):
        def configure_trainer(self, trainer):
            trainer.train_exceptions.append(MineError)

    trainer, model = kit.trainer(), kit.Net()
    trainer.plugins.append(Listing([]))
    model.train_step = failing(MineError("on purpose"))
    with pytest.raises(MineError):
        trainer.fit(model, kit.Data())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("hook", ["setup", "train_step", "valid_step"])
def test_what_is_no_exception_passes_through(kit, kind, hook):
    trainer, model, data = kit.trainer(valid_frequency=1), kit.Net(), kit.Data()
    setattr(model, hook, failing(kind()))
    with pytest.raises(kind):
        trainer.fit(model, data)
    assert data.teardowns == 1


def test_the_checkpoint_in_the_background_is_finished_first(kit, tmp_path):
    trainer, model = kit.trainer(chkpt_root=tmp_path, chkpt_frequency=1, async_chkpt=True), kit.Net()
    model.on_training_epoch_end = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(model, kit.Data())
    assert [path.name for path in tmp_path.iterdir()] == ["net_epoch_1_iter_3.pth"]


@pytest.mark.parametrize("hook", ["train_step", "valid_step"])
def test_workers_are_stopped_though_the_exception_is_kept(kit, hook):
    trainer, model = kit.trainer(valid_frequency=1), kit.Net()
    during = []

    def fail(*args):
        during.extend(multiprocessing.active_children())
        raise MineError("on purpose")

    setattr(model, hook, fail)
    with pytest.raises(RuntimeError) as kept:
        trainer.fit(model, kit.Data(num_workers=1))
    assert kept.value.__cause__ is not None
    assert during
    assert not multiprocessing.active_children()


def test_a_failed_fit_does_not_pass_for_training(kit):
    trainer, model = kit.trainer(), kit.Net()
    trainer.fit(model, kit.Data())
    model.train_step = failing(MineError("on purpose"))
    with pytest.raises(RuntimeError):
        trainer.fit(model, kit.Data())
    model.trace.clear()
    trainer.test(model, kit.Data())
    assert model.trace[0] == ("setup", False)


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ({"train": None}, {}, r"Data\.train_dataloader\(\) is None, but the train split is needed"),
        ({"valid": None}, {"valid_frequency": 1}, r"Data\.valid_dataloader\(\) is None"),
        ({"valid": None}, {}, None),  # control: without validation it is not needed
    ],
)
def test_missing_splits(kit, lengths, options, message):
    trainer = kit.trainer(**options)
    if message is None:
        trainer.fit(kit.Net(), kit.Data(**lengths))
    else:
        with pytest.raises(RuntimeError, match=message):
            trainer.fit(kit.Net(), kit.Data(**lengths))


def test_a_missing_test_split(kit):
    with pytest.raises(RuntimeError, match=r"Data\.test_dataloader\(\) is None"):
        kit.trainer().test(kit.Net(), kit.Data(test=None))


def test_a_split_without_batches_does_not_hang(kit):
    data = kit.Data(train=1, batch_size=2, drop_last=True)
    data.setup = lambda: setattr(
        data, "_train_dataset", data._create_dataset([1, 2, 3], {"batch_size": 4, "drop_last": True})
    )
    with pytest.raises(
        RuntimeError, match="no batches: drop_last leaves nothing of 3 samples in batches of 4"
    ):
        kit.trainer(kit.ITERATION, 5).fit(kit.Net(), data)


def test_a_loader_that_cannot_be_resumed_is_refused(kit):
    import torch

    data = kit.Data()
    data.train_dataloader = lambda: torch.utils.data.DataLoader([1, 2])
    with pytest.raises(RuntimeError, match=r"must be a ResumableDataLoader, found DataLoader"):
        kit.trainer().fit(kit.Net(), data)
