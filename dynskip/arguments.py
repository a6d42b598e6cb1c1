"""What callers pass, as Python's own: integers, numbers and token ids of numpy, torch or Python."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

# The form of every error that dynskip's own checks raise: `<function>: <argument> must <requirement>, got <actual>.`
# An exception of the same type from a bug, ours or a library's, does not have it and keeps its traceback.
_OWN_FORM = re.compile(r"[A-Za-z_][\w.]*: .+( must |, got ).+", re.DOTALL)
_CHECKED_TYPES = (ValueError, TypeError, RuntimeError, MemoryError, ImportError)
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def as_int(value: object) -> int | None:
    """The integer that ``value`` is, of Python, numpy or torch; None for all else, truth values among it."""
    if type(value) is int:
        return value
    if isinstance(value, int):
        return None if isinstance(value, bool) else int(value)
    scalar = _scalar(value)
    return scalar if type(scalar) is int else None


def as_float(value: object) -> float | None:
    """The number that ``value`` is, of Python, numpy or torch, as a float; None for all else, truth values among it.

    NaN and infinity pass; an integer beyond all floats is infinity.
    """
    if not isinstance(value, int | float):
        value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def as_token_ids(value: object) -> list[int] | None:
    """A new list of the integers of a sequence, or of a one-dimensional array or tensor; None for all else."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return None
    if is_array(value, 1):
        value = value.tolist()  # type: ignore[attr-defined]  # arrays and tensors have it
    if not isinstance(value, Sequence):
        return None
    if all(type(token) is int for token in value):
        return list(value)
    tokens = [as_int(token) for token in value]
    return None if None in tokens else tokens  # type: ignore[return-value]  # no None among them


def is_array(value: object, num_dims: int) -> bool:
    """Whether ``value`` is an array or a tensor of ``num_dims`` dimensions, of whatever library."""
    return getattr(value, "ndim", None) == num_dims and hasattr(value, "tolist")


def is_unicode(text: str) -> bool:
    """Whether ``text`` is characters only: a lone surrogate, as from bytes that are no UTF-8, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """``value`` as an error shows it: on one line, and cut where it is long."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"{type(value).__name__} of very many digits"
    return " ".join(text.split())


def is_own_error(error: BaseException) -> bool:
    """Whether ``error`` is one that dynskip's own checks of arguments raise."""
    return isinstance(error, _CHECKED_TYPES) and _OWN_FORM.match(str(error)) is not None


def _scalar(value: Any) -> object:
    """The Python number in a scalar of numpy, or in an array or tensor without dimensions; else ``value``."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
