"""What a run says at its start and at its end."""

import dataclasses
import math
import platform
import re

import pytest
import torch

from helios.trainer import Trainer, TrainingState, TrainingUnit
from helios.trainer._banner import banner, summary
from helios.trainer._execution import Execution

CPU = Execution(torch.device("cpu"))


def settings(**options):
    return Trainer(**{"total_steps": 10, "use_cpu": True, **options}).settings


def test_where_it_comes_from(tmp_path):
    assert banner("net", settings(), CPU, None).startswith("Helios: run net, 10 epochs, from the beginning\n")
    path = tmp_path / "net_epoch_1_iter_3.pth"
    assert f"10 epochs, goes on from {path}\n" in banner("net", settings(), CPU, path)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"total_steps": 1}, "1 epoch"),
        ({"total_steps": 3, "accumulation_steps": 2}, "3 epochs"),
        ({"total_steps": 3, "train_unit": TrainingUnit.ITERATION}, "3 iterations"),
        (
            {"total_steps": 3, "train_unit": TrainingUnit.ITERATION, "accumulation_steps": 2},
            "3 iterations of 2 batches",
        ),
        (
            {"total_steps": math.inf, "early_stop_cycles": 4, "valid_frequency": 1},
            "epochs until 4 validations in a row bring no improvement",
        ),
        (
            {"total_steps": math.inf, "early_stop_cycles": 1, "valid_frequency": 1},
            "epochs until 1 validation in a row bring no improvement",
        ),
    ],
)
def test_how_long_it_takes(options, length):
    assert f"run net, {length}, from" in banner("net", settings(**options), CPU, None)


def test_what_it_runs_on(monkeypatch):
    text = banner("net", settings(random_seed=5), CPU, None)
    assert f"torch {torch.__version__}, Python {platform.python_version()}" in text
    for package in ("trainer", "data", "chkpt", "rng"):
        assert re.search(rf"helios-{package} \d+\.\d+", text)
    assert re.search(r"device cpu, \d+ threads?\n", text)
    assert "seed 5, deterministic kernels off\n" in text
    assert "deterministic kernels on\n" in banner("net", settings(enable_deterministic=True), CPU, None)
    assert "kernels off, cuDNN benchmark on" in banner(
        "net", settings(enable_cudnn_benchmark=True), CPU, None
    )
    # No CUDA is needed: what it would say of itself is faked.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Accelerator {device.index}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    text = banner("net", settings(), Execution(torch.device("cuda", 1), gpu_ids=(1,)), None)
    assert (
        "device cuda:1 (Accelerator 1)\n" in text and f"torch {torch.__version__}, CUDA 12.8, Python" in text
    )


def test_whether_it_survives(tmp_path):
    root = {"chkpt_root": tmp_path}
    text = banner("net", settings(**root, chkpt_frequency=1), CPU, None)
    assert text.endswith(f"checkpoints every epoch in {tmp_path}")
    text = banner("net", settings(**root, chkpt_frequency=5), CPU, None)
    assert f"every 5 epochs in {tmp_path}" in text
    assert "no checkpoints (chkpt_root is not set)" in banner("net", settings(chkpt_frequency=1), CPU, None)
    assert "no checkpoints (chkpt_frequency is not set)" in banner("net", settings(**root), CPU, None)


@pytest.mark.parametrize(
    ("num_batches", "elapsed_s", "text"),
    [
        (300, 2.0, "300 batches in 2.0 s, 150.0 batches/s"),
        (1, 4.0, "1 batch in 4.0 s, 4.0 s/batch"),
        (7322, 3661.0, "7322 batches in 1:01:01, 2.0 batches/s"),
        (0, 0.01, "0 batches in 0.0 s"),
        (5, 0.0, "5 batches in 0.0 s"),
    ],
)
def test_the_summary(tmp_path, num_batches, elapsed_s, text):
    state = TrainingState(global_epoch=3, global_iteration=300)
    last = tmp_path / "net_epoch_3_iter_300.pth"
    assert summary(state, "finished: enough", num_batches, elapsed_s, last) == (
        f"finished: enough; epoch 3, iteration 300; {text}; last checkpoint: {last}"
    )
    assert summary(state, "stopped", num_batches, elapsed_s, None).endswith("; last checkpoint: none")


def test_both_are_logged(kit, tmp_path, capsys):
    class Speaking(kit.Net):
        def append_to_banner(self, banner):
            return banner + "\n  and 100% {of} its own"

    options = {"chkpt_root": tmp_path / "c", "chkpt_frequency": 1, "print_banner": True}
    logs = {"enable_file_logging": True, "log_path": tmp_path / "logs"}
    kit.trainer(total_steps=1, **options, **logs).fit(Speaking(), kit.Data())
    first = capsys.readouterr().out
    (log,) = (tmp_path / "logs").iterdir()
    for text in (first, log.read_text()):
        assert "Helios: run net, 1 epoch, from the beginning" in text
        assert "seed 6691" in text and "\n  and 100% {of} its own\n" in text
        assert "finished: total_steps reached; epoch 1, iteration 3; 3 batches in" in text
        assert text.rstrip().endswith(f"last checkpoint: {tmp_path / 'c' / 'net_epoch_1_iter_3.pth'}")
    kit.trainer(total_steps=2, **options).fit(Speaking(), kit.Data())
    assert f"goes on from {tmp_path / 'c' / 'net_epoch_1_iter_3.pth'}" in capsys.readouterr().out
    kit.trainer(total_steps=1).fit(Speaking(), kit.Data())
    assert "of} its own" not in capsys.readouterr().out


def test_the_device_is_that_of_the_run(kit, capsys):
    trainer = kit.trainer(total_steps=1, print_banner=True)
    trainer._executions = (dataclasses.replace(trainer._execution, device=torch.device("meta")),)
    trainer.fit(kit.Net(), kit.Data())
    assert "device meta\n" in capsys.readouterr().out
