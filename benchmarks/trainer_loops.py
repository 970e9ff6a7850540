"""The loops: by hand, Helios' Trainer and its peers, each as its documentation says.

Every function is given the work and returns what trains for one epoch; none logs or saves unless it is told to. What
belongs to a library is imported inside: no process has all of them.
"""

import logging
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.trainer_work import Work, loss_of
from benchmarks.workloads import helios_loader, torch_loader

Train = Callable[[], object]


def torch_loader_of(work: Work) -> Iterable[Any]:
    """Return torch's loader."""
    return torch_loader(work.dataset(), work.batch_size, 0)


def helios_loader_of(work: Work) -> Iterable[Any]:
    """Return ours, which does not re-key: exactly the work of torch's."""
    return helios_loader(work.dataset(), work.batch_size, 0, "worker")


def helios_ml_loader_of(work: Work) -> Iterable[Any]:
    """Return the loader of helios-ml."""
    declare_torchvision()
    import helios.data as hld

    create: Any = hld.create_dataloader
    loader: DataLoader[Any] = create(work.dataset(), batch_size=work.batch_size, shuffle=True)[0]
    return loader


def by_hand(work: Work, loader: Iterable[Any], bar: bool) -> Train:
    """The loop that one would write, over any loader."""
    from tqdm import tqdm

    net = work.net()
    optimizer = None if work.is_empty else work.optimizer(net)

    def train() -> None:
        for batch in tqdm(loader) if bar else loader:
            work.begin_step()
            if optimizer is not None:
                loss_of(net, batch).backward()
                optimizer.step()
                optimizer.zero_grad()

    return train


def helios_parts(work: Work) -> tuple[Any, Any]:
    """Return Model and DataModule."""
    import helios.trainer as hlt
    from helios.data import DataModule

    class Data(DataModule):
        def setup(self) -> None:
            params = {"batch_size": work.batch_size, "shuffle": True, "sample_rng": "worker"}
            self._train_dataset = self._create_dataset(work.dataset(), params)

    class Empty(hlt.Model):
        def setup(self, fast_init: bool = False) -> None:
            pass

        def train_step(self, batch: Any, state: Any) -> None:
            work.begin_step()

    class Net(Empty):
        def setup(self, fast_init: bool = False) -> None:
            self.net = work.net().to(self.device)
            self.optimizer = work.optimizer(self.net)

        def state_dict(self) -> dict[str, Any]:
            return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

        def load_state_dict(self, state: dict[str, Any], fast_init: bool = False) -> None:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])

        def train_step(self, batch: Any, state: Any) -> None:
            work.begin_step()
            self._loss_items["loss"] = loss_of(self.net, batch)
            self._loss_items["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    return (Empty if work.is_empty else Net)("bench"), Data()


def helios(work: Work, bar: bool, by_epoch: bool, **others: Any) -> Train:
    """Our Trainer."""
    from helios.trainer import Trainer, TrainingUnit

    def train() -> None:
        trainer = Trainer(
            train_unit=TrainingUnit.EPOCH if by_epoch else TrainingUnit.ITERATION,
            total_steps=1 if by_epoch else work.num_steps,
            enable_progress_bar=bar,
            print_banner=False,
            use_cpu=True,
            **others,
        )
        trainer.fit(*helios_parts(work))

    return train


def declare_torchvision() -> None:
    """Let torchvision be imported, which helios-ml does, where its compiled part is for another build of torch.

    Two of its operators have to be known for that. No trainer calls them.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        raise ImportError("helios-ml needs torchvision")
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(
                    f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


def helios_ml(work: Work, bar: bool, by_epoch: bool) -> Train:
    """The trainer of helios-ml, whose import package has the name of ours: in an interpreter without us."""
    declare_torchvision()
    import helios.data as hld
    import helios.model as hlm
    import helios.trainer as hlt

    class Data(hld.DataModule):
        def setup(self) -> None:
            params = {"batch_size": work.batch_size, "shuffle": True}
            self._add_train_phase(work.dataset(), params)  # type: ignore[attr-defined]

    class Empty(hlm.Model):  # type: ignore[name-defined,misc]
        def setup(self, for_inference: bool = False) -> None:
            pass

        def train_step(self, batch: Any, state: Any) -> None:
            work.begin_step()

    class Net(Empty):
        def setup(self, for_inference: bool = False) -> None:
            self.net = work.net().to(self.device)
            self.optimizer = work.optimizer(self.net)

        def train_step(self, batch: Any, state: Any) -> None:
            work.begin_step()
            self._loss_items["loss"] = loss_of(self.net, batch)
            self._loss_items["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def train() -> None:
        trainer = hlt.Trainer(
            train_unit=hlt.TrainingUnit.EPOCH if by_epoch else hlt.TrainingUnit.ITERATION,
            total_steps=1 if by_epoch else work.num_steps,
            enable_progress_bar=bar,
            print_banner=False,
            use_cpu=True,
        )
        if not trainer.fit((Empty if work.is_empty else Net)("bench"), Data()):
            raise RuntimeError("fit returned False")

    return train


def lightning_module(work: Work) -> Any:
    """Return a LightningModule; the one whose step is empty optimizes by hand, that is, not at all."""
    import lightning

    class Empty(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            work.begin_step()

        def configure_optimizers(self) -> None:
            return None

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = work.net()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            work.begin_step()
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.optimizer(self.net)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Empty() if work.is_empty else Net()


def lightning(work: Work, bar: bool, barebones: bool, **others: Any) -> Train:
    """Lightning's Trainer; barebones is its mode to find out what overhead its features are."""
    import lightning

    options: dict[str, Any] = {"barebones": True}
    if not barebones:
        options = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": bar,
            "enable_model_summary": False,
        }

    def train(**fit_options: Any) -> None:
        trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **{**options, **others})
        trainer.fit(lightning_module(work), torch_loader_of(work), **fit_options)

    return train


def ignite(work: Work, bar: bool) -> Train:
    """The Engine of pytorch-ignite."""
    from ignite.engine import Engine
    from ignite.handlers import ProgressBar

    net = work.net()
    optimizer = None if work.is_empty else work.optimizer(net)

    def update(engine: Any, batch: Any) -> None:
        work.begin_step()
        if optimizer is not None:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()

    def train() -> None:
        engine = Engine(update)
        if bar:
            ProgressBar().attach(engine)
        engine.run(torch_loader_of(work), max_epochs=1)

    return train


def accelerate(work: Work, bar: bool) -> Train:
    """The loop by hand, with what Accelerate prepares."""
    from accelerate import Accelerator
    from accelerate.utils import tqdm

    accelerator = Accelerator(cpu=True)
    net = work.net()
    loader = accelerator.prepare(torch_loader_of(work))
    optimizer = None
    if not work.is_empty:
        net, optimizer = accelerator.prepare(net, work.optimizer(net))

    def train() -> None:
        for batch in tqdm(loader) if bar else loader:
            work.begin_step()
            if optimizer is not None:
                optimizer.zero_grad()
                accelerator.backward(loss_of(net, batch))
                optimizer.step()

    return train
