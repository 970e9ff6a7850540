"""Table 15: which share of its time a trainer stands still if it saves a checkpoint after every step."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from benchmarks import trainer_loops as loops
from benchmarks.chkpt_states import fsync, scratch
from benchmarks.harness import MIB, Case, Options, interleave, table
from benchmarks.standing import Standing
from benchmarks.trainer_work import Work, loss_of

TITLE = "A checkpoint after every step of a model of 10 MiB: the share of the time for which training stands still"
NOTES = (
    "Stalled: (the mean of a step with a checkpoint after each - the mean without any) / the mean with. A turn is an "
    "epoch with and one without, one after the other; the first tenth is left out, and so is what is still to be "
    "written at the end. All numbers are medians over the turns. One thread, SGD, so that the state is the parameters; "
    "steps of two lengths, since what is saved in the background is hidden in a step if it takes no longer than that, "
    "on the second core, if there is one. Each keeps the newest file only. By hand: `torch.save`, fsync and a rename. "
    "helios: all that it restores, sums, fsync, a rename, and with `keep_last=1` the newest file is verified. "
    "Lightning: `ModelCheckpoint(every_n_train_steps=1)`, which does not sync; and with a plug-in for files that does, "
    "which makes the same to do for all. File: what is saved, in MiB."
)
HIDDEN = [512] * 11
WORKS = {"short": Work(30, 32, HIDDEN), "long": Work(12, 256, HIDDEN)}


class Trains(NamedTuple):
    """One loop without checkpoints, and with."""

    plain: Callable[[], object]
    saving: Callable[[], object]


def by_hand(work: Work, folder: Path) -> Trains:
    """The loop by hand, over torch's loader."""
    loader, net = loops.torch_loader_of(work), work.net()
    optimizer = work.optimizer(net)

    def train(saves: bool) -> None:
        for batch in loader:
            work.begin_step()
            loss_of(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if saves:
                temp = folder / "hand.tmp"
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, temp)
                fsync(temp)
                temp.replace(folder / "hand.pth")

    return Trains(partial(train, False), partial(train, True))


def helios(work: Work, folder: Path, in_background: bool) -> Trains:
    """Our Trainer; a new folder each time, so that no run goes on from another."""
    loop = partial(loops.helios, work, bar=False, by_epoch=False)

    def saving() -> None:
        new = tempfile.mkdtemp(dir=folder)
        loop(chkpt_root=new, chkpt_frequency=1, keep_last=1, async_chkpt=in_background)()

    return Trains(loop(), saving)


def lightning(work: Work, folder: Path, synced: bool) -> Trains:
    """Lightning's."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    class Synced(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            fsync(Path(path))

    def saving() -> None:
        saver = ModelCheckpoint(tempfile.mkdtemp(dir=folder), every_n_train_steps=1)
        plugins = [Synced()] if synced else []
        loop = loops.lightning(
            work, False, False, enable_checkpointing=True, callbacks=[saver], plugins=plugins
        )
        loop()

    return Trains(loops.lightning(work, False, False), saving)


CONTENDERS: dict[str, Callable[[Work, Path], Trains]] = {
    "by hand, torch.save + fsync": by_hand,
    "helios, async_chkpt": partial(helios, in_background=True),
    "helios, async_chkpt=False": partial(helios, in_background=False),
    "Lightning": partial(lightning, synced=False),
    "Lightning + fsync": partial(lightning, synced=True),
}


def contender(case: Case) -> Callable[[], list[float]]:
    """Return what does a turn: ms of a step without and with checkpoints, MiB of the file; in its own process."""
    torch.set_num_threads(1)
    work, folder = WORKS[case["work"]], Path(case["folder"])
    trains = CONTENDERS[case["who"]](work, folder)

    def step_ms(train: Callable[[], object]) -> float:
        os.sync()
        work.restart()
        train()
        return fmean(work.steps_us()) / 1e3

    def turn() -> list[float]:
        found = [step_ms(trains.plain), step_ms(trains.saving)]
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes = [path.stat().st_size / MIB for path in files]
        for path in files:
            path.unlink()
        return [*found, max(sizes), len(files)]

    return turn


def cells(turns: list[list[float]]) -> list[object]:
    """Return the cells of a row."""
    plain, saving, mib = (median(turn[column] for turn in turns) for column in range(3))
    share = median((turn[1] - turn[0]) / turn[1] for turn in turns)
    return [plain, saving, median(turn[1] - turn[0] for turn in turns), f"{share:.1%}", mib, len(turns)]


def run(options: Options) -> str:
    """Measure all and return the table."""
    seconds = 180 if options.large else 60
    rows: list[list[object]] = []
    with ExitStack() as stack:
        folder = stack.enter_context(scratch(100))
        processes = {who: stack.enter_context(Standing("trainer_stall")) for who in CONTENDERS}
        for name in WORKS:
            cases = {who: {"work": name, "who": who, "folder": str(folder)} for who in CONTENDERS}
            runs = {who: partial(processes[who].turn, cases[who]) for who in CONTENDERS}
            results = interleave(runs, seconds / len(WORKS), min_rounds=5)
            rows += [[f"{who}, {name} step", *cells(turns)] for who, turns in results.items()]
    head = ["step without, ms", "step with, ms", "more, ms", "stalled", "file, MiB", "turns"]
    return table(["", *head], rows)
