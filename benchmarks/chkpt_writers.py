"""What writes checkpoints: Helios, plain bytes, and the peers, each as its documentation does.

None of the peers syncs what it wrote, except torch.distributed.checkpoint; for the others that is done here, so that
all have the same to do.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch

from benchmarks.chkpt_states import TENSOR_MIB, State, fsync
from benchmarks.harness import MIB

Write = Callable[[Path], object]


class Writer(NamedTuple):
    """A way to write a state.

    Attributes:
        made_for: is given the state, and returns what writes it to a path.
        sums: what could find damage in the file, later.
        syncs: what is on the disk when it returns, and who sees to that.
    """

    made_for: Callable[[State], Write]
    sums: str
    syncs: str


def blocks(state: State) -> list[memoryview]:
    """Return the bytes of all tensors in blocks; small tensors are joined, large ones are not copied."""
    views = [memoryview(tensor.numpy()).cast("B") for tensor in state["model"].values()]
    if all(len(view) >= TENSOR_MIB * MIB for view in views):
        return views
    joined = memoryview(b"".join(views))
    return [joined[begin : begin + TENSOR_MIB * MIB] for begin in range(0, len(joined), TENSOR_MIB * MIB)]


def write_blocks(data: Iterable[memoryview], path: Path) -> None:
    """Write bytes to a temporary name, sync them and rename: the least that an atomic save has to do."""
    temp = path.with_name(path.name + ".tmp")
    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for block in data:
            while block:
                block = block[os.write(descriptor, block) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temp.replace(path)


def plain(state: State) -> Write:
    """Write the bytes of the tensors, and nothing else."""
    data = blocks(state)
    return lambda path: write_blocks(data, path)


def helios(state: State) -> Write:
    """`helios.chkpt.save`."""
    from helios.chkpt import save

    return lambda path: save(state, path)


def torch_path(state: State) -> Write:
    """`torch.save` to a path."""

    def write(path: Path) -> None:
        torch.save(state, path)
        fsync(path)

    return write


def torch_handle(state: State) -> Write:
    """`torch.save` to an open file."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            torch.save(state, cast("IO[bytes]", file))
            file.flush()
            fsync(path)

    return write


def safetensors(state: State) -> Write:
    """`safetensors.torch.save_file`: tensors by name only, no other values."""
    from safetensors.torch import save_file

    def write(path: Path) -> None:
        save_file(state["model"], path)
        fsync(path)

    return write


def distributed(state: State) -> Write:
    """`torch.distributed.checkpoint.save` in one process: a folder."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    return lambda path: save(state, storage_writer=FileSystemWriter(path), no_dist=True)


def lightning(state: State) -> Write:
    """Lightning's plug-in for files, which is atomic."""
    from lightning.fabric.plugins.io import TorchCheckpointIO

    plugin = TorchCheckpointIO()

    def write(path: Path) -> None:
        plugin.save_checkpoint(state, path)
        fsync(path)

    return write


WRITERS = {
    "write + fsync": Writer(plain, "none", "file, here"),
    "control": Writer(plain, "none", "file, here"),
    "helios save": Writer(helios, "SHA-256 and CRC-32, read", "file and name, itself"),
    "torch.save(path)": Writer(torch_path, "CRC-32, unread", "file, here"),
    "torch.save(handle)": Writer(torch_handle, "CRC-32, unread", "file, here"),
    "safetensors save_file": Writer(safetensors, "none", "file, here"),
    "torch.distributed.checkpoint": Writer(distributed, "CRC-32, unread", "file, itself"),
    "Lightning TorchCheckpointIO": Writer(lightning, "CRC-32, unread", "file, here"),
}
