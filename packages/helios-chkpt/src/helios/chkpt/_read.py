"""Reading checkpoints: nothing is believed before it is checked, and nothing of a file is ever run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from helios.chkpt._arguments import as_path, check_bool
from helios.chkpt._errors import CheckpointError, NotACheckpointError, UnsafeError, explain
from helios.chkpt._format.archive import Archive, check_records, open_archive, open_file
from helios.chkpt._format.calls import KNOWN, MalformedError
from helios.chkpt._format.decode import Decoded, TooDeepError, decode
from helios.chkpt._format.scan import names_in
from helios.chkpt._format.torch_zip import corrupt
from helios.chkpt._naming import is_sharded, main_file
from helios.chkpt._places import key_text
from helios.chkpt._versions import MAJOR, check_version, major_of, too_new

if TYPE_CHECKING:
    from helios.chkpt._materialise import MapLocation

# Modules of what releases of Helios had in their files.
_FAMILIES = frozenset({"helios", "pathlib"})
_LEGACY_KEYS = frozenset({"training_state", "model", "rng"})


def load(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = None,
    mmap: bool | None = None,
    verify: bool = True,
    safe_types: Sequence[type] = (),
    keys: Iterable[str] | None = None,
    shards: bool = True,
) -> dict[str, object]:
    """Read a checkpoint: a file, or the folder that `save_sharded` wrote.

    The structure of the file, its manifest and its pickle are always checked. Of a folder everything comes into this
    process, which needs no process group: what was a DTensor comes as a plain whole tensor.

    Args:
        path: the file or folder.
        map_location: where tensors go, as for `torch.load`; checkpoints hold CPU tensors.
        mmap: map the tensors instead of reading them; None is False. The file must not be changed in place
            while they are in use (`save` never does that). Tensors in shards cannot be mapped.
        verify: compare the CRC-32 of every record that is read, and the SHA-256 of all shards.
        safe_types: classes that may be made from the file in addition to plain values and tensors, in this
            call only.
        keys: read these keys of the dictionary only, and only their tensors; None reads all.
        shards: read tensors in shards; otherwise there is None where they belong, and shards are not looked at.

    Returns:
        What was saved, with the key ``version`` added.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        CheckpointError: one of its subclasses, by what is wrong with the file.
        KeyError: the file has no such key.
        TypeError, ValueError: a wrong argument, or `mmap` for a folder.
        RuntimeError: from torch, if `map_location` names a device that is not there.
    """
    target = as_path("path", path)
    check_bool("verify", verify)
    check_bool("shards", shards)
    if mmap is not None:
        check_bool("mmap", mmap)
    check_types(safe_types)
    if is_sharded(target):
        from helios.chkpt._sharded.read import load_folder  # torch: not needed to verify or to inspect

        if mmap and shards:
            raise ValueError("mmap: tensors in shards cannot be mapped; expected False or None for a folder")
        return load_folder(target, map_location, verify, safe_types, keys, shards)
    with open_file(target) as file:
        contents = read_contents(file, target)
        return loaded(
            file,
            contents,
            map_location=map_location,
            mmap=bool(mmap),
            verify=verify,
            safe_types=safe_types,
            keys=keys,
        )


def loaded(
    file: IO[bytes],
    contents: Contents,
    *,
    map_location: MapLocation,
    mmap: bool = False,
    verify: bool,
    safe_types: Sequence[type],
    keys: Iterable[str] | None,
) -> dict[str, object]:
    """As `load`, of a file that is open and whose contents were read. They are used up."""
    from helios.chkpt._materialise import materialise  # as in `load`

    contents.check(check_types(safe_types))
    archive = contents.archive
    values = contents.values if keys is None else _chosen(contents.values, keys, archive.path)
    state = materialise(
        values, file, archive, map_location=map_location, mmap=mmap, verify=verify, safe_types=safe_types
    )
    return cast("dict[str, object]", state)


def verify(path: str | os.PathLike[str], *, safe_types: Sequence[type] = (), digests: bool = True) -> None:
    """Check that a file or folder is a whole checkpoint: its structure, every record, and what its pickle says.

    The version is not judged: a file of another major release that is whole passes, and `load` says what to
    do with it. Does not import torch.

    Args:
        path: the file, or the folder that `save_sharded` wrote.
        safe_types: as for `load`.
        digests: compare the SHA-256 of every record; otherwise only the CRC-32, which is three times as fast. Shards
            have a SHA-256 only.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        CheckpointError: one of its subclasses, by what is wrong with the file.
        TypeError, ValueError: `path` is no path.
    """
    target = as_path("path", path)
    check_bool("digests", digests)
    types = check_types(safe_types)
    if is_sharded(target):
        from helios.chkpt._sharded.verify import verify_folder

        verify_folder(target, types, digests=digests)
        return
    with open_file(target) as file:
        contents = read_contents(file, target)
        check_records(file, contents.archive, digests=digests)
    if not contents.is_of_other_release(types):
        contents.check_safe(types)


def read_score(path: Path) -> float | None:
    """The score that was noted in a checkpoint; None if there is none, or it cannot be read."""
    try:
        with open_file(main_file(path)) as file:
            manifest = open_archive(file, path).manifest
    except (CheckpointError, OSError):
        return None
    return None if manifest is None else manifest.score


@dataclass(frozen=True)
class Contents:
    """What is in a file, read but not believed: `check` says whether it may be loaded.

    Attributes:
        archive: the file.
        values: the dictionary, described.
        foreign: names of classes and functions in it that are neither plain values nor tensors.
    """

    archive: Archive
    values: dict[object, object]
    foreign: tuple[str, ...]

    @property
    def version(self) -> object:
        """The value under the key ``version``, None if there is none."""
        return self.values.get("version")

    @property
    def versions(self) -> list[object]:
        """What is under the key ``version``, be it text or, as in files of 2.x, a member of an enum."""
        return [value for key, value in self.values.items() if key_text(key) == "version"]

    def is_of_other_release(self, types: frozenset[str]) -> bool:
        """Whether the file is one that `load` refuses by its version, whatever else is in it."""
        if self.archive.is_newer:
            return True
        if major_of(self.version) == MAJOR:
            return False  # then nothing excuses what is not plain
        strange = set(self.foreign) - types
        families = {name.partition(".")[0] for name in strange}
        names = {str(key) for key in self.values if type(key) is str}
        return bool(strange) and families <= _FAMILIES and ("helios" in families or names >= _LEGACY_KEYS)

    def check_schema(self) -> None:
        """VersionTooNewError if a later major release wrote the file."""
        manifest = self.archive.manifest
        if manifest is not None and self.archive.is_newer:
            raise too_new(manifest.version, self.archive.path)

    def check(self, types: frozenset[str]) -> None:
        """Raise unless this release can load the file: a subclass of `CheckpointError`."""
        path = self.archive.path
        self.check_schema()
        if self.is_of_other_release(types):
            versions = self.versions
            check_version(versions[0] if versions else None, path, present=bool(versions))
        self.check_safe(types)
        check_version(self.version, path, present="version" in self.values)

    def check_safe(self, types: frozenset[str]) -> None:
        """UnsafeError if there is more in the file than plain values, tensors and these types."""
        strange = [name for name in self.foreign if name not in types]
        if strange:
            raise _unsafe(self.archive.path, strange)


def read_contents(file: IO[bytes], path: Path) -> Contents:
    """What an open file holds; tensors are not looked at.

    Raises:
        CheckpointError: it is not the file of a dictionary, or damaged, or its pickle is none of ours.
    """
    archive = open_archive(file, path)
    if archive.is_newer:
        return Contents(archive, {}, ())
    decoded = _decoded(archive)
    if type(decoded.value) is not dict:
        if decoded.foreign:
            raise _unsafe(path, decoded.foreign)
        found = f"a {type(decoded.value).__name__}"
        raise NotACheckpointError(explain(path, found, "a dict", "Use torch.load for it."))
    return Contents(archive, decoded.value, decoded.foreign)


def check_types(safe_types: object) -> frozenset[str]:
    """The names of classes as a pickle has them; TypeError unless they are a sequence of classes."""
    if isinstance(safe_types, str) or not isinstance(safe_types, Sequence):
        raise TypeError(f"safe_types: expected a sequence of classes, got {type(safe_types).__name__}")
    for kind in safe_types:
        if not isinstance(kind, type):
            raise TypeError(f"safe_types: expected classes, got {kind!r}")
    return frozenset(f"{kind.__module__}.{kind.__qualname__}" for kind in safe_types)


def _decoded(archive: Archive) -> Decoded:
    try:
        return decode(archive.pickle, {key: record.num_bytes for key, record in archive.storages.items()})
    except MalformedError as error:
        if not isinstance(error, TooDeepError):
            strange = [name for name in names_in(archive.pickle) if name not in KNOWN]
            if strange:
                raise _unsafe(archive.path, strange) from error
        raise corrupt(archive.path, str(error), "a pickle of tensors and plain values") from error


def _chosen(values: dict[object, object], keys: Iterable[str], path: Path) -> dict[object, object]:
    if isinstance(keys, str):
        raise TypeError("keys: expected several keys, got a str")
    wanted = list(keys)
    missing = [key for key in wanted if key not in values]
    if missing:
        raise KeyError(
            f"{path} has no key {missing[0]!r}; it has {[key for key in values if type(key) is str]}"
        )
    return {key: values[key] for key in wanted}


def _unsafe(path: Path, names: Sequence[str]) -> CheckpointError:
    remedy = "Nothing of the file was run. If you trust it and the type is your own, pass it in safe_types."
    return UnsafeError(explain(path, f"the global {names[0]:.200}", "plain values and tensors only", remedy))
