"""What torchrun tells a process, by environment variables."""

import os
from dataclasses import dataclass

import torch.distributed

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Torchrun:
    """The place of this process among those that torchrun started.

    Attributes:
        rank: its number.
        world_size: how many there are.
        local_rank: its number on its machine.
        local_world_size: how many there are on its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def is_using_torchrun() -> bool:
    """Return whether torchrun started this process, or who did has set all variables that torchrun sets."""
    return torch.distributed.is_torchelastic_launched() or all(name in os.environ for name in VARIABLES)


def read_torchrun() -> Torchrun:
    """Read the variables, checked.

    Raises:
        ValueError: one is missing, is no number, or contradicts another.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"torchrun sets {', '.join(VARIABLES)}, and {', '.join(missing)} is not set here: start the script with "
            "torchrun, or set all of them"
        )
    world_size = _number("WORLD_SIZE", 1, None, "the number of processes")
    rank = _number("RANK", 0, world_size, "WORLD_SIZE")
    local_world_size = _number("LOCAL_WORLD_SIZE", 1, world_size + 1, "WORLD_SIZE + 1")
    local_rank = _number("LOCAL_RANK", 0, local_world_size, "LOCAL_WORLD_SIZE")
    _number("MASTER_PORT", 0, 2**16, "the numbers of ports")
    return Torchrun(rank, world_size, local_rank, local_world_size)


def check_no_part_of_torchrun() -> None:
    """Refuse a WORLD_SIZE of several processes, without the rest that would say which of them this is.

    Raises:
        ValueError: it is there, or no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"the environment variable WORLD_SIZE must be the number of processes, found {text!r}: unset it, or set it "
            "to 1"
        )
    if int(text) > 1:
        missing = [name for name in VARIABLES if name not in os.environ]
        raise ValueError(
            f"the environment variable WORLD_SIZE is {text}, but {', '.join(missing)} are not set: start the script "
            "with torchrun, which sets all of them, or unset WORLD_SIZE"
        )


def _number(name: str, minimum: int, end: int | None, meaning: str) -> int:
    text = os.environ[name]
    number = int(text) if text.isdecimal() else None
    if number is None or number < minimum or (end is not None and number >= end):
        limit = "" if end is None else f" and less than {end} ({meaning})"
        raise ValueError(
            f"the environment variable {name} must be a whole number, {minimum} or more{limit}, found {text!r}"
        )
    return number
