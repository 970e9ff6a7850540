"""The processes that save or load one checkpoint together. An error of one is an error of all, which names it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from helios.chkpt import _errors

_Local = TypeVar("_Local")
_Share = TypeVar("_Share")
_OWN: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        TypeError,
        ValueError,
        KeyError,
        RuntimeError,
        _errors.NotACheckpointError,
        _errors.TruncatedError,
        _errors.CorruptError,
        _errors.UnsafeError,
        _errors.VersionTooNewError,
        _errors.VersionTooOldError,
    )
}


@dataclass(frozen=True)
class _Failure:
    """An error as it is sent: not pickled as it is, since any class may be one."""

    rank: int
    kind: str
    message: str
    errno: int | None = None
    filename: str | None = None

    @property
    def error(self) -> Exception:
        """The error for a process, the same in each."""
        if self.errno is not None:
            return OSError(self.errno, f"rank {self.rank}: {self.message}", self.filename)
        if self.kind in _OWN:
            return _OWN[self.kind](f"rank {self.rank}: {self.message}")
        return RuntimeError(f"rank {self.rank}: {self.kind}: {self.message}")


@dataclass(frozen=True)
class Ranks:
    """This process among the others of a group.

    Attributes:
        group: None for the default group, and for a process that is alone.
        rank: its number in the group.
        size: number of processes.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Those of a process group; of the default one for None; without any, this process alone.

        Raises:
            ValueError: this process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            if group is not None:
                raise ValueError("group: expected None as long as torch.distributed is not initialised")
            return cls()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group: this process is not in it; only its members may call this")
        return cls(group, rank, dist.get_world_size(group))

    def central(
        self, local: Callable[[], _Local], decide: Callable[[list[_Local]], Sequence[_Share]]
    ) -> _Share:
        """Do something in each process, then something with all results in that of rank 0, and share out its results.

        Args:
            local: what each does.
            decide: what rank 0 does with the results; gives one share for each rank. Not called if one failed.

        Raises:
            Exception: what `local` or `decide` raised, in all processes; of several the one of the lowest rank.
        """
        own, error = self._try(local)
        if self.size == 1:
            if error is not None:
                raise error
            return decide([own])[0]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(own, gathered, group=self.group, group_dst=0)
        shares: list[Any] | None = None
        if gathered is not None:
            failure = next((item for item in gathered if isinstance(item, _Failure)), None)
            if failure is None:
                decided, error = self._try(lambda: list(decide(gathered)))
                shares = [decided] * self.size if error is not None else decided
            else:
                shares = [failure] * self.size
        received: list[Any] = [None]
        dist.scatter_object_list(received, shares, group=self.group, group_src=0)
        share: _Share = self._raised(received[0], error)
        return share

    def agree(self, local: Callable[[], _Local]) -> list[_Local]:
        """Do something in each process; give all results, in the order of the ranks, to each.

        Raises:
            Exception: what `local` raised, in all processes; of several the one of the lowest rank.
        """
        own, error = self._try(local)
        if self.size == 1:
            if error is not None:
                raise error
            return [own]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, own, group=self.group)
        for item in gathered:
            self._raised(item, error)
        return gathered

    def _try(self, work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            return work(), None
        except BaseException as error:
            return self._failure(error), error

    def _failure(self, error: BaseException) -> _Failure:
        if isinstance(error, OSError) and error.errno is not None:
            name = None if error.filename is None else str(error.filename)
            return _Failure(self.rank, "OSError", error.strerror or "", error.errno, name)
        return _Failure(self.rank, type(error).__name__, str(error))

    def _raised(self, value: Any, error: BaseException | None) -> Any:
        if error is not None and not isinstance(error, Exception):
            raise error  # Ctrl-C
        if isinstance(value, _Failure):
            raise value.error from error
        return value
