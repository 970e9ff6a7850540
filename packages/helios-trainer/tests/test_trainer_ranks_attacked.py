"""Several ranks of which one fails, is slow, or does what others do not: the run ends soon, with the cause named."""

import pickle
import socket
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

JOB = Path(__file__).parent / "ranks_attacked_job.py"


@pytest.fixture
def outcomes(scripts, tmp_path):
    """Run a scenario of ranks_attacked_job.py on so many ranks, and return what each has returned."""

    def run(name, world_size=2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        size = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place = {**size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            {key: str(value) for key, value in {**place, "RANK": r, "LOCAL_RANK": r}.items()}
            for r in range(world_size)
        ]
        done = scripts.together([(JOB, (name, tmp_path), env) for env in ranks], tmp_path)
        paths = [tmp_path / f"result{rank}" for rank in range(world_size)]
        assert all(path.exists() for path in paths), [each.stderr for each in done]
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
    assert first.count("Before that, rank 1 failed: AbortError: in load") == 1


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


@pytest.mark.parametrize("scenario", ["own_states", "own_states_fsdp"])
def test_what_a_rank_has_of_its_own_comes_back_to_it(outcomes, scenario):
    ranks = outcomes(scenario)
    for whole, stopped in ranks:
        assert whole == stopped
    assert ranks[0] != ranks[1]


def test_the_control_for_that(outcomes):
    for whole, stopped in outcomes("own_states_lost"):  # rank 0 hears of rank 1 when gradients are exchanged
        assert whole != stopped


@pytest.mark.parametrize(
    "scenario",
    ["averages_weights", "skips_backward", "takes_turns", "in_lists", "in_lists_fsdp", "own_best"],
)
def test_ranks_that_differ_in_odd_ways_end_as_if_never_stopped(outcomes, scenario):
    ranks = outcomes(scenario)
    for whole, *stopped, _ in ranks:
        assert [whole] * len(stopped) == stopped


def test_a_file_has_what_is_the_same_once(outcomes):
    for whole, stopped, num_bytes in outcomes("large"):
        assert whole == stopped
        net, copied = 4 * (4 + 1) * 10_000, 4 * 4 * 10_000
        assert num_bytes < 4 * net + copied + 100_000  # weights, their gradients and two moments of each


def test_of_a_view_only_what_it_shows_is_sent(outcomes):
    (num_bytes,) = outcomes("bytes_of_views", world_size=1)
    assert 400_000 < num_bytes < 600_000


def test_on_another_number_of_ranks_it_is_said_that_it_is_lost(outcomes):
    assert outcomes("own_states_stopped") == [False, False]
    ((is_finished, said),) = outcomes("own_states_alone", world_size=1)
    assert is_finished is True
    (warning,) = [text for text in said if "is lost" in text]
    assert "had other states of model and plugins than rank 0" in warning


def test_a_rank_whose_teardown_waits_for_one_that_failed(outcomes):
    first, second = outcomes("waits_in_teardown")
    assert second == ["AbortError: in training"]
    assert "rank 1 failed: AbortError: in training" in "".join(first)


def test_states_of_plugins_may_be_sharded(outcomes):
    assert outcomes("sharded_plugin") == [[False, True, True]] * 2


def test_other_keys_beside_shards_are_refused_by_all(outcomes):
    for errors in outcomes("sharded_on_first_only"):
        assert errors[0].startswith("ValueError: rank 1 has something else in 'net' > ")
        assert "of a state_dict than rank 0, where tensors are of which each rank has a part" in errors[0]
