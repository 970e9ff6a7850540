from __future__ import annotations

import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks, for where there is no pyproject.toml."""
    config.addinivalue_line(
        "markers", "long: takes long, and finds nothing that depends on where a package is installed"
    )


@pytest.fixture
def state() -> dict[str, object]:
    """Something of every kind that a small training run saves."""
    net = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), bias=torch.tensor([0.5, -0.0]))
    net.__dict__["_metadata"] = OrderedDict({"": {"version": 1}})
    return {
        "training_state": {"global_epoch": 1, "loss": 0.1, "name": "run"},
        "model": {"net": net, "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.99)}},
        "rng": {"torch": torch.arange(16, dtype=torch.uint8), "rand": (3, tuple(range(5)), None)},
    }


@pytest.fixture
def legacy() -> Path:
    """Files that earlier releases of Helios wrote, unedited: <release>/<variant>/<name>.pth."""
    return Path(__file__).parent / "legacy"


@pytest.fixture
def temps(tmp_path: Path) -> Iterator[None]:
    """After the test no temporary file is anywhere below its folder."""
    yield
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.fixture(scope="session")
def kit() -> Any:
    """The module chkpt_kit."""
    spec = importlib.util.spec_from_file_location("chkpt_kit", Path(__file__).parent / "chkpt_kit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chkpt_kit"] = module
    spec.loader.exec_module(module)
    return module
