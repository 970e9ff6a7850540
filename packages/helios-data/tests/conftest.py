"""What tests of loaders begin and end with."""

import gc
import multiprocessing
from multiprocessing.process import BaseProcess

import pytest

from helios.core import rng


def pytest_configure(config):
    """Name the marks, for where there is no pyproject.toml."""
    config.addinivalue_line(
        "markers", "long: takes long, and finds nothing that depends on where a package is installed"
    )


@pytest.fixture
def seeded():
    rng.seed_rngs(1)


@pytest.fixture
def no_worker_stays(monkeypatch):
    """They end by themselves: torch terminates one only when it has waited for it for five seconds."""
    before, terminated, terminate = multiprocessing.active_children(), [], BaseProcess.terminate
    monkeypatch.setattr(BaseProcess, "terminate", lambda self: (terminated.append(self), terminate(self)))
    yield
    if set(multiprocessing.active_children()) - set(before):
        gc.collect()
    assert not set(multiprocessing.active_children()) - set(before)
    assert terminated == []
