"""The options of a loader, as an object."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from helios.core.rng import DEFAULT_SEED
from helios.data._samplers import OrderName, ResumableSampler
from helios.data._sharding import BatchSize, Tail
from helios.data.orders import Order

SampleRNG = Literal["sample", "batch", "worker"]


@dataclass
class DataLoaderParams:
    """The options of `create_dataloader`, which see, as an object.

    It may be filled field by field; a DataModule copies it, so changing it later changes nothing.
    """

    random_seed: int = DEFAULT_SEED
    batch_size: BatchSize = 1
    shuffle: bool = False
    num_workers: int = 0
    pin_memory: bool = True
    drop_last: bool = False
    debug_mode: bool = False
    is_distributed: bool = False
    sampler: ResumableSampler | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    order: Order | OrderName | None = None
    tail: Tail | str | None = None
    sample_rng: SampleRNG = "sample"
    worker_init_fn: Callable[[int], None] | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    in_order: bool = True
    timeout: float = 0
    multiprocessing_context: Any = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; the values are the same objects."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the object from fields by name; fields that are not given have their defaults.

        Raises:
            TypeError: `values` is not a dict.
            ValueError: a name is not a field.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a dict, found {type(values).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name) for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"values has the unknown field {unknown[0]!r}; the fields are {', '.join(names)}"
            )
        return cls(**values)
