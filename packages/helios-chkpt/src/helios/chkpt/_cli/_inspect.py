"""``inspect``: what is in a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from helios.chkpt._cli._command import Command, Status, path_of
from helios.chkpt._cli._files import name_as_json, reason_of
from helios.chkpt._cli._output import Column, plural, print_json, print_table, size_text
from helios.chkpt._inspect import CheckpointInfo, Entry, inspect
from helios.chkpt._places import printable, shape_text

_TENSORS = (
    Column("TENSOR", shrinks=True),
    Column("DTYPE"),
    Column("SHAPE"),
    Column("SIZE", is_number=True),
    Column("SHARES MEMORY WITH", shrinks=True),
)
_VALUES = (
    Column("VALUE", shrinks=True),
    Column("KIND", shrinks=True),
    Column("CONTENT", shrinks=True),
    Column("SAME AS", shrinks=True),
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=path_of, help="a .pth file, or a .dcp folder")
    parser.add_argument("--tensors", action="store_true", help="list the tensors")
    parser.add_argument("--all", action="store_true", help="list the tensors and all other values")
    parser.add_argument("--json", action="store_true", help="print JSON, always with everything")


def _run(arguments: argparse.Namespace) -> Status:
    info = inspect(arguments.file)
    if arguments.json:
        print_json(_as_json(info))
        return Status.FINE
    for name, text in _summary(info):
        print(f"{name:<8}  {printable(text)}")
    if arguments.tensors or arguments.all:
        _print_entries(_TENSORS, [_tensor_row(entry) for entry in info.tensors])
    if arguments.all:
        _print_entries(_VALUES, [_value_row(entry) for entry in info.entries if entry.dtype is None])
    return Status.FINE


def _summary(info: CheckpointInfo) -> list[tuple[str, str]]:
    name = info.name
    lines = [("file", str(info.path))]
    if name is not None:
        metadata = f", {name.metadata!r}" if name.metadata else ""
        lines.append(("run", f"{name.run_name}, epoch {name.epoch}, iteration {name.iteration}{metadata}"))
    schema = "no manifest" if info.schema is None else f"schema {info.schema}"
    lines.append(("version", f"{info.version or 'none'}, {schema}"))
    lines.append(("size", f"{size_text(info.num_bytes)} ({info.num_bytes:,} bytes)"))
    if info.num_shard_files:
        lines.append(("shards", f"{plural(info.num_shard_files, 'file')}, {size_text(info.num_shard_bytes)}"))
    if info.digest is not None:
        lines.append(("digest", f"sha256 {info.digest}"))
    if info.score is not None:
        lines.append(("score", f"{info.score:.6g}"))
    if info.keys:
        sizes = f"{size_text(info.num_tensor_bytes)}, {info.num_model_elements:,} elements under model"
        lines.append(("keys", ", ".join(info.keys)))
        lines.append(("tensors", f"{info.num_tensors:,}, {sizes}"))
        lines.append(("others", f"{len(info.entries) - info.num_tensors:,}"))
    if info.foreign:
        lines.append(("foreign", f"{', '.join(info.foreign)} (named in the file, not imported)"))
    if info.load_error is not None:
        lines.append(("load", reason_of(info.load_error, info.path)))
    return lines


def _print_entries(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without the last column if nothing is in it."""
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print()
    print_table(columns, rows)


def _tensor_row(entry: Entry) -> list[str]:
    kind = "" if entry.kind == "tensor" else f" ({entry.kind})"
    shape, num_bytes = entry.shape or (), entry.num_bytes or 0
    return [entry.path, f"{entry.dtype}{kind}", shape_text(shape), size_text(num_bytes), entry.shares or ""]


def _value_row(entry: Entry) -> list[str]:
    return [entry.path, entry.kind, entry.value, entry.shares or ""]


def _as_json(info: CheckpointInfo) -> dict[str, object]:
    return {
        "path": str(info.path),
        **name_as_json(info.name),
        "version": info.version,
        "schema": info.schema,
        "bytes": info.num_bytes,
        "shard_files": info.num_shard_files,
        "shard_bytes": info.num_shard_bytes,
        "digest": info.digest,
        "score": info.score,
        "keys": info.keys,
        "tensor_bytes": info.num_tensor_bytes,
        "model_elements": info.num_model_elements,
        "foreign": info.foreign,
        "load_error": "" if info.load_error is None else reason_of(info.load_error, info.path),
        "entries": [_entry_as_json(entry) for entry in info.entries],
    }


def _entry_as_json(entry: Entry) -> dict[str, object]:
    return {
        "path": entry.path,
        "kind": entry.kind,
        "value": entry.value,
        "dtype": entry.dtype,
        "shape": entry.shape,
        "bytes": entry.num_bytes,
        "storage": entry.storage,
        "sha256": entry.sha256,
        "shares": entry.shares,
    }


INSPECT = Command(
    "inspect",
    "Say what is in a checkpoint, without reading its tensors.",
    "0 it was read, also if this release cannot load it; 1 it is damaged or no checkpoint; "
    "2 wrong usage or no such file",
    _add_arguments,
    _run,
)
