"""What a state is made of while it is in a file: containers and plain values as they are, the rest described.

Reading a pickle into these imports nothing, calls nothing and holds no tensor's bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to, not imported.

    Attributes:
        module: such as ``torch._utils``.
        name: such as ``_rebuild_tensor_v2``.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """The bytes that one or several tensors are views of.

    Attributes:
        key: name of the record ``data/<key>``.
        dtype: what its numbers are counted in, such as ``float32``; ``uint8`` if it is untyped.
        location: the device it was saved from, such as ``cpu`` or ``cuda:0``.
        num_bytes: its size.
        is_untyped: written as ``torch.UntypedStorage``, for dtypes that have no storage class of their own.
    """

    key: str
    dtype: str
    location: str
    num_bytes: int
    is_untyped: bool = False


@dataclass(eq=False)
class Tensor:
    """A strided tensor, described. Each object is one tensor: two that are equal in all fields are two views.

    Attributes:
        storage: where its bytes are.
        dtype: such as ``bfloat16``.
        offset: its first element in the storage, counted in elements.
        shape: sizes.
        stride: steps, counted in elements.
        requires_grad: as it was saved.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False


@dataclass(eq=False)
class Call:
    """What a pickle would make by calling something, not called.

    Attributes:
        function: what it would call.
        args: with what.
        state: what it would give the object afterwards (``BUILD``), None if nothing.
        items: keys and values it would set in the object afterwards, or values it would append.
        is_new: it would make an object of the class `function` without ``__init__``.
    """

    function: Global
    args: tuple[object, ...] = field(
        repr=False
    )  # a hostile file may share parts so often that text has no end
    state: object = field(default=None, repr=False)
    items: list[object] = field(default_factory=list, repr=False)
    is_new: bool = False


def parts_of(value: object) -> list[object] | None:
    """What is directly in a container, a tensor or a call; None for anything that has no parts."""
    if isinstance(value, dict):
        attributes = list(vars(value).values()) if type(value) is OrderedDict else []
        return [*value.keys(), *value.values(), *attributes]
    if isinstance(value, list | tuple | set):
        return list(value)
    if isinstance(value, Tensor):
        return [value.storage]
    if isinstance(value, Call):
        return [value.function, value.args, value.state, *value.items]
    return None


def walk(value: object) -> Iterator[object]:
    """All that is in a value, itself included, each object once. Does not recurse."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        parts = parts_of(item)
        if parts is None:
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            yield item
            todo += parts
