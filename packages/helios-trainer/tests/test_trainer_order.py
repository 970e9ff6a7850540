"""The order of all calls, the counters that each sees, and where training stops."""

import math

import pytest


def fit(kit, trainer, data=None, **options):
    model = kit.Net(**options)
    trainer.fit(model, data or kit.Data())
    return model


def batch(current, total, epoch, within, should_log=False):
    at = (current, total, epoch, within)
    return [
        ("on_training_batch_start", at),
        ("train_step", at),
        ("on_training_batch_end", at, should_log),
        ("should_training_stop",),
    ]


VALID_BATCHES = [
    call
    for step in range(2)
    for call in (
        ("on_validation_batch_start", step),
        ("valid_step", step, False, False),
        ("on_validation_batch_end", step),
    )
]


def without_values(trace):
    """Leave out scores and means, whose values are not the point here."""
    return [
        call[:1]
        if call[0] == "have_metrics_improved"
        else call[:2]
        if call[0] == "on_validation_end"
        else call
        for call in trace
    ]


def validation(cycle):
    return [
        ("eval",),
        ("on_validation_start", cycle),
        *VALID_BATCHES,
        ("on_validation_end", cycle),
        ("train",),
    ]


START = [("setup", False), ("on_training_start",), ("train",)]


def test_epochs(kit):
    model = fit(kit, kit.trainer(valid_frequency=1, print_frequency=2), kit.Data(train=2))
    expected = [
        *START,
        ("on_training_epoch_start", 1),
        *batch(1, 1, 1, 1),
        *batch(2, 2, 1, 2),
        *validation(1),
        ("have_metrics_improved",),
        ("should_training_stop",),
        ("on_training_epoch_end", 1),
        ("should_training_stop",),
        ("on_training_epoch_start", 2),
        *batch(3, 3, 2, 1),
        *batch(4, 4, 2, 2, should_log=True),
        *validation(2),
        ("have_metrics_improved",),
        ("should_training_stop",),
        ("on_training_epoch_end", 2),
        ("should_training_stop",),
        ("on_training_end",),
    ]
    assert without_values(model.trace) == expected


def test_iterations_across_epochs(kit):
    trainer = kit.trainer(kit.ITERATION, 5, valid_frequency=2, print_frequency=3)
    model = fit(kit, trainer, kit.Data(train=3))
    expected = [
        *START,
        ("on_training_epoch_start", 1),
        *batch(1, 1, 1, 1),
        *batch(2, 2, 1, 2),
        *validation(1),
        ("have_metrics_improved",),
        ("should_training_stop",),
        *batch(3, 3, 1, 3, should_log=True),
        ("on_training_epoch_end", 1),
        ("on_training_epoch_start", 2),
        *batch(4, 4, 2, 1),
        *validation(2),
        ("have_metrics_improved",),
        ("should_training_stop",),
        *batch(5, 5, 2, 2),
        ("on_training_epoch_end", 2),
        ("on_training_end",),
    ]
    assert without_values(model.trace) == expected


def test_iterations_with_accumulation_count_complete_ones(kit):
    trainer = kit.trainer(kit.ITERATION, 3, accumulation_steps=2, valid_frequency=2, print_frequency=1)
    model = fit(kit, trainer, kit.Data(train=3), accumulation=2)
    expected = [
        *START,
        ("on_training_epoch_start", 1),
        *batch(0, 1, 1, 1),
        *batch(1, 2, 1, 2, should_log=True),
        *batch(1, 3, 1, 3),
        ("on_training_epoch_end", 1),
        ("on_training_epoch_start", 2),
        *batch(2, 4, 2, 1, should_log=True),
        *validation(1),
        ("have_metrics_improved",),
        ("should_training_stop",),
        *batch(2, 5, 2, 2),
        *batch(3, 6, 2, 3, should_log=True),
        ("on_training_epoch_end", 2),
        ("on_training_end",),
    ]
    assert without_values(model.trace) == expected


def test_testing(kit):
    model = kit.Net()
    kit.trainer().test(model, kit.Data())
    assert model.trace == [
        ("setup", False),
        ("load_for_testing",),
        ("eval",),
        ("on_testing_start",),
        *(
            call
            for step in range(2)
            for call in (
                ("on_testing_batch_start", step),
                ("test_step", step, False, False),
                ("on_testing_batch_end", step),
            )
        ),
        ("on_testing_end",),
    ]


def test_plugins_come_before_the_model(kit):
    trainer, trace = kit.trainer(total_steps=1, valid_frequency=1), []
    trainer.plugins.append(kit.NotingPlugin(trace, "plug2"))
    trainer.plugins.append(kit.ClaimingPlugin(trace, "plug"))
    model = kit.Net(trace=trace)
    trainer.fit(model, kit.Data(train=1, valid=1))
    trainer.test(model, kit.Data(test=1))
    expected = """
        plug2.configure_trainer plug.configure_trainer plug2.setup plug2.configure_model plug.setup
        plug.configure_model setup plug2.on_training_start plug.on_training_start on_training_start train
        on_training_epoch_start on_training_batch_start plug.process_training_batch train_step
        on_training_batch_end plug.should_training_stop should_training_stop
        eval plug2.on_validation_start plug.on_validation_start on_validation_start
        on_validation_batch_start plug.process_validation_batch valid_step on_validation_batch_end
        plug2.on_validation_end plug.on_validation_end on_validation_end train
        have_metrics_improved plug.should_training_stop should_training_stop on_training_epoch_end
        plug.should_training_stop should_training_stop
        plug2.on_training_end plug.on_training_end on_training_end
        load_for_testing eval plug2.on_testing_start plug.on_testing_start on_testing_start
        on_testing_batch_start plug.process_testing_batch test_step on_testing_batch_end
        plug2.on_testing_end plug.on_testing_end on_testing_end
    """
    assert kit.names(trace) == expected.split()


def test_a_plugin_replaces_batches(kit):
    class Doubling(kit.NotingPlugin):
        def process_training_batch(self, batch, state):
            return batch[0] * 0, batch[1]

    trainer = kit.trainer(total_steps=1)
    trainer.plugins.append(Doubling([]))
    model = fit(kit, trainer)
    assert [total for _, total in model.batches] == [0.0] * 3
    control = fit(kit, kit.trainer(total_steps=1))
    assert 0.0 not in [total for _, total in control.batches]


def test_a_plugin_that_stops_is_not_followed_by_the_model(kit):
    trainer, trace = kit.trainer(total_steps=9), []
    plugin = kit.ClaimingPlugin(trace)
    plugin.stop = lambda: True
    trainer.plugins.append(plugin)
    model = kit.Net(trace=trace)
    trainer.fit(model, kit.Data())
    assert "should_training_stop" not in kit.names(trace)
    assert model.state.global_iteration == 1


def nth_stop_check(number):
    """Stop at the check with this number, from 1."""

    def stop(model):
        return sum(call[0] == "should_training_stop" for call in model.trace) == number

    return stop


@pytest.mark.parametrize(
    ("number", "at", "before"),
    [
        (1, (1, 1, 1, 1), "on_training_batch_end"),  # after a batch
        (2, (2, 2, 1, 2), "on_training_batch_end"),  # after the last batch: no validation then
        (3, (2, 2, 1, 0), "have_metrics_improved"),  # after a validation
        (4, (2, 2, 1, 0), "on_training_epoch_end"),  # after an epoch
    ],
)
def test_epochs_stop_at_each_check(kit, number, at, before):
    trainer = kit.trainer(total_steps=9, valid_frequency=1)
    model = fit(kit, trainer, kit.Data(train=2), stop=nth_stop_check(number))
    names = kit.names(model.trace)
    last_check = len(names) - 1 - names[::-1].index("should_training_stop")
    assert names[last_check - 1] == before
    end = [] if before == "on_training_epoch_end" else ["on_training_epoch_end"]
    assert names[last_check + 1 :] == [*end, "on_training_end"]
    assert kit.counters(model.state) == at
    assert ("eval" in names) == (number >= 3)


@pytest.mark.parametrize(
    ("number", "iterations", "before"),
    [(1, 0, "on_training_batch_end"), (2, 1, "on_training_batch_end"), (3, 1, "have_metrics_improved")],
)
def test_iterations_stop_at_each_check(kit, number, iterations, before):
    trainer = kit.trainer(kit.ITERATION, 9, accumulation_steps=2, valid_frequency=1)
    model = fit(kit, trainer, kit.Data(train=3), stop=nth_stop_check(number), accumulation=2)
    names = kit.names(model.trace)
    assert names[-4:] == [before, "should_training_stop", "on_training_epoch_end", "on_training_end"]
    assert model.state.current_iteration == iterations


@pytest.mark.parametrize("unit", ["EPOCH", "ITERATION"])
def test_early_stop(kit, unit):
    improved = {1: False, 2: True, 3: False, 4: False}  # the second resets the counter
    trainer = kit.trainer(getattr(kit, unit), 50, valid_frequency=2, early_stop_cycles=2)
    model = fit(kit, trainer, kit.Data(train=3), improved=improved)
    assert model.state.early_stop_count == 2
    assert model.state.validation_cycles == 4
    assert (model.state.global_epoch if unit == "EPOCH" else model.state.current_iteration) == 8
    names = kit.names(model.trace)
    assert names[-3:] == ["have_metrics_improved", "on_training_epoch_end", "on_training_end"]


def test_without_early_stop_cycles_no_answer_stops(kit):
    never = dict.fromkeys(range(1, 9), False)
    model = fit(kit, kit.trainer(total_steps=5, valid_frequency=1), improved=never)
    assert (model.state.global_epoch, model.state.early_stop_count) == (5, 0)


def test_infinite_training_is_ended_by_the_early_stop(kit):
    trainer = kit.trainer(kit.ITERATION, math.inf, valid_frequency=3, early_stop_cycles=1)
    model = fit(kit, trainer, improved={3: False})
    assert model.state.current_iteration == 9


def test_running_losses_sum_what_came_since_the_validation_before(kit):
    model = kit.Net()
    losses = []
    step = model.train_step

    def noted(batch, state):
        step(batch, state)
        losses.append(model._loss_items["loss"].detach())

    model.train_step = noted
    kit.trainer(kit.ITERATION, 6, valid_frequency=2).fit(model, kit.Data())
    sums = [call[2] for call in model.trace if call[0] == "on_validation_end"]
    assert sums == [sum(losses[i : i + 2]).item() for i in (0, 2, 4)]


def test_losses_are_of_one_batch(kit):
    class Now(kit.Net):
        def train_step(self, batch, state):
            assert self._loss_items == {}
            self._loss_items[f"of {state.global_iteration}"] = 1.0

    model = Now()
    kit.trainer(total_steps=1).fit(model, kit.Data(train=3))
    assert model._loss_items == {"of 3": 1.0}
    assert model._running_losses == {"of 1": 1.0, "of 2": 1.0, "of 3": 1.0}


def test_scores_are_of_one_validation_or_test(kit):
    class Now(kit.Net):
        tests = 0

        def valid_step(self, batch, step):
            self._val_scores[f"of {self.cycle}"] = 1.0

        def test_step(self, batch, step):
            self._test_scores[f"of {self.tests}"] = 1.0

    model, trainer = Now(), kit.trainer(total_steps=2, valid_frequency=1)
    trainer.fit(model, kit.Data())
    assert model._val_scores.keys() == {"sum", "of 2"}
    for model.tests in (1, 2):
        trainer.test(model, kit.Data())
        assert model._test_scores.keys() == {f"of {model.tests}"}


def test_validations_shuffle_anew_and_draw_no_training_randomness(kit):
    orders = []

    class Watching(kit.Net):
        def valid_step(self, batch, step):
            orders.append(batch[1].tolist())

        def have_metrics_improved(self):
            return True

    with_validation, without = Watching(), Watching()
    kit.trainer(valid_frequency=1).fit(with_validation, kit.Data(valid=4))
    kit.trainer().fit(without, kit.Data(valid=4))
    assert orders[:4] != orders[4:]
    assert sorted(index for order in orders[:4] for index in order) == list(range(8))
    assert with_validation.batches == without.batches
    assert kit.bits(with_validation.state_dict()["net"]) == kit.bits(without.state_dict()["net"])


def test_a_plugin_is_configured_once_and_may_add_others(kit):
    class Child(kit.Plugin):
        def configure_trainer(self, trainer):
            configured.append((self.plug_id, self.trainer is trainer))

    class Parent(Child):
        def configure_trainer(self, trainer):
            super().configure_trainer(trainer)
            trainer.plugins.append(Child("child"))

    configured = []
    trainer, model = kit.trainer(), kit.Net()
    trainer.plugins.append(Parent("parent"))
    trainer.fit(model, kit.Data())
    trainer.test(model, kit.Data())
    assert configured == [("parent", True), ("child", True)]
