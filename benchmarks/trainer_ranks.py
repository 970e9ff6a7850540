"""Table 16: what several ranks cost: a step, and a checkpoint."""

import tempfile
from collections.abc import Callable
from statistics import fmean, median, quantiles
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import Case, Options, ratio, table, timed
from benchmarks.ranks import in_ranks
from benchmarks.trainer_work import Work, loss_of
from helios.core.rng import get_rng_state_dict
from helios.data import DataModule, create_dataloader
from helios.trainer import Model, Trainer, TrainingState, TrainingUnit
from helios.trainer._model import tables_of
from helios.trainer._rank_state import states_of_ranks
from helios.trainer._ranks import Together
from helios.trainer._stop_request import StopRequest

TITLE = (
    "Several ranks: microseconds that a step takes more than in a loop by hand, and what a checkpoint takes"
)
NOTES = (
    "Processes as torchrun starts them, gloo, a thread each, over the same loader that deals out the samples, with "
    "DistributedDataParallel. Rank 0 measures, from the beginning of a step to that of the next. A turn is an epoch, "
    "of which the first tenth is left out; the contenders take turns in the same processes. Over by hand: the median "
    "over the turns of the difference to the turn of the loop by hand just before; by hand itself is a second such "
    "loop, which is the noise. Losses: kept in `_loss_items`. Agreement: what a rank does after each batch so that all "
    "can stop after the same one, and answer alike; nobody is asked to. Save: a checkpoint of 10 MB that rank 0 "
    "writes, with fsync; and of that what all ranks do together before: comparing what each has, and gathering what "
    "differs, such as the generators."
)
WORKS = {"MLP": Work(400, 32, [32]), "wide MLP": Work(100, 32, [1024, 1024])}


def by_hand(work: Work) -> Callable[[], None]:
    """Return a loop by hand."""
    loader = create_dataloader(
        work.dataset(), batch_size=work.batch_size, shuffle=True, sample_rng="worker", is_distributed=True
    )
    net = DistributedDataParallel(work.net())
    optimizer = work.optimizer(net)

    def train() -> None:
        for batch in loader:
            work.begin_step()
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()

    return train


class Data(DataModule):
    """The samples."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def setup(self) -> None:
        """Make the dataset."""
        options = {"batch_size": self._work.batch_size, "shuffle": True, "sample_rng": "worker"}
        self._train_dataset = self._create_dataset(self._work.dataset(), options)


class Net(Model):
    """The network."""

    def __init__(self, work: Work, *, keeps_losses: bool) -> None:
        super().__init__("net")
        self._work, self._keeps_losses = work, keeps_losses

    def setup(self, fast_init: bool = False) -> None:
        """Make the network."""
        self.net = self.distribute(self._work.net())
        self.optimizer = self._work.optimizer(self.net)

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return self.save_all(net=self.net, optimizer=self.optimizer)

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        """Take it back."""
        self.load_all(state, net=self.net, optimizer=self.optimizer)

    def train_step(self, batch: Any, state: TrainingState) -> None:
        """Train on a batch."""
        self._work.begin_step()
        self.optimizer.zero_grad()
        loss = loss_of(self.net, batch)
        loss.backward()
        self.optimizer.step()
        if self._keeps_losses:
            self._loss_items["loss"] = loss


def ours(work: Work, unit: TrainingUnit, *, keeps_losses: bool = False, **options: Any) -> Callable[[], None]:
    """Return our Trainer."""
    steps = 1 if unit is TrainingUnit.EPOCH else work.num_steps // dist.get_world_size()

    def train() -> None:
        trainer = Trainer(train_unit=unit, total_steps=steps, print_banner=False, use_cpu=True, **options)
        trainer.fit(Net(work, keeps_losses=keeps_losses), Data(work))

    return train


def contenders(work: Work) -> dict[str, Callable[[], None]]:
    """Return what is measured, by name."""
    return {
        "by hand": by_hand(work),
        "helios Trainer, by EPOCH": ours(work, TrainingUnit.EPOCH),
        "helios Trainer, by ITERATION": ours(work, TrainingUnit.ITERATION),
        "helios Trainer, by EPOCH, losses": ours(work, TrainingUnit.EPOCH, keeps_losses=True),
    }


def steps_of(work: Work, train: Callable[[], None]) -> list[float]:
    """Return median, 10th percentile and mean of the steps of a turn."""
    dist.barrier()
    work.restart()
    train()
    steps = work.steps_us()
    return [median(steps), quantiles(steps, n=10)[0], fmean(steps)]


def measure_steps(num_turns: int) -> dict[str, dict[str, list[list[list[float]]]]]:
    """Return, by work and contender, the turns: each of the loop by hand before it, and of itself."""
    found: dict[str, dict[str, list[list[list[float]]]]] = {}
    for name, work in WORKS.items():
        hand, runs = by_hand(work), contenders(work)
        turns: dict[str, list[list[list[float]]]] = {each: [] for each in runs}
        for turn in range(num_turns + 1):
            for each, train in runs.items():
                pair = [steps_of(work, hand), steps_of(work, train)]
                if turn > 0:
                    turns[each].append(pair)
        found[name] = turns
    return found


def measure_agreement() -> float:
    """Return microseconds that the agreement takes after a batch."""
    ranks = Together(StopRequest())
    ranks.wait_for_all()

    def ask() -> None:
        for _ in range(10_000):
            ranks.vote("should_training_stop", False)
            ranks.is_asked_to_stop()

    took = median(timed(ask, 10_000) for _ in range(15))
    ranks.wait_for_all()
    ranks.close()
    return took


def measure_saves(num_saves: int) -> list[float]:
    """Return milliseconds of a save, and of what all ranks do together for it, which is in that."""
    work = Work(8 * dist.get_world_size(), 1, [1024, 512])
    request = StopRequest()
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        model, took = Net(work, keeps_losses=False), []
        saves = _timed_saves(took)
        with saves:
            options = {"chkpt_root": shared[0], "chkpt_frequency": 1, "keep_last": 1, "async_chkpt": False}
            for _ in range(max(1, num_saves // 8)):
                name = f"run{len(took)}"
                ours_at = Trainer(
                    name,
                    TrainingUnit.ITERATION,
                    8,
                    print_banner=False,
                    use_cpu=True,
                    **options,  # type: ignore[arg-type]
                )
                ours_at.fit(model, Data(work))
        ranks = Together(request)
        loader = create_dataloader(work.dataset(), is_distributed=True)
        generators = dict(get_rng_state_dict())

        def together() -> None:
            own = {"tables": tables_of(model), "model": model.state_dict(), "plugins": {}}
            own["data"] = dict(loader.state_dict())
            states_of_ranks(ranks, model, generators, own)

        gathers = [timed(together) for _ in range(20)]
        ranks.wait_for_all()
        ranks.close()
        dist.barrier()
    return [median(took) / 1e3, median(gathers) / 1e3]


class _timed_saves:  # noqa: N801  # used as a function
    """Times every save of the trainer inside."""

    def __init__(self, took: list[float]) -> None:
        self._took = took

    def __enter__(self) -> None:
        from helios.trainer._saver import CheckpointSaver

        self._real = CheckpointSaver._save

        def save(saver: Any, *arguments: Any) -> None:
            self._took.append(timed(lambda: self._real(saver, *arguments)))

        CheckpointSaver._save = save  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        from helios.trainer._saver import CheckpointSaver

        CheckpointSaver._save = self._real  # type: ignore[method-assign]


def run_case(case: Case) -> Any:
    """Do what a case says, as a rank."""
    if case["what"] == "steps":
        return measure_steps(case["turns"])
    if case["what"] == "agreement":
        return measure_agreement()
    return measure_saves(case["saves"])


def run(options: Options) -> str:
    """Return the tables."""
    turns = 25 if options.large else 9
    steps = in_ranks("trainer_ranks", 2, {"what": "steps", "turns": turns})
    rows = []
    for name, by_contender in steps.items():
        for each, pairs in by_contender.items():
            hand, own = ([pair[side] for pair in pairs] for side in (0, 1))
            cells: list[object] = []
            for column in range(3):
                mine, theirs = ([turn[column] for turn in side] for side in (own, hand))
                cells += [median(mine), median(a - b for a, b in zip(mine, theirs, strict=True))]
            times = ratio([turn[0] for turn in own], [turn[0] for turn in hand])
            rows.append([f"{name}: {each}", *cells, f"{times:.3f}"])
    head = ["2 ranks, us a step", "median", "over", "p10", "over", "mean", "over", "times by hand"]
    agreement = [
        [f"{world} ranks", in_ranks("trainer_ranks", world, {"what": "agreement"})] for world in (2, 4)
    ]
    saves = [
        [
            f"{world} ranks",
            *in_ranks("trainer_ranks", world, {"what": "saves", "saves": 64 if options.large else 24}),
        ]
        for world in (1, 2, 4)
    ]
    return "\n\n".join(
        [
            table(head, rows),
            table(["agreement after a batch", "us"], agreement),
            table(["checkpoint of 10 MB", "ms a save", "ms together before"], saves),
        ]
    )
