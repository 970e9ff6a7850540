"""What the tests of the whole share: jobs in real processes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from job_runner import JobRunner


@pytest.fixture(scope="session")
def run_job() -> Iterator[JobRunner]:
    """Run a job in a process of its own and return its status; negative is a signal."""
    with JobRunner() as runner:
        yield runner
