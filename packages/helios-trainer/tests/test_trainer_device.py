"""Choosing the device, and the switches of cuDNN and determinism. No CUDA is needed: its counts are faked."""

import os

import pytest
import torch

from helios.trainer import Trainer


@pytest.fixture
def cuda(monkeypatch):
    def fake(num_devices):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)

    monkeypatch.delenv("WORLD_SIZE", raising=False)
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
        (
            2,
            None,
            r"gpus=None means the 2 devices \[0, 1\], and this release trains in one process: pass gpus=\[0\]",
        ),
        (4, [3, 1], r"gpus=\[3, 1\] means the 2 devices .* pass gpus=\[3\]"),
    ],
)
def test_refusals(cuda, num_devices, gpus, message):
    cuda(num_devices)
    with pytest.raises(ValueError, match=message):
        Trainer(gpus=gpus)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2: this release trains in one process"):
        Trainer(use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
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
    class Watching(kit.Net):
        def __init__(self, **options):
            super().__init__(**options)
            self.seen = {}

        def train_step(self, batch, state):
            self.seen["train"] = look()
            super().train_step(batch, state)

        def valid_step(self, batch, step):
            self.seen["valid"] = look()
            super().valid_step(batch, step)

        def test_step(self, batch, step):
            self.seen["test"] = look()
            super().test_step(batch, step)

    return Watching()


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_benchmark_is_on_in_training_only(kit, monkeypatch, enabled, before):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    model = watching(kit, lambda: torch.backends.cudnn.benchmark)
    trainer = kit.trainer(valid_frequency=1, enable_cudnn_benchmark=enabled)
    trainer.fit(model, kit.Data())
    trainer.test(model, kit.Data())
    assert model.seen == {"train": enabled, "valid": False, "test": False}
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("enabled", [True, False])
def test_deterministic_kernels(kit, monkeypatch, enabled):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def look():
        return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    model = watching(kit, look)
    trainer = kit.trainer(valid_frequency=1, enable_deterministic=enabled)
    trainer.fit(model, kit.Data())
    trainer.test(model, kit.Data())
    assert set(model.seen.values()) == {(True, ":4096:8") if enabled else (False, None)}
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
