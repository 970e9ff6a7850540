"""Choosing the device, and the switches of cuDNN and determinism. No CUDA is needed: its counts are faked."""

import os
from contextlib import contextmanager, suppress

import pytest
import torch

from helios.chkpt import load, load_last_checkpoint
from helios.trainer import Trainer
from helios.trainer._execution import select_executions

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clear_torchrun(monkeypatch):
    for name in (*TORCHRUN, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cuda(monkeypatch):
    def fake(num_devices):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)

    clear_torchrun(monkeypatch)
    return fake


@pytest.mark.parametrize(
    ("num_devices", "use_cpu", "gpus", "device", "gpu_ids"),
    [
        (0, None, None, "cpu", []),
        (0, True, None, "cpu", []),
        (0, False, None, "cpu", []),
        (1, None, None, "cuda:0", [0]),
        (1, False, None, "cuda:0", [0]),
        (1, True, None, "cpu", []),
        (4, True, None, "cpu", []),
        (4, None, [2], "cuda:2", [2]),
        (4, False, [0], "cuda:0", [0]),
    ],
)
def test_selection(cuda, num_devices, use_cpu, gpus, device, gpu_ids):
    cuda(num_devices)
    trainer = Trainer(use_cpu=use_cpu, gpus=gpus)
    assert trainer.gpu_ids == gpu_ids
    assert trainer._execution.device == torch.device(device)


@pytest.mark.parametrize(
    ("num_devices", "gpus", "message"),
    [
        (0, [0], r"gpus=\[0\] needs CUDA, which is not available here"),
        (2, [2], "gpus must be ids of the 2 CUDA devices here, found 2"),
    ],
)
def test_refusals(cuda, num_devices, gpus, message):
    cuda(num_devices)
    with pytest.raises(ValueError, match=message):
        Trainer(gpus=gpus)


def selected(**arguments):
    """What is chosen, in short: device, rank and local rank of each process, and what all have in common."""
    executions = select_executions(*(arguments.get(name) for name in ("use_cpu", "gpus", "nprocs")))
    common = {(e.world_size, e.local_world_size, e.gpu_ids, e.has_group, e.is_spawned) for e in executions}
    assert len(common) == 1
    return [(str(e.device), e.rank, e.local_rank) for e in executions], *common.pop()


@pytest.mark.parametrize(
    ("num_devices", "arguments", "devices", "gpu_ids"),
    [
        (0, {"nprocs": 3}, ["cpu"] * 3, ()),
        (4, {"use_cpu": True, "nprocs": 2}, ["cpu"] * 2, ()),
        (2, {}, ["cuda:0", "cuda:1"], (0, 1)),
        (4, {"gpus": [3, 1]}, ["cuda:3", "cuda:1"], (3, 1)),
    ],
)
def test_several_processes_to_be_spawned(cuda, num_devices, arguments, devices, gpu_ids):
    cuda(num_devices)
    size = len(devices)
    places = [(device, rank, rank) for rank, device in enumerate(devices)]
    assert selected(**arguments) == (places, size, size, gpu_ids, True, True)
    trainer = Trainer(**arguments)
    assert (trainer.rank, trainer.local_rank, trainer.gpu_ids) == (0, 0, list(gpu_ids))
    assert trainer.queue.empty()


@pytest.mark.parametrize(
    ("num_devices", "arguments", "device", "gpu_ids"),
    [
        (0, {"nprocs": 1}, "cpu", ()),
        (0, {}, "cpu", ()),
        (1, {}, "cuda:0", (0,)),
        (4, {"gpus": [2]}, "cuda:2", (2,)),
    ],
)
def test_one_process_is_this_one(cuda, num_devices, arguments, device, gpu_ids):
    cuda(num_devices)
    assert selected(**arguments) == ([(device, 0, 0)], 1, 1, gpu_ids, False, False)
    assert Trainer(**arguments).queue is None


@pytest.mark.parametrize("nprocs", [1, 2, 3])
@pytest.mark.parametrize("gpus", [None, [0, 1]])
def test_nprocs_with_gpus(cuda, nprocs, gpus):
    cuda(2)
    with pytest.raises(
        ValueError, match=f"nprocs={nprocs} is for the CPU: on CUDA there is one process for each GPU"
    ):
        Trainer(nprocs=nprocs, gpus=gpus)


def set_torchrun(monkeypatch, *values):
    for name, value in zip(TORCHRUN, (*values, "localhost", 29500), strict=True):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("num_devices", "arguments", "device", "gpu_ids"),
    [
        (0, {}, "cpu", ()),
        (0, {"nprocs": 6}, "cpu", ()),
        (8, {"use_cpu": True}, "cpu", ()),
        (2, {}, "cuda:1", (0, 1)),
        (8, {"nprocs": 6}, "cuda:1", (0, 1)),
        (8, {"gpus": [5, 7, 2]}, "cuda:7", (5, 7)),
    ],
)
def test_a_process_of_torchrun(cuda, monkeypatch, num_devices, arguments, device, gpu_ids):
    """The second one on the third of three machines."""
    cuda(num_devices)
    set_torchrun(monkeypatch, 5, 6, 1, 2)
    assert selected(**arguments) == ([(device, 5, 1)], 6, 2, gpu_ids, True, False)
    trainer = Trainer(**arguments)
    assert (trainer.rank, trainer.local_rank, trainer.gpu_ids) == (5, 1, list(gpu_ids))
    assert trainer.queue is None


def test_the_only_process_of_torchrun_has_a_group_too(cuda, monkeypatch):
    cuda(0)
    set_torchrun(monkeypatch, 0, 1, 0, 1)
    assert selected() == ([("cpu", 0, 0)], 1, 1, (), True, False)


@pytest.mark.parametrize(
    ("num_devices", "arguments", "message"),
    [
        (
            0,
            {"nprocs": 2},
            r"nprocs=2, but torchrun has started 6 processes \(WORLD_SIZE\): leave nprocs out",
        ),
        (8, {"gpus": [5]}, r"gpus=\[5\] has 1 ids, but torchrun has started 2 processes on this machine"),
        (1, {}, "LOCAL_RANK is 1, and there are 1 CUDA devices here: start torchrun with --nproc-per-node=1"),
        (0, {"gpus": [0, 1]}, r"gpus=\[0, 1\] needs CUDA, which is not available here"),
    ],
)
def test_what_torchrun_contradicts(cuda, monkeypatch, num_devices, arguments, message):
    cuda(num_devices)
    set_torchrun(monkeypatch, 5, 6, 1, 2)
    with pytest.raises(ValueError, match=message):
        Trainer(**arguments)


def test_a_world_size_alone(cuda, monkeypatch):
    cuda(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    missing = "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
    with pytest.raises(
        ValueError, match=f"WORLD_SIZE is 2, but {missing} are not set: start the script with torchrun"
    ):
        Trainer(use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Trainer(use_cpu=True).queue is None


@pytest.mark.parametrize("value", ["two", "", "0", "-1", "1.0"])
def test_a_number_of_processes_that_is_none(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    message = f"environment variable WORLD_SIZE must be the number of processes, found '{value}': unset it"
    with pytest.raises(ValueError, match=message):
        Trainer(use_cpu=True)


def test_the_model_knows_its_device(kit):
    model = kit.Net()
    kit.trainer(total_steps=1).fit(model, kit.Data())
    assert (model.device, model.map_loc, model.rank, model.is_distributed) == (
        torch.device("cpu"),
        "cpu",
        0,
        False,
    )
    assert model.trainer is not None


def watching(kit, look):
    """A model that notes what `look` gives in each of its hooks, as (hook, what it gave)."""

    class Watching(kit.Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.seen = set()

        def note(self, *call):
            self.seen.add((call[0], look()))
            super().note(*call)

    return Watching()


IN_TRAINING = [
    "on_training_epoch_start", "on_training_batch_start", "train_step", "on_training_batch_end",
    "on_training_epoch_end",
]  # fmt: skip
IN_EVALUATION = [
    hook.replace("*", name)
    for name in ("validation", "testing")
    for hook in ("on_*_start", "on_*_batch_start", "on_*_batch_end", "on_*_end")
] + ["valid_step", "test_step"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_benchmark_is_on_in_training_only(kit, monkeypatch, enabled, before):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    model = watching(kit, lambda: torch.backends.cudnn.benchmark)
    trainer = kit.trainer(valid_frequency=1, enable_cudnn_benchmark=enabled)
    trainer.fit(model, kit.Data())
    trainer.test(model, kit.Data())
    for hook in IN_TRAINING:
        assert (hook, enabled) in model.seen and (hook, not enabled) not in model.seen
    for hook in IN_EVALUATION:
        assert (hook, False) in model.seen and (hook, True) not in model.seen
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("hook", ["train_step", "valid_step", "test_step"])
def test_benchmark_is_put_back_after_a_failure(kit, monkeypatch, hook):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    trainer, model = kit.trainer(valid_frequency=1), kit.Net()

    def fail(*args):
        assert torch.backends.cudnn.benchmark is False
        raise kit.AbortError

    setattr(model, hook, fail)
    with pytest.raises(kit.AbortError):
        trainer.fit(model, kit.Data())
        trainer.test(model, kit.Data())
    assert torch.backends.cudnn.benchmark is True


@pytest.mark.parametrize("enabled", [True, False])
def test_deterministic_kernels(kit, monkeypatch, enabled):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def look():
        return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    model = watching(kit, look)
    trainer = kit.trainer(valid_frequency=1, enable_deterministic=enabled)
    trainer.fit(model, kit.Data())
    trainer.test(model, kit.Data())
    assert {seen for _, seen in model.seen} == {(True, ":4096:8") if enabled else (False, None)}
    assert look() == (False, None)


def test_deterministic_settings_of_the_user_are_put_back_after_a_failure(kit, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = kit.Net(abort_at=10)
        with pytest.raises(kit.AbortError):
            kit.trainer(enable_deterministic=True).fit(model, kit.Data())
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)


class Devices:
    """Two CUDA devices that record what a run asks of them."""

    def __init__(self, monkeypatch):
        self.seeds, self.maps, self.current = [], [], [0]
        self.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
        clear_torchrun(monkeypatch)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", self.seeds.append)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [s.clone() for s in self.states])
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: setattr(self, "states", states))
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr("helios.trainer._find.load_last_checkpoint", self.load)

    @contextmanager
    def device(self, device):
        self.current.append(device.index)
        try:
            yield
        finally:
            self.current.pop()

    def load(self, *place, map_location, **options):
        self.maps.append(map_location)
        return load_last_checkpoint(*place, **options)

    def draw(self):
        """Draw from the generators of all devices."""
        self.states = [state * 3 + 1 for state in self.states]

    def values(self):
        return [state.item() for state in self.states]


def model_on(kit, devices):
    """A model whose run is on a CUDA device, though its networks are here."""

    class Elsewhere(kit.Net):
        def setup(self, fast_init=False):
            assert (self.device, self.map_loc) == (torch.device("cuda", 1), "cuda:1")
            self.device = torch.device("cpu")
            super().setup(fast_init)

        def note(self, *call):
            assert devices.current == [0, 1]  # the device of the run is the current one
            super().note(*call)

        def train_step(self, batch, state):
            devices.draw()
            super().train_step(batch, state)

    return Elsewhere


def test_a_run_on_the_second_of_two_devices(kit, monkeypatch, tmp_path):
    devices = Devices(monkeypatch)
    made = model_on(kit, devices)

    def run(root, **options):
        model = made(**options)
        trainer = kit.trainer(use_cpu=None, gpus=[1], chkpt_root=root, chkpt_frequency=1)
        devices.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
        with suppress(kit.AbortError):
            trainer.fit(model, kit.Data())
        assert devices.current == [0]
        return trainer, model

    trainer, whole = run(tmp_path / "whole")
    assert trainer.gpu_ids == [1]
    assert set(devices.seeds) == {6691}  # torch.manual_seed asks for it too
    assert devices.maps == ["cuda:1"]
    end = devices.values()
    saved = load(tmp_path / "whole" / "net_epoch_1_iter_3.pth")["rng"]["cuda"]
    assert [state.item() for state in saved] == [(1 * 27 + 13) % 256, (2 * 27 + 13) % 256]

    run(tmp_path / "two", abort_at=len(whole.trace) - 10)
    assert devices.values() != end
    _, rest = run(tmp_path / "two")
    assert devices.values() == end  # the generators of the devices went on too
    assert kit.bits(rest.state_dict()) == kit.bits(whole.state_dict())
    assert trainer.test(made(), kit.Data()) is True
    assert set(devices.maps) == {"cuda:1"} and devices.current == [0]


def test_on_the_cpu_no_device_is_made_current(kit, monkeypatch):
    devices = Devices(monkeypatch)
    model = watching(kit, lambda: tuple(devices.current))
    trainer = kit.trainer()
    trainer.fit(model, kit.Data())
    trainer.test(model, kit.Data())
    assert {seen for _, seen in model.seen} == {(0,)}
    assert set(devices.seeds) == {6691}  # they are there, so they are seeded: the model may use them
