"""Resumable data loading for PyTorch: an epoch continues exactly where it stopped.

Replace `torch.utils.data.DataLoader` by `create_dataloader`, keep `loader.state_dict()` with your checkpoint,
and give it back with `loader.load_state_dict(state)`.
"""

from helios.data._datamodule import DataModule, DatasetSplit, SplitDataset
from helios.data._loader import ResumableDataLoader
from helios.data._params import DataLoaderParams, create_dataloader
from helios.data._permutation import ALGORITHM, Permutation
from helios.data._samplers import (
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
)
from helios.data._sharding import Tail
from helios.data._state import LoaderState, LoaderStateError
from helios.data._version import __version__

__all__ = [
    "ALGORITHM",
    "DataLoaderParams",
    "DataModule",
    "DatasetSplit",
    "LoaderState",
    "LoaderStateError",
    "Permutation",
    "ResumableDataLoader",
    "ResumableDistributedSampler",
    "ResumableRandomSampler",
    "ResumableSampler",
    "ResumableSequentialSampler",
    "SplitDataset",
    "Tail",
    "__version__",
    "create_dataloader",
]
