"""Which exceptions are the user's to mend: those end a command with status 2 and one line, others with a traceback."""

from __future__ import annotations

import re

# The form of every error that dynskip's own checks raise: `<function>: <argument> must <requirement>, got <actual>.`
# An exception of the same type from a bug, ours or a library's, does not have it and keeps its traceback.
_OWN_FORM = re.compile(r"[A-Za-z_][\w.]*: .+( must |, got ).+", re.DOTALL)
_CHECKED_TYPES = (ValueError, TypeError, RuntimeError, MemoryError, ImportError)


class UserError(Exception):
    """A mistake in what the user asked of the command line; its text is the whole message."""


def user_message(error: BaseException) -> str | None:
    """One line for the user if ``error`` is theirs to mend, else None.

    Theirs are UserError, every OSError (a file, a folder, a network that is not there) and what dynskip's checks raise.
    """
    text = str(error)
    own = isinstance(error, _CHECKED_TYPES) and _OWN_FORM.match(text) is not None
    if not (own or isinstance(error, UserError | OSError)):
        return None
    return " ".join(text.split()) or type(error).__name__
