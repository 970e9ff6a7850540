"""What every order is: a name, a length, and a function from positions to dataset indices."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from helios.data._checks import check_positions
from helios.data._permutation import Indices

IndicesAt = Callable[[Indices], Indices]


class Order(ABC):
    """An order of samples. Immutable: one order may serve many samplers.

    To write one, set the attributes and override `of_epoch`.

    Attributes:
        algorithm: name of the order, kept in the state; change it when the order changes.
        num_samples: positions in an epoch, 1 or more.
        window: positions that are computed together. A sampler asks for about as many at once; 1 leaves it
            the choice.
        is_interleaved: deal positions out to the ranks one by one, as PyTorch's DistributedSampler does,
            instead of batch by batch.
    """

    algorithm: str
    num_samples: int
    window: int = 1
    is_interleaved: bool = False

    @abstractmethod
    def of_epoch(self, seed: int, epoch: int) -> IndicesAt:
        """Return the function that maps the positions of an epoch to dataset indices.

        Args:
            seed: seed of the run, 0 or more.
            epoch: 0 or more.

        Returns:
            A function of an int64 array, shape (n,), of positions in range(num_samples) in any order, to an
            int64 array, shape (n,). What it returns must depend on the arguments, the order and nothing else.
        """

    def digest(self) -> str | None:
        """Return a short name of what the order was made of, such as its weights; None if there is nothing.

        It is kept in the state, so that a state of other weights is refused.
        """
        return None

    def check_dataset(self, num_dataset_samples: int) -> None:
        """Check that the order is for a dataset of this length; unless overridden, that of an epoch.

        Raises:
            ValueError: it is not.
        """
        check_length(self, self.num_samples, num_dataset_samples)


def check_length(order: Order, expected: int, num_dataset_samples: int) -> None:
    """ValueError unless the dataset has the length that the order is for."""
    if num_dataset_samples != expected:
        raise ValueError(
            f"order must be for the {num_dataset_samples} samples of the dataset, found a "
            f"{type(order).__name__} for {expected}"
        )


def in_windows(num_samples: int, window: int, indices_of: Callable[[int], Indices]) -> IndicesAt:
    """Return a function of positions for an order that is computed window by window.

    Args:
        num_samples: positions in the epoch.
        window: positions in a window; window w begins at position w * window.
        indices_of: returns the indices of a window.
    """
    last: list[tuple[int, Indices]] = []  # a sampler asks for neighbours: the last window is often the next

    def indices_at(positions: Indices) -> Indices:
        check_positions(positions, num_samples)
        out = np.empty(len(positions), dtype=np.int64)
        windows = positions // window
        for number in np.unique(windows).tolist():
            if not last or last[0][0] != number:
                last[:] = [(number, indices_of(number))]
            is_inside = windows == number
            out[is_inside] = last[0][1][positions[is_inside] - number * window]
        return out

    return indices_at
