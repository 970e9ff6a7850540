"""What the main file of a sharded checkpoint says of its shards, and whether they are what it says. Without torch."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios.chkpt._errors import CorruptError, NotACheckpointError, TruncatedError, explain
from helios.chkpt._format.dtypes import ITEM_BYTES
from helios.chkpt._format.torch_zip import RESTORE, corrupt
from helios.chkpt._format.values import Storage, Tensor

KEY = "sharded"
"""The key of the main file's dictionary that describes the shards; nothing else may use it."""

METADATA = ".metadata"
"""DCP's own table of contents."""

_SHARDS_NAME = re.compile(r"shards-[0-9a-f]{16}")
_FILE_NAME = re.compile(r"\.metadata|__(0|[1-9][0-9]{0,8})_(0|[1-9][0-9]{0,8})\.distcp")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACEMENT = re.compile(r"R|S\((0|[1-9][0-9]{0,3})\)")
_CHUNK_BYTES = 1 << 22
_MAX_NUMBER = 2**63


@dataclass(frozen=True)
class ShardFile:
    """A file in the folder of shards.

    Attributes:
        name: its name.
        num_bytes: its size.
        sha256: of its content, in hexadecimal digits.
    """

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Spread:
    """How a tensor is stored in shards, and how it was spread over processes.

    Attributes:
        name: its name in DCP; tensors that are tied have the same.
        dtype: such as ``bfloat16``.
        shape: of the whole tensor.
        placements: for each dim of the mesh ``S(<dim of the tensor>)`` or ``R``.
        mesh_shape: number of processes in each dim of the mesh.
        mesh_dim_names: names of these dims, None if they had none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    placements: tuple[str, ...]
    mesh_shape: tuple[int, ...]
    mesh_dim_names: tuple[str, ...] | None

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def text(self) -> str:
        """How it was spread, such as ``S(0) on dp=2``."""
        names = self.mesh_dim_names or [str(dim) for dim in range(len(self.mesh_shape))]
        mesh = ", ".join(f"{name}={size}" for name, size in zip(names, self.mesh_shape, strict=True))
        return f"{', '.join(self.placements)} on {mesh}"


@dataclass(eq=False)
class ShardedTensor(Tensor):
    """A tensor in shards, described as a contiguous one whose storage has the name in DCP for its key."""

    spread: Spread = field(kw_only=True)


@dataclass(frozen=True)
class Shards:
    """The shards of a checkpoint.

    Attributes:
        folder: name of the folder they are in.
        files: what is in it.
        tensors: for each place in the state where a tensor in shards belongs: the keys that lead there, and the tensor.
    """

    folder: str
    files: tuple[ShardFile, ...]
    tensors: tuple[tuple[tuple[object, ...], Spread], ...]

    @property
    def by_name(self) -> dict[str, Spread]:
        """The tensors, each once."""
        return {spread.name: spread for _, spread in self.tensors}

    @property
    def data_files(self) -> list[ShardFile]:
        """All files but the table of contents, which is checked when it is read."""
        return [file for file in self.files if file.name != METADATA]


def is_shards_name(name: str) -> bool:
    """Whether a folder of this name holds shards."""
    return _SHARDS_NAME.fullmatch(name) is not None


def as_value(shards: Shards) -> dict[str, object]:
    """What is stored under `KEY`."""
    return {
        "folder": shards.folder,
        "files": [{"name": f.name, "bytes": f.num_bytes, "sha256": f.sha256} for f in shards.files],
        "tensors": [
            {
                "path": list(path),
                "name": spread.name,
                "dtype": spread.dtype,
                "shape": list(spread.shape),
                "placements": list(spread.placements),
                "mesh_shape": list(spread.mesh_shape),
                "mesh_dim_names": None if spread.mesh_dim_names is None else list(spread.mesh_dim_names),
            }
            for path, spread in shards.tensors
        ],
    }


def read_shards(values: dict[object, object], path: Path) -> Shards:
    """What is stored under `KEY`, checked.

    Args:
        values: those of the main file.
        path: the main file, for messages.

    Raises:
        NotACheckpointError: there is no such key.
        CorruptError: it is not as `as_value` has it.
    """
    if KEY not in values:
        found = f"no key {KEY!r}"
        raise NotACheckpointError(explain(path, found, "the main file of a sharded checkpoint", RESTORE))
    match values[KEY]:
        case {"folder": str(folder), "files": list(files), "tensors": list(tensors), **rest} if (
            not rest and is_shards_name(folder)
        ):
            pass
        case _:
            raise corrupt(path, f"a value under {KEY!r} that is none of ours", "folder, files and tensors")
    shards = Shards(
        folder, tuple(_file(item, path) for item in files), tuple(_tensor(item, path) for item in tensors)
    )
    names = [file.name for file in shards.files]
    if len(set(names)) != len(names) or METADATA not in names:
        raise corrupt(path, f"shards of which one is named twice, or without {METADATA}", "a name for each")
    by_name = shards.by_name
    if any(by_name[spread.name] != spread for _, spread in shards.tensors):
        raise corrupt(path, "two tensors in shards of one name that differ", "a name for each")
    return shards


def _file(item: object, path: Path) -> ShardFile:
    match item:
        case {"name": str(name), "bytes": int(num_bytes), "sha256": str(sha256), **rest}:
            is_fine = (
                _FILE_NAME.fullmatch(name) and _SHA256.fullmatch(sha256) and 0 <= num_bytes < _MAX_NUMBER
            )
            if is_fine and not rest and type(num_bytes) is int:
                return ShardFile(name, num_bytes, sha256)
            raise corrupt(path, f"the file of shards {name!r:.80}", "a plain name, a size and a SHA-256")
    raise corrupt(path, "a file of shards that is none", "a plain name, a size and a SHA-256")


def _tensor(item: object, path: Path) -> tuple[tuple[object, ...], Spread]:
    match item:
        case {
            "path": list(keys),
            "name": str(name),
            "dtype": str(dtype),
            "shape": list(shape),
            "placements": list(placements),
            "mesh_shape": list(mesh_shape),
            "mesh_dim_names": None | list() as dim_names,
            **rest,
        } if not rest and keys and dtype in ITEM_BYTES:
            if _are_sizes(shape) and _are_sizes(mesh_shape) and len(placements) == len(mesh_shape):
                spread = Spread(
                    name,
                    dtype,
                    tuple(shape),
                    tuple(placements),
                    tuple(mesh_shape),
                    None if dim_names is None else tuple(dim_names),
                )
                if _is_placed(spread):
                    return tuple(keys), spread
    raise corrupt(
        path, "a tensor in shards that is none of ours", "path, name, dtype, shape, placements, mesh"
    )


def _are_sizes(values: list[object]) -> bool:
    total = 1
    for value in values:
        if type(value) is not int or not 0 <= value < _MAX_NUMBER:
            return False
        total *= max(value, 1)
        if total >= _MAX_NUMBER:
            return False
    return True


def _is_placed(spread: Spread) -> bool:
    names = spread.mesh_dim_names
    if names is not None and (len(names) != len(spread.mesh_shape) or any(type(n) is not str for n in names)):
        return False
    for placement in spread.placements:
        match = _PLACEMENT.fullmatch(placement) if type(placement) is str else None
        if match is None or (match[1] is not None and int(match[1]) >= len(spread.shape)):
            return False
    return True


def described(spread: Spread) -> ShardedTensor:
    """The description of a tensor in shards that takes the place of None in the state's values."""
    strides = [1]
    for length in reversed(spread.shape[1:]):
        strides.append(strides[-1] * length)
    stride = tuple(reversed(strides)) if spread.shape else ()
    storage = Storage(spread.name, spread.dtype, "cpu", spread.num_bytes)
    return ShardedTensor(storage, spread.dtype, 0, spread.shape, stride, spread=spread)


def fill(state: Any, path: Sequence[object], value: object) -> None:
    """Put a value where keys lead that leads to None now; tuples on the way are made anew.

    Raises:
        LookupError: they lead nowhere, or to something else.
    """
    way: list[tuple[Any, Any]] = []
    node = state
    for key in path:
        way.append((node, key))
        node = _item(node, key)
    if node is not None:
        raise LookupError(f"{list(path)} leads to a {type(node).__name__}")
    container, key = way.pop()
    while type(container) is tuple:
        value = (*container[:key], value, *container[key + 1 :])
        container, key = way.pop()
    container[key] = value


def _item(node: Any, key: object) -> object:
    try:
        if type(node) in (dict, OrderedDict, Counter) and key in node:
            return node[key]
        if type(node) in (list, tuple) and type(key) is int and 0 <= key < len(node):
            return node[key]
    except TypeError:  # a key that has no hash
        pass
    raise LookupError(f"no {key!r:.80} in a {type(node).__name__}")


def filled(values: dict[object, object], shards: Shards, path: Path) -> dict[object, object]:
    """The values of the main file without `KEY`, with a description wherever a tensor in shards belongs.

    Raises:
        CorruptError: there is no place for one.
    """
    values.pop(KEY)
    for keys, spread in shards.tensors:
        put(values, keys, described(spread), path)
    return values


def put(state: object, keys: Sequence[object], value: object, path: Path) -> None:
    """`fill`; CorruptError if there is no place."""
    try:
        fill(state, keys, value)
    except LookupError as error:
        raise corrupt(path, f"no place for a tensor in shards ({error})", "None there") from error


def check_files(folder: Path, shards: Shards) -> None:
    """Check that the files in the shards' folder are those that the main file lists, and as large.

    Raises:
        TruncatedError: a file is missing or too short.
        CorruptError: one is too long, or no regular file, or not on the list.
        OSError: something cannot be looked at.
    """
    place = folder / shards.folder
    try:
        if not stat.S_ISDIR(place.lstat().st_mode):
            raise corrupt(place, "no folder", "the folder of the shards")
        found = set(os.listdir(place))  # noqa: PTH208  # names
    except FileNotFoundError:
        raise _missing(place, "no such folder") from None
    listed = {file.name for file in shards.files}
    for name in sorted(found - listed):
        raise corrupt(place / name, "a file that the checkpoint does not list", "none")
    for file in shards.files:
        _check_size(place / file.name, file, file.name in found)


def _check_size(path: Path, file: ShardFile, is_there: bool) -> None:
    if not is_there:
        raise _missing(path, "no such file")
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise corrupt(path, "no regular file", "a file of shards")
    if status.st_size < file.num_bytes:
        raise _missing(path, f"{status.st_size} bytes")
    if status.st_size > file.num_bytes:
        raise corrupt(path, f"{status.st_size} bytes", f"{file.num_bytes}")


def _missing(path: Path, found: str) -> TruncatedError:
    return TruncatedError(explain(path, found, "a whole checkpoint", RESTORE))


def check_digests(folder: Path, shards: Shards, files: Iterable[ShardFile]) -> None:
    """Compare the SHA-256 of files; several at a time.

    Raises:
        CorruptError: one is another.
        OSError: one cannot be read.
    """
    place = folder / shards.folder
    files = list(files)
    if sum(file.num_bytes for file in files) <= _CHUNK_BYTES:  # threads would cost more than they save
        for file in files:
            _check_digest(place / file.name, file)
        return
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda file: _check_digest(place / file.name, file), files))


def read_metadata_bytes(folder: Path, shards: Shards) -> bytes:
    """The content of `METADATA`, checked.

    Raises:
        CorruptError: it is not what was written.
        OSError: it cannot be read.
    """
    (file,) = (file for file in shards.files if file.name == METADATA)
    content = bytearray()
    _check_digest(folder / shards.folder / file.name, file, content.extend)
    return bytes(content)


def _check_digest(path: Path, file: ShardFile, keep: Callable[[memoryview], object] | None = None) -> None:
    digest, total = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES if file.num_bytes > _CHUNK_BYTES else file.num_bytes + 1))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _missing(path, "no such file") from None
    with os.fdopen(descriptor, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
            total += count
            if keep is not None:
                keep(buffer[:count])
    if total != file.num_bytes or digest.hexdigest() != file.sha256:
        raise CorruptError(explain(path, f"the SHA-256 {digest.hexdigest()}", file.sha256, RESTORE))
