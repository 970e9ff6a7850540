"""What `check_resume` tells its user."""

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as in the run that was never interrupted.

    Attributes:
        component: its path, for example `scheduler.last_epoch`, `net.2.weight` or `sample order`.
        step: global iteration at which it was seen, from 1.
        epoch: number of the epoch, from 1.
        when: in what part of the step it was seen.
        expected: its value in the whole run.
        found: its value in the other.
        summary: both values in short; of large tensors how many elements differ, and by how much.
        origin: how the other run was interrupted and from which file it was resumed.
        cause: why, in a few words.
        advice: lines that say more, and what to do.
        others: paths of what else differs then.
        is_by_itself: the run differs also if it is not interrupted, only repeated.
    """

    component: str
    step: int
    epoch: int
    when: str
    expected: str
    found: str
    summary: str
    origin: str
    cause: str
    advice: tuple[str, ...]
    others: tuple[str, ...]
    is_by_itself: bool

    def __str__(self) -> str:
        other = "once more" if self.is_by_itself else "resumed"
        rows = [("the whole run", self.expected), (other, self.found)]
        rows += [
            ("seen", f"{self.when}, step {self.step} of epoch {self.epoch}"),
            ("the run was", self.origin),
        ]
        lines = [f"{self.component}: {self.summary} at step {self.step}, {self.cause}", ""]
        lines += [f"    {name + ':':<15}{value}" for name, value in rows]
        lines += ["", *(f"    {line}" for line in self.advice)]
        if self.others:
            lines += ["", *_wrapped(f"Also different then: {shortened(self.others)}")]
        return "\n".join(lines)


@dataclass(frozen=True)
class ResumeReport:
    """What was checked, and what was found.

    Attributes:
        num_steps: batches of the whole run.
        interrupted: how each run was interrupted that ended with the same bits, in order.
        difference: the first difference; None if there is none.
    """

    num_steps: int
    interrupted: tuple[str, ...]
    difference: Difference | None

    @property
    def is_exact(self) -> bool:
        """Whether every run ended with the same bits."""
        return self.difference is None

    def __str__(self) -> str:
        if self.difference is None:
            first = f"the same bits in each of {self.num_steps} steps, in runs that were"
            return "\n".join([first, *(f"    {each}" for each in self.interrupted)])
        same = f"The same bits came of runs that were {', '.join(self.interrupted)}"
        return "\n".join([str(self.difference), *(_wrapped(same) if self.interrupted else [])])


class ResumeError(AssertionError):
    """A run that is resumed is not the run that was never interrupted; the text is the report.

    Attributes:
        report: what was found.
    """

    __module__ = "helios.trainer.testing"  # shorter in a traceback

    def __init__(self, report: ResumeReport) -> None:
        super().__init__(str(report))
        self.report = report


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="      ", break_long_words=False)


def shortened(paths: tuple[str, ...], most: int = 6) -> str:
    """Return the first of some paths."""
    rest = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + rest
