"""Wrong arguments are refused when they are given; the message names the argument, and what was found."""

import dataclasses
import math

import pytest

from helios.trainer import Model, Plugin, PluginRegistry, Trainer, TrainingState, TrainingUnit

COUNTS = ["valid_frequency", "chkpt_frequency", "print_frequency", "early_stop_cycles", "keep_last", "nprocs"]
COUNTS += ["dry_run"]
FLAGS = [
    "enable_cudnn_benchmark", "enable_deterministic", "enable_tensorboard", "enable_file_logging",
    "capture_warnings", "enable_progress_bar", "print_banner", "async_chkpt",
]  # fmt: skip
PATHS = ["chkpt_root", "log_path", "run_path"]

WRONG = [
    ({"run_name": 3}, TypeError, "run_name must be a str, found int 3"),
    ({"run_name": None}, TypeError, "run_name must be a str, found NoneType None"),
    ({"run_name": "a/b"}, ValueError, "run_name .* without /.* found 'a/b'"),
    ({"run_name": "a\\b"}, ValueError, "run_name"),
    ({"run_name": "a\nb"}, ValueError, "run_name .* printable"),
    ({"run_name": "a\0b"}, ValueError, "run_name"),
    ({"run_name": "x" * 300}, ValueError, "run_name .* at most 150 bytes, found 300"),
    ({"train_unit": "epoch"}, TypeError, "train_unit must be a TrainingUnit, found str 'epoch'; .*from_str"),
    ({"train_unit": None}, TypeError, "train_unit"),
    ({"total_steps": -1}, ValueError, "total_steps must be 0 or more, found -1"),
    ({"total_steps": 2.0}, TypeError, "total_steps must be an int or infinity, found 2.0"),
    ({"total_steps": math.nan}, TypeError, "total_steps must be an int or infinity, found nan"),
    ({"total_steps": -math.inf}, TypeError, "total_steps must be an int or infinity, found -inf"),
    ({"total_steps": "3"}, TypeError, "total_steps must be an int, found str '3'"),
    ({"total_steps": True}, TypeError, "total_steps must be an int, found bool True"),
    ({"total_steps": None}, TypeError, "total_steps"),
    ({"total_steps": math.inf}, ValueError, "total_steps is infinite .* set early_stop_cycles"),
    ({"total_steps": math.inf, "early_stop_cycles": 2}, ValueError, "valid_frequency is None"),
    ({"early_stop_cycles": 2}, ValueError, "early_stop_cycles=2 .* valid_frequency is None"),
    ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be 1 or more, found 0"),
    ({"accumulation_steps": None}, TypeError, "accumulation_steps must be an int, found NoneType"),
    ({"accumulation_steps": 1.5}, TypeError, "accumulation_steps must be an int, found float 1.5"),
    ({"random_seed": -1}, ValueError, "random_seed must be 0 or more, found -1"),
    ({"random_seed": 2**64}, ValueError, r"random_seed must be less than 2\*\*64, found"),
    ({"random_seed": "1"}, TypeError, "random_seed must be an int, found str '1'"),
    ({"enable_tensorboard": True}, ValueError, "enable_tensorboard is True, but run_path is None"),
    ({"enable_file_logging": True}, ValueError, "enable_file_logging is True, but log_path is None"),
    ({"enable_deterministic": True, "enable_cudnn_benchmark": True}, ValueError, "exclude each other"),
    ({"strategy": "ddp"}, TypeError, "strategy must be Strategy.DDP or Strategy.FSDP, found str 'ddp'"),
    ({"dist_timeout_s": 0}, ValueError, "dist_timeout_s must be more than 0 seconds, and finite, found 0"),
    ({"dist_timeout_s": math.inf}, ValueError, "dist_timeout_s must be more than 0 seconds, .* found inf"),
    ({"dist_timeout_s": math.nan}, ValueError, "dist_timeout_s must be more than 0 seconds, .* found nan"),
    ({"dist_timeout_s": "3"}, TypeError, "dist_timeout_s must be seconds or None, found str '3'"),
    ({"dist_timeout_s": True}, TypeError, "dist_timeout_s must be seconds or None, found bool True"),
    ({"accept_on_resume": "rng"}, TypeError, "accept_on_resume must be a list of names, found str 'rng'"),
    ({"accept_on_resume": [1]}, TypeError, r"accept_on_resume must be a list of names, found \[1\]"),
    ({"use_cpu": 1}, TypeError, "use_cpu must be True, False or None, found int 1"),
    ({"use_cpu": None, "gpus": 0}, TypeError, "gpus must be a list of device ids .* found 0"),
    ({"use_cpu": None, "gpus": (0,)}, TypeError, r"gpus must be a list .* found \(0,\)"),
    ({"use_cpu": None, "gpus": [True]}, TypeError, "gpus must be a list"),
    ({"use_cpu": None, "gpus": ["0"]}, TypeError, "gpus must be a list"),
    ({"use_cpu": None, "gpus": []}, ValueError, r"gpus must be one or more different ids, .* found \[\]"),
    ({"use_cpu": None, "gpus": [-1]}, ValueError, r"gpus .* found \[-1\]"),
    ({"use_cpu": None, "gpus": [0, 0]}, ValueError, r"gpus .* found \[0, 0\]"),
    ({"gpus": [0]}, ValueError, r"use_cpu=True and gpus=\[0\] contradict each other"),
    *(({name: 0}, ValueError, f"{name} must be 1 or more, found 0") for name in COUNTS),
    *(({name: -3}, ValueError, f"{name} must be 1 or more, found -3") for name in COUNTS),
    *(({name: 1.0}, TypeError, f"{name} must be an int, found float 1.0") for name in COUNTS),
    *(({name: True}, TypeError, f"{name} must be an int, found bool True") for name in COUNTS),
    *(({name: 1}, TypeError, f"{name} must be True or False, found int 1") for name in FLAGS),
    *(({name: None}, TypeError, f"{name} must be True or False, found NoneType") for name in FLAGS),
    *(({name: 3}, TypeError, f"{name} must be a path, found int 3") for name in PATHS),
    *(({name: b"x"}, TypeError, f"{name} must be a path, found bytes") for name in PATHS),
    *(({name: ""}, ValueError, f"{name} must be a path or None, found ''") for name in PATHS),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_trainer(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Trainer(**{"use_cpu": True, **arguments})


def test_every_argument_is_tested():
    tested = {name for arguments, _, _ in WRONG for name in arguments}
    assert tested == set(Trainer.__init__.__annotations__) - {"return"}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("below", ["", "sub/folder"])
def test_paths_that_are_files(tmp_path, name, below):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=f"{name} must be a folder, found .*file"):
        Trainer(use_cpu=True, **{name: file / below})


def test_good_arguments(tmp_path):
    settings = Trainer(
        "run", TrainingUnit.ITERATION, math.inf, 3, 4, 5, 6, use_cpu=True, early_stop_cycles=1,
        chkpt_root=str(tmp_path), log_path=tmp_path / "not yet" / "there", nprocs=1, random_seed=2**64 - 1,
    ).settings  # fmt: skip
    assert (settings.valid_frequency, settings.chkpt_frequency, settings.print_frequency) == (3, 4, 5)
    assert settings.chkpt_root == tmp_path
    assert not (tmp_path / "not yet").exists()


def test_defaults():
    trainer = Trainer(use_cpu=True)
    settings = trainer.settings
    assert (settings.train_unit, settings.total_steps, settings.random_seed) == (TrainingUnit.EPOCH, 0, 6691)
    assert (trainer.rank, trainer.local_rank, trainer.gpu_ids, trainer.queue) == (0, 0, [], None)
    assert (trainer.train_exceptions, trainer.test_exceptions, dict(trainer.plugins)) == ([], [], {})


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (3, TypeError, "save_name must be a str, found int 3"),
        ("", ValueError, "save_name must not be empty"),
        ("a/b", ValueError, "save_name .* found 'a/b'"),
        ("x" * 151, ValueError, "save_name .* at most 150 bytes"),
    ],
)
def test_model(kit, name, kind, message):
    with pytest.raises(kind, match=message):
        kit.Net(save_name=name)


def test_a_model_must_define_setup_and_train_step(kit):
    with pytest.raises(TypeError, match="setup"):
        Model("m")

    class Untrainable(Model):
        def setup(self, fast_init=False):
            pass

    with pytest.raises(TypeError, match="model must define train_step to be trained, Untrainable does not"):
        kit.trainer().fit(Untrainable("m"), kit.Data())
    assert kit.trainer().test(Untrainable("m"), kit.Data())  # testing needs none


@pytest.mark.parametrize(
    ("plug_id", "kind", "message"),
    [
        (3, TypeError, "plug_id must be a str, found int 3"),
        ("", ValueError, "plug_id .* found ''"),
        ("model", ValueError, "plug_id .* found 'model'"),
        ("data", ValueError, "plug_id"),
        ("version", ValueError, "plug_id"),
    ],
)
def test_plugin(plug_id, kind, message):
    with pytest.raises(kind, match=message):
        Plugin(plug_id)


def test_registry():
    plugins, a, b = PluginRegistry(), Plugin("a"), Plugin("b")
    plugins.append(b)
    plugins["a"] = a
    assert list(plugins) == ["b", "a"] and plugins["a"] is a and len(plugins) == 2
    with pytest.raises(TypeError, match="plugin must be a Plugin, found str"):
        plugins.append("a")
    with pytest.raises(TypeError, match="plugin must be a Plugin, found int"):
        plugins["c"] = 3
    with pytest.raises(ValueError, match="plug_id 'a' is taken"):
        plugins.append(Plugin("a"))
    with pytest.raises(ValueError, match="'c' cannot be added under the id 'd'"):
        plugins["d"] = Plugin("c")
    with pytest.raises(TypeError, match=r"Bare\.__init__ must call super\(\).__init__\(plug_id\)"):
        plugins.append(type("Bare", (Plugin,), {"__init__": lambda self: None})())
    del plugins["a"]
    plugins.append(Plugin("a"))
    assert list(plugins) == ["b", "a"]


OVERRIDES = {
    "training_batch": "process_training_batch",
    "validation_batch": "process_validation_batch",
    "testing_batch": "process_testing_batch",
    "should_training_stop": "should_training_stop",
}


@pytest.mark.parametrize("by_flag", [True, False])
@pytest.mark.parametrize("override", OVERRIDES)
def test_unique_overrides(override, by_flag):
    def claiming(plug_id):
        if by_flag:
            plugin = Plugin(plug_id)
            setattr(plugin.unique_overrides, override, True)
            return plugin
        return type("Claiming", (Plugin,), {OVERRIDES[override]: lambda self, *args: None})(plug_id)

    plugins = PluginRegistry()
    plugins.append(claiming("a"))
    plugins.append(Plugin("b"))  # control: it claims nothing
    with pytest.raises(ValueError, match=f"plug-in 'c' overrides {override}, which plug-in 'a' does already"):
        plugins.append(claiming("c"))
    assert plugins.owner_of(override) is plugins["a"]


@pytest.mark.parametrize("method", ["fit", "test"])
def test_fit_and_test(kit, method):
    run = getattr(kit.trainer(), method)
    with pytest.raises(TypeError, match="model must be a Model, found str"):
        run("model", kit.Data())
    with pytest.raises(TypeError, match="datamodule must be a DataModule, found list"):
        run(kit.Net(), [])


@pytest.mark.parametrize("name", ["train_exceptions", "test_exceptions"])
@pytest.mark.parametrize("kinds", [[int], [ValueError("one")], [None], ValueError])
def test_lists_of_exceptions(kit, name, kinds):
    trainer = kit.trainer()
    setattr(trainer, name, kinds)
    for run in (trainer.fit, trainer.test):
        with pytest.raises(TypeError, match=f"{name} must be a list of exception types, found "):
            run(kit.Net(), kit.Data())


@pytest.mark.parametrize("metrics", [[1], 0.5, "accuracy"])
def test_metrics(kit, metrics):
    model = kit.Net()
    with pytest.raises(TypeError, match="metrics must be a dict of numbers by name, found "):
        model.metrics = metrics
    assert model.metrics is model._val_scores
    model.metrics = {"accuracy": 0.5}  # control
    assert model.metrics == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("loss", "found"), [("0.5", "str '0.5'"), ([0.5], r"list \[0.5\]"), (None, "NoneType None")]
)
def test_losses(kit, loss, found):
    class Odd(kit.Net):
        def train_step(self, batch, state):
            self._loss_items |= {"good": 1, "odd": loss}

    with pytest.raises(
        RuntimeError, match=rf"_loss_items\['odd'\] must be a number or a tensor.* found {found}"
    ):
        kit.trainer().fit(Odd(), kit.Data())


def test_nothing_to_train(kit):
    with pytest.raises(ValueError, match="total_steps is 0, there is nothing to train"):
        kit.trainer(total_steps=0).fit(kit.Net(), kit.Data())


def test_training_unit():
    assert [TrainingUnit.from_str(text) for text in ("epoch", "ITERATION")] == [
        TrainingUnit.EPOCH,
        TrainingUnit.ITERATION,
    ]
    with pytest.raises(ValueError, match="label must be 'iteration' or 'epoch', found 'step'"):
        TrainingUnit.from_str("step")
    with pytest.raises(TypeError, match="label must be a str, found int 1"):
        TrainingUnit.from_str(1)


def test_training_state():
    state = TrainingState()
    assert set(dataclasses.asdict(state)) == {
        "current_iteration", "global_iteration", "global_epoch", "validation_cycles", "dataset_iter",
        "early_stop_count", "average_iter_time", "running_iter", "trainer",
    }  # fmt: skip
    assert not any(dataclasses.asdict(state).values())
    assert TrainingState.from_dict(state.to_dict()) == state
    with pytest.raises(ValueError, match="missing or unknown: global_epoch, other"):
        TrainingState.from_dict(
            {**{k: v for k, v in state.to_dict().items() if k != "global_epoch"}, "other": 1}
        )
