"""check_resume: the whole run, the interrupted ones, and what they differ in."""

from collections.abc import Callable, Iterable
from pathlib import Path

from helios.data import DataModule
from helios.trainer._model import Model
from helios.trainer._trainer import Trainer
from helios.trainer._training_state import TrainingUnit
from helios.trainer.testing._compare import (
    LENGTH,
    Divergence,
    first_divergence,
    first_scalar_divergence,
)
from helios.trainer.testing._diagnose import (
    BY_ITSELF,
    Cause,
    cause_in_resume,
    cause_without_resume,
    primary_path,
    resume_of,
)
from helios.trainer.testing._points import Plan, chosen_plans, given_plans, layout_of
from helios.trainer.testing._recorder import Recording, Scalar
from helios.trainer.testing._report import Difference, ResumeError, ResumeReport
from helios.trainer.testing._runs import Makers, Processes, Runner, undisturbed
from helios.trainer.testing._values import Pair, pair_of


def check_resume(
    make_trainer: Callable[[Path], Trainer],
    make_model: Callable[[], Model],
    make_datamodule: Callable[[], DataModule],
    *,
    stop_at: int | Iterable[int] | None = None,
    num_points: int = 3,
    seed: int = 0,
    ignore: Iterable[str] = (),
    raises: bool = True,
) -> ResumeReport:
    """Check that your own model is exact: that a run which is interrupted and resumed is the run that never was.

    It is run whole, then once for each of several interruptions: asked to stop at random steps, at the end of an epoch,
    in an accumulation, before, in and after a validation; killed after a checkpoint; both in one run. After every step
    all that can be seen is compared, bit for bit: order of samples, batch, generators, parameters, buffers, gradients,
    optimizers, schedulers, whatever else has a `state_dict`, and the plain attributes of model and plug-ins; and the
    scalars that were logged. The first difference is reported, with its cause where that can be found out. Use a run
    of few steps: it is run about a dozen times, in this process.

    Every run has new objects in a new folder, as a new process has. Generators are put at foreign places before each,
    and are as they were after the check. Banner, bars and what is logged below WARNING are suppressed.

    Not compared: measured times (`state.average_iter_time`), paths, files, functions, datasets.

    Args:
        make_trainer: makes the trainer, with `chkpt_root` the folder that it is given and the `chkpt_frequency` of
            the real run: `lambda chkpt_root: Trainer(chkpt_root=chkpt_root, chkpt_frequency=1, ...)`.
        make_model: makes the model; its class will do.
        make_datamodule: makes the datamodule.
        stop_at: global iterations (batches, from 1) to stop and to kill the run at, instead of chosen ones.
        num_points: how many random steps to stop at, beside the awkward ones.
        seed: chooses them, and the foreign places of the generators.
        ignore: patterns of paths that may differ, with all below them: `("timer.*", "last_seen")`.
        raises: raise a ResumeError if there is a difference.

    Returns:
        What was checked and found.

    Raises:
        ResumeError: there is a difference. It is an AssertionError, whose text is the report.
        TypeError: an argument, or what it makes, has the wrong type.
        ValueError: the trainer saves no checkpoints in the folder, an object is made only once, or `stop_at` is not in
            the run.
    """
    __tracebackhide__ = True  # pytest shows the report instead of this function
    patterns = _checked_patterns(ignore)
    steps = _checked_steps(stop_at, num_points)
    with undisturbed():
        runner = Runner(Makers(make_trainer, make_model, make_datamodule), seed, patterns)
        report = _Check(runner).run(steps, num_points, seed)
    if raises and report.difference is not None:
        raise ResumeError(report)
    return report


def _checked_patterns(ignore: Iterable[str]) -> tuple[str, ...]:
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"ignore must be patterns of paths, found {ignore!r}")
    return patterns


def _checked_steps(stop_at: int | Iterable[int] | None, num_points: int) -> list[int] | None:
    if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < 0:
        raise ValueError(f"num_points must be an int, 0 or more, found {num_points!r}")
    if stop_at is None:
        return None
    steps = [stop_at] if isinstance(stop_at, int) else list(stop_at)
    if not steps or not all(isinstance(step, int) and not isinstance(step, bool) for step in steps):
        raise TypeError(f"stop_at must be one or more global iterations, found {stop_at!r}")
    return steps


_REPEATED = "only repeated, not resumed"
_LOGGED_AGAIN = Cause(
    "though the model is the same",
    (
        "What was logged after the checkpoint is logged again by the run that goes on, and must be the same. Here it",
        "depends on state that is in no attribute of the model and of the plug-ins: in the DataModule, for example.",
    ),
)


class _Check:
    """The whole run, and the comparison of others with it.

    Args:
        runner: runs the model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        processes = runner.run()
        self._whole, self._saves = processes.recordings[0], processes.saves

    def run(self, steps: list[int] | None, num_points: int, seed: int) -> ResumeReport:
        """Make the plans and follow them until there is a difference."""
        settings = self._runner.settings
        by_iteration = settings.train_unit is TrainingUnit.ITERATION
        layout = layout_of(self._whole, self._saves, settings.accumulation_steps if by_iteration else 1)
        plans = chosen_plans(layout, num_points, seed) if steps is None else given_plans(steps, layout)
        followed: list[str] = []
        for plan in plans:
            difference = self._follow(plan)
            if difference is not None:
                return ResumeReport(layout.num_steps, tuple(followed), difference)
            followed.append(_describe(plan))
        return ResumeReport(layout.num_steps, tuple(followed), None)

    def _follow(self, plan: Plan) -> Difference | None:
        processes = self._runner.run(*plan)
        for number, recording in enumerate(processes.recordings):
            divergence = first_divergence(self._whole, recording, is_to_end=not recording.interrupted)
            if divergence is not None:
                return self._explain(plan, processes, number, divergence)
        last = processes.recordings[-1]
        scalars = first_scalar_divergence(self._whole.scalars, last.scalars)
        if scalars is None:
            return None
        repeated = self._runner.run().recordings[0]
        own = first_scalar_divergence(self._whole.scalars, repeated.scalars)
        if own is not None:
            return _scalar_difference(own, _REPEATED, BY_ITSELF, is_by_itself=True)
        return _scalar_difference(scalars, _origin(plan, len(processes.recordings) - 1, last), _LOGGED_AGAIN)

    def _explain(self, plan: Plan, processes: Processes, number: int, divergence: Divergence) -> Difference:
        recording = processes.recordings[number]
        if recording.save is None:
            return self._by_itself(plan, number, recording, divergence)
        repeated = self._runner.run().recordings[0]
        own = first_divergence(self._whole, repeated)
        if own is not None:
            return self._by_itself((), 0, repeated, own)
        resume = resume_of(recording, processes.saves)
        path = primary_path(divergence, resume)
        pair = self._pair(plan, number, divergence, path)
        return _difference(
            path,
            divergence,
            pair,
            cause_in_resume(path, divergence, resume),
            _origin(plan, number, recording),
        )

    def _by_itself(self, plan: Plan, number: int, recording: Recording, divergence: Divergence) -> Difference:
        path = next(iter(divergence.leaves))
        pair = self._pair(plan, number, divergence, path)
        cause = cause_without_resume(path, recording, divergence)
        return _difference(path, divergence, pair, cause, _REPEATED, is_by_itself=True)

    def _pair(self, plan: Plan, number: int, divergence: Divergence, path: str) -> Pair:
        """Return both values; those that were too large to keep are had by running both again up to there."""
        leaves = {**divergence.effects, **divergence.leaves}[path]
        if path == LENGTH or any(leaf is None for leaf in leaves) or str(leaves[0]) != str(leaves[1]):
            return pair_of(*leaves)
        moment = divergence.moment_of(path)
        expected = self._runner.run(capture=(0, moment, path)).recordings[-1].captured
        found = self._runner.run(*plan, capture=(number, moment, path)).recordings[-1].captured
        return pair_of(*leaves, (expected, found))


def _difference(
    path: str, divergence: Divergence, pair: Pair, cause: Cause, origin: str, is_by_itself: bool = False
) -> Difference:
    others = [other for other in (*divergence.leaves, *divergence.effects) if other != path]
    return Difference(
        component=path,
        step=divergence.global_iteration,
        epoch=divergence.epoch,
        when=divergence.moment_of(path).phase.value,
        expected=pair.expected,
        found=pair.found,
        summary=pair.summary,
        origin=origin,
        cause=cause.headline,
        advice=cause.advice,
        others=tuple(others),
        is_by_itself=is_by_itself,
    )


def _scalar_difference(
    scalars: tuple[Scalar | None, Scalar | None], origin: str, cause: Cause, is_by_itself: bool = False
) -> Difference:
    one, two = scalars
    known = one or two
    assert known is not None, "they differ"
    expected, found = ("not logged" if scalar is None else scalar.value for scalar in scalars)
    if one is not None and two is not None and one[:2] != two[:2]:
        expected, found = (f"{scalar.name} at {scalar.step}," for scalar in (one, two))
    return Difference(
        component=f"scalar {known.name}",
        step=known.global_iteration,
        epoch=known.epoch,
        when="when it was logged",
        expected=expected,
        found=found,
        summary=f"{expected} != {found}",
        origin=origin,
        cause=cause.headline,
        advice=cause.advice,
        others=(),
        is_by_itself=is_by_itself,
    )


def _describe(plan: Plan) -> str:
    return " and then ".join(map(str, plan))


def _origin(plan: Plan, number: int, recording: Recording) -> str:
    return f"{_describe(plan[:number])}, and resumed from {recording.resumed_from}"
