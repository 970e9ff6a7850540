"""The steps from each older structure to the next. The chain is checked when it is imported."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from helios.chkpt._format.manifest import SCHEMA
from helios.chkpt_migrator._steps import flatten, nest, pickle_training_state


@dataclass(frozen=True)
class Migration:
    """One step of the chain.

    Attributes:
        source: schema of what it takes; see `helios.chkpt_migrator._schema`.
        target: schema of what it gives, higher than `source`.
        step: pure function from the values in a file (`helios.chkpt._format.values`) to others. The key ``version``
            is dealt with by the caller.
    """

    source: int
    target: int
    step: Callable[[dict[object, object]], dict[object, object]]


def check_chain(chain: Sequence[Migration], head: int = SCHEMA) -> None:
    """ValueError unless the steps lead, one after the other and without a gap, to the schema `head`."""
    sources = [migration.source for migration in chain]
    if len(set(sources)) != len(sources):
        raise ValueError(f"chain: two steps from one schema: {sources}; expected one from each")
    for migration in chain:
        if migration.source >= migration.target:
            raise ValueError(
                f"chain: a step from {migration.source} to {migration.target}; expected a later schema"
            )
    for earlier, later in itertools.pairwise(chain):
        if earlier.target != later.source:
            raise ValueError(
                f"chain: the step to {earlier.target} is followed by one from {later.source}; expected no gap"
            )
    if chain and chain[-1].target != head:
        raise ValueError(f"chain: ends at {chain[-1].target}; expected {head}")


def steps_from(schema: int, chain: Sequence[Migration]) -> tuple[Migration, ...]:
    """The steps that a file of `schema` has to take; empty if there is no way."""
    starts = [i for i, migration in enumerate(chain) if migration.source == schema]
    return tuple(chain[starts[0] :]) if starts else ()


MIGRATIONS: tuple[Migration, ...] = (
    Migration(0, 1, pickle_training_state),
    Migration(1, 2, nest),
    Migration(2, 3, flatten),
)
"""The chain of this release."""

check_chain(MIGRATIONS)
