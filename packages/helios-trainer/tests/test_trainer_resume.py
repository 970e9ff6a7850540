"""A run that was interrupted anywhere goes on, in new objects, and ends with the same bits."""

import gc
import random
import weakref

import pytest
import torch
from torch import nn

from helios.chkpt import find_last_checkpoint, load, load_last_checkpoint, save
from helios.core import rng
from helios.trainer import Model

pytestmark = pytest.mark.long

NUM_START_CALLS = 3  # setup, on_training_start, train


def run(kit, root, setup, **model_options):
    """Fit new objects; return the model, whether it finished."""
    options = dict(setup)
    data = kit.Data(**options.pop("data", {}))
    plugins = options.pop("plugins", lambda model: ())
    make = options.pop("model", kit.Net)
    improved = options.pop("improved", None)
    # Foreign draws before must not matter: a new process would not have them.
    torch.rand(7), random.random()
    model = make(improved=improved, accumulation=options.get("accumulation_steps", 1), **model_options)
    trainer = kit.trainer(chkpt_root=root, **options)
    for plugin in plugins(model):
        trainer.plugins.append(plugin)
    try:
        trainer.fit(model, data)
    except kit.AbortError:
        return model, False
    model.end = kit.end_of(model)  # now, while the generators are as the run left them
    return model, True


def check_going_on(kit, first, rest, whole):
    """The interrupted run is a beginning of the whole, what it became is its end, and nothing is lost between."""
    calls, restarted = rest.trace[:NUM_START_CALLS], rest.trace[NUM_START_CALLS:]
    assert kit.names(calls) == ["setup", "on_training_start", "train"]
    assert first.trace == whole.trace[: len(first.trace)]
    assert restarted == whole.trace[len(whole.trace) - len(restarted) :]
    assert len(first.trace) + len(restarted) >= len(whole.trace)
    assert first.batches == whole.batches[: len(first.batches)]
    assert rest.batches == whole.batches[len(whole.batches) - len(rest.batches) :]
    assert rest.end == whole.end


SETUPS = {
    "epochs": {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1},
    "epochs, saved before they are validated": {"total_steps": 4, "valid_frequency": 2, "chkpt_frequency": 1},
    "epochs of one batch": {"total_steps": 4, "valid_frequency": 3, "chkpt_frequency": 2, "data": {"train": 1}},
    "epochs, accumulating": {"total_steps": 4, "accumulation_steps": 2, "chkpt_frequency": 1},
    "iterations": {"unit": "ITERATION", "total_steps": 7, "valid_frequency": 2, "chkpt_frequency": 3},
    "iterations, validated when saved": {
        "unit": "ITERATION", "total_steps": 6, "valid_frequency": 2, "chkpt_frequency": 2,
    },
    "iterations, each saved": {"unit": "ITERATION", "total_steps": 7, "chkpt_frequency": 1},
    "iterations, accumulating across epochs": {
        "unit": "ITERATION", "total_steps": 5, "accumulation_steps": 2, "valid_frequency": 2, "chkpt_frequency": 1,
    },
    "early stop": {
        "total_steps": 9, "valid_frequency": 1, "chkpt_frequency": 1, "early_stop_cycles": 2,
        "improved": {1: False, 2: True, 3: False, 4: False}, "data": {"train": 1, "valid": 1},
    },
    "drop_last": {"total_steps": 2, "chkpt_frequency": 1, "data": {"train": 3, "drop_last": True}},
}  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_interrupted_at_any_call(kit, tmp_path, name):
    setup = dict(SETUPS[name])
    setup["unit"] = getattr(kit, setup.get("unit", "EPOCH"))
    whole, finished = run(kit, tmp_path / "whole", setup)
    assert finished
    stride = 1 if len(whole.trace) < 60 else 2  # every second call of the longer ones, to save time
    for at in range(NUM_START_CALLS, len(whole.trace), stride):
        root = tmp_path / str(at)
        first, finished = run(kit, root, setup, abort_at=at)
        assert not finished
        rest, finished = run(kit, root, setup)
        assert finished
        check_going_on(kit, first, rest, whole)


def test_interrupted_after_every_step_again_and_again(kit, tmp_path):
    """Ten calls and an interruption, over and over: a resumed run can be resumed."""
    setup = {"unit": kit.ITERATION, "total_steps": 8, "valid_frequency": 3, "chkpt_frequency": 1}
    whole, _ = run(kit, tmp_path / "whole", setup)
    finished, attempts = False, 0
    while not finished:
        last, finished = run(kit, tmp_path / "bits", setup, abort_at=25)
        attempts += 1
    assert attempts > 3
    assert last.end == whole.end


@pytest.mark.parametrize("forgotten", ["optimizer", "schedule", "net"])
def test_control_a_forgotten_piece_of_state_is_seen(kit, tmp_path, forgotten):
    class Forgetful(kit.Net):
        def load_state_dict(self, state, fast_init=False):
            super().load_state_dict({**state, forgotten: getattr(self, forgotten).state_dict()})

    setup = {"total_steps": 3, "chkpt_frequency": 1, "model": Forgetful}
    whole, _ = run(kit, tmp_path / "whole", setup)
    run(kit, tmp_path / "two", setup, abort_at=40)
    rest, finished = run(kit, tmp_path / "two", setup)
    assert finished
    assert rest.end != whole.end


def test_hooks_of_an_epoch_begun_run_once(kit, tmp_path):
    setup = {"unit": kit.ITERATION, "total_steps": 6, "chkpt_frequency": 2, "data": {"train": 6}}
    whole, _ = run(kit, tmp_path / "whole", setup)
    at = whole.trace.index(("train_step", (3, 3, 1, 3)))
    run(kit, tmp_path / "two", setup, abort_at=at)
    rest, _ = run(kit, tmp_path / "two", setup)
    names = kit.names(rest.trace)
    assert "on_training_epoch_start" not in names
    assert names.count("on_training_epoch_end") == 1
    assert rest.trace[3] == ("on_training_batch_start", (3, 3, 1, 3))


def test_the_early_stop_counter_goes_on(kit, tmp_path):
    """Interrupted between the checkpoint and the check that triggers: the check is the first thing done."""
    never = dict.fromkeys(range(1, 9), False)
    setup = {
        "total_steps": 9,
        "valid_frequency": 1,
        "chkpt_frequency": 1,
        "early_stop_cycles": 2,
        "improved": never,
    }
    whole, _ = run(kit, tmp_path / "whole", setup)
    checks = [i for i, name in enumerate(kit.names(whole.trace)) if name == "have_metrics_improved"]
    run(kit, tmp_path / "two", setup, abort_at=checks[1])
    rest, _ = run(kit, tmp_path / "two", setup)
    assert kit.names(rest.trace)[3:] == ["have_metrics_improved", "on_training_epoch_end", "on_training_end"]
    # Control: had the counter been lost, one more epoch would have run.
    assert rest.batches == []


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_running_means_go_on(kit, tmp_path, unit):
    # Saved in the middle between two validations, so the sums themselves must be in the checkpoint.
    setup = {"unit": getattr(kit, unit), "total_steps": 4, "valid_frequency": 4, "chkpt_frequency": 2}
    whole, _ = run(kit, tmp_path / "whole", setup)
    (mean,) = [call for call in whole.trace if call[0] == "on_validation_end"]
    at = whole.trace.index(("on_validation_start", 1))
    run(kit, tmp_path / "two", setup, abort_at=at)
    rest, _ = run(kit, tmp_path / "two", setup)
    assert mean in rest.trace
    # Control: the mean of what came after the checkpoint alone is another number.
    fresh, _ = run(kit, tmp_path / "three", {**setup, "valid_frequency": 2})
    assert [call[2] for call in fresh.trace if call[0] == "on_validation_end"][1] != mean[2]


class Gradients(Model):
    """Each kind of gradient that may be pending when a checkpoint is taken."""

    def __init__(self, log, abort_at=None, style="accumulate"):
        super().__init__("gradients")
        self.log, self.abort_at, self.style = log, abort_at, style

    def setup(self, fast_init=False):
        self.often, self.rarely = nn.Linear(4, 2), nn.ModuleDict({"a": nn.Linear(2, 1)})
        self.temperature = torch.ones(1, requires_grad=True)  # in no module
        self.table = nn.Linear(2, 2)  # used in odd batches only
        self.optimizers = {
            "often": torch.optim.SGD([*self.often.parameters(), *self.table.parameters()], 0.1, momentum=0.9),
            "rarely": torch.optim.Adam([*self.rarely.parameters(), self.temperature], 0.1),
        }

    def parts(self):
        return {"often": self.often, "rarely": self.rarely, "table": self.table, **self.optimizers_by_name()}

    def optimizers_by_name(self):
        return {f"{name} optimizer": optimizer for name, optimizer in self.optimizers.items()}

    def state_dict(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        return {**state, "temperature": self.temperature.detach()}

    def load_state_dict(self, state, fast_init=False):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        with torch.no_grad():
            self.temperature.copy_(state["temperature"])

    def on_training_start(self):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def step(self, state):
        self.optimizers["often"].step()
        self.optimizers["often"].zero_grad(set_to_none=self.style != "zeros")
        if state.global_iteration % 5 == 0:
            self.optimizers["rarely"].step()
            self.optimizers["rarely"].zero_grad()

    def train_step(self, batch, state):
        if state.global_iteration == self.abort_at:
            raise KeyboardInterrupt
        if self.style == "step first" and state.global_iteration > 1:
            self.step(state)
        x = self.often(batch[0])
        if state.global_iteration % 2:
            x = self.table(x)
        (self.rarely["a"](x) * self.temperature).square().mean().backward()
        if self.style in ("accumulate", "zeros"):
            self.step(state)
        if self.style == "stale":  # steps, but never clears: gradients decay instead
            self.optimizers["often"].step()
            for p in self.often.parameters():
                p.grad.mul_(0.5)
        self.log.append(self.temperature.item())


@pytest.mark.parametrize("style", ["accumulate", "zeros", "step first", "stale"])
@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_pending_gradients_go_on(kit, tmp_path, style, unit):
    options = {"total_steps": 4 if unit == "EPOCH" else 12, "chkpt_frequency": 1}

    def fit(root, abort_at=None):
        model = Gradients([], abort_at, style)
        kit.trainer(getattr(kit, unit), chkpt_root=root, **options).fit(model, kit.Data())
        return kit.bits(model.state_dict()), model.log

    whole, _ = fit(tmp_path / "whole")
    for at in range(4, 12):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / str(at), at)
        assert fit(tmp_path / str(at))[0] == whole


class Modes(Model):
    """Hooks of an epoch freeze and switch to evaluation what no state_dict speaks of."""

    def __init__(self, abort_at=None):
        super().__init__("modes")
        self.abort_at = abort_at

    def setup(self, fast_init=False):
        self.nets = [
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            nn.Sequential(nn.Dropout(), nn.Linear(4, 1)),
        ]
        self.nets[0].requires_grad_(False)
        parameters = [p for net in self.nets for p in net.parameters()]
        self.optimizer = torch.optim.Adam(parameters, 0.1)

    def state_dict(self):
        return {"nets": [net.state_dict() for net in self.nets], "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state, fast_init=False):
        for net, saved in zip(self.nets, state["nets"], strict=True):
            net.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    def on_training_epoch_start(self, epoch):
        self.nets[0].requires_grad_(epoch == 2)  # gradual unfreezing
        self.nets[0][1].train(epoch == 2)  # and batch norm that stays as it is

    def train_step(self, batch, state):
        if state.global_iteration == self.abort_at:
            raise KeyboardInterrupt
        self.optimizer.zero_grad()
        self.nets[1](self.nets[0](batch[0])).square().mean().backward()
        self.optimizer.step()


@pytest.mark.parametrize("at", [3, 4, 6, 7, 8, 10, 11])
def test_frozen_and_evaluating_modules_stay_so(kit, tmp_path, at):
    def fit(root, abort_at=None):
        model = Modes(abort_at)
        trainer = kit.trainer(kit.ITERATION, 12, chkpt_root=root, chkpt_frequency=1)
        trainer.fit(model, kit.Data(train=4, batch_size=3))
        return kit.bits(model.state_dict())

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "two", at)
    assert fit(tmp_path / "two") == whole


@pytest.mark.parametrize(
    ("lost", "check"),
    [
        ("load_rng_state_dict", lambda *args: test_interrupted_at_any_call(*args, "epochs")),
        ("restore_tables", lambda *args: test_running_means_go_on(*args, "EPOCH")),
        ("restore_gradients", lambda *args: test_pending_gradients_go_on(*args, "accumulate", "EPOCH")),
        ("restore_frozen", lambda *args: test_frozen_and_evaluating_modules_stay_so(*args, 6)),
        ("restore_training_modes", lambda *args: test_frozen_and_evaluating_modules_stay_so(*args, 3)),
    ],
)
def test_control_what_is_not_restored_is_seen(kit, tmp_path, monkeypatch, lost, check):
    monkeypatch.setattr(f"helios.trainer._resumption.{lost}", lambda *args, **options: None)
    with pytest.raises(AssertionError):
        check(kit, tmp_path)


def test_more_steps_train_though_the_end_switched_to_evaluation(kit, tmp_path):
    class Ending(kit.Net):
        def on_training_end(self):
            self.net.eval()

        def train_step(self, batch, state):
            assert self.net.training
            super().train_step(batch, state)

    for total in (4, 8):
        kit.trainer(kit.ITERATION, total, chkpt_root=tmp_path, chkpt_frequency=1).fit(Ending(), kit.Data())


def test_hooks_that_draw_random_numbers(kit, tmp_path):
    class Drawing(kit.Net):
        def draw(self):
            torch.rand(3), random.random(), rng.get_default_numpy_rng().generator.random()

        def setup(self, fast_init=False):
            super().setup(fast_init)
            self.draw()

        def on_training_start(self):
            super().on_training_start()
            self.draw()

        def state_dict(self):
            self.draw()
            return super().state_dict()

        def load_state_dict(self, state, fast_init=False):
            super().load_state_dict(state, fast_init)
            self.draw()

    setup = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1, "model": Drawing}
    whole, _ = run(kit, tmp_path / "whole", setup)
    for at in range(25, len(whole.trace), 9):
        run(kit, tmp_path / str(at), setup, abort_at=at)
        rest, _ = run(kit, tmp_path / str(at), setup)
        assert rest.end == whole.end


def test_a_grad_scaler_goes_on(kit, tmp_path):
    class Scaled(kit.Net):
        def setup(self, fast_init=False):
            super().setup(fast_init)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)

        def state_dict(self):
            return {**super().state_dict(), "scaler": self.scaler.state_dict()}

        def load_state_dict(self, state, fast_init=False):
            super().load_state_dict(state, fast_init)
            self.scaler.load_state_dict(state["scaler"])

        def train_step(self, batch, state):
            self.note("train_step", kit.counters(state))
            self.optimizer.zero_grad()
            self.scaler.scale(
                self.net(batch[0]).square().mean() * 1e30
            ).backward()  # overflows: steps are skipped
            self.scaler.step(self.optimizer)
            self.scaler.update()

    setup = {"unit": kit.ITERATION, "total_steps": 8, "chkpt_frequency": 1, "model": Scaled}
    whole, _ = run(kit, tmp_path / "whole", setup)
    assert whole.scaler.get_scale() < 2.0**30
    for at in (12, 18, 25, 30):
        run(kit, tmp_path / str(at), setup, abort_at=at)
        rest, finished = run(kit, tmp_path / str(at), setup)
        assert finished
        assert rest.end == whole.end


def test_plugins_go_on_under_their_ids(kit, tmp_path):
    setup = {"total_steps": 3, "valid_frequency": 1, "chkpt_frequency": 1}
    made = []

    def plugins(model):
        made.append(kit.NotingPlugin([], "a"))
        return made[-1], kit.ClaimingPlugin([], "b")

    run(kit, tmp_path, {**setup, "plugins": plugins}, abort_at=40)
    counted = made[-1].count
    run(kit, tmp_path, {**setup, "plugins": plugins})
    assert (counted, made[-1].count) == (1, 3)
    assert load(find_last_checkpoint(tmp_path))["a"] == {"count": 3}


def altered(root, change):
    """Change the newest checkpoint in a folder."""
    path = find_last_checkpoint(root)
    checkpoint = load(path)
    change(checkpoint)
    del checkpoint["version"]
    save(checkpoint, path)


def drop(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("rng"), "lacks 'rng'"),
        (drop("model"), "lacks 'model'"),
        (drop("data"), "lacks 'data'"),
        (drop("training_state"), "lacks 'training_state'"),
        (drop("rng", "numpy"), "numpy: missing"),
        (drop("rng", "torch"), "torch: missing"),
        (drop("data", "epoch"), "lacks 'epoch'"),
        (drop("training_state", "global_epoch"), "global_epoch"),
        (drop("training_state", "trainer", "cut"), "lacks 'cut'"),
        (drop("plug"), "no state of the plug-in 'plug'"),
    ],
)
def test_a_missing_part_is_named(kit, tmp_path, change, named):
    setup = {
        "total_steps": 2, "chkpt_frequency": 1, "plugins": lambda model: [kit.NotingPlugin([])],
        "enable_file_logging": True, "log_path": tmp_path / "logs",
    }  # fmt: skip
    run(kit, tmp_path / "c", setup, abort_at=20)
    altered(tmp_path / "c", change)
    with pytest.raises(RuntimeError, match=named):
        run(kit, tmp_path / "c", setup)
    assert any(named in path.read_text() for path in (tmp_path / "logs").iterdir())
    # Control: it is the change that is refused.
    run(kit, tmp_path / "control", setup, abort_at=20)
    altered(tmp_path / "control", lambda checkpoint: None)
    assert run(kit, tmp_path / "control", setup)[1]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"random_seed": 1}, "random_seed=6691, this trainer has random_seed=1"),
        ({"accumulation_steps": 3}, "accumulation_steps=1, this trainer has accumulation_steps=3"),
        ({"unit": "ITERATION"}, "train_unit=EPOCH, this trainer has train_unit=ITERATION"),
        ({"data": {"train": 4}}, "num_samples: the state has 6, here it is 8"),
    ],
)
def test_settings_that_make_another_run_are_refused(kit, tmp_path, changed, named):
    setup = {"total_steps": 2, "chkpt_frequency": 1}
    run(kit, tmp_path, setup, abort_at=20)
    other = {**setup, **changed}
    if "unit" in other:
        other["unit"] = getattr(kit, other["unit"])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=named):
        run(kit, tmp_path, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert run(kit, tmp_path, setup)[1]  # and it can still go on as it was


@pytest.mark.parametrize("workers", [{"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_may_change(kit, tmp_path, workers):
    setup = {"unit": kit.ITERATION, "total_steps": 7, "chkpt_frequency": 2, "valid_frequency": 3}
    whole, _ = run(kit, tmp_path / "whole", setup)
    run(kit, tmp_path / "two", setup, abort_at=len(whole.trace) // 2)
    rest, _ = run(kit, tmp_path / "two", {**setup, "data": workers})
    assert rest.end == whole.end


def test_frequencies_may_change(kit, tmp_path):
    setup = {"unit": kit.ITERATION, "total_steps": 7, "chkpt_frequency": 2}
    whole, _ = run(kit, tmp_path / "whole", setup)
    run(kit, tmp_path / "two", setup, abort_at=len(whole.trace) // 2)
    rest, _ = run(kit, tmp_path / "two", {**setup, "chkpt_frequency": 1, "keep_last": 1, "async_chkpt": True})
    assert rest.end == whole.end


def test_a_damaged_checkpoint_is_passed_over(kit, tmp_path):
    setup = {
        "total_steps": 4,
        "chkpt_frequency": 1,
        "enable_file_logging": True,
        "log_path": tmp_path / "logs",
    }
    whole, _ = run(kit, tmp_path / "whole", setup)
    run(kit, tmp_path / "two", setup, abort_at=len(whole.trace) - 10)
    path = find_last_checkpoint(tmp_path / "two")
    path.write_bytes(path.read_bytes()[:-100])
    rest, _ = run(kit, tmp_path / "two", setup)
    assert rest.end == whole.end
    assert f"skipped {path}" in "".join(p.read_text() for p in (tmp_path / "logs").iterdir())


def test_other_runs_in_the_folder_are_left_alone(kit, tmp_path):
    setup = {"total_steps": 2, "chkpt_frequency": 1, "keep_last": 1}
    for name in ("a", "a_epoch_9_iter_9", "b"):
        run(kit, tmp_path, {**setup, "run_name": name, "total_steps": 3})
    alone, _ = run(kit, tmp_path / "alone", {**setup, "run_name": "c"})
    beside, _ = run(kit, tmp_path, {**setup, "run_name": "c"})
    assert beside.end == alone.end
    assert len(list(tmp_path.glob("*.pth"))) == 4


def test_no_second_copy_of_the_state_stays_in_memory(kit, tmp_path):
    seen = []

    class Copying(kit.Net):
        """Takes copies, so the checkpoint's own tensors are nobody's when the loop begins."""

        def load_state_dict(self, state, fast_init=False):
            seen.extend(weakref.ref(tensor) for tensor in tensors_in(state))
            super().load_state_dict(
                {key: torch.utils._pytree.tree_map(clone, value) for key, value in state.items()}, fast_init
            )

        def train_step(self, batch, state):
            if seen:
                gc.collect()
                assert not [ref for ref in seen if ref() is not None]
            super().train_step(batch, state)

    def clone(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    def tensors_in(state):
        return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]

    setup = {"total_steps": 3, "chkpt_frequency": 1, "model": Copying}
    run(kit, tmp_path, setup, abort_at=30)
    assert run(kit, tmp_path, setup)[1]
    assert seen


def test_weights_are_mapped_to_the_models_device(kit, tmp_path, monkeypatch):
    asked = []
    real = load_last_checkpoint
    monkeypatch.setattr(
        "helios.trainer._find.load_last_checkpoint",
        lambda *place, **options: asked.append(options) or real(*place, **options),
    )
    setup = {"total_steps": 2, "chkpt_frequency": 1}
    run(kit, tmp_path, setup, abort_at=20)
    run(kit, tmp_path, setup)
    assert asked == [{"map_location": "cpu", "safe_types": [], "shards": False}] * 2
