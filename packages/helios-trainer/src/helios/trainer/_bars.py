"""The progress bars of a run. They never synchronise with a device."""

import math
import sys
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from helios.trainer._bar import Bar, NoBar, PlainBar, TerminalBar, is_terminal
from helios.trainer._model import Model
from helios.trainer._training_state import TrainingState, TrainingUnit


class ProgressBars:
    """The bars of a run: by epoch one for epochs and one for batches; by iteration one.

    They are on stderr. If that is no terminal they are plain lines: see `PlainBar` for when there is one.

    Args:
        enabled: show them.
        unit: what the run counts.
        total_steps: epochs or iterations of the run; infinity has no end.
        plain_interval_s: seconds between two lines of a bar where there is no terminal.
    """

    def __init__(
        self, enabled: bool, unit: TrainingUnit, total_steps: int | float, plain_interval_s: float = 30.0
    ) -> None:
        is_there = sys.stderr is not None and not getattr(sys.stderr, "closed", False)
        self._stream = sys.stderr if enabled and is_there else None
        self._by_epoch = unit is TrainingUnit.EPOCH
        self._total = None if total_steps == math.inf else total_steps
        self._plain_interval_s = plain_interval_s
        self._steps: Bar | None = None
        self._batches: Bar | None = None
        self._model: Model | None = None

    def start(self, state: TrainingState, finished_epochs: int) -> None:
        """Show where the run stands."""
        if self._stream is None:
            return
        name, unit, done = "iterations", "it", state.current_iteration
        if self._by_epoch:
            name, unit, done = "epochs", "epoch", finished_epochs
        self._steps = self._make(name, unit, self._total, done, stays=True)

    def start_epoch(self, state: TrainingState, num_batches: int | None) -> None:
        """Show the batches of an epoch, which may have begun before; None if nobody knows how many it has."""
        if self._stream is not None and self._by_epoch:
            self._batches = self._make(
                f"epoch {state.global_epoch}", "batch", num_batches, state.dataset_iter
            )

    def finish_batch(self, is_complete: bool, model: Model) -> None:
        """Count a batch, and show the model's losses and metrics if the bar is drawn anyway."""
        bar = self._batches if self._by_epoch else self._steps
        if bar is not None and is_complete:
            self._model = model
            if bar.count():
                bar.show(describe(model))
                bar.draw()

    def finish_epoch(self) -> None:
        """Count an epoch, whose last losses and metrics stay beside the count."""
        if self._steps is None:
            return
        # None: a resumed epoch that had no batch left.
        text = "" if self._model is None else describe(self._model)
        self._steps.show(text)
        if self._batches is not None:
            self._batches.show(text)
            self._batches.close()
            self._batches = None
        if self._by_epoch and self._steps.count():
            self._steps.draw()

    def evaluation(self, name: str, num_batches: int | None) -> Bar:
        """Return a bar for a validation or a test; None if nobody knows how many batches it has."""
        return self._make(name, "batch", num_batches)

    def close(self) -> None:
        """Take the bars down."""
        for bar in (self._batches, self._steps):
            if bar is not None:
                bar.close()
        self._batches = self._steps = None

    def _make(self, name: str, unit: str, total: float | None, done: int = 0, *, stays: bool = False) -> Bar:
        if self._stream is None:
            return NoBar()
        if is_terminal(self._stream):
            return TerminalBar(self._stream, name, unit=unit, total=total, done=done, stays=stays)
        interval_s = self._plain_interval_s
        return PlainBar(self._stream, name, unit=unit, total=total, done=done, interval_s=interval_s)


def describe(model: Model) -> str:
    """Format those of a model's losses and metrics that can be read without waiting for a device."""
    losses, metrics = model._loss_items, model.metrics
    logged = {} if model._scalar_log is None else model._scalar_log.shown
    # Nobody chose the names of scores for the bar: one may be called like a loss.
    if metrics is model._val_scores:
        metrics = {(f"valid {name}" if name in losses else name): value for name, value in metrics.items()}
    shown = {name: _format(value) for name, value in {**losses, **logged, **metrics}.items()}
    return ", ".join(f"{_printable(name)}={text}" for name, text in shown.items() if text is not None)


def _format(value: object) -> str | None:
    """Format a number; None for what is none, or is not on the CPU."""
    if isinstance(value, torch.Tensor):
        # Of the subclasses some are spread over processes: to read them would be to wait for all.
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not is_plain or value.device.type != "cpu" or value.numel() != 1:
            return None
        value = value.detach().reshape(()).tolist()
    elif isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, Integral):
        return str(int(value))
    return f"{float(value):.4g}" if isinstance(value, Real) else None


def _printable(name: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(name))
