"""How ranks hear of one another between batches: several in one process, over a real store."""

import signal
import threading

import pytest
import torch.distributed as dist

from helios.trainer._ranks import _is_of_the_bereaved
from helios.trainer._stop_request import StopRequest
from helios.trainer._watch import Watch

TIMEOUT_S = 20.0  # of a rank that waits for what never comes


@pytest.fixture
def server():
    """What keeps the store: in a list, from which it can be taken to end it."""
    return [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]


@pytest.fixture
def watches(server):
    """Three ranks, and what each was asked."""
    store = dist.TCPStore("127.0.0.1", server[0].port, is_master=False)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    requests = [StopRequest() for _ in range(3)]
    made = [Watch("helios/test", rank, 3, request, TIMEOUT_S) for rank, request in enumerate(requests)]
    yield made, requests
    for watch in made:
        watch.close()
    dist.destroy_process_group()


class Answer(threading.Thread):
    """What a rank that waits comes to, in a thread of its own."""

    def __init__(self, call, *arguments):
        super().__init__()
        self.call, self.arguments, self.found = call, arguments, None
        self.start()

    def run(self):
        try:
            self.found = self.call(*self.arguments)
        except Exception as error:
            self.found = error

    def get(self):
        self.join()
        return self.found


def letters_are_there(watch, *keys):
    """Wait for letters, over a connection that nobody else needs meanwhile."""
    watch._store.clone().wait(list(keys))


def test_a_vote_that_waits_does_not_keep_a_stop_from_being_heard(watches):
    (first, second, third), requests = watches
    voting = Answer(first.vote, True)
    letters_are_there(first, "letter/1/1", "letter/2/1")  # the second rank is behind, with a vote to answer
    requests[2].make(signal.SIGTERM)
    assert third.is_asked_to_stop() is False  # it has heard from all; they stop at the next place
    assert third.is_asked_to_stop() is True
    assert voting.is_alive()
    assert second.vote(False) == third.vote(False) == []
    assert voting.get() == [1, 2]
    assert [second.is_asked_to_stop() for _ in range(2)] == [False, True]
    assert [first.is_asked_to_stop() for _ in range(2)] == [False, True]
    assert requests[0].signal is requests[1].signal is signal.SIGTERM


def test_a_vote_that_two_wait_for(watches):
    (first, second, third), _ = watches
    assert first.vote(False) == third.vote(False) == []
    yes = Answer(first.vote, True)
    letters_are_there(first, "letter/1/1")
    also_yes = Answer(third.vote, True)
    letters_are_there(first, "letter/1/2")
    assert second.vote(False) == second.vote(False) == []
    assert yes.get() == also_yes.get() == [1]


def test_the_store_is_lost(watches, server):
    (first, _, _), _ = watches
    assert first.is_asked_to_stop() is False
    server.clear()
    first._thread.join()
    with pytest.raises(RuntimeError, match="the store of the process group does not answer: "):
        first.is_asked_to_stop()


class OwnError(RuntimeError):
    pass


@pytest.mark.parametrize("kind", [RuntimeError, dist.DistNetworkError, dist.DistBackendError])
def test_errors_of_torch_that_another_rank_is_gone(kind):
    assert _is_of_the_bereaved(kind("[gloo/pair.cc:553] Connection closed by peer"))
    assert not _is_of_the_bereaved(kind("shapes differ"))


@pytest.mark.parametrize("kind", [OwnError, ConnectionError, ValueError])
def test_errors_of_others_are_not_taken_for_those(kind):
    assert not _is_of_the_bereaved(kind("Connection closed: Timed out"))
