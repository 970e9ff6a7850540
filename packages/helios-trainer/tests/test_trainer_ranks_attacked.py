"""Several ranks of which one fails, is slow, or does what others do not: the run ends soon, with the cause named."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

JOB = Path(__file__).parent / "ranks_attacked_job.py"


@pytest.fixture
def outcomes(tmp_path):
    """Run a scenario of ranks_attacked_job.py on so many ranks, and return what each has returned."""

    def run(name, world_size=2):
        command = [sys.executable, JOB, name, tmp_path, str(world_size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        paths = [tmp_path / f"result{rank}" for rank in range(world_size)]
        assert all(path.exists() for path in paths), done.stderr
        return [pickle.loads(path.read_bytes()) for path in paths]

    return run


def test_a_rank_that_fails_ends_the_vote_that_another_waits_in(outcomes):
    first, second = outcomes("fails_in_validation")
    assert second == ["AbortError: in validation"]
    assert "rank 1 failed: AbortError: in validation" in "".join(first)


def test_a_slow_rank_is_waited_for(outcomes):
    assert outcomes("is_slow_in_validation") == [True, True]


def test_a_slow_rank_is_waited_for_no_longer_than_allowed(outcomes):
    first, _ = outcomes("is_slower_than_allowed")
    assert "dist_timeout_s" in first[-1] or "rank 1 failed" in first[-1]
    first, _ = outcomes("is_slower_than_allowed_to_save")
    assert "imed out" in first[0]


def test_a_rank_that_alone_cannot_load_says_why(outcomes):
    first, second = outcomes("cannot_load")
    assert second == ["AbortError: in load"]
    assert any("rank 1 failed: AbortError: in load" in text for text in first)


def test_a_sharded_run_goes_on_from_a_checkpoint_after_a_validation(outcomes):
    for stopped, finished, _ in outcomes("sharded"):
        assert stopped is False and finished is True


def test_networks_with_hooks_are_distributed_on_three_ranks(outcomes):
    assert outcomes("with_hooks", world_size=3) == [True] * 3


def test_losses_that_another_rank_lacks_are_named(outcomes):
    for outcome, _ in outcomes("other_losses"):
        assert "rank 0: loss (torch.float32, []), own (torch.float64, []); rank 1: loss (" in outcome[0]


def test_losses_are_averaged_by_name(outcomes):
    (outcome, first), (_, second) = outcomes("losses_in_another_order")
    assert outcome is True
    assert first == second and len(first) == 2


def test_draws_in_prepare_data_do_not_change_the_weights_of_rank_0(outcomes):
    (outcome, first), (_, second) = outcomes("draws_in_prepare_data")
    assert outcome is True
    assert first == second


def test_exceptions_whose_init_takes_something_else_keep_their_type(outcomes):
    assert outcomes("revived", world_size=1) == [["OddError", "1 and 2", 1]]
