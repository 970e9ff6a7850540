"""The processes of a run, and what they have to agree on. A run in one process is alone, and agrees with itself.

What every rank does after every batch must cost nothing, so that nobody talks to anybody there: two collectives of a
few bytes take longer than a small step. A rank that is asked to stop, which is rare, wakes a thread in the others (see
`_watch.py`).
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from helios.core.rng import derive_seed, seed_rngs
from helios.trainer._execution import Execution
from helios.trainer._stop_request import StopRequest
from helios.trainer._watch import Watch
from helios.trainer.distributed import break_gloo, shutdown_dist

T = TypeVar("T")
# What gloo, NCCL and the store say when another process is gone.
_WORDS_OF_THE_BEREAVED = (
    "gloo",
    "NCCL",
    "onnection",
    "Timed out",
    "timed out",
    "recvValue",
    "does not answer",
)


class DisagreementError(RuntimeError):
    """Ranks of one run differ in what must be the same on all of them."""


class Ranks(Protocol):
    """This process among those of the run.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
    """

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and shows what a run writes and shows."""

    def is_asked_to_stop(self) -> bool:
        """Whether all ranks stop here. Called where a run can stop, by all ranks in the same order."""

    def vote(self, question: str, answer: bool) -> bool:
        """Return the answer of all ranks to a question that is mostly answered with no, without waiting then.

        Raises:
            DisagreementError: another rank answered otherwise.
        """

    def agreed(self, question: str, answer: bool) -> bool:
        """Return the answer of all ranks to a question, when all have answered.

        Raises:
            DisagreementError: another rank answered otherwise.
        """

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 and return on every rank what it returned, which must be small and plain.

        Raises:
            RuntimeError: it raised on rank 0; there, what it raised.
        """

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, on all ranks."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and nothing on the others."""

    def wait_for_all(self) -> None:
        """Return when all ranks are here."""

    def failed(self, error: BaseException) -> str | None:
        """Let the other ranks, and a parent, know that an exception ends this one, unless they do already.

        Returns:
            What ended the run, if that is something else; None if it is not, or was returned before.
        """

    def leave(self) -> None:
        """Wait for no other rank any more, since the run has failed, and let none wait for this one.

        What talks to them fails, or does nothing, here and there; but not in a group of the user's own.
        """

    def close(self) -> None:
        """Let go of what was taken; the run is over, well or not."""


class Alone:
    """The only process of a run."""

    rank, world_size, is_first = 0, 1, True

    def __init__(self, request: StopRequest) -> None:
        self._request = request

    def is_asked_to_stop(self) -> bool:
        """See `Ranks`."""
        return self._request.is_made

    def vote(self, question: str, answer: bool) -> bool:
        """See `Ranks`."""
        return answer

    def agreed(self, question: str, answer: bool) -> bool:
        """See `Ranks`."""
        return answer

    def on_first(self, work: Callable[[], T]) -> T:
        """See `Ranks`."""
        return work()

    def all_gather(self, value: T) -> list[T]:
        """See `Ranks`."""
        return [value]

    def gather(self, value: T) -> list[T]:
        """See `Ranks`."""
        return [value]

    def wait_for_all(self) -> None:
        """See `Ranks`."""

    def failed(self, error: BaseException) -> str | None:
        """See `Ranks`."""
        return None

    def leave(self) -> None:
        """See `Ranks`."""

    def close(self) -> None:
        """See `Ranks`."""


class Together:
    """One of several processes, in the default group of torch.distributed.

    Args:
        request: whether somebody asked this process to stop. Once the ranks agree, it is made in all of them.
        timeout_s: how long they wait for one another; None is torch's default.
        owns_group: the group was made for this run, and not by the user.
        on_failure: is told the exception that ends this rank, as soon as it is seen.
    """

    def __init__(
        self,
        request: StopRequest,
        timeout_s: float | None = None,
        *,
        owns_group: bool = False,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._owns_group, self._on_failure = owns_group, on_failure
        self._has_failed = False
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if timeout_s is None:
            timeout_s = dist.distributed_c10d.default_pg_timeout.total_seconds()
        # Beside the default group, where the user's own collectives may be under way; and on the CPU.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        token = self.on_first(lambda: dist.distributed_c10d._get_default_store().add("helios/runs", 1))
        self._watch = Watch(f"helios/{token}", self.rank, self.world_size, request, timeout_s)

    @property
    def is_first(self) -> bool:
        """See `Ranks`."""
        return self.rank == 0

    def is_asked_to_stop(self) -> bool:
        """See `Ranks`."""
        return self._watch.is_asked_to_stop()

    def vote(self, question: str, answer: bool) -> bool:
        """See `Ranks`."""
        others = self._watch.vote(answer)
        if others:
            raise _disagreement(question, [self.rank], others)
        return answer

    def agreed(self, question: str, answer: bool) -> bool:
        """See `Ranks`."""
        answers = self.all_gather(answer)
        if len(set(answers)) > 1:
            yes = [rank for rank, each in enumerate(answers) if each]
            raise _disagreement(question, yes, [rank for rank, each in enumerate(answers) if not each])
        return answer

    def on_first(self, work: Callable[[], T]) -> T:
        """See `Ranks`."""
        box: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_first:
            try:
                box[0] = work()
                pickle.dumps(box)  # or it fails where the others wait
            except Exception as caught:
                error = caught
                box[1] = f"{type(caught).__name__}: {caught}"
        dist.broadcast_object_list(box, src=0, group=self._group)
        if error is not None:
            raise error
        if box[1] is not None:
            raise RuntimeError(f"rank 0 failed, so this one cannot go on: {box[1]}")
        return box[0]  # type: ignore[no-any-return]  # what rank 0 put in

    def all_gather(self, value: T) -> list[T]:
        """See `Ranks`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """See `Ranks`."""
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def wait_for_all(self) -> None:
        """See `Ranks`."""
        dist.barrier(group=self._group)

    def failed(self, error: BaseException) -> str | None:
        """See `Ranks`."""
        if self._has_failed:
            return None
        self._has_failed = True
        self._on_failure(error)
        first = self._watch.failed(f"{type(error).__name__}: {error}")
        if first is not None:
            return f"Before that, {first}"
        if _is_of_the_bereaved(error):
            return "No other rank said that it failed: one was killed, or hangs and has not come within dist_timeout_s"
        return None

    def leave(self) -> None:
        """See `Ranks`."""
        if self._owns_group:
            shutdown_dist(has_failed=True)
        else:
            break_gloo(self._group)

    def close(self) -> None:
        """See `Ranks`."""
        self._watch.close()
        if dist.is_initialized():  # else the whole group was given up before
            dist.destroy_process_group(self._group)


def _disagreement(question: str, yes: list[int], no: list[int]) -> DisagreementError:
    who = [", ".join(f"rank {rank}" for rank in ranks) for ranks in (yes, no)]
    return DisagreementError(
        f"{question} said yes on {who[0]}, and no on {who[1]}: it must say the same on every rank, so let it decide by "
        "what all of them know (all_reduce_tensors)"
    )


def ranks_of(
    execution: Execution,
    request: StopRequest,
    timeout_s: float | None,
    *,
    owns_group: bool = False,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> Ranks:
    """Return this process among those of the run; see `Together`."""
    if not execution.is_distributed:
        return Alone(request)
    owns_group = owns_group or execution.is_spawned
    return Together(request, timeout_s, owns_group=owns_group, on_failure=on_failure)


@contextmanager
def explaining(ranks: Ranks) -> Iterator[None]:
    """Say with an exception that ends this rank what ended the run, if that is another one."""
    try:
        yield
    except BaseException as error:  # of SystemExit, too, the others want to know
        reason = ranks.failed(error)
        if reason is not None:
            error.add_note(reason)
        raise


def _is_of_the_bereaved(error: BaseException) -> bool:
    """Whether torch, or we, raised an exception because another process is gone."""
    is_candidate = isinstance(error, dist.DistError) or type(error) is RuntimeError
    return is_candidate and any(word in str(error) for word in _WORDS_OF_THE_BEREAVED)


def check_same(ranks: Ranks, facts_of: Callable[[], dict[str, str]]) -> None:
    """Check that all ranks have the same facts, which take long to find and are not looked for by one alone.

    Raises:
        DisagreementError: one differs; it is named, with what each rank has.
    """
    if ranks.world_size == 1:
        return
    facts = facts_of()
    everyone = ranks.all_gather(facts)
    for name in facts:
        found = [each.get(name) for each in everyone]
        if len(set(found)) > 1:
            by_rank = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
            raise DisagreementError(
                f"{name} must be the same on all ranks of a run, found {by_rank}. Start all of them with the same "
                "script, arguments and packages"
            )


def seed_rank(seed: int, ranks: Ranks) -> None:
    """Give each rank but the first generators of its own, so that dropout, for one, is another on each.

    Called after `setup`: what is made there, such as weights, is the same on all of them.
    """
    if not ranks.is_first:
        seed_rngs(derive_seed(seed, "rank", ranks.rank))
