"""``diff``: what differs in two checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from helios.chkpt._cli._command import Command, Status, path_of, print_error
from helios.chkpt._cli._output import Column, plural, print_json, print_table
from helios.chkpt._comparison import Difference, diff
from helios.chkpt._errors import CheckpointError

_COLUMNS = (Column("PLACE", shrinks=True), Column("DIFFERENCE"), Column("A -> B", shrinks=True))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", type=path_of, help="a .pth file, or a .dcp folder")
    parser.add_argument("b", metavar="B", type=path_of, help="another")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> Status:
    try:
        differences = diff(arguments.a, arguments.b)
    except CheckpointError as error:  # not 1, which says that they differ
        print_error("helios-chkpt diff", error)
        return Status.UNUSABLE
    if arguments.json:
        print_json([_as_json(difference) for difference in differences])
    else:
        _print(differences)
    return Status.BAD if differences else Status.FINE


def _print(differences: Sequence[Difference]) -> None:
    if not differences:
        print("no difference")
        return
    print_table(_COLUMNS, [[d.path, d.kind.value, d.detail] for d in differences])
    print()
    print(plural(len(differences), "difference"))


def _as_json(difference: Difference) -> dict[str, object]:
    return {
        "path": difference.path,
        "difference": difference.kind.value,
        "a": difference.a,
        "b": difference.b,
        "elements": difference.num_elements,
        "differing": difference.num_differing,
        "max_abs": difference.max_abs,
        "nan": difference.num_nan,
    }


DIFF = Command(
    "diff",
    "Say what differs in two checkpoints, down to the elements of tensors, bit by bit.",
    "0 nothing differs, 1 something does, 2 wrong usage, or one cannot be read or is damaged",
    _add_arguments,
    _run,
)
