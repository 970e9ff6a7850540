"""DataModule: the datasets of a run and how they are loaded, in one object."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from helios.data._create import create_dataloader
from helios.data._loader import ResumableDataLoader
from helios.data._params import DataLoaderParams


class DatasetSplit(Enum):
    """The three uses of a dataset."""

    TRAIN = 0
    VALID = 1
    TEST = 2

    @staticmethod
    def from_str(label: str) -> "DatasetSplit":
        """Return the split named "train", "valid" or "test", in any case.

        Raises:
            TypeError: the label is not a str.
            ValueError: the label names no split.
        """
        if not isinstance(label, str):
            raise TypeError(f"label must be a str, found {type(label).__name__} {label!r}")
        try:
            return DatasetSplit[label.upper()]
        except KeyError:
            names = ", ".join(repr(split.name.lower()) for split in DatasetSplit)
            raise ValueError(f"label must be one of {names}, found {label!r}") from None


@dataclass(frozen=True)
class SplitDataset:
    """A dataset and how it is loaded; made by `DataModule._create_dataset`."""

    dataset: Any
    params: DataLoaderParams


class DataModule:
    """Base of the user's data. Override `setup`, and what else is needed.

    `setup` assigns the splits that there are:
    `self._train_dataset = self._create_dataset(dataset, params)`, likewise `_valid_dataset` and
    `_test_dataset`.

    Attributes:
        trainer: the trainer that uses this, or None. Untyped, since helios-data knows no trainer.
        is_distributed: deal the samples out to the ranks of torch.distributed; the trainer sets it.
    """

    # Of the class, so that a subclass whose __init__ does not call ours works too.
    trainer: Any = None
    is_distributed: bool = False
    _train_dataset: SplitDataset | None = None
    _valid_dataset: SplitDataset | None = None
    _test_dataset: SplitDataset | None = None

    def prepare_data(self) -> None:
        """Download and convert; runs once, in one process, before all else. Assign no state here."""

    def setup(self) -> None:
        """Make the datasets and assign the splits; runs in every process."""

    def teardown(self) -> None:
        """Let go of what `setup` took; runs in every process at the end, also after an error."""

    @property
    def train_dataset(self) -> Any:
        """The dataset of the training split, or None."""
        return _dataset_of(self._train_dataset)

    @property
    def valid_dataset(self) -> Any:
        """The dataset of the validation split, or None."""
        return _dataset_of(self._valid_dataset)

    @property
    def test_dataset(self) -> Any:
        """The dataset of the test split, or None."""
        return _dataset_of(self._test_dataset)

    def train_dataloader(self) -> ResumableDataLoader | None:
        """Make a loader of the training split; None if there is none."""
        return self._create_dataloader(self._train_dataset)

    def valid_dataloader(self) -> ResumableDataLoader | None:
        """Make a loader of the validation split; None if there is none."""
        return self._create_dataloader(self._valid_dataset)

    def test_dataloader(self) -> ResumableDataLoader | None:
        """Make a loader of the test split; None if there is none."""
        return self._create_dataloader(self._test_dataset)

    def _create_dataset(self, dataset: Any, params: DataLoaderParams | Mapping[str, Any]) -> SplitDataset:
        """Put a dataset and the options of its loader together.

        Args:
            dataset: map-style dataset.
            params: DataLoaderParams, or a dict of its fields. Copied.

        Raises:
            TypeError: `params` is neither.
            ValueError: a name in the dict is not a field.
        """
        if isinstance(params, DataLoaderParams):
            return SplitDataset(dataset, dataclasses.replace(params))
        if isinstance(params, Mapping):
            return SplitDataset(dataset, DataLoaderParams.from_dict(params))
        raise TypeError(
            f"params must be DataLoaderParams or a dict of its fields, found {type(params).__name__}"
        )

    def _create_dataloader(self, split: SplitDataset | None) -> ResumableDataLoader | None:
        if split is None:
            return None
        _check_split(split)
        options = split.params.to_dict()
        # A sampler of the user's own knows about ranks already.
        options["is_distributed"] = split.params.is_distributed or self.is_distributed
        return create_dataloader(split.dataset, **options)


def _dataset_of(split: SplitDataset | None) -> Any:
    return None if split is None else _check_split(split).dataset


def _check_split(split: Any) -> SplitDataset:
    if not isinstance(split, SplitDataset):
        raise TypeError(
            f"a split must be assigned as self._create_dataset(dataset, params), found {type(split).__name__}"
        )
    return split
