"""Resumable data loading for PyTorch: an epoch continues exactly where it stopped.

Replace `torch.utils.data.DataLoader` by `create_dataloader`, keep `loader.state_dict()` with your checkpoint,
and give it back with `loader.load_state_dict(state)`.
"""

from helios.data._create import create_dataloader
from helios.data._datamodule import DataModule, DatasetSplit, SplitDataset
from helios.data._earlier import EarlierState
from helios.data._loader import ResumableDataLoader
from helios.data._params import DataLoaderParams
from helios.data._permutation import ALGORITHM, Permutation
from helios.data._samplers import (
    ResumableDistributedSampler,
    ResumableRandomSampler,
    ResumableSampler,
    ResumableSequentialSampler,
)
from helios.data._sharding import BatchSize, Tail
from helios.data._state import LoaderState, LoaderStateError, StreamLoaderState
from helios.data._stream_loader import StreamDataLoader
from helios.data._version import __version__
from helios.data.orders import (
    BucketedOrder,
    MixtureOrder,
    Order,
    RandomOrder,
    SequentialOrder,
    SubsetOrder,
    TorchOrder,
    WeightedOrder,
)

__all__ = [
    "ALGORITHM",
    "BatchSize",
    "BucketedOrder",
    "DataLoaderParams",
    "DataModule",
    "DatasetSplit",
    "EarlierState",
    "LoaderState",
    "LoaderStateError",
    "MixtureOrder",
    "Order",
    "Permutation",
    "RandomOrder",
    "ResumableDataLoader",
    "ResumableDistributedSampler",
    "ResumableRandomSampler",
    "ResumableSampler",
    "ResumableSequentialSampler",
    "SequentialOrder",
    "SplitDataset",
    "StreamDataLoader",
    "StreamLoaderState",
    "SubsetOrder",
    "Tail",
    "TorchOrder",
    "WeightedOrder",
    "__version__",
    "create_dataloader",
]
