"""Reading a sharded checkpoint, in one process or in many. Nothing is believed before it is checked."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor import empty as empty_dtensor

from helios.chkpt._arguments import as_path, check_bool
from helios.chkpt._errors import CheckpointError
from helios.chkpt._format.torch_zip import corrupt
from helios.chkpt._materialise import MapLocation, placer
from helios.chkpt._naming import MAIN_FILE, is_sharded
from helios.chkpt._read import check_types, load, loaded
from helios.chkpt._sharded.folder import stamp_of
from helios.chkpt._sharded.manifest import KEY, Shards, Spread, check_digests, put
from helios.chkpt._sharded.metadata import Chunk
from helios.chkpt._sharded.ranks import Ranks
from helios.chkpt._sharded.verify import MAX_TRIES, chunks_of, opened_main, unless_replaced

Chunks = Mapping[str, Sequence[Chunk]]


def load_together(
    path: str | os.PathLike[str],
    meshes: Sequence[DeviceMesh],
    map_location: MapLocation,
    verify: bool,
    safe_types: Sequence[type],
    group: Any,
) -> dict[str, object]:
    """As `helios.chkpt.load_sharded`."""
    ranks = Ranks.of(group)
    loading = _Loading(path, meshes, map_location, verify, safe_types, ranks)
    for _ in range(MAX_TRIES):
        before = ranks.agree(loading.begin)
        try:
            ranks.agree(loading.check)
            ranks.agree(loading.read)
        except (CheckpointError, OSError):
            if ranks.agree(loading.stamp) == before:
                raise
        else:
            if ranks.agree(loading.stamp) == before and all(item == before[0] for item in before):
                return loading.state
    raise OSError(
        errno.EBUSY, "it was replaced whenever it was read, or is not the same for all ranks", str(path)
    )


class _Loading:
    """One load in one process of several."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        meshes: Sequence[DeviceMesh],
        map_location: MapLocation,
        verify: bool,
        safe_types: Sequence[type],
        ranks: Ranks,
    ) -> None:
        self._argument = path
        self._meshes = meshes
        self._map_location = map_location
        self._verify = verify
        self._safe_types = safe_types
        self._ranks = ranks
        self._shards: Shards | None = None
        self._chunks: Chunks = {}
        self.state: dict[str, object] = {}

    def begin(self) -> object:
        """Check the arguments; say which checkpoint there is."""
        self._path = as_path("path", self._argument)
        check_bool("verify", self._verify)
        check_types(self._safe_types)
        if not all(isinstance(mesh, DeviceMesh) for mesh in self._meshes):
            raise TypeError(f"meshes: expected a sequence of DeviceMesh, got {self._meshes!r:.80}")
        return self.stamp()

    def stamp(self) -> object:
        """Something that is another one once the checkpoint was replaced: equal for all who see the same one."""
        if not is_sharded(self._path):
            return None
        stamp = stamp_of(self._path)
        return (
            None if stamp is None else stamp[2:4]
        )  # size and time of change: devices have other numbers elsewhere

    def check(self) -> None:
        """Load what is not in shards, and check this process's part of them."""
        where, types = self._map_location, self._safe_types
        self._shards = None
        if not is_sharded(self._path):
            self.state = load(self._path, map_location=where, verify=self._verify, safe_types=types)
        else:
            self.state, self._shards = _load_main(self._path, where, self._verify, types)
            self._chunks = chunks_of(self._path, self._shards)
            if self._verify:
                files = self._shards.data_files
                check_digests(self._path, self._shards, files[self._ranks.rank :: self._ranks.size])

    def read(self) -> None:
        """Read the shards that this process needs."""
        if self._shards is None:
            return
        tensors = {name: self._empty(spread) for name, spread in self._shards.by_name.items()}
        read_into(tensors, self._path, self._shards, self._chunks)
        place = placer(self._map_location)
        for name, spread in self._shards.by_name.items():
            if _mesh_for(spread, self._meshes) is None:
                tensors[name] = place(tensors[name])
        for keys, spread in self._shards.tensors:
            put(self.state, keys, tensors[spread.name], self._path / MAIN_FILE)

    def _empty(self, spread: Spread) -> torch.Tensor:
        mesh = _mesh_for(spread, self._meshes)
        if mesh is None:
            return whole(spread)
        placements = [_placement(text) for text in spread.placements]
        dtype = getattr(torch, spread.dtype)
        return empty_dtensor(spread.shape, dtype=dtype, device_mesh=mesh, placements=placements)


def load_folder(
    folder: Path,
    map_location: MapLocation,
    verify: bool,
    safe_types: Sequence[type],
    keys: Iterable[str] | None,
    shards: bool,
) -> dict[str, object]:
    """As `helios.chkpt.load`, of a sharded checkpoint."""
    chosen = None if keys is None or isinstance(keys, str) else list(keys)
    if chosen is not None and KEY in chosen:
        raise KeyError(f"{folder} has no key {KEY!r}; that one describes the shards")

    def work() -> dict[str, object]:
        return _load_all(folder, map_location, verify, safe_types, keys if chosen is None else chosen, shards)

    return unless_replaced(folder, work)


def _load_all(
    folder: Path,
    map_location: MapLocation,
    verify: bool,
    safe_types: Sequence[type],
    keys: Iterable[str] | None,
    with_shards: bool,
) -> dict[str, object]:
    state, shards = _load_main(folder, map_location, verify, safe_types, keys)
    if not with_shards:
        return state
    chunks = chunks_of(folder, shards)
    if verify:
        check_digests(folder, shards, shards.data_files)
    places = [(way, spread) for way, spread in shards.tensors if way[0] in state]
    tensors = {spread.name: whole(spread) for _, spread in places}
    read_into(tensors, folder, shards, chunks)
    place = placer(map_location)
    tensors = {name: place(tensor) for name, tensor in tensors.items()}
    for way, spread in places:
        put(state, way, tensors[spread.name], folder / MAIN_FILE)
    return state


def _load_main(
    folder: Path,
    map_location: MapLocation,
    verify: bool,
    safe_types: Sequence[type],
    keys: Iterable[str] | None = None,
) -> tuple[dict[str, object], Shards]:
    """What is not in shards, with None where a tensor in shards belongs, and what the main file says of these."""
    with opened_main(folder) as (file, main):
        state = loaded(
            file,
            main.contents,
            map_location=map_location,
            verify=verify,
            safe_types=safe_types,
            keys=keys,
        )
    state.pop(KEY, None)
    assert main.shards is not None, "files of later releases are refused"
    return state, main.shards


def read_into(tensors: dict[str, torch.Tensor], folder: Path, shards: Shards, chunks: Chunks) -> None:
    """Read what belongs into tensors, DTensors or plain ones, by their names in DCP.

    Raises:
        CorruptError: it is not what the checkpoint says.
        OSError: a file cannot be read.
    """
    reader = FileSystemReader(folder / shards.folder)
    metadata = _metadata(tensors, shards, chunks)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = planner.finish_plan(planner.create_local_plan())
    try:
        reader.read_data(plan, planner).wait()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load has no end of them
        found = f"a content that does not load ({type(error).__name__}: {error})"
        raise corrupt(folder / shards.folder, found, "tensors") from error


def _metadata(names: Iterable[str], shards: Shards, chunks: Chunks) -> Metadata:
    """What DCP would have unpickled, of what was checked, for some tensors."""
    tables: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    by_name = shards.by_name
    for name in names:
        boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks[name]]
        properties = TensorProperties(dtype=getattr(torch, by_name[name].dtype))
        tables[name] = TensorStorageMetadata(properties, torch.Size(by_name[name].shape), boxes)
        for number, chunk in enumerate(chunks[name]):
            index = MetadataIndex(name, chunk.offsets, number)
            places[index] = _StorageInfo(chunk.file, chunk.start, chunk.num_bytes)
    return Metadata(tables, storage_data=places)


def whole(spread: Spread) -> torch.Tensor:
    """An uninitialised tensor of its dtype and shape, on the CPU."""
    return torch.empty(spread.shape, dtype=getattr(torch, spread.dtype), device="cpu")


def _mesh_for(spread: Spread, meshes: Sequence[DeviceMesh]) -> DeviceMesh | None:
    fitting = [mesh for mesh in meshes if mesh.ndim == len(spread.placements)]
    same = [mesh for mesh in fitting if mesh.mesh_dim_names == spread.mesh_dim_names]
    return next(iter([*same, *fitting]), None)


def _placement(text: str) -> Placement:
    return Replicate() if text == "R" else Shard(int(text[2:-1]))
