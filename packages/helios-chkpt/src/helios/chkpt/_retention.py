"""Which checkpoints may be deleted. Nothing is read here: files are looked at by functions that are passed in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helios.chkpt._arguments import check_count


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        keep_last: the newest good ones; None keeps all, unless `keep_best` is set: then it is 1.
        keep_every: of the others those whose iteration is a multiple of this; None for none.
        keep_best: of the others the best by score; None for none.

    Raises:
        TypeError, ValueError: one is neither None nor an int of 1 or more.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: int | None = None

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "keep_best"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), at_least=1)
        if self.keep_every is not None and not self.deletes:
            raise ValueError("keep_every: without keep_last or keep_best nothing is deleted; set one of them")

    @property
    def deletes(self) -> bool:
        """Whether anything is ever deleted."""
        return self.keep_last is not None or self.keep_best is not None


@dataclass(frozen=True)
class Candidate:
    """A checkpoint file.

    Attributes:
        path: the file.
        iteration: of its name.
    """

    path: Path
    iteration: int


def deletable(
    newest_first: Sequence[Candidate],
    retention: Retention,
    *,
    is_good: Callable[[Path], bool],
    score: Callable[[Path], float | None],
) -> list[Path]:
    """The files that may be deleted, newest first.

    Damaged files count for nothing: those newer than the last one that is kept stay, for somebody to look at. What a
    link that is kept leads to is kept, too.

    Args:
        newest_first: the files of a run.
        retention: what is kept.
        is_good: whether a file verifies.
        score: the score noted in a file.
    """
    if not retention.deletes:
        return []
    keep_last = retention.keep_last or 1
    older: list[Candidate] = []
    num_good = 0
    for candidate in newest_first:
        if num_good >= keep_last:
            older.append(candidate)
        else:
            num_good += is_good(candidate.path)
    kept: set[Path] = set()
    if retention.keep_every is not None:
        kept |= {c.path for c in older if c.iteration % retention.keep_every == 0}
    if retention.keep_best is not None:
        kept |= _best(newest_first, retention.keep_best, is_good, score)
    found = {c.path for c in older if c.path not in kept}
    needed = {os.path.realpath(c.path) for c in newest_first if c.path not in found}
    return [c.path for c in older if c.path in found and os.path.realpath(c.path) not in needed]


def _best(
    newest_first: Sequence[Candidate],
    count: int,
    is_good: Callable[[Path], bool],
    score: Callable[[Path], float | None],
) -> set[Path]:
    scores = [(value, c.path) for c in newest_first if (value := score(c.path)) is not None]
    best = (path for _, path in sorted(scores, key=lambda s: -s[0]) if is_good(path))  # of equals, the newest
    return {path for _, path in zip(range(count), best, strict=False)}
