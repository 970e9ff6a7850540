"""What `Model.log` was given: scalars on their way to TensorBoard and to the progress bar."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np
import torch

from helios.trainer._training_state import TrainingState
from helios.trainer.logging import get_tensorboard_writer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from helios.trainer._model import Model

_MAX_WAITING = 1000  # then they are read though nobody else waits for the device, lest they pile up


@dataclass(frozen=True)
class _Waiting:
    """A scalar that its device may not have computed yet."""

    name: str
    value: torch.Tensor
    step: int
    wall_time_s: float


class ScalarLog:
    """Takes scalars without waiting for a device.

    Numbers and tensors on the CPU are written at once. Tensors elsewhere wait, as copies on their device, and are
    fetched together when `flush` is called: before a checkpoint, after a validation, at the end.

    Args:
        writer: TensorBoard's, or None if there is none.
        state: the counters of the run, whose `global_iteration` is the step of what is logged without one.

    Attributes:
        shown: the last value of each that is known on the CPU, for the bar.
    """

    def __init__(self, writer: "SummaryWriter | None", state: TrainingState) -> None:
        self._writer = writer
        self._state = state
        self._waiting: list[_Waiting] = []
        self.shown: dict[str, float] = {}

    def add(self, name: str, value: float | torch.Tensor, step: int | None) -> None:
        """Take a scalar; see `Model.log`.

        Raises:
            TypeError: it is no number.
            ValueError: it is a tensor of more than one.
        """
        at = self._state.global_iteration if step is None else step
        if not isinstance(name, str) or not isinstance(at, Integral):
            raise TypeError(f"log takes a name, a number and an int as step, found {name!r}, ..., {step!r}")
        if isinstance(value, torch.Tensor | np.ndarray):
            if math.prod(value.shape) != 1:
                raise ValueError(f"log takes one number, found the shape {tuple(value.shape)} for {name!r}")
            value = value.detach() if isinstance(value, torch.Tensor) else value.item()
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            # A copy, since the next batch may write into it.
            self._waiting.append(_Waiting(name, value.reshape(()).clone(), int(at), time.time()))
            if len(self._waiting) >= _MAX_WAITING:
                self.flush()
            return
        number = value.item() if isinstance(value, torch.Tensor | np.generic) else value
        if not isinstance(number, Real):
            raise TypeError(
                f"log takes a number or a tensor of one, found {type(number).__name__} for {name!r}"
            )
        self._write(name, float(number), int(at), None)

    def flush(self) -> None:
        """Fetch what waits, in one copy for each device, and write it."""
        waiting, self._waiting = self._waiting, []
        for device in {each.value.device for each in waiting}:
            there = [each for each in waiting if each.value.device == device]
            values = torch.stack([each.value.float() for each in there]).tolist()
            for each, value in zip(there, values, strict=True):
                self._write(each.name, value, each.step, each.wall_time_s)

    def _write(self, name: str, value: float, step: int, wall_time_s: float | None) -> None:
        self.shown[name] = value
        if self._writer is not None:
            self._writer.add_scalar(name, value, step, walltime=wall_time_s)


@contextmanager
def logging_scalars(model: "Model", state: TrainingState) -> Iterator[None]:
    """Let `Model.log` log inside, to the writer of the run in progress."""
    log = model._scalar_log = ScalarLog(get_tensorboard_writer(), state)
    try:
        yield
        log.flush()
    finally:
        model._scalar_log = None
