"""The order of PyTorch's DistributedSampler, for runs that were begun with it."""

import torch

from helios.data._checks import check_bool, check_positions
from helios.data._permutation import Indices
from helios.data.orders._base import IndicesAt, Order
from helios.data.orders._basic import check_num_positions


class TorchOrder(Order):
    """What `torch.utils.data.DistributedSampler` yields, on every rank: `randperm` seeded with seed + epoch.

    For continuing a run that was begun elsewhere. It holds a list of all indices (8 bytes each), takes time in
    proportion to their number at the first batch of an epoch, and is as lasting as torch's generator.

    Args:
        num_samples: length of the dataset, 1 to 2**62.
        shuffle: shuffle every epoch; else the order of the dataset.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the length is out of range.
    """

    SHUFFLED = "torch-randperm-v1"
    NOT_SHUFFLED = "torch-sequential-v1"
    is_interleaved = True

    def __init__(self, num_samples: int, shuffle: bool = True) -> None:
        self.num_samples = check_num_positions("num_samples", num_samples)
        self.shuffle = check_bool("shuffle", shuffle)
        self.algorithm = self.SHUFFLED if shuffle else self.NOT_SHUFFLED

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return a lookup in the list of this epoch; see `Order.of_epoch`."""
        if seed + epoch >= 2**64:
            raise ValueError(
                f"seed + epoch must be less than 2**64, as torch takes it, found {seed} + {epoch}"
            )
        order: list[Indices] = []  # made when it is first asked for: a sampler may only be passing by

        def indices_at(positions: Indices) -> Indices:
            check_positions(positions, self.num_samples)
            if not self.shuffle:
                return positions
            if not order:
                generator = torch.Generator().manual_seed(seed + epoch)
                order.append(torch.randperm(self.num_samples, generator=generator).numpy())
            return order[0][positions]

        return indices_at
