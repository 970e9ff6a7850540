"""Where to interrupt a run: at random places, and at those where resuming is most often wrong."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from helios.trainer.testing._recorder import Interruption, InterruptionKind, Phase, Recording, Save

Plan = tuple[Interruption, ...]
"""The interruptions of one run, one after the other."""


@dataclass(frozen=True)
class RunLayout:
    """What there is in a run, by numbers of batches, from 1.

    Attributes:
        num_steps: batches that are trained on.
        epoch_ends: last batches of epochs, without the last epoch's.
        validated: the batch before each validation, in their order.
        saved: batches after which a checkpoint is taken, without the last one.
        accumulation_steps: batches of an iteration.
    """

    num_steps: int
    epoch_ends: tuple[int, ...]
    validated: tuple[int, ...]
    saved: tuple[int, ...]
    accumulation_steps: int = 1


def layout_of(whole: Recording, saves: Sequence[Save], accumulation_steps: int) -> RunLayout:
    """Return what there is in a run that was never interrupted."""
    steps = [seen for moment, seen in whole.moments.items() if moment.phase is Phase.STEP]
    return RunLayout(
        num_steps=len(steps),
        epoch_ends=tuple(one.global_iteration for one, two in pairwise(steps) if one.epoch != two.epoch),
        validated=tuple(
            seen.global_iteration
            for moment, seen in whole.moments.items()
            if moment.phase is Phase.VALIDATION
        ),
        saved=tuple(sorted({save.global_iteration for save in saves} - {len(steps)})),
        accumulation_steps=accumulation_steps,
    )


def given_plans(stop_at: Sequence[int], layout: RunLayout) -> list[Plan]:
    """Return a stop and a kill at each given step; and both in one run, if there are two steps.

    Raises:
        ValueError: a step is not one of the run.
    """
    for step in stop_at:
        if not 1 <= step <= layout.num_steps:
            raise ValueError(
                f"stop_at has {step}, but the run has {layout.num_steps} batches: give global iterations from 1 to "
                f"{layout.num_steps}"
            )
    steps = sorted(set(stop_at))
    plans: list[Plan] = [(_stop(step),) for step in steps]
    plans += [(_kill(step),) for step in steps]
    return [*plans, (_stop(steps[0]), _kill(steps[1]))] if len(steps) > 1 else plans


def chosen_plans(layout: RunLayout, num_points: int, seed: int) -> list[Plan]:
    """Return plans for random steps and for the awkward ones."""
    generator = random.Random(seed)
    last = layout.num_steps
    inner = range(1, max(last, 2))
    stops = set(generator.sample(inner, min(num_points, len(inner))))
    for awkward in (
        layout.epoch_ends,
        [step for step in inner if step % layout.accumulation_steps],
        layout.validated,  # the validation comes first when the run goes on
        [step + 1 for step in layout.validated if step + 1 < last],
    ):
        if awkward:
            stops.add(generator.choice(awkward))
    plans: list[Plan] = [(_stop(step),) for step in sorted(stops)]
    if layout.validated:
        number = generator.randint(1, len(layout.validated))
        plans.append((Interruption(InterruptionKind.STOP_IN_VALIDATION, number),))
    if layout.saved:  # else a run that is killed begins anew
        right_after, anywhere = (
            generator.choice(layout.saved) + 1,
            generator.randint(layout.saved[0] + 1, last),
        )
        plans += [(_kill(step),) for step in sorted({right_after, anywhere})]
    if last > 2:
        first, second = sorted(generator.sample(range(1, last), 2))
        plans.append((_stop(first), _kill(second)))
    return plans


def _stop(step: int) -> Interruption:
    return Interruption(InterruptionKind.STOP, step)


def _kill(step: int) -> Interruption:
    return Interruption(InterruptionKind.KILL, step)
