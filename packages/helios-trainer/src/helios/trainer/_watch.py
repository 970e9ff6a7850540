"""How ranks that run side by side agree to stop after the same iteration, without talking to each other before.

Each rank counts the places that it passes where a run can stop: all pass the same ones in the same order. One that is
asked to stop leaves a letter for each of the others in the store of the process group. A thread of theirs, which waits
for letters (in C++, without the interpreter's lock), raises a flag for its main thread, then publishes the number of
the last place that this has passed, whatever it is doing. The ranks stop at the place after the highest number
published: none can be beyond it, since each looks at its flag at every place, and those who see the flag read the
numbers before they go on.
"""

import signal
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # they are, without being declared

from helios.trainer._stop_request import StopRequest

_NEVER = timedelta(days=365)
_LOOK_AGAIN_S = 0.005
_LISTEN_TIME = timedelta(seconds=1)  # then it is looked whether an answer can still be expected
_SIGN_S = 10.0  # a thread that waits for its main thread lets others know so often that it is there
_SILENCE_S = 120.0  # threads answer; only of a dead rank there is nothing to hear


class Watch:
    """The places of this rank, and the thread that hears of requests.

    Args:
        name: of the run, unlike that of any other in the process group.
        rank: this one.
        world_size: how many there are.
        request: whether somebody asked this process. Once the ranks agree, it is made.
        timeout_s: how long to wait for another rank's answer to a question.
    """

    def __init__(self, name: str, rank: int, world_size: int, request: StopRequest, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._rank, self._world_size, self._request = rank, world_size, request
        # Copies, since a connection on which a thread waits is of no use to another thread.
        default: Any = dist.distributed_c10d._get_default_store()
        self._store, self._of_thread = (PrefixStore(name, default.clone()) for _ in range(2))
        self._place = 0  # the last that the main thread has passed
        # Votes that it has taken part in, and the last in which it said no.
        self._num_votes = self._last_no = 0
        self._is_woken = False
        self._stop_place: int | None = None
        self._publishing = threading.Lock()
        self._is_published = False
        self._is_closing = False
        self._lost: dist.DistError | None = None  # what ended the thread, if it is the store
        self._thread = threading.Thread(target=self._listen, name="helios ranks", daemon=True)
        self._thread.start()

    def is_asked_to_stop(self) -> bool:
        """Pass a place, and say whether all ranks stop there.

        Raises:
            RuntimeError: the store is gone, and with it what the ranks agree by.
        """
        self._place += 1
        if self._lost is not None:
            reason = str(self._lost).partition("\n")[0]  # without torch's stack
            raise RuntimeError(
                f"the store of the process group does not answer: {reason}. The process that kept it has ended, or "
                "its machine cannot be reached"
            ) from self._lost
        flag = self._request.of_parent
        if flag is not None and flag.value:
            self._request.hear(signal.Signals(flag.value) if flag.value > 0 else None)
        if not (self._is_woken or self._request.is_made):
            return False
        if self._stop_place is None:
            self._stop_place = self._agree()
        return self._place >= self._stop_place

    def vote(self, answer: bool) -> list[int]:
        """Take part in a vote, and return who said no if this rank says yes; who says no does not wait."""
        self._num_votes += 1
        number = self._num_votes
        if not answer:
            self._last_no = number
            return []
        self._store.set(f"vote/{number}/{self._rank}", "yes")
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        for rank in others:
            self._send(rank, f"vote {number}")
        return [rank for rank in others if self._answer_of(rank, f"vote/{number}/{rank}") == "no"]

    def failed(self, what: str) -> str | None:
        """Note that this rank has failed, unless another has before: then return what that said."""
        try:
            first: str = self._store.compare_set(
                "failed", "", f"rank {self._rank} failed: {what:.1000}"
            ).decode()
        except dist.DistError:
            return None  # the store is gone, with the rank that kept it
        return None if first.startswith(f"rank {self._rank} ") else first

    def close(self) -> None:
        """End the thread."""
        if not self._is_closing:
            self._is_closing = True
            try:
                self._send(self._rank, "close")
            except dist.DistError:
                return  # the store is gone, with the rank that kept it; and the thread ends by that
            self._thread.join()

    def _agree(self) -> int:
        """Return the number of the place to stop at."""
        if self._request.is_made and not self._is_woken:
            code = 0 if self._request.signal is None else int(self._request.signal)
            for rank in range(self._world_size):
                if rank != self._rank:
                    self._send(rank, f"stop {code}")
        self._publish(self._store)
        places = [int(self._answer_of(rank, f"place/{rank}")) for rank in range(self._world_size)]
        return max(places) + 1

    def _publish(self, store: Store) -> None:
        with self._publishing:
            if not self._is_published:
                self._is_published = True
                store.set(f"place/{self._rank}", str(self._place))

    def _send(self, rank: int, letter: str) -> None:
        number = self._store.add(f"letters/{rank}", 1)
        self._store.set(f"letter/{rank}/{number}", letter)

    def _answer_of(self, rank: int, key: str) -> str:
        began_s = heard_s = time.monotonic()
        num_signs = 0
        while not self._comes(key):
            if self._store.check(["failed"]):
                raise RuntimeError(f"rank {rank} does not answer: {self._store.get('failed').decode()}")
            now_s, before = time.monotonic(), num_signs
            num_signs = self._store.add(f"signs/{rank}", 0)
            heard_s = heard_s if num_signs == before else now_s
            if now_s - heard_s > _SILENCE_S or now_s - began_s > self._timeout_s:
                raise RuntimeError(
                    f"rank {rank} does not answer after {now_s - began_s:.0f} s: it has died, its process hangs, or it "
                    "needs more time than dist_timeout_s gives it"
                )
        answer: str = self._store.get(key).decode()
        return answer

    def _comes(self, key: str) -> bool:
        try:
            self._store.wait([key], _LISTEN_TIME)
        except dist.DistStoreError:
            return False
        return True

    def _listen(self) -> None:
        try:
            self._read_letters()
        except dist.DistError as error:
            self._lost = error  # for the main thread, at its next place

    def _read_letters(self) -> None:
        number, signed_s = 1, 0.0
        votes: list[int] = []  # that wait for the main thread; letters do not wait for them
        while True:
            key = f"letter/{self._rank}/{number}"
            if votes:
                time.sleep(_LOOK_AGAIN_S)
            else:
                self._of_thread.wait([key], _NEVER)
                signed_s = time.monotonic()
            if self._of_thread.check([key]):
                number += 1
                subject, _, value = self._of_thread.get(key).decode().partition(" ")
                if subject == "close":
                    return
                if subject == "stop":
                    self._hear_of_stop(int(value))
                else:
                    votes.append(int(value))
            votes = [vote for vote in votes if not self._is_answered(vote)]
            if votes and time.monotonic() - signed_s > _SIGN_S:
                signed_s = time.monotonic()
                self._of_thread.add(f"signs/{self._rank}", 1)

    def _hear_of_stop(self, code: int) -> None:
        self._request.hear(signal.Signals(code) if code else None)
        self._is_woken = True  # before the place is read, see above
        self._publish(self._of_thread)

    def _is_answered(self, vote: int) -> bool:
        """Whether this rank has answered a vote. If the main thread has said no, and has gone on, say it for it."""
        key = f"vote/{vote}/{self._rank}"
        if self._of_thread.check([key]):
            return True
        if self._last_no < vote:
            return False
        self._of_thread.set(key, "no")
        return True
