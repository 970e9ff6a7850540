"""``diff``: the command, and what it prints."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from helios.trainer.ledger._diff import Comparison, Difference, Parting, Span, diff
from helios.trainer.ledger._format import LedgerError

_PROG = "python -m helios.trainer.ledger"
_MOST = 8  # differences that are listed
_HINTS = {
    "epoch": "epochs have another length: another dataset, batch size or drop_last",
    "ids": "other samples were drawn: another seed, dataset, batch size or sampler, or a place lost in a restart",
    "batch": "the same samples have another content: their dataset or collation draws from a generator that is not "
    "Helios's (numpy.random, say), or depends on the time, the process or files that changed",
    "rng": "a generator had moved on: something drew from it in one run only, before this step",
    "weights": "what came before has left other weights: kernels that are not deterministic (enable_deterministic), or "
    "something that state_dict lacks, after a restart",
    "optimizers": "what came before has left another optimizer: something that state_dict lacks, after a restart",
    "losses": "the step began alike and came to something else: kernels that are not deterministic "
    "(enable_deterministic), state that is in no network or optimizer, or weights that have parted since they "
    "were compared last",
}


class Status(IntEnum):
    """Exit statuses."""

    EQUAL = 0
    PART = 1
    UNUSABLE = 2
    SHORTER = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two ledgers, print where they part, and return the exit status: see ``--help``."""
    parsed = _parser().parse_args(arguments)
    try:
        comparison = diff(parsed.a, parsed.b)
    except (LedgerError, OSError) as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        return Status.UNUSABLE
    status = _status_of(comparison)
    if parsed.json:
        print(json.dumps({"status": status.name.lower(), **dataclasses.asdict(comparison)}, indent=2))
    else:
        print("\n".join(lines_of(comparison)))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(_PROG, description="Look at ledgers of runs.")
    diff_parser = parser.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "diff",
        help="say where two runs part",
        description="Name the first step at which two runs part, and in what, from cause to effect.",
        epilog="Exit statuses: 0 equal, 1 they part, 2 wrong usage or files that cannot be read or compared, "
        "3 equal as far as both go, but one has steps that the other lacks.",
    )
    diff_parser.add_argument("a", metavar="A", type=Path, help="a ledger")
    diff_parser.add_argument("b", metavar="B", type=Path, help="another")
    diff_parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _status_of(comparison: Comparison) -> Status:
    if comparison.parting is not None:
        return Status.PART
    return Status.EQUAL if comparison.has_same_steps else Status.SHORTER


def lines_of(comparison: Comparison) -> Iterator[str]:
    """Yield what is printed: where the runs part first, then what came before, then what may have caused it."""
    parting = comparison.parting
    if parting is not None:
        yield from _parting_lines(parting)
    else:
        yield _verdict(comparison)
    yield f"  {_equal_part(comparison)}"
    for setting in comparison.settings:
        yield f"  begun with another {_text(setting)}"
    if parting is not None:
        yield f"  {_HINTS[parting.differences[0].component.split('.')[0]]}"


def _parting_lines(parting: Parting) -> Iterator[str]:
    first, *others = parting.differences
    where = f"at the end, after step {parting.step}" if parting.is_end else f"at step {parting.step}"
    yield f"part {where}, epoch {parting.epoch}: {_text(first)}"
    for other in others[:_MOST]:
        yield f"  also {_text(other)}"
    if len(others) > _MOST:
        yield f"  and {len(others) - _MOST} more"


def _verdict(comparison: Comparison) -> str:
    if comparison.has_same_steps:
        return "equal"
    a, b = comparison.a, comparison.b
    parts = []
    if a.first != b.first:
        name, span = ("A", a) if a.first > b.first else ("B", b)
        parts.append(f"{name} begins at step {span.first}")
    if (a.last, a.is_finished) != (b.last, b.is_finished):
        name, span, other = ("A", a, b) if (a.last, a.is_finished) < (b.last, b.is_finished) else ("B", b, a)
        parts.append(f"{name} ends at step {span.last}, the other {_end_of(other)}")
    return f"equal as far as both go: {'; '.join(parts)}"


def _end_of(span: Span) -> str:
    return f"at step {span.last}, where it finished" if span.is_finished else f"at step {span.last}"


def _equal_part(comparison: Comparison) -> str:
    last, weights_at = comparison.equal_through, comparison.weights_equal_at
    if last is None:
        return "nothing before is equal: it is the first step that both have"
    told = f"equal through step {last}, from step {comparison.first} on"
    if weights_at is None:
        return f"{told}; no weights were compared"
    return f"{told}; weights compared last at step {weights_at}"


def _text(difference: Difference) -> str:
    return f"{difference.component} {_value(difference.a)} in A, {_value(difference.b)} in B"


def _value(value: Any) -> str:
    return "nothing" if value is None else str(value)
