"""Finding the first thing in which two runs differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from helios.trainer.testing._leaf import Leaf, Snapshot
from helios.trainer.testing._recorder import Moment, Phase, Recording, Scalar, Seen

Differences = dict[str, tuple[Leaf | None, Leaf | None]]


@dataclass(frozen=True)
class Divergence:
    """The first moment at which two runs differ.

    Attributes:
        moment: which.
        global_iteration: batches trained on by then.
        epoch: number of the epoch, from 1.
        leaves: of each path that differs, what it was in the whole run and in the other; None where it was not there.
        effects: likewise after the step, if the moment is when its batch came: they may tell why.
    """

    moment: Moment
    global_iteration: int
    epoch: int
    leaves: Differences
    effects: Differences = field(default_factory=dict)

    def moment_of(self, path: str) -> Moment:
        """Return the first moment at which a path differs."""
        return self.moment if path in self.leaves else Moment(Phase.STEP, self.moment.number)


LENGTH = "length of the run"


def differing(expected: Snapshot, found: Snapshot) -> Differences:
    """Return the paths at which two snapshots differ, in their order."""
    if expected == found:
        return {}
    paths = {**dict.fromkeys(expected), **dict.fromkeys(found)}
    return {
        path: (expected.get(path), found.get(path)) for path in paths if expected.get(path) != found.get(path)
    }


def first_divergence(whole: Recording, other: Recording, *, is_to_end: bool = True) -> Divergence | None:
    """Return where a run that began, or was resumed, differs from the whole run, or None.

    Args:
        whole: the run that was never interrupted.
        other: another one.
        is_to_end: it should have gone on to the end.
    """
    is_as_long = not is_to_end or _is_end_of(other, whole)
    for moment, seen in other.moments.items():
        there = whole.moments.get(moment)
        if there is None or (moment.phase is Phase.END and not is_as_long):
            return _other_length(whole, other)
        if leaves := differing(there.snapshot, seen.snapshot):
            is_batch = moment.phase is Phase.BATCH
            effects = _leaves_at(Moment(Phase.STEP, moment.number), whole, other) if is_batch else {}
            effects = {path: pair for path, pair in effects.items() if path not in leaves}
            return Divergence(moment, seen.global_iteration, seen.epoch, leaves, effects)
    return None if is_as_long else _other_length(whole, other)


def _is_end_of(other: Recording, whole: Recording) -> bool:
    found, expected = list(other.moments), list(whole.moments)
    return found == expected[len(expected) - len(found) :]


def _leaves_at(moment: Moment, whole: Recording, other: Recording) -> Differences:
    nothing = Seen({}, 0, 0)
    return differing(whole.moments.get(moment, nothing).snapshot, other.moments.get(moment, nothing).snapshot)


def _other_length(whole: Recording, other: Recording) -> Divergence:
    """Describe runs of which one has other steps or validations than the other."""
    ours, theirs = (_outline(recording) for recording in (whole, other))
    last = list(other.moments.values())[-1]
    moment = next(m for m in reversed(other.moments))
    return Divergence(moment, last.global_iteration, last.epoch, {LENGTH: (ours, theirs)})


def _outline(recording: Recording) -> Leaf:
    last = list(recording.moments.values())[-1]
    validations = [moment.number for moment in recording.moments if moment.phase is Phase.VALIDATION]
    text = f"{last.global_iteration} steps, {max(validations, default=0)} validations"
    return Leaf(text.encode(), "run", text)


def first_scalar_divergence(
    whole: Sequence[Scalar], other: Sequence[Scalar]
) -> tuple[Scalar | None, Scalar | None] | None:
    """Return the first scalars in which the logs of two runs differ, or None."""
    for index in range(max(len(whole), len(other))):
        pair = tuple(log[index] if index < len(log) else None for log in (whole, other))
        if pair[0] is None or pair[1] is None or pair[0][:3] != pair[1][:3]:
            return pair[0], pair[1]
    return None
