"""``convert``: a checkpoint as one file, or as a folder with shards."""

from __future__ import annotations

import argparse

from helios.chkpt._cli._command import Command, Status, path_of
from helios.chkpt._cli._output import print_json
from helios.chkpt._places import printable


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=path_of, help="a .pth file, or a .dcp folder")
    parser.add_argument("target", metavar="DST", type=path_of, help="the other kind; must not be there yet")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: argparse.Namespace) -> Status:
    from helios.chkpt._sharded.convert import convert  # torch: seconds to import

    convert(arguments.source, arguments.target)
    if arguments.json:
        print_json({"source": str(arguments.source), "target": str(arguments.target)})
    else:
        print(f"{printable(str(arguments.source))} -> {printable(str(arguments.target))}")
    return Status.FINE


CONVERT = Command(
    "convert",
    "Make one file of a folder with shards, or a folder of a file.",
    "0 done, 1 SRC is damaged or no checkpoint, 2 wrong usage, or something cannot be read or written",
    _add_arguments,
    _run,
)
