"""Runs of two or three ranks that something is wrong with, or odd. Arguments: a scenario below, a folder for results.

Starts itself once for each rank, with the variables that torchrun sets.
"""

import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import trainer_kit as kit
from torch import nn

import helios.trainer._watch as watch
from helios.trainer import Model, Strategy
from helios.trainer._rank_process import Failure, revive

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


def fit(model, data=None, **options):
    """Return whether the run has finished, or the error that ended it with the notes of its cause."""
    try:
        return trainer(**options).fit(model, data or kit.Data(train=4, tail="pad"))
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


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one, self.lock = one, threading.Lock()


def revived():
    error = revive(Failure.of(0, OddError(1, 2)).pickled)
    return [type(error).__name__, str(error), error.one]


def main():
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        result = globals()[NAME]()
        (FOLDER / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
        return
    world_size = int(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    try:
        for process in ranks:
            process.wait(timeout=90)
    finally:
        for process in ranks:
            process.kill()


if __name__ == "__main__":
    main()
