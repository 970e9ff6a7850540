"""The command line, but for `migrate`, which is above this package: `helios.chkpt_migrator` puts all together."""

from helios.chkpt._cli._command import Command, Status, main, path_of
from helios.chkpt._cli._convert import CONVERT
from helios.chkpt._cli._diff import DIFF
from helios.chkpt._cli._inspect import INSPECT
from helios.chkpt._cli._ls import LS
from helios.chkpt._cli._output import Column, plural, print_json, print_table
from helios.chkpt._cli._prune import PRUNE
from helios.chkpt._cli._verify import VERIFY

__all__ = [
    "CONVERT",
    "DIFF",
    "INSPECT",
    "LS",
    "PRUNE",
    "VERIFY",
    "Column",
    "Command",
    "Status",
    "main",
    "path_of",
    "plural",
    "print_json",
    "print_table",
]
