"""The command line: ``dynskip <command>`` and ``python -m dynskip <command>``.

A command is a module of this package, named in ``COMMANDS``: texts ``HELP``, ``DESCRIPTION`` and ``EXAMPLES``, and
functions ``add_options(parser)`` and ``run(args) -> int``. It imports torch and the like inside ``run``, so that
``dynskip --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dynskip.cli import streams
from dynskip.cli.options import user_message
from dynskip.version import __version__

COMMANDS = (
    "bench",
    "calibrate",
    "demo",
    "eval",
    "generate",
    "info",
    "lm_eval",
    "report",
    "search",
    "serve",
    "simulate",
    "train",
    "tune",
    "validate",
)

USER_MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EXAMPLES = """examples:
  dynskip generate --path uniform:8 "The lighthouse keeper"
  dynskip generate --path full --path uniform:8 "Once upon a time" "The recipe calls for"
  dynskip info
  dynskip generate --help        each command has its own help and examples
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after one line on stderr."""
        self.exit(USER_MISTAKE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The parser of ``dynskip`` with all its commands."""
    parser = Parser(
        prog="dynskip",
        description="Run a batch of sequences through one decoder, each along its own subset of the layers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dynskip {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error arose, not only its message")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"dynskip.cli.{name}")
        command.add_options(
            subparsers.add_parser(
                name,
                help=command.HELP,
                description=command.DESCRIPTION,
                epilog=command.EXAMPLES,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: the command's own, 2 after a mistake of the user's (one line on stderr), 130 after Ctrl-C."""
    name, traces = "dynskip", False
    try:
        streams.prepare()
        try:
            args = build_parser().parse_args(argv)
        except SystemExit as stop:  # argparse leaves this way, after --help with 0 and after a mistake with 2
            status = int(stop.code or 0)
        else:
            name, traces = f"dynskip {args.command}", args.traceback
            status = importlib.import_module(f"dynskip.cli.{args.command}").run(args)
        streams.flush()
        return status
    except BrokenPipeError:
        streams.abandon_stdout()  # its reader, `head` for one, has seen enough
        return 0
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        if traces:
            traceback.print_exc()
        print(f"{name}: error: {message}", file=sys.stderr)
        streams.settle()
        return USER_MISTAKE
