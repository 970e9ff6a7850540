"""The helpers of Model: distribute, autocast, clip_gradients, save_all and load_all."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from helios.trainer import Model


class Bare(Model):
    def __init__(self):
        super().__init__("bare")

    def setup(self, fast_init=False):
        pass


class Full(Bare):
    """Has one of everything that has a state, and much that has none."""

    def __init__(self, seed=0, hidden=3):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 1))
        self.head = self.net[2]  # a part of a part
        self.both = nn.ModuleList([self.net, nn.Dropout()])  # nothing of its own
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.best = torch.tensor(math.inf)
        self.kind = nn.Linear  # a class, which has those methods too

    def step(self):
        self.net(torch.randn(5, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.best = torch.rand(())

    def parts(self):
        return {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def state_dict(self):
        return self.save_all(**self.parts(), best=self.best)

    def load_state_dict(self, state, fast_init=False):
        self.best = self.load_all(state, **self.parts())["best"]


def trained(**options):
    model = Full(**options)
    for _ in range(3):
        model.step()
    return model


def test_save_all_asks_each_part_and_keeps_values(kit):
    model = trained()
    state = model.state_dict()
    assert list(state) == ["net", "optimizer", "scheduler", "best", "_parts"]
    assert state["_parts"] == ["net", "optimizer", "scheduler"]
    assert state["best"] is model.best
    for name, part in model.parts().items():
        assert kit.bits(state[name]) == kit.bits(part.state_dict())


def test_load_all_gives_it_back(kit):
    state = copy.deepcopy(trained().state_dict())
    model = Full(seed=1)
    assert kit.bits(model.state_dict()) != kit.bits(state)
    model.load_state_dict(state)
    assert kit.bits(model.state_dict()) == kit.bits(state)
    assert model.load_all(state, **model.parts()).keys() == {"best"}
    assert model.load_all(state, **model.parts(), best=None)["best"] is state["best"]  # values may be given


def test_a_run_that_uses_both_is_exact(kit, tmp_path):
    class Net(kit.Net):
        def parts(self):
            return {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}

        def state_dict(self):
            return self.save_all(**self.parts(), cycle=self.cycle)

        def load_state_dict(self, state, fast_init=False):
            self.cycle = self.load_all(state, **self.parts())["cycle"]

    def end(root, abort_at=None):
        model = Net(abort_at=abort_at)
        trainer = kit.trainer(valid_frequency=1, chkpt_root=root, chkpt_frequency=1)
        try:
            trainer.fit(model, kit.Data())
        except kit.AbortError:
            return None
        return kit.end_of(model)

    whole = end(tmp_path / "whole")
    assert end(tmp_path / "killed", abort_at=30) is None
    assert list((tmp_path / "killed").glob("*.pth"))
    assert end(tmp_path / "killed") == whole


def forget(model, name):
    parts = {key: part for key, part in model.parts().items() if key != name}
    return model.save_all(**parts)


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_a_forgotten_part_is_named(name):
    with pytest.raises(ValueError, match=rf"^save_all was not given {name}: .*save_all\({name}=\.\.\.\)"):
        forget(Full(), name)


def test_a_forgotten_network_is_named_under_each_name():
    with pytest.raises(ValueError, match="not given net, head, both:"):
        forget(Full(), "net")


class Counter:
    """Not of torch, and has a state."""

    def state_dict(self):
        return {"count": 1}

    def load_state_dict(self, state):
        pass


def linear():
    return nn.Linear(1, 1)


FORGOTTEN = {
    "ema": lambda: torch.optim.swa_utils.AveragedModel(linear()),
    "scaler": lambda: torch.amp.GradScaler("cpu"),
    "counter": Counter,
    "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(linear().parameters())),
    "buffer": lambda: nn.BatchNorm1d(2, affine=False),
}


@pytest.mark.parametrize("name", FORGOTTEN)
@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda part: part, ""),
        (lambda part: [3, part], ".1"),
        (lambda part: ({"k": part},), ".0.k"),
    ],
    ids=["itself", "in a list", "in a dict in a tuple"],
)
def test_whatever_has_a_state_is_missed(name, wrap, place):
    model = Full()
    setattr(model, name, wrap(FORGOTTEN[name]()))
    with pytest.raises(ValueError, match=rf"not given {name}{place}: .*save_all\({name}="):
        model.state_dict()
    for omit in ([name], (name + place,)):
        state = model.save_all(omit=omit, **model.parts())
        assert state["_parts"] == ["net", "optimizer", "scheduler"]


def test_what_has_no_state_is_not_missed():
    model = Full()
    model.drop, model.loss, model.metric = nn.Dropout(), nn.CrossEntropyLoss(), nn.Module()
    model.metric.register_buffer("sum", torch.zeros(()), persistent=False)
    model.numbers, model.tensor = [1, 2.0, "x", None], torch.ones(2)
    model.state_dict()


def test_omit_is_checked():
    model = Full()
    with pytest.raises(ValueError, match="omit names 'teahcer', which is no attribute"):
        model.save_all(omit=["teahcer"], **model.parts())
    for omit in ("net", [3]):
        with pytest.raises(TypeError, match="omit must be several names"):
            model.save_all(omit=omit, **model.parts())
    with pytest.raises(ValueError, match="no part may be called '_parts'"):
        model.save_all(**model.parts(), _parts=1)


class Several(Bare):
    def __init__(self, num_nets=2):
        super().__init__()
        self.nets = {str(i): nn.Linear(1, 1) for i in range(num_nets)}
        self.optimizers = [torch.optim.SGD(n.parameters(), momentum=0.9) for n in self.nets.values()]

    def state_dict(self):
        return self.save_all(nets=self.nets, optimizers=self.optimizers)

    def load_state_dict(self, state, fast_init=False):
        assert self.load_all(state, nets=self.nets, optimizers=self.optimizers) == {}


def test_parts_in_dicts_and_lists(kit):
    first, second = Several(), Several()
    for optimizer, net in zip(first.optimizers, first.nets.values(), strict=True):
        net(torch.ones(1, 1)).backward()
        optimizer.step()
    state = copy.deepcopy(first.state_dict())
    assert kit.bits(second.state_dict()) != kit.bits(state)
    second.load_state_dict(state)
    assert kit.bits(second.state_dict()) == kit.bits(state)
    with pytest.raises(ValueError, match=r"nets holds \['0', '1', '2'\] here, and \['0', '1'\] there"):
        Several(num_nets=3).load_state_dict(state)
    with pytest.raises(TypeError, match=r"nets\.x has no state_dict, though others in nets have"):
        first.save_all(nets={**first.nets, "x": 3}, optimizers=first.optimizers)


def change(state, name, **changes):
    """The state with changes in a part; None removes."""
    part = {**state[name], **changes}
    return {**state, name: {key: value for key, value in part.items() if value is not None}}


def without(state, name):
    parts = [part for part in state["_parts"] if part != name]
    return {key: value for key, value in {**state, "_parts": parts}.items() if key != name}


MISFITS = {
    "a part without a state": (lambda s: without(s, "scheduler"), "it has no scheduler"),
    "a value where a part is": (lambda s: {**without(s, "net"), "net": 3}, "net is a value there, and has a"),
    "a state of nobody": (
        lambda s: {**s, "ema": {}, "_parts": [*s["_parts"], "ema"]},
        "it has a state of ema, which load_all was not given",
    ),
    "a key too few": (lambda s: change(s, "net", **{"0.bias": None}), "net lacks 0.bias there"),
    "a key too many": (lambda s: change(s, "net", **{"9.bias": ONE}), "net has no 9.bias here"),
    "another shape": (
        lambda s: change(s, "net", **{"0.bias": ONE}),
        r"net has 0.bias of shape \(3,\) here, and \(1,\) there",
    ),
    "other groups": (
        lambda s: change(s, "optimizer", param_groups=[{"params": [0]}]),
        r"optimizer has groups of \[6\] parameters here, and of \[1\] there",
    ),
}
ONE = torch.ones(1)


@pytest.mark.parametrize(("spoil", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_changes_nothing(kit, spoil, message):
    state, model = copy.deepcopy(trained().state_dict()), Full(seed=1)
    before = copy.deepcopy(kit.bits(model.state_dict()))
    with pytest.raises(ValueError, match=f"nothing was loaded: {message}"):
        model.load_state_dict(spoil(state))
    assert kit.bits(model.state_dict()) == before
    model.load_state_dict(state)  # the control
    assert kit.bits(model.state_dict()) == kit.bits(state) != before


def test_all_that_does_not_fit_is_named():
    state = without(trained().state_dict(), "optimizer")
    with pytest.raises(
        ValueError, match=r"it has no optimizer; it has a state of net, .*; .*state of scheduler"
    ):
        Full().load_all(state, optimizer=torch.optim.SGD(linear().parameters()))
    with pytest.raises(ValueError, match="net has a state there, and none here"):
        Full().load_all(trained().state_dict(), net=3)


def test_a_state_that_was_written_by_hand(kit):
    model = trained()
    state = {name: part.state_dict() for name, part in model.parts().items()} | {"best": model.best}
    other = Full(seed=1)
    other.load_state_dict(copy.deepcopy(state))
    assert kit.bits(other.state_dict()) == kit.bits(model.state_dict())
    with pytest.raises(ValueError, match="it has a state of scheduler, which load_all was not given"):
        other.load_all(state, net=other.net, optimizer=other.optimizer)


def test_a_part_may_be_called_state(kit):
    model = Bare()
    model.state = nn.Linear(1, 1)
    assert model.load_all(model.save_all(state=model.state), state=model.state) == {}


def test_autocast():
    model, x = Bare(), torch.ones(2, 2)
    with model.autocast():
        assert (x @ x).dtype == torch.bfloat16
    with model.autocast(torch.float16):
        assert (x @ x).dtype == torch.float16
    with model.autocast(enabled=False):
        assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_autocast_is_of_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: calls.append((args, options)))
    model = Bare()
    model.device = torch.device("cuda", 1)
    model.autocast()
    assert calls == [(("cuda",), {"dtype": torch.bfloat16, "enabled": True})]


@pytest.mark.parametrize(("norm_type", "norm"), [(2.0, 5.0), (math.inf, 4.0), (1.0, 7.0)])
@pytest.mark.parametrize("of", ["network", "iterator", "tensor"])
def test_clip_gradients(of, norm_type, norm):
    net = nn.Linear(2, 1, bias=False)
    given = {"network": net, "iterator": net.parameters(), "tensor": net.weight}[of]
    net.weight.grad = torch.tensor([[3.0, -4.0]])
    found = Bare().clip_gradients(given, norm / 2, norm_type)
    assert torch.equal(found, torch.tensor(norm))
    expected = torch.tensor([[3.0, -4.0]]) * torch.clamp((norm / 2) / (torch.tensor(norm) + 1e-6), max=1.0)
    assert torch.equal(net.weight.grad, expected)
    before = net.weight.grad.clone()
    Bare().clip_gradients(net, norm, norm_type)
    assert torch.equal(net.weight.grad, before)  # it is within the bound


def test_clip_gradients_does_not_wait():
    """A meta tensor has no numbers: whoever needs one of them gets an error."""
    net = nn.Linear(2, 1, device="meta")
    for parameter in net.parameters():
        parameter.grad = torch.empty_like(parameter)
    assert Bare().clip_gradients(net, 1.0).device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):  # the control
        nn.utils.clip_grad_norm_(net.parameters(), 1.0, error_if_nonfinite=True)


def test_norms_that_are_not_finite_are_returned():
    net = nn.Linear(1, 1, bias=False)
    net.weight.grad = torch.tensor([[math.inf]])
    assert torch.isinf(Bare().clip_gradients(net, 1.0))


def test_distribute_in_one_process():
    model, net = Bare(), nn.Linear(1, 1)
    assert model.distribute(net, find_unused_parameters=True) is net
    model.device = torch.device("meta")
    assert model.distribute(net).weight.device.type == "meta"


def test_distribute_on_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "helios.trainer._replicas.DistributedDataParallel",
        lambda *args, **options: calls.append((args, options)),
    )
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    model, net = Bare(), nn.Linear(1, 1)
    model.is_distributed = True
    model.device = torch.device("cuda", 3)
    model.distribute(net, bucket_cap_mb=5)
    model.device = torch.device("cpu")
    model.distribute(net)
    assert calls == [((net,), {"device_ids": [torch.device("cuda", 3)], "bucket_cap_mb": 5}), ((net,), {})]


TWO = """
import copy, json, sys
import torch, torch.distributed as dist
import helios.trainer as hlt
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
class M(hlt.Model):
    def setup(self, fast_init=False): pass
model = M("m")
model.is_distributed = sys.argv[3] == "together"
torch.manual_seed(rank)
model.net = model.distribute(torch.nn.Linear(2, 1))
model.net(torch.full((1, 2), rank + 1.0)).sum().backward()
inner = model.net.module if model.is_distributed else model.net
gradient = inner.weight.grad.tolist()
state = copy.deepcopy(model.save_all(net=model.net))
names = list(state["net"])
alone = torch.nn.Linear(2, 1)
model.load_all(state, net=alone)
same = torch.equal(alone.weight, inner.weight)
torch.nn.init.zeros_(inner.weight)
model.load_all(state, net=model.net)
print(json.dumps([gradient, names, same and torch.equal(alone.weight, inner.weight), inner.weight.tolist()]))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["together", "alone"])
def test_two_processes(scripts, tmp_path, how):
    """Gradients are averaged, and a state fits with and without DistributedDataParallel. Alone is the control."""
    ranks = scripts.together([(TWO, (rank, tmp_path / "store", how), {}) for rank in range(2)], tmp_path)
    first, second = (json.loads(done.stdout) for done in ranks)
    assert first[1] == second[1] == ["weight", "bias"]
    assert first[2] and second[2]
    if how == "together":
        assert first == second
        assert first[0] == [[1.5, 1.5]]
    else:
        assert first[3] != second[3]
        assert (first[0], second[0]) == ([[1.0, 1.0]], [[2.0, 2.0]])
