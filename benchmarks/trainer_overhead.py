"""Table 13: what a trainer adds to a step of the loop that one would write by hand."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

import torch

from benchmarks import trainer_loops as loops
from benchmarks.harness import Case, Options, interleave, ratio, table
from benchmarks.standing import Standing
from benchmarks.trainer_work import Work

TITLE = "Trainers: microseconds that a step takes more than in a loop by hand"
NOTES = (
    "From the beginning of a step to that of the next one, so loop and loader are in it; a turn is an epoch, of which "
    "the first tenth is left out. One thread, no logging, no checkpoints. Median, 10th percentile and mean: of the "
    "steps of a turn, and of them the medians over the turns. Over by hand: what they are above those of a loop by "
    "hand, without a bar, over the same loader, which runs just before in the same process; the median over the "
    "turns. The mean has what a bar takes when it is drawn, ten times a second, and all that the machine does besides. "
    "Every library has a process of its own, whose bars go to a terminal; they take turns. By hand itself (the row "
    "without a bar): the same loop a second time, which is the noise. helios and helios-ml keep the loss in "
    "`_loss_items`, as their documentation does; the others keep nothing. Loaders: `ResumableDataLoader` with "
    '`sample_rng="worker"`, which is exactly the work of torch\'s; helios-ml makes a torch DataLoader with a sampler '
    "of its own. Empty: a step that does nothing on a batch of 1; for Lightning with manual optimization. MLP: two "
    "linear layers and SGD, on a batch of 32. Barebones: Lightning's mode to find out what its features cost. "
    "helios-ml runs in an interpreter of its own, which `HELIOS_ML_PYTHON` names."
)
WORKS = {"empty": Work(2000, 1, []), "MLP": Work(400, 32, [32])}


class Contender(NamedTuple):
    """A row of the table.

    Attributes:
        label: what it is called.
        library: which process it is in.
        loader: makes the loader that it uses, and that the loop by hand beside it does.
        loop: is given the work and whether there is a bar, and returns what trains.
        bars: with which bars it is run.
    """

    label: str
    library: str
    loader: Callable[[Work], Any]
    loop: Callable[[Work, bool], loops.Train]
    bars: Sequence[bool] = (False, True)


def hand_over(loader: Callable[[Work], Any]) -> Callable[[Work, bool], loops.Train]:
    """Return the loop by hand over a kind of loader."""
    return lambda work, bar: loops.by_hand(work, loader(work), bar)


OURS, TORCH, THEIRS = loops.helios_loader_of, loops.torch_loader_of, loops.helios_ml_loader_of
CONTENDERS = [
    Contender("by hand", "by hand", OURS, hand_over(OURS)),
    Contender("helios Trainer, by EPOCH", "helios", OURS, partial(loops.helios, by_epoch=True)),
    Contender("helios Trainer, by ITERATION", "helios", OURS, partial(loops.helios, by_epoch=False)),
    Contender("by hand", "by hand", TORCH, hand_over(TORCH)),
    Contender("Accelerate", "accelerate", TORCH, loops.accelerate),
    Contender("pytorch-ignite", "ignite", TORCH, loops.ignite),
    Contender("Lightning", "lightning", TORCH, partial(loops.lightning, barebones=False)),
    Contender("Lightning, barebones", "lightning", TORCH, partial(loops.lightning, barebones=True), [False]),
    Contender("by hand", "helios-ml", THEIRS, hand_over(THEIRS)),
    Contender("helios-ml, by EPOCH", "helios-ml", THEIRS, partial(loops.helios_ml, by_epoch=True)),
    Contender("helios-ml, by ITERATION", "helios-ml", THEIRS, partial(loops.helios_ml, by_epoch=False)),
]
LOADERS: dict[Callable[[Work], Any], str] = {OURS: "helios", TORCH: "torch", THEIRS: "helios-ml"}


class Steps(NamedTuple):
    """Microseconds of the steps of a turn."""

    median: float
    p10: float
    mean: float


class Turn(NamedTuple):
    """A turn, and that of the loop by hand before it."""

    own: Steps
    hand: Steps


def contender(case: Case) -> Callable[[], list[Steps]]:
    """Return what does a turn of a contender; runs in a process of its own."""
    torch.set_num_threads(1)
    work, row = WORKS[case["work"]], CONTENDERS[case["row"]]
    hand, own = loops.by_hand(work, row.loader(work), False), row.loop(work, case["bar"])
    return lambda: [steps_of(work, hand), steps_of(work, own)]


def steps_of(work: Work, train: loops.Train) -> Steps:
    """Train for an epoch."""
    work.restart()
    train()
    steps = work.steps_us()
    return Steps(median(steps), quantiles(steps, n=10)[0], fmean(steps))


def turn_of(process: Standing, case: Case) -> Turn:
    """Have a turn done."""
    hand, own = process.turn(case)
    return Turn(Steps(*own), Steps(*hand))


def excess(own: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the differences of neighbouring turns."""
    return median(one - other for one, other in zip(own, others, strict=True))


def cells(turns: list[Turn]) -> list[object]:
    """Return the cells of a row after those that say what is measured."""
    own, hand = ([getattr(turn, name) for turn in turns] for name in ("own", "hand"))
    shown: list[object] = []
    for name in Steps._fields:
        mine, theirs = ([getattr(steps, name) for steps in each] for each in (own, hand))
        shown += [median(mine), excess(mine, theirs)]
    times = ratio([steps.median for steps in own], [steps.median for steps in hand])
    return [*shown, f"{times:.2f}", len(turns)]


def processes_for(stack: ExitStack) -> dict[str, Standing | None]:
    """Start the processes; None is a library without an interpreter."""
    found: dict[str, Standing | None] = {}
    for library in {row.library for row in CONTENDERS}:
        python = os.environ.get("HELIOS_ML_PYTHON") if library == "helios-ml" else None
        is_here = library != "helios-ml" or python is not None
        found[library] = stack.enter_context(Standing("trainer_overhead", python)) if is_here else None
    return found


def measure(name: str, processes: dict[str, Standing | None], seconds: float) -> list[list[object]]:
    """Return the rows of a table."""
    runs: dict[str, Callable[[], Turn]] = {}
    reasons: dict[str, str] = {}
    heads: dict[str, list[object]] = {}
    for index, row in enumerate(CONTENDERS):
        for bar in row.bars:
            key = f"{index} {bar}"
            heads[key] = [row.label, LOADERS[row.loader], "yes" if bar else "no"]
            process = processes[row.library]
            if process is None:
                reasons[key] = "not measured: HELIOS_ML_PYTHON is not set"
                continue
            run = partial(turn_of, process, {"work": name, "row": index, "bar": bar})
            try:
                run()
            except RuntimeError as error:
                reasons[key] = f"not measured: {error}"
            else:
                runs[key] = run
    results = interleave(runs, seconds, min_rounds=5)
    return [
        [*heads[key], *(cells(results[key]) if key in results else [f"- ({reasons[key]})", *[None] * 7])]
        for key in heads
    ]


def run(options: Options) -> str:
    """Measure all and return the tables."""
    seconds = 240 if options.large else 50
    head = ["loader", "bar", "median", "over by hand", "p10", "over by hand", "mean", "over by hand"]
    with ExitStack() as stack:
        processes = processes_for(stack)
        return "\n\n".join(
            table([f"{name}, us a step", *head, "times", "turns"], measure(name, processes, seconds))
            for name in WORKS
        )
