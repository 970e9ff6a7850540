"""What is remembered of a part: a digest, and a text where it is small."""

import fnmatch
import hashlib
import random
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from helios.trainer.testing._parts import GENERATORS, Part, is_scalar

_MAX_SHOWN_ELEMENTS = 8
_MAX_SHOWN_IN_ARRAYS = 3  # larger ones are compared, by running again
_MAX_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Leaf:
    """What is remembered of a part at one moment.

    Attributes:
        digest: of all its bits.
        kind: its type; of a tensor data type and shape.
        text: its value if it is small, else None.
    """

    digest: bytes
    kind: str
    text: str | None

    def __str__(self) -> str:
        return self.kind if self.text is None else self.text


Snapshot = dict[str, Leaf]


def snapshot_of(parts: Iterable[Part], ignored: Iterable[str] = (), folder: str = "") -> Snapshot:
    """Return the leaves of parts by path.

    Args:
        parts: the parts.
        ignored: patterns of paths to leave out, as `fnmatch` takes them.
        folder: path of the run's folder, which texts may have in them.
    """
    return {part.path: leaf_of(part.value, folder) for part in parts if not is_ignored(part.path, ignored)}


def is_ignored(path: str, patterns: Iterable[str]) -> bool:
    """Say whether a path is one of, or below one of, those to ignore. Brackets stand for themselves."""
    for pattern in patterns:
        literal = pattern.replace("[", "[[]")
        if fnmatch.fnmatchcase(path, literal) or any(
            fnmatch.fnmatchcase(path, literal + below) for below in (".*", "[[]*")
        ):
            return True
    return False


def leaf_of(value: Any, folder: str = "") -> Leaf:
    """Return what is to be remembered of a value."""
    if isinstance(value, torch.Tensor):
        return _leaf_of_tensor(value)
    if isinstance(value, np.ndarray):
        kind = f"ndarray {value.dtype} {list(value.shape)}"
        data = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
        begin = value.reshape(-1)[: _MAX_SHOWN_IN_ARRAYS + 1].tolist()
        return Leaf(_digest(kind.encode(), data), kind, _shown(begin, value.shape))
    if isinstance(value, GENERATORS):
        digest = _digest(state_of_generator(value))
        kind = f"{type(value).__module__}.{type(value).__name__}"
        return Leaf(digest, kind, f"at state {digest.hex()[:6]}")
    kind = type(value).__name__
    if is_scalar(value):
        text = str(value) if isinstance(value, Enum | torch.dtype | torch.device) else repr(value)
        text = text.replace(folder, "<chkpt_root>") if folder else text
        short = text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."
        return Leaf(_digest(kind.encode(), text.encode()), kind, short)
    items = sorted(map(repr, value)) if isinstance(value, Set) else [repr(item) for item in value]
    kind = f"{kind} of {len(items)}"
    return Leaf(_digest(kind.encode(), "\0".join(items).encode()), kind, _series(items, kind))


def _leaf_of_tensor(tensor: torch.Tensor) -> Leaf:
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.is_meta:
        return Leaf(_digest(kind.encode()), kind, None)
    plain = plain_tensor(tensor)
    data = memoryview(plain.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    begin = plain.reshape(-1)[: _MAX_SHOWN_IN_ARRAYS + 1].tolist()
    return Leaf(_digest(kind.encode(), data), kind, _shown(begin, plain.shape))


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values on the CPU, dense and contiguous, without gradient."""
    with torch.no_grad():
        tensor = tensor.detach()
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        return tensor.resolve_conj().resolve_neg().cpu().contiguous()


def state_of_generator(generator: Any) -> bytes:
    """Return the state of a generator of torch, NumPy or `random` as bytes."""
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().numpy())
    if isinstance(generator, random.Random):
        return repr(generator.getstate()).encode()
    is_legacy = isinstance(generator, np.random.RandomState)
    state = generator.get_state(legacy=False) if is_legacy else generator.bit_generator.state
    with np.printoptions(threshold=10_000):  # else an array of some hundred numbers is cut short
        return repr(state).encode()


def _shown(begin: list[Any], shape: Sequence[int]) -> str | None:
    """Return the values of a small tensor or array as text, given its first ones."""
    if len(begin) > _MAX_SHOWN_IN_ARRAYS:
        return None
    return f"[{', '.join(map(repr, begin))}]" if len(shape) else repr(begin[0])


def _series(items: list[str], kind: str) -> str:
    if len(items) <= _MAX_SHOWN_ELEMENTS:
        return f"[{', '.join(items)}]"
    return f"{kind} that ends with {', '.join(items[-3:])}"


def _digest(*data: bytes | memoryview) -> bytes:
    hashing = hashlib.blake2b(digest_size=16)
    for each in data:
        hashing.update(each)
    return hashing.digest()
