"""What commands have in common: arguments, exit statuses, and how they end when nobody listens any more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from helios.chkpt._errors import CheckpointError
from helios.chkpt._places import printable
from helios.chkpt._version import __version__


class Status(IntEnum):
    """Exit statuses."""

    FINE = 0
    BAD = 1
    UNUSABLE = 2
    INTERRUPTED = 130  # as a shell says for SIGINT
    CUT_OFF = 141  # and for SIGPIPE


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: what is typed.
        summary: one line.
        statuses: what its exit statuses 0, 1 and 2 mean.
        add_arguments: adds its arguments to its parser.
        run: does it, and returns the exit status.
    """

    name: str
    summary: str
    statuses: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Status]


def main(prog: str, commands: Sequence[Command], arguments: Sequence[str] | None = None) -> int:
    """Run one of several commands and return the exit status. What is wrong with files is said on stderr.

    Args:
        prog: name of the program, for messages.
        commands: the subcommands; if there is only one, `prog` is it, and its name is not typed.
        arguments: None for those of the process.
    """
    _open_streams()
    if hasattr(sys.stdout, "reconfigure"):  # names of files may hold what a terminal's encoding cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run(_parser(prog, commands), arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it exits, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Status.CUT_OFF
    except OSError as error:
        print_error(prog, error)
        return Status.UNUSABLE
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return Status.INTERRUPTED
    return status


def _open_streams() -> None:
    """Open what the caller closed (``>&-``): else a checkpoint would get its number, and what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # until the process ends


def path_of(text: str) -> Path:
    """The path that an argument is: not an empty one, which a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected the path of a file or folder, got ''")
    return Path(text)


def print_error(prog: str, error: Exception) -> None:
    """Say on stderr what went wrong, in a line."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    print(f"{prog}: {printable(text)}", file=sys.stderr)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    try:
        parsed = parser.parse_args(arguments)
        return int(parsed.command.run(parsed))
    except SystemExit as end:  # argparse, after a help or a wrong argument
        return end.code if isinstance(end.code, int) else Status.FINE
    except BrokenPipeError:
        raise
    except CheckpointError as error:
        print_error(parser.prog, error)
        return Status.BAD
    except (OSError, ValueError) as error:
        print_error(parser.prog, error)
        return Status.UNUSABLE


def _parser(prog: str, commands: Sequence[Command]) -> argparse.ArgumentParser:
    if len(commands) == 1:
        (command,) = commands
        parser = argparse.ArgumentParser(prog, description=command.summary, epilog=_epilog(command))
        _set_up(parser, command)
        return parser
    parser = argparse.ArgumentParser(
        prog,
        description="Look at checkpoints, compare, check, migrate and delete them.",
        epilog="Exit statuses: 0 fine, 1 something differs or is bad, 2 wrong usage or nothing that could be read, "
        "130 interrupted, 141 nobody read the output to its end. Each COMMAND has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"helios-chkpt {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary, epilog=_epilog(command)
        )
        _set_up(subparser, command)
    return parser


def _set_up(parser: argparse.ArgumentParser, command: Command) -> None:
    command.add_arguments(parser)
    parser.set_defaults(command=command)


def _epilog(command: Command) -> str:
    return f"Exit statuses: {command.statuses}; 130 interrupted, 141 nobody read the output to its end."
