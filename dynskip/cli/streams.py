"""Standard input and output, whatever they are: closed, broken, or of an encoding that has not every character."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from io import TextIOWrapper

from dynskip.cli.options import UserError


def prepare() -> None:
    """Make the standard streams fit for any text; raises UserError where there is no stdout.

    What an encoding has not is written as an escape. Without stderr its text goes nowhere.
    """
    if sys.stderr is None:  # else what is meant for it would go to stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        raise UserError("stdout must be open, got none. Redirect it to a file or to /dev/null")


def read_stdin() -> str:
    """All of stdin; raises UserError where it is closed or a terminal, UnicodeDecodeError where it is no text."""
    if sys.stdin is None:
        raise UserError(
            "stdin must be open where prompts are to be read from it, got none. Give a prompt as an argument"
        )
    if sys.stdin.isatty():
        raise UserError("a prompt must be given: as an argument, in --file, or on stdin")
    if isinstance(sys.stdin, TextIOWrapper):
        # ASCII is the encoding of a locale that says nothing, and a part of UTF-8.
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="strict")
    return sys.stdin.read()


def writes_unicode() -> bool:
    """Whether stdout has every character, so that none is written as an escape."""
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf")


def flush() -> None:
    """Write what stdout still holds. Raises OSError where that fails; stdout goes nowhere from then on."""
    try:
        sys.stdout.flush()
    except OSError:
        abandon_stdout()
        raise


def settle() -> None:
    """Write what stdout still holds if it can be written: an error has been reported already."""
    with contextlib.suppress(OSError):
        if sys.stdout is not None:
            flush()


def abandon_stdout() -> None:
    """Send stdout nowhere: else Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
