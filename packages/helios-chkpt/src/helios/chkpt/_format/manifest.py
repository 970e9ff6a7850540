"""The manifest: what wrote a file, and a digest of each of its records. JSON, the last record of an archive."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from helios.chkpt._format.layout import MANIFEST, Record, offset_after

SCHEMA = 3
"""What this release writes. It changes with the major version of helios-chkpt only."""

_KIND = "helios-checkpoint"
_SHA256 = re.compile("[0-9a-f]{64}")


class ManifestError(ValueError):
    """The content of a manifest is not that of one; says what was found."""


@dataclass(frozen=True)
class Manifest:
    """What a file says about itself.

    Attributes:
        schema: number of the structure of file and state.
        version: of helios-chkpt that wrote the file.
        records: all but the manifest, in the order of the file.
        score: how good the checkpoint is, for retention; None if nobody said.
    """

    schema: int
    version: str
    records: tuple[Record, ...]
    score: float | None = None


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of the record of a manifest; equal manifests give equal bytes."""
    records = [
        {"name": r.name, "bytes": r.num_bytes, "crc32": f"{r.crc32:08x}", "sha256": r.sha256}
        for r in manifest.records
    ]
    head = {"kind": _KIND, "schema": manifest.schema, "version": manifest.version, "score": manifest.score}
    # A line for each record: the file can be looked into with `strings`.
    lines = ",\n".join(json.dumps(record) for record in records)
    return f'{json.dumps(head)[:-1]}, "records": [\n{lines}\n]}}\n'.encode()


def read_head(data: bytes) -> tuple[dict[str, object], int, str]:
    """The JSON of a manifest, its schema and its version, whatever the schema.

    Raises:
        ManifestError: it is no manifest.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError("a manifest that is no JSON") from error
    match values:
        case {"kind": str(kind), "schema": int(schema), "version": str(version)} if kind == _KIND:
            return values, schema, version
    raise ManifestError("a manifest without kind, schema and version")


def read_manifest(data: bytes) -> Manifest:
    """The manifest of a file of this schema; where records are follows from their names and sizes.

    Raises:
        ManifestError: something is missing or malformed.
    """
    values, schema, version = read_head(data)
    entries, score = values.get("records"), values.get("score")
    if not isinstance(entries, list):
        raise ManifestError("a manifest without records")
    if score is not None and not (type(score) is float and math.isfinite(score)):
        raise ManifestError("a manifest with a score that is no finite float")
    records: list[Record] = []
    position = 0
    for entry in entries:
        record = _record(entry, position)
        records.append(record)
        position = record.offset + record.num_bytes
    names = {record.name for record in records}
    if len(names) != len(records) or MANIFEST in names:
        raise ManifestError("a manifest that names a record twice")
    return Manifest(schema, version, tuple(records), score)


def _record(entry: object, start: int) -> Record:
    match entry:
        case {"name": str(name), "bytes": int(num_bytes), "crc32": str(crc32), "sha256": str(sha256)}:
            if name.isascii() and 0 <= num_bytes < 2**63 and _SHA256.fullmatch(sha256) and len(crc32) == 8:
                try:
                    return Record(name, start, offset_after(start, name), num_bytes, int(crc32, 16), sha256)
                except ValueError:
                    pass
    raise ManifestError(f"a manifest with the record {entry!r:.80}")
