"""Fixtures of the trainer's tests."""

import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_configure(config):
    """Name the marks, for where there is no pyproject.toml."""
    config.addinivalue_line(
        "markers", "long: takes long, and finds nothing that depends on where a package is installed"
    )


@pytest.fixture(scope="session")
def kit():
    """The module trainer_kit."""
    spec = importlib.util.spec_from_file_location("trainer_kit", HERE / "trainer_kit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer_kit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def python(tmp_path):
    """Run Python code in a process of its own, with the given folder as working folder; return its stdout."""

    def run(code, *arguments, check=True):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def surroundings_unchanged():
    """Every run, whatever becomes of it, leaves the process as it found it."""

    def look():
        return (
            logging.getLogger("helios").handlers[:],
            logging.getLogger("helios").level,
            logging.getLogger("py.warnings").handlers[:],
            warnings.showwarning,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            torch.is_grad_enabled(),
        )

    before = look()
    yield
    assert look() == before
