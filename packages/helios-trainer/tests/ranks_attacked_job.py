"""Runs of two or three ranks that something is wrong with, or odd. Arguments: a scenario below, a folder for results.

One process of it is a rank, and has the variables that torchrun sets.
"""

import logging
import os
import pickle
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import trainer_kit as kit
from torch import nn

import helios.trainer._watch as watch
from helios.trainer import Model, Plugin, Strategy, _resumption
from helios.trainer._digest import digest
from helios.trainer._modules import buffers_of, named_parameters
from helios.trainer._rank_process import Failure, revive
from helios.trainer._rank_state import _on_cpu
from helios.trainer.distributed import all_reduce_tensors, safe_barrier

NAME, FOLDER = sys.argv[1], Path(sys.argv[2])


class Line(Model):
    """Trains a line; what a test wants more is done by `at`, called with the place and the model."""

    def __init__(self, at=lambda place, model: None, make=lambda: nn.Linear(4, 1)):
        super().__init__("line")
        self.at, self.make = at, make

    def setup(self, fast_init=False):
        self.net = self.distribute(self.make())
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)

    def state_dict(self):
        return self.save_all(net=self.net, optimizer=self.optimizer)

    def load_state_dict(self, state, fast_init=False):
        self.load_all(state, net=self.net, optimizer=self.optimizer)

    def train_step(self, batch, state):
        self.optimizer.zero_grad()
        loss = self.net(batch[0]).square().mean()
        loss.backward()
        self.optimizer.step()
        self._loss_items["loss"] = loss
        self.at("train", self)

    def valid_step(self, batch, step):
        self.net(batch[0])

    def on_validation_end(self, validation_cycle):
        self.at("validation", self)
        super().on_validation_end(validation_cycle)

    def types_for_safe_load(self):
        self.at("load", self)
        return []


def trainer(**options):
    return kit.trainer(kit.ITERATION, 4, chkpt_root=FOLDER / "checkpoints", chkpt_frequency=2, **options)


def fit(model, data=None, plugin=None, **options):
    """Return whether the run has finished, or the error that ended it with the notes of its cause."""
    try:
        of_model = trainer(**options)
        if plugin is not None:
            of_model.plugins.append(plugin)
        return of_model.fit(model, data or kit.Data(train=4, tail="pad"))
    except Exception as error:
        caught = error.__cause__ or error
        return [f"{type(caught).__name__}: {caught}", *getattr(caught, "__notes__", [])]


def fails_in_validation():
    def at(place, model):
        if place == "validation" and model.rank == 1:
            time.sleep(0.5)  # until rank 0 waits for its vote
            raise kit.AbortError("in validation")

    return fit(Line(at), valid_frequency=1)


def is_slow_in_validation():
    watch._SILENCE_S, watch._SIGN_S = 1.0, 0.2

    def at(place, model):
        if place == "validation" and model.rank == 0:
            time.sleep(3.0)

    return fit(Line(at), valid_frequency=3)


def is_slower_than_allowed():
    def at(place, model):
        if place == "validation" and model.rank == 1:
            time.sleep(6.0)

    return fit(Line(at), valid_frequency=1, dist_timeout_s=2)


def is_slower_than_allowed_to_save():
    def at(place, model):
        if place == "validation" and model.rank == 1:
            time.sleep(6.0)

    return fit(Line(at), valid_frequency=2, dist_timeout_s=2)


def cannot_load():
    def at(place, model):
        if place == "load" and model.rank == 1:
            raise kit.AbortError("in load")

    return fit(Line(at))


def sharded():
    """A checkpoint that follows a validation, and a run that goes on from it."""

    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))

    def stop(place, model):
        if place == "validation":
            model.trainer.request_stop()

    options = {"strategy": Strategy.FSDP, "valid_frequency": 2}
    stopped = fit(Line(stop, make), **options)
    model = Line(make=make)
    return [stopped, fit(model, **options), [p.to_local().tolist() for p in model.net.parameters()]]


def with_hooks():
    def make():
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        net.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        return net

    return fit(Line(make=make), kit.Data(train=6))


def losses(change):
    def at(place, model):
        if place == "train":
            change(model)

    model = Line(at)
    outcome = fit(model, print_frequency=1)
    return [outcome, kit.bits(dict(sorted(model._running_losses.items())))]


def other_losses():
    return losses(lambda model: model._loss_items.update({"own": 1.0} if model.rank == 0 else {}))


def losses_in_another_order():
    def change(model):
        items = [("a", torch.tensor(1.0)), ("b", torch.tensor(2.0))]
        model._loss_items = dict(items if model.rank == 0 else reversed(items))

    return losses(change)


class DrawingData(kit.Data):
    def prepare_data(self):
        torch.rand(3), random.random()


def draws_in_prepare_data():
    weights = []

    def make():
        net = nn.Linear(4, 1)
        weights.append(net.weight.tolist())
        return net

    return [fit(Line(make=make), DrawingData(train=4)), weights]


class OwnStates(Line):
    """Each rank has counters, a history, a network and an optimizer of its own, and lets its copy drift at times."""

    def setup(self, fast_init=False):
        super().setup()
        self.own = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.own_optimizer = torch.optim.Adam(self.own.parameters(), lr=0.01)
        self.counts, self.seen = {f"of rank {self.rank}": [self.rank]}, 0

    def state_dict(self):
        parts = {
            "net": self.net,
            "optimizer": self.optimizer,
            "own": self.own,
            "own_optimizer": self.own_optimizer,
        }
        return self.save_all(**parts, counts=self.counts, seen=self.seen)

    def load_state_dict(self, state, fast_init=False):
        parts = {
            "net": self.net,
            "optimizer": self.optimizer,
            "own": self.own,
            "own_optimizer": self.own_optimizer,
        }
        values = self.load_all(state, **parts)
        self.counts, self.seen = dict(values["counts"]), values["seen"]

    def train_step(self, batch, state):
        self.seen += int(batch[0].sum() * 100)
        self.counts[f"batch {self.seen}"] = [state.global_iteration]
        self.own_optimizer.zero_grad(set_to_none=False)
        self.own(batch[0]).square().sum().backward()
        if state.global_iteration != 2:  # else it has gradients that wait for the step after the checkpoint
            self.own_optimizer.step()
        with self.exchange_gradients(self.net, when=state.global_iteration > 2):
            super().train_step(batch, state)


class Remembering(Plugin):
    """Keeps of each rank what the others do not have."""

    def __init__(self):
        super().__init__("remembering")
        self.seen = []

    def observe_training_step(self, state):
        self.seen.append(torch.rand(()).item())

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def own_states(strategy=Strategy.DDP):
    """What each rank has at the end of a run, and of one that was stopped on the way."""

    def run(name, *stops):
        """Stop in the first start of this name after so many batches, in the second likewise; go on to the end."""
        for stop in (*stops, None):
            seen, plugin = [], Remembering()

            def at(place, model, stop=stop, seen=seen):
                seen.append(place)
                if seen.count("train") == stop:
                    model.trainer.request_stop()

            model = OwnStates(at)
            data = kit.Data(train=4, batch_size=3)
            outcome = fit(model, data, plugin, run_name=name, strategy=strategy)
            assert outcome is (stop is None), outcome
        gradients = [p.grad for p in model.own.parameters()]
        return digest([model.state_dict(), plugin.state_dict(), gradients])

    return [run("whole"), run("stopped", 2, 1)]


def own_states_fsdp():
    return own_states(Strategy.FSDP)


def own_states_stopped():
    return fit(OwnStates(lambda place, model: model.trainer.request_stop()), kit.Data(train=4), Remembering())


def own_states_alone():
    """Goes on from what `own_states_stopped` left, and returns the warnings."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("helios").addHandler(handler)
    return [fit(OwnStates(), kit.Data(train=4), Remembering()), said]


def own_states_lost():
    """The control: rank 0's states for all."""
    _resumption.overlaid = lambda state, parts: dict(state)
    return own_states()


class Averaging(Plugin):
    """Keeps a mean of the weights, of which each rank has a part."""

    def __init__(self):
        super().__init__("averaging")
        self.means = {}

    def configure_model(self, model):
        self.model = model

    def observe_training_step(self, state):
        for name, parameter in self.model.net.named_parameters():
            mean = self.means.get(name, parameter.detach())
            self.means[name] = 0.5 * mean + 0.5 * parameter.detach()

    def state_dict(self):
        return {"means": self.means}

    def load_state_dict(self, state):
        self.means = dict(state["means"])


def sharded_plugin():
    def run(name, stop):
        def at(place, model):
            if place == "train" and stop:
                model.trainer.request_stop()

        plugin = Averaging()
        outcome = fit(Line(at), plugin=plugin, run_name=name, strategy=Strategy.FSDP)
        return outcome, digest(plugin.means)

    _, whole = run("whole", False)
    stopped, _ = run("stopped", True)
    finished, resumed = run("stopped", False)
    return [stopped, finished, whole == resumed]


class OnFirstOnly(Line):
    def state_dict(self):
        return {} if self.rank > 0 else super().state_dict()


def sharded_on_first_only():
    return fit(OnFirstOnly(), strategy=Strategy.FSDP)


def restarted(make, *stops, strategy=Strategy.DDP):
    """What each rank has at the end of a run, and of runs that were stopped after so many batches; the first file."""
    outcomes = []
    for stop in (None, *stops):
        for stop_here in {stop: True, None: False}:
            seen = []

            def at(place, model, stop_here=stop_here, seen=seen):
                seen.append(place)
                if len(seen) == stop_here:
                    model.trainer.request_stop()

            model = make(at)
            outcome = fit(model, kit.Data(train=4), run_name=f"run{stop}", strategy=strategy)
            assert outcome is (stop_here is None), outcome
        gradients = {name: p.grad for name, p in named_parameters(model)}
        outcomes.append(digest([model.state_dict(), gradients, buffers_of(model), list(model.order.items())]))
    sizes = [path.stat().st_size for path in (FOLDER / "checkpoints").glob(f"run{stops[0]}_*.pth")]
    return [*outcomes, min(sizes, default=0)]


class Restarted(Line):
    """Has in its state what `others` returns, besides."""

    def __init__(self, at):
        super().__init__(at)
        self.order = {}

    def parts(self):
        return {"net": self.net, "optimizer": self.optimizer}

    def others(self):
        return {}

    def state_dict(self):
        return self.save_all(**self.parts(), **self.others())

    def load_state_dict(self, state, fast_init=False):
        self.take(self.load_all(state, **self.parts()))

    def take(self, values):
        pass

    def train_step(self, batch, state):
        self.step(batch[0], state.global_iteration)
        self.at("train", self)

    def step(self, x, number):
        self.optimizer.zero_grad()
        self.net(x).square().mean().backward()
        self.optimizer.step()


class AveragesWeights(Restarted):
    """Each rank trains for itself; then weights are averaged, and Adam has moments that differ."""

    def step(self, x, number):
        with self.exchange_gradients(self.net, when=False):
            super().step(x, number)
        if number % 2 == 0:
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.copy_(all_reduce_tensors(parameter) / 2)


def averages_weights():
    return restarted(AveragesWeights, 2)


class SkipsBackward(Restarted):
    """The second of three batches is left out, after a forward pass: gradients of the first wait."""

    def step(self, x, number):
        with self.exchange_gradients(self.net, when=number % 3 != 1):
            loss = self.net(x).square().mean()
            if number % 3 != 2:
                loss.backward()
        if number % 3 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def skips_backward():
    return restarted(SkipsBackward, 2)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.which = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)]), 0

    def forward(self, x):
        return self.heads[self.which](x)


class TakesTurns(Restarted):
    """A part of the network is used only in the batches that exchange nothing."""

    def setup(self, fast_init=False):
        self.net = self.distribute(Heads(), find_unused_parameters=True)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def step(self, x, number):
        is_step = number % 2 == 0
        self.net.module.which = int(is_step)
        with self.exchange_gradients(self.net, when=is_step):
            self.net(x).square().mean().backward()
        if is_step:
            self.optimizer.step()
            self.optimizer.zero_grad()


def takes_turns():
    return restarted(TakesTurns, 1)


class Versioned(nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version") is None:
            raise ValueError("a state without versions")
        super()._load_from_state_dict(state, prefix, metadata, *others)


class InLists(Restarted):
    """Networks in a list, one of which each rank has for itself; with batch norms, a version, and a buffer for a while.

    Also values in an order that differs between ranks.
    """

    def setup(self, fast_init=False):
        distributed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.net = [self.distribute(distributed), nn.Sequential(Versioned(4, 4), nn.BatchNorm1d(4))]
        self.optimizer = [torch.optim.Adam(net.parameters(), lr=0.05) for net in self.net]
        self.order = {0: 0, 1: 0}

    def others(self):
        return {"order": self.order}

    def take(self, values):
        self.order = dict(values["order"])

    def step(self, x, number):
        for net, optimizer in zip(self.net, self.optimizer, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        self.order[self.rank] = self.order.pop(self.rank)
        self.net[1].register_buffer("cache", torch.ones(1 + self.rank), persistent=False)


def in_lists():
    return restarted(InLists, 2)


def in_lists_fsdp():
    return restarted(InLists, 2, strategy=Strategy.FSDP)


class Large(Restarted):
    """Only rank 0 has a copy of the weights; rank 1 has a number of its own."""

    def __init__(self, at):
        super().__init__(at)
        self.make = lambda: nn.Linear(4, 10_000)

    def others(self):
        return {"number": self.rank, **({} if self.rank else {"copy": self.net.module.weight.clone()})}


def large():
    return restarted(Large, 2)


class OwnBest(Restarted):
    """Each rank has weights of another network as its best."""

    def setup(self, fast_init=False):
        self.net = [self.distribute(nn.Linear(4, 1)) for _ in range(2)]
        self.optimizer = torch.optim.Adam([p for net in self.net for p in net.parameters()])
        self.best = self.net[self.rank].module.weight

    def others(self):
        return {"best": self.best}

    def take(self, values):
        assert torch.equal(values["best"], self.best)

    def step(self, x, number):
        self.optimizer.zero_grad()
        sum(net(x).square().mean() for net in self.net).backward()
        self.optimizer.step()


def own_best():
    return restarted(OwnBest, 2)


def bytes_of_views():
    """How much is sent of gradients that are views of one long tensor, as with gradient_as_bucket_view."""
    row = torch.zeros(100, 1000)
    return len(pickle.dumps(_on_cpu({"gradients": list(row.unbind())})))


class Waiting(kit.Data):
    def teardown(self):
        safe_barrier()


def waits_in_teardown():
    def at(place, model):
        if model.rank == 1:
            raise kit.AbortError("in training")

    return fit(Line(at), Waiting(train=4), dist_timeout_s=60)


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one, self.lock = one, threading.Lock()


def revived():
    error = revive(Failure.of(0, OddError(1, 2)).pickled)
    return [type(error).__name__, str(error), error.one]


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcome = globals()[NAME]()
    (FOLDER / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(outcome))
