"""What all trainers have to do: the samples, the network, and the step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.workloads import Rows

Loss = Callable[[torch.Tensor], torch.Tensor]
FEATURES = 8  # of a row of `Rows`


class Enough(Exception):  # noqa: N818  # it is not an error
    """So many steps as were wanted have begun."""


@dataclass
class Work:
    """A number of batches, and the step that is taken on each.

    Attributes:
        num_steps: batches of an epoch.
        batch_size: samples of each.
        hidden: widths of the hidden layers; none at all is a step that does nothing.
        last: the step that ends training, by raising `Enough`; None goes on to the end.
        began_ns: when each step began, since `restart`.
    """

    num_steps: int
    batch_size: int
    hidden: list[int]
    last: int | None = None
    began_ns: list[int] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the step does nothing."""
        return not self.hidden

    def dataset(self) -> Rows:
        """Make the samples."""
        return Rows(self.num_steps * self.batch_size)

    def net(self) -> nn.Module:
        """Make the network."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in zip([FEATURES, *self.hidden], [*self.hidden, 1], strict=True):
            layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.SGD(net.parameters(), lr=1e-3)

    def begin_step(self) -> None:
        """Note the time: the first thing that a step does."""
        self.began_ns.append(time.perf_counter_ns())
        if self.last is not None and len(self.began_ns) == self.last:
            raise Enough

    def restart(self) -> None:
        """Forget the steps of the turn before."""
        self.began_ns.clear()

    def steps_us(self) -> list[float]:
        """Return how long each step took, with all that came between it and the next one; not the first tenth."""
        stamps = self.began_ns[len(self.began_ns) // 10 :]
        return [(after - before) / 1e3 for before, after in pairwise(stamps)]


def loss_of(net: Any, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss of a batch."""
    loss: torch.Tensor = (net(batch) - 1).square().mean()
    return loss
