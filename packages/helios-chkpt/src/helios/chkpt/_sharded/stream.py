"""Files that are hashed while they are written, as the file system that DCP's writer writes to."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from helios.chkpt._sharded.manifest import METADATA, ShardFile

_SMALL_BYTES = 1 << 16  # torch writes a tensor in some twenty pieces, most of them small
_BUFFER_BYTES = 1 << 22


class ShardWriter(FileSystemWriter):
    """DCP's writer into a folder that is there and empty.

    Args:
        folder: the folder.

    Attributes:
        files: what was written by this process.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=True)
        self.files: list[ShardFile] = []
        self.fs = _HashingFileSystem(self.files)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make no folder: in a process that does not see that of rank 0, the first write is to fail."""
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write without the CRC-32 of torch.save, which costs as much as half of a SHA-256, and which nobody reads."""
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            return super().write_data(plan, planner)
        finally:
            torch.serialization.set_crc32_options(before)

    def storage_meta(self) -> StorageMeta:
        """Nothing of this machine and this moment, so that equal states give equal files."""
        return StorageMeta()

    def finish(self, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
        """Write the table of contents, in the protocol of our own pickles, which is read without running it."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {r.index: r.storage_data for of_rank in results for r in of_rank}
        metadata.storage_meta = self.storage_meta()
        with self.fs.create_stream(Path(self.path) / METADATA, "wb") as stream:
            stream.write(pickle.dumps(metadata, protocol=2))
            os.fsync(stream.fileno())


class _HashingFileSystem(FileSystem):
    def __init__(self, files: list[ShardFile]) -> None:
        self._files = files

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", "nothing is read while shards are written"
        target = Path(path)
        stream = _HashingStream(target)
        try:
            yield stream
            stream.close()
        except Exception as error:
            failed = (
                stream.failed or error
            )  # torch.save says nothing of an OSError but that a position is wrong
            if isinstance(failed, OSError) and failed.filename is None and failed.errno is not None:
                raise OSError(failed.errno, failed.strerror, str(target)) from error
            raise
        finally:
            stream.abandon()
        self._files.append(ShardFile(target.name, stream.tell(), stream.hexdigest()))


class _HashingStream(io.RawIOBase):
    """A new file. What is written is hashed by a thread meanwhile.

    Attributes:
        failed: why a write failed; None if none did.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._pool = ThreadPoolExecutor(1)
        self._digest = hashlib.sha256()
        self._small = bytearray()
        self._position = 0  # of what the file has
        self.failed: OSError | None = None

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """How many bytes were written."""
        return self._position + len(self._small)

    def hexdigest(self) -> str:
        """SHA-256 of what was written."""
        return self._digest.hexdigest()

    def fileno(self) -> int:
        """Of the file, which has all by then: whoever asks wants to have it on the disk."""
        self.flush()
        return self._descriptor

    def write(self, data: Any) -> int:
        """All of it, or an OSError."""
        memory = memoryview(data).cast("B")
        if len(memory) < _SMALL_BYTES:
            self._small += memory
            if len(self._small) >= _BUFFER_BYTES:
                self.flush()
        else:
            self.flush()
            self._put(memory)
        return len(memory)

    def flush(self) -> None:
        """Have the file have all."""
        if self._small:
            small, self._small = self._small, bytearray()
            self._put(memoryview(small))

    def close(self) -> None:
        """Once all is written."""
        if not self.closed:
            self.flush()
            os.close(self._descriptor)
            self._pool.shutdown()
            super().close()

    def abandon(self) -> None:
        """Close the file, whatever was not written."""
        self._small = bytearray()
        self.close()

    def _put(self, memory: memoryview) -> None:
        hashed = self._pool.submit(self._digest.update, memory)
        try:
            while memory:
                count = os.write(self._descriptor, memory)
                memory = memory[count:]
                self._position += count
        except OSError as error:
            self.failed = self.failed or error
            raise
        finally:
            hashed.result()  # the memory is the caller's afterwards
