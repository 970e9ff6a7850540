"""The two orders of every day."""

from helios.data._checks import check_int, check_positions
from helios.data._permutation import ALGORITHM, MAX_NUM_SAMPLES, Indices, Permutation
from helios.data.orders._base import IndicesAt, Order


class RandomOrder(Order):
    """Every epoch is another permutation of the dataset.

    Args:
        num_samples: length of the dataset, 1 to 2**62.

    Raises:
        TypeError: the length is not an int.
        ValueError: it is out of range.
    """

    algorithm = ALGORITHM

    def __init__(self, num_samples: int) -> None:
        self.num_samples = check_num_positions("num_samples", num_samples)

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the permutation of this epoch; see `Order.of_epoch`."""
        return Permutation(self.num_samples, seed, epoch).take


class SequentialOrder(Order):
    """The order of the dataset, in every epoch.

    Args:
        num_samples: length of the dataset, 1 to 2**62.

    Raises:
        TypeError: the length is not an int.
        ValueError: it is out of range.
    """

    algorithm = "sequential"

    def __init__(self, num_samples: int) -> None:
        self.num_samples = check_num_positions("num_samples", num_samples)

    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the identity; see `Order.of_epoch`."""

        def indices_at(positions: Indices) -> Indices:
            check_positions(positions, self.num_samples)
            return positions

        return indices_at


def check_num_positions(name: str, value: int) -> int:
    """Return an int of 1 to 2**62; TypeError or ValueError otherwise."""
    number = check_int(name, value, 1)
    if number > MAX_NUM_SAMPLES:
        raise ValueError(f"{name} must be 1 to 2**62, found {number}")
    return number
