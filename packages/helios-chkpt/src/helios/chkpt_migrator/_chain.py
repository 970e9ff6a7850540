"""The steps from each older format to the next. The chain is checked when it is imported."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helios.chkpt._versions import MAJOR


@dataclass(frozen=True)
class Migration:
    """One step of the chain.

    Attributes:
        source: major version of the files it takes.
        target: major version of what it gives, higher than `source`.
        step: pure function from the dictionary in the file to the new one. The key ``version`` is dealt with
            by the caller.
    """

    source: int
    target: int
    step: Callable[[dict[str, object]], dict[str, object]]


def check_chain(chain: Sequence[Migration], head: int = MAJOR) -> None:
    """ValueError unless the steps lead, one after the other and without a gap, to the format `head`."""
    sources = [migration.source for migration in chain]
    if len(set(sources)) != len(sources):
        raise ValueError(f"chain: two steps from one version: {sources}; expected one from each")
    for migration in chain:
        if migration.source >= migration.target:
            raise ValueError(
                f"chain: a step from {migration.source} to {migration.target}; expected a later version"
            )
    for earlier, later in itertools.pairwise(chain):
        if earlier.target != later.source:
            raise ValueError(
                f"chain: the step to {earlier.target} is followed by one from {later.source}; expected no gap"
            )
    if chain and chain[-1].target != head:
        raise ValueError(f"chain: ends at {chain[-1].target}; expected {head}")


def steps_from(major: int, chain: Sequence[Migration]) -> tuple[Migration, ...]:
    """The steps that a file of `major` has to take; empty if there is no way."""
    starts = [i for i, migration in enumerate(chain) if migration.source == major]
    return tuple(chain[starts[0] :]) if starts else ()


MIGRATIONS: tuple[Migration, ...] = ()
"""The chain of this release: none yet."""

check_chain(MIGRATIONS)
