"""Table 14: how long it takes until the first step, of a new run and of one that goes on."""

import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness import Case, Options, in_fresh_process, interleave, table

TITLE = "Start of a trainer: milliseconds until the first step, of a new run and of one that goes on"
NOTES = (
    "In a fresh process each time; they take turns. Import: of what the run needs beyond torch, which is imported "
    "before, as is what it imports itself for the first optimizer. Start: from there until the first step begins, a "
    "small network on one thread, a checkpoint every step. Resume: the same in a process that finds the checkpoint "
    "after step 3 of one that ended in step 4. Over by hand: the median difference of neighbouring turns, without and "
    "with the import. By hand: `torch.load` of the state, and our loader's `load_state_dict`; control: the same again. "
    "Lightning: `fit(ckpt_path=...)`, over torch's DataLoader."
)
STEPS_BEFORE = 4


class Started(NamedTuple):
    """Milliseconds of the import, and from there to the first step."""

    imported: float
    first: float


def by_hand(work: Any, folder: Path) -> object:
    """Go on from a checkpoint, if there is one, and save one every step."""
    import torch

    from benchmarks.trainer_loops import helios_loader_of
    from benchmarks.trainer_work import loss_of

    path = folder / "hand.pth"
    loader: Any = helios_loader_of(work)
    net = work.net()
    optimizer = work.optimizer(net)
    if path.exists():
        state = torch.load(path, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        loader.load_state_dict(state["loader"])
    for batch in loader:
        work.begin_step()
        loss_of(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
        torch.save({**state, "rng": torch.get_rng_state()}, path)
    return None


def helios(work: Any, folder: Path) -> object:
    """Our Trainer."""
    from benchmarks.trainer_loops import helios as loop

    return loop(work, False, False, chkpt_root=folder / "helios", chkpt_frequency=1)()


def lightning(work: Any, folder: Path) -> object:
    """Lightning's."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from benchmarks.trainer_loops import lightning as loop

    last = folder / "last.ckpt"
    saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    train: Any = loop(work, False, False, enable_checkpointing=True, callbacks=[saver])
    return train(ckpt_path=str(last) if last.exists() else None)


def imports_by_hand() -> None:
    """Import what the loop by hand needs."""
    import helios.data  # noqa: F401


def imports_helios() -> None:
    """Import what our users do."""
    import helios.data
    import helios.trainer  # noqa: F401


def imports_lightning() -> None:
    """Import what Lightning's users do."""
    import lightning  # noqa: F401
    from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: F401


CONTENDERS: dict[str, tuple[Callable[[], None], Callable[[Any, Path], object]]] = {
    "by hand": (imports_by_hand, by_hand),
    "control": (imports_by_hand, by_hand),
    "helios": (imports_helios, helios),
    "Lightning": (imports_lightning, lightning),
}


def run_case(case: Case) -> list[float]:
    """Train until a step begins; return the ms of the import, and those from there to the first step."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.trainer_work import Enough, Work

    # The first optimizer makes torch import some more of itself, a second or so, which is no trainer's doing.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    imports, train = CONTENDERS[case["who"]]
    begin = time.perf_counter()
    imports()
    imported = time.perf_counter()
    work = Work(num_steps=100, batch_size=32, hidden=[32], last=case["last"])
    try:
        train(work, Path(case["folder"]))
    except Exception as error:
        if not isinstance(error, Enough) and not isinstance(error.__cause__, Enough):
            raise
    return [(imported - begin) * 1e3, work.began_ns[0] / 1e6 - imported * 1e3]


def first_step(who: str, template: Path | None) -> Started:
    """Let a fresh process come to its first step, in a copy of a folder or in an empty one."""
    with tempfile.TemporaryDirectory(prefix="helios-benchmark-") as name:
        folder = Path(name)
        if template is not None:
            shutil.copytree(template, folder, dirs_exist_ok=True)
        found = in_fresh_process("trainer_start", {"who": who, "folder": name, "last": 1})
    if isinstance(found, str):
        raise RuntimeError(found)
    return Started(*found)


def interrupted(who: str, folder: Path) -> str | None:
    """Begin a run and end it in a step; return why that failed, if it did."""
    folder.mkdir()
    found = in_fresh_process("trainer_start", {"who": who, "folder": str(folder), "last": STEPS_BEFORE})
    return found if isinstance(found, str) else None


def cells(own: list[Started], hand: list[Started]) -> list[object]:
    """Return the cells of a row."""
    firsts = [one.first - other.first for one, other in zip(own, hand, strict=True)]
    totals = [sum(one) - sum(other) for one, other in zip(own, hand, strict=True)]
    medians = [median(turn.imported for turn in own), median(turn.first for turn in own)]
    return [*medians, median(firsts), median(totals), len(own)]


def run(options: Options) -> str:
    """Measure all and return the table."""
    seconds = 240 if options.large else 60
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="helios-benchmark-") as name:
        templates = {who: Path(name) / who for who in CONTENDERS}
        reasons = {who: interrupted(who, template) for who, template in templates.items()}
        able = [who for who in CONTENDERS if reasons[who] is None]
        starts = {f"{who}, start": partial(first_step, who, None) for who in able}
        resumes = {f"{who}, resume": partial(first_step, who, templates[who]) for who in able}
        results = interleave({**starts, **resumes}, seconds, min_rounds=5)
    for what in ("start", "resume"):
        for who in CONTENDERS:
            row: list[object] = [f"{who}, {what}"]
            if who in able:
                rows.append(row + cells(results[f"{who}, {what}"], results[f"by hand, {what}"]))
            else:
                rows.append([*row, f"- ({reasons[who]})", *[None] * 4])
    return table(
        ["", "import, ms", "first step, ms", "over by hand", "and with the import", "turns"],
        rows,
    )
