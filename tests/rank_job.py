"""The run of job.py on several ranks, started as torchrun starts them, by rank_server.py."""

import dataclasses
import hashlib
import importlib
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from job import NUM_SAMPLES, Job, Points, PointsModel, reach_in_save
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import helios.trainer.logging as hl_logging
from helios.chkpt import save
from helios.data import DataModule
from helios.trainer import Strategy, Trainer, TrainingState, TrainingUnit
from helios.trainer.distributed import all_reduce_tensors, is_dist_active

BATCH_SIZE = 4


@dataclass(frozen=True)
class RankJob(Job):
    """What to train on how many ranks, and which of them dies where.

    Attributes:
        world_size: how many ranks.
        strategy: "ddp" or "fsdp".
        victims: the ranks that are sent the signal, each by itself. For them `signal` may also be "raise", to raise an
            error, or "hang", to wait for ever.
        draws_on_rank_1: only rank 1 draws a number more in each batch.
        batch_size: samples of a rank in a batch.
        has_batch_norm: else layer norm, which can do with a batch of one sample.
        num_samples: of the dataset.
        has_group: else it is one process that nothing like torchrun has started.
        is_crossed: the network's layers are used in another order than they are registered in.
        is_raw: DistributedDataParallel is used without `Model.distribute`.
        notes_loaded: each rank saves the model's state as it is when training starts, whole, in `loaded.pth`.
        dist_timeout_s: of the Trainer.
        other_on_rank_1: what rank 1 has otherwise: "accumulation", "model" or nothing.
    """

    world_size: int = 2
    strategy: str = "ddp"
    victims: tuple[int, ...] = ()
    draws_on_rank_1: bool = False
    batch_size: int = BATCH_SIZE
    has_batch_norm: bool = True
    num_samples: int = NUM_SAMPLES
    has_group: bool = True
    is_crossed: bool = False
    is_raw: bool = False
    notes_loaded: bool = False
    dist_timeout_s: float | None = None
    other_on_rank_1: str = ""

    def of_rank(self, rank: int) -> "RankJob":
        """Return the job as one rank has it: with a folder of its own to note in, and its own fate."""
        folder = str(Path(self.root, f"rank{rank}"))
        own = dataclasses.replace(self, root=folder, kill=self.kill if rank in self.victims else None)
        if rank == 1 and self.other_on_rank_1 == "accumulation":
            return dataclasses.replace(own, accumulation=self.accumulation + 1)
        return own

    def _meet_its_fate(self) -> None:
        if self.signal == "raise":
            raise RuntimeError("raised on purpose")
        if self.signal == "hang":
            while True:
                signal.pause()
        super()._meet_its_fate()


class RankData(DataModule):
    """The points of job.py; every one is validated once, whatever the number of ranks."""

    def __init__(self, job: RankJob) -> None:
        super().__init__()
        self._job = job

    def setup(self) -> None:
        workers = {"num_workers": abs(self._job.workers), "persistent_workers": self._job.workers < 0}
        train = {"batch_size": self._job.batch_size, "shuffle": True, **workers}
        tail = "pad" if self._job.strategy == "fsdp" else "exact"
        valid = {"batch_size": self._job.batch_size, "shuffle": True, "tail": tail}
        self._train_dataset = self._create_dataset(Points(self._job.num_samples), train)
        self._valid_dataset = self._create_dataset(Points(self._job.num_samples), valid)


class Crossed(nn.Module):
    """Layers that get their gradients in another order than the reverse of that in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(128, 3)
        self.second = nn.Linear(6, 128)
        self.first = nn.Linear(6, 128)
        self.third = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.third(self.first(x))) + self.second(x))


class RankModel(PointsModel):
    """The model of job.py; its scores are those of all ranks, and gradients are exchanged before a step only."""

    _job: RankJob
    _num_batches = 0  # when the last one was trained on by this process

    def distribute(self, net: nn.Module, **options: Any) -> nn.Module:
        return DistributedDataParallel(net) if self._job.is_raw else super().distribute(net, **options)

    def _network(self) -> nn.Module:
        return Crossed() if self._job.is_crossed else super()._network()

    def _norm(self) -> nn.Module:
        return super()._norm() if self._job.has_batch_norm else nn.LayerNorm(12)

    def state_dict(self) -> dict[str, Any]:
        self._job.reach("state_dict", self._num_batches)
        return self._parts()

    def _parts(self) -> dict[str, Any]:
        parts = self.save_all(net=self.net, optimizer=self.optimizer, scheduler=self.scheduler)
        return {**parts, "best": self.best, "cycle": self._cycle}

    def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
        self._job.reach("load_state_dict")
        self.best, self._cycle = state["best"], state["cycle"]
        parts = {key: value for key, value in state.items() if key not in ("best", "cycle")}
        self.load_all(parts, net=self.net, optimizer=self.optimizer, scheduler=self.scheduler)

    def on_training_start(self) -> None:
        torch.rand(3)
        random.random()
        if self._job.notes_loaded:
            save(tree_map(_whole, self._parts()), Path(self._job.root, "loaded.pth"))

    def train_step(self, batch: Any, state: TrainingState) -> None:
        self._num_batches = state.global_iteration
        _note_samples(batch, state, Path(self._job.root, "samples.txt"))
        if self._job.draws_on_rank_1 and self.rank == 1:
            random.random()
        is_step = state.global_iteration % self._job.accumulation == 0
        with self.exchange_gradients(self.net, when=is_step):
            super().train_step(batch, state)

    def on_training_batch_end(self, state: TrainingState, should_log: bool = False) -> None:
        super(PointsModel, self).on_training_batch_end(state, should_log)
        if state.global_iteration % self._job.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        if should_log:
            writer = hl_logging.get_tensorboard_writer()
            assert (writer is None) == (self.rank > 0)
            if writer is not None:
                running = self._running_losses["loss"] / max(state.running_iter, 1)
                writer.add_scalar("running", running, state.global_iteration)
        self._job.reach("on_training_batch_end", state.global_iteration)

    def on_validation_end(self, validation_cycle: int) -> None:
        score = torch.tensor(self._val_scores.get("loss", 0.0))
        self._val_scores["loss"] = (all_reduce_tensors(score) if is_dist_active() else score).item()
        self.log("mean", self._running_losses["loss"], validation_cycle)  # of all ranks, at this moment
        super(PointsModel, self).on_validation_end(validation_cycle)
        self.log("valid", self._val_scores["loss"], validation_cycle)
        self._job.reach("on_validation_end", validation_cycle)


OTHER_MODEL = """
import rank_job


class RankModel(rank_job.RankModel):
    margin = 0.5
"""


def other_model(folder: Path) -> type[RankModel]:
    """Return what a rank has that was started with another version of the script."""
    path = folder / "other_rank_job.py"
    path.write_text(OTHER_MODEL)
    sys.path.append(str(folder))
    model_class: type[RankModel] = importlib.import_module(path.stem).RankModel
    return model_class


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _note_samples(batch: Any, state: TrainingState, path: Path) -> None:
    """Write a line for each sample of a batch: epoch, batch, sample, and a digest of it as it was augmented."""
    x, _, indices = batch
    with path.open("a") as file:
        for index, sample in zip(indices.tolist(), x, strict=True):
            augmented = hashlib.sha256(sample.numpy().tobytes()).hexdigest()
            file.write(f"{state.global_epoch} {state.global_iteration} {index} {augmented}\n")


def run(job: RankJob, model_class: type[RankModel] = RankModel) -> bool:
    """Train in this process, which is a rank by its environment, and say whether that is finished."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"]) if job.has_group else 0
    root, own = Path(job.root), job.of_rank(rank)
    Path(own.root).mkdir(parents=True, exist_ok=True)
    reach_in_save(own)
    trainer = Trainer(
        run_name="points",
        train_unit=TrainingUnit.from_str(job.unit),
        total_steps=job.total_steps,
        valid_frequency=job.valid_frequency,
        chkpt_frequency=job.chkpt_frequency,
        print_frequency=3,  # at others each rank has its own sums of losses
        accumulation_steps=own.accumulation,
        early_stop_cycles=job.early_stop_cycles,
        enable_deterministic=True,
        enable_tensorboard=True,
        run_path=root / "tensorboard",
        enable_file_logging=True,
        log_path=root / "logs",
        chkpt_root=root / "checkpoints",
        print_banner=False,
        async_chkpt=job.is_async,
        strategy=Strategy(job.strategy),
        dist_timeout_s=job.dist_timeout_s,
        use_cpu=True,
    )
    if job.other_on_rank_1 == "model" and rank == 1:
        model_class = other_model(Path(own.root))
    return trainer.fit(model_class(own), RankData(own))
