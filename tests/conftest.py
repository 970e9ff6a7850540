"""What the tests of the whole share: jobs in real processes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from job_runner import JobRunner
from rank_runner import RankRunner


@pytest.fixture(scope="session")
def run_job() -> Iterator[JobRunner]:
    """Run a job in a process of its own and return its status; negative is a signal."""
    with JobRunner() as runner:
        yield runner


@pytest.fixture(scope="session")
def run_ranks() -> Iterator[RankRunner]:
    """Run a job on several ranks, each in a process of its own; see `rank_server.run`."""
    with RankRunner() as runner:
        yield runner
