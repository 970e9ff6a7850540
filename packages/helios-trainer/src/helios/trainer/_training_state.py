"""The unit of training and the counters of a run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self


class TrainingUnit(Enum):
    """What total_steps and the frequencies count.

    Attributes:
        ITERATION: complete iterations: one for each `accumulation_steps` batches.
        EPOCH: passes over the training split.
    """

    ITERATION = 0
    EPOCH = 1

    @staticmethod
    def from_str(label: str) -> "TrainingUnit":
        """Return the unit named "iteration" or "epoch", in any case.

        Raises:
            TypeError: the label is not a str.
            ValueError: the label names no unit.
        """
        if not isinstance(label, str):
            raise TypeError(f"label must be a str, found {type(label).__name__} {label!r}")
        try:
            return TrainingUnit[label.upper()]
        except KeyError:
            raise ValueError(f"label must be 'iteration' or 'epoch', found {label!r}") from None


@dataclass
class TrainingState:
    """Where training stands. During a batch, the batch in progress is counted already.

    Attributes:
        current_iteration: iterations; by ITERATION only complete ones (accumulation included).
        global_iteration: batches, whatever the accumulation.
        global_epoch: the epoch in progress or just ended, from 1.
        validation_cycles: the validation in progress or just ended, from 1.
        dataset_iter: batches of the epoch in progress.
        early_stop_count: validations in a row without improvement.
        average_iter_time: seconds for a batch, mean over this run's batches.
        running_iter: as current_iteration, counted since the last validation.
        trainer: in a checkpoint, what the trainer keeps beside the counters; empty otherwise.
    """

    current_iteration: int = 0
    global_iteration: int = 0
    global_epoch: int = 0
    validation_cycles: int = 0
    dataset_iter: int = 0
    early_stop_count: int = 0
    average_iter_time: float = 0.0
    running_iter: int = 0
    trainer: dict[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; the values are the same objects."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the object from its fields by name.

        Raises:
            ValueError: a field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            wrong = ", ".join(sorted(map(str, names.symmetric_difference(values))))
            raise ValueError(
                f"training_state must have the fields {sorted(names)}; missing or unknown: {wrong}"
            )
        return cls(**values)
