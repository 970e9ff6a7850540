"""CUDAPlugin moves whatever a batch is made of. There is no GPU: batches go to torch's "meta" device instead."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from helios.trainer import CUDAPlugin, Plugin

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    image: torch.Tensor
    name: str


@dataclasses.dataclass
class Counted:
    image: torch.Tensor
    size: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.size = self.image.numel()


class Boxes:
    """Knows how to move."""

    def __init__(self, device="cpu"):
        self.device = device

    def to(self, device):
        return Boxes(str(device))


@pytest.fixture
def meta(kit):
    plugin = CUDAPlugin()
    model = kit.Net()
    model.device = torch.device("meta")
    plugin.configure_model(model)
    return plugin


def ways(plugin):
    return (
        lambda batch: plugin.process_training_batch(batch, None),
        lambda batch: plugin.process_validation_batch(batch, 0),
        lambda batch: plugin.process_testing_batch(batch, 0),
    )


def devices(value):
    """Where the tensors are, in the order in which they are found."""
    if isinstance(value, torch.Tensor):
        return [value.device.type]
    if isinstance(value, dict | UserDict | MappingProxyType):
        return [device for item in value.values() for device in devices(item)]
    return [device for item in value for device in devices(item)] if isinstance(value, list | tuple) else []


ONE = torch.ones(2)
BATCHES = [
    ONE,
    [ONE, (ONE, {"x": ONE})],
    (ONE, "text", b"bytes", 3, None),
    Pair(ONE, [ONE, ONE]),
    OrderedDict(x=ONE, y=ONE),
    UserDict(x=ONE),
    {1: {2: [ONE]}, "none": None},
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_all_tensors_are_moved_and_the_rest_stays(meta, batch):
    before = devices(batch)
    for process in ways(meta):
        found = process(batch)
        assert type(found) is type(batch)
        assert devices(found) == ["meta"] * len(before)
        assert devices(batch) == before == ["cpu"] * len(before)  # the batch itself is left alone


def test_what_is_not_a_tensor_is_the_same_object(meta):
    batch = (ONE, "text", len, torch.Tensor, None)
    assert meta.process_training_batch(batch, None)[1:] == batch[1:]
    assert meta.process_training_batch("text", None) == "text"
    assert meta.process_training_batch(torch.Size([2, 3]), None) == torch.Size([2, 3])


def test_kinds_of_dicts(meta):
    found = meta.process_training_batch(defaultdict(list, x=ONE), None)
    assert found.default_factory is list
    assert devices(found) == ["meta"]
    found = meta.process_training_batch(MappingProxyType({"x": ONE}), None)
    assert type(found) is dict
    assert devices(found) == ["meta"]


def test_dataclasses(meta):
    found = meta.process_training_batch(Frozen(ONE, "a"), None)
    assert (type(found), found.image.device.type, found.name) == (Frozen, "meta", "a")
    counted = Counted(ONE)
    counted.size = 9
    found = meta.process_training_batch([counted], None)[0]
    assert (found.image.device.type, found.size, counted.image.device.type) == ("meta", 9, "cpu")


def test_what_can_move_itself(meta):
    assert meta.process_training_batch({"boxes": Boxes()}, None)["boxes"].device == "meta"
    packed = meta.process_training_batch(pack_sequence([ONE, ONE[:1]]), None)
    assert packed.data.device.type == "meta"


def test_nothing_waits_for_the_device(meta, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: calls.append((args, options)))
    meta.process_training_batch([ONE], None)
    assert calls == [((torch.device("meta"),), {"non_blocking": True})]


@pytest.mark.parametrize("batch", [*BATCHES, Frozen(ONE, "a"), Boxes()], ids=lambda b: type(b).__name__)
def test_on_the_cpu_the_batch_is_left_as_it_is(kit, batch):
    plugin = CUDAPlugin()
    plugin.configure_model(kit.Net())
    assert all(process(batch) is batch for process in ways(plugin))


def test_it_alone_processes_batches(kit):
    trainer = kit.trainer()
    trainer.plugins.append(CUDAPlugin())
    for split in ("training", "validation", "testing"):
        assert trainer.plugins.owner_of(f"{split}_batch") is trainer.plugins["cuda"]
    assert trainer.plugins.owner_of("should_training_stop") is None
    with pytest.raises(ValueError, match=r"'mine' overrides training_batch, which plug-in 'cuda' does"):
        trainer.plugins.append(kit.ClaimingPlugin([], "mine"))
    trainer.plugins.append(Plugin("other"))
    assert CUDAPlugin("mover").plug_id == "mover"


def test_a_run_moves_every_batch_to_its_device(kit):
    """A device that is not the CPU is put where `fit` would have put it; the networks stay here."""
    where = []

    class Model(kit.Net):
        def setup(self, fast_init=False):
            self.device = torch.device("cpu")
            super().setup(fast_init)

        def train_step(self, batch, state):
            where.append(("train", devices(list(batch))))

        def valid_step(self, batch, step):
            where.append(("valid", devices(list(batch))))

        def test_step(self, batch, step):
            where.append(("test", devices(list(batch))))

    class Elsewhere(CUDAPlugin):
        def configure_model(self, model):
            model.device = torch.device("meta")
            super().configure_model(model)

    trainer = kit.trainer(total_steps=1, valid_frequency=1)
    trainer.plugins.append(Elsewhere())
    model, data = Model(), kit.Data(train=2, valid=1, test=1)
    trainer.fit(model, data)
    trainer.test(model, data)
    both = ["meta", "meta"]
    assert where == [("train", both), ("train", both), ("valid", both), ("test", both)]


def test_a_run_with_it_is_exact(kit, tmp_path):
    def end(total_steps, root, plugins=True):
        trainer = kit.trainer(total_steps=total_steps, chkpt_root=root, chkpt_frequency=1)
        if plugins:
            trainer.plugins.append(CUDAPlugin())
        model = kit.Net()
        trainer.fit(model, kit.Data())
        return kit.end_of(model)

    whole = end(2, tmp_path / "whole")
    end(1, tmp_path / "parts")
    assert end(2, tmp_path / "parts") == whole == end(2, tmp_path / "without", plugins=False)
