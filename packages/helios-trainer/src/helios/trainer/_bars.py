"""Progress bars: what tqdm is told of a run. They never synchronise with a device."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from helios.trainer._model import Model
from helios.trainer._training_state import TrainingState, TrainingUnit


class ProgressBars:
    """The bars of a run: by epoch one for epochs and one for iterations; by iteration one.

    Args:
        enabled: show them.
        unit: what the run counts.
        total_steps: epochs or iterations of the run.
    """

    def __init__(self, enabled: bool, unit: TrainingUnit, total_steps: int | float) -> None:
        self._enabled = enabled
        self._by_epoch = unit is TrainingUnit.EPOCH
        self._total = None if total_steps == math.inf else total_steps
        self._steps: tqdm[Any] | None = None
        self._batches: tqdm[Any] | None = None

    def start(self, state: TrainingState, finished_epochs: int) -> None:
        """Show where the run stands."""
        if self._enabled:
            name, done = (
                ("epochs", finished_epochs) if self._by_epoch else ("iterations", state.current_iteration)
            )
            self._steps = tqdm(total=self._total, initial=done, desc=name, position=0, dynamic_ncols=True)

    def start_epoch(self, state: TrainingState, num_batches: int) -> None:
        """Show the batches of an epoch, which may have begun before."""
        if self._enabled and self._by_epoch:
            self._batches = tqdm(
                total=num_batches,
                initial=state.dataset_iter,
                desc=f"epoch {state.global_epoch}",
                position=1,
                leave=False,
                dynamic_ncols=True,
            )

    def finish_batch(self, is_complete: bool, model: Model) -> None:
        """Count a batch, and show the model's losses and metrics if the bar is drawn anyway."""
        bar = self._batches if self._by_epoch else self._steps
        if bar is not None and is_complete and bar.update(1):
            bar.set_postfix_str(_describe({**model._loss_items, **model.metrics}), refresh=False)

    def finish_epoch(self) -> None:
        """Count an epoch."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            if self._steps is not None:
                self._steps.update(1)

    def evaluation(self, name: str, num_batches: int) -> "tqdm[Any]":
        """Return a bar for a validation or a test."""
        position = (self._steps is not None) + (self._batches is not None)
        return tqdm(
            total=num_batches,
            desc=name,
            position=position,
            leave=False,
            disable=not self._enabled,
            dynamic_ncols=True,
        )

    def close(self) -> None:
        """Take the bars down."""
        for bar in (self._batches, self._steps):
            if bar is not None:
                bar.close()
        self._batches = self._steps = None


def _describe(shown: Mapping[str, Any]) -> str:
    """Format the numbers that can be read without waiting for a device."""
    parts = []
    for name, value in shown.items():
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu" or value.numel() != 1 or value.is_complex():
                continue
            value = value.detach().item()
        if isinstance(value, int | float):
            parts.append(f"{name}={value:.4g}")
    return ", ".join(parts)
