"""Orders: which sample stands where in an epoch, as a pure function of (seed, epoch, position).

Any resumable sampler, and `create_dataloader`, takes one. Since nothing but the function is asked, every order can
be dealt out to ranks, gone on with from any position, with other ranks, batch sizes and workers.
"""

from helios.data.orders._base import IndicesAt, Order
from helios.data.orders._basic import RandomOrder, SequentialOrder
from helios.data.orders._bucketed import BucketedOrder
from helios.data.orders._mixture import MixtureOrder
from helios.data.orders._subset import SubsetOrder
from helios.data.orders._torch import TorchOrder
from helios.data.orders._weighted import WeightedOrder

__all__ = [
    "BucketedOrder",
    "IndicesAt",
    "MixtureOrder",
    "Order",
    "RandomOrder",
    "SequentialOrder",
    "SubsetOrder",
    "TorchOrder",
    "WeightedOrder",
]
