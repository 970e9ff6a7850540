"""The format of a ledger: lines of JSON, the first of which is a header.

The header has `helios_ledger` (the format's number), `run` (its name) and `begun_with` (settings and versions as the
run began; after a restart they may be others). Every other line is a step:

| key | value |
|---|---|
| `step` | `global_iteration`; each line has one more than the line before |
| `epoch` | `global_epoch` |
| `losses` | numbers as they are, `"nan"` and infinities as text, anything else its digest |
| `ids` | digest of the dataset indices of the batch; null for a stream |
| `batch` | digest of the batch that `train_step` got |
| `rng` | digest of each generator, as `train_step` found it |
| `weights` | digest of each parameter and buffer, as `train_step` found it; every so many steps |
| `optimizers` | digest of what each optimizer keeps for each parameter, and of its `param_groups`; with `weights` |

The last line of a run that came to its end has `end: true`, the last step's number, and `rng`, `weights` and
`optimizers` as training left them.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

FORMAT = 1
HEADER_KEY = "helios_ledger"


class LedgerError(ValueError):
    """A file is no ledger, is damaged, or is not the one that a run wrote."""


def line_of(values: Mapping[str, Any]) -> bytes:
    """Return a header or a row as a line of the file."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def header_of(line: bytes, path: Path) -> dict[str, Any]:
    """Return the header that a line is.

    Raises:
        LedgerError: it is none, or of a format that this release does not know.
    """
    header = _object_in(line)
    if header is None or not isinstance(header.get(HEADER_KEY), int):
        raise LedgerError(f"{path} is no ledger: its first line is not the header of one")
    if header[HEADER_KEY] > FORMAT:
        raise LedgerError(
            f"{path} has format {header[HEADER_KEY]}, this release of helios-trainer knows {FORMAT}: take a newer one"
        )
    if not isinstance(header.get("run"), str) or not isinstance(header.get("begun_with"), dict):
        raise LedgerError(f"{path} is damaged: its header lacks 'run' or 'begun_with'")
    return header


def read_header(file: IO[bytes], path: Path) -> dict[str, Any]:
    """Return the header of an open file, which stands at its first row then.

    Raises:
        LedgerError: the file does not begin with one.
    """
    return header_of(file.readline(), path)


def read_rows(file: IO[bytes], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an open file, from the first on. A last line that a killed process left torn is none.

    Raises:
        LedgerError: a line is no row, or not of the step that follows the line before.
    """
    before: dict[str, Any] | None = None
    for number, line in enumerate(file, start=2):
        if not line.endswith(b"\n"):
            return
        row = _object_in(line)
        if row is None or not isinstance(row.get("step"), int) or not isinstance(row.get("epoch"), int):
            raise LedgerError(f"{path}, line {number}, is damaged: expected a row, found {line[:40]!r}")
        if before is not None:
            expected = before["step"] + (not is_end(row))
            if is_end(before) or row["step"] != expected:
                raise LedgerError(
                    f"{path}, line {number}, is damaged: step {row['step']} after "
                    f"{'the end at ' if is_end(before) else ''}step {before['step']}"
                )
        yield row
        before = row


def is_end(row: Mapping[str, Any]) -> bool:
    """Say whether a row is the end of a run, not a step."""
    return bool(row.get("end"))


def _object_in(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # the latter of a hostile file
        return None
    return value if isinstance(value, dict) else None
