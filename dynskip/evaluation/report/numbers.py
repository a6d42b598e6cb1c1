"""The numbers of rows as a reader wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dynskip.evaluation.report.rows import Row, bounds, find

MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and a true minus, or a dash for none."""
    if value is None:
        return MISSING
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def interval(row: Row | None, digits: int = 3) -> str:
    """The value of ``row`` and its interval in brackets, where it has one."""
    return _written(row, lambda value: number(value, digits))


def percent(row: Row | None, digits: int = 0) -> str:
    """The same of a share, in percent."""
    return _written(row, lambda value: f"{number(100 * value, digits)} %")


def signed(row: Row | None, digits: int = 3) -> str:
    """The same of a difference, a plus in front of what is above zero."""
    return _written(row, lambda value: _signed(value, digits))


def listed(things: Sequence[Any]) -> str:
    """``things`` in a row with commas, or a dash for none."""
    return ", ".join(map(str, things)) or MISSING


def cell(section: Row, metric: str, digits: int = 3, **labels: Any) -> str:
    """The value and the interval of the first row of ``metric`` with ``labels``, or a dash."""
    return interval(find(section, metric=metric, **labels), digits)


def _written(row: Row | None, text: Callable[[float], str]) -> str:
    if row is None or row.get("value") is None:
        return MISSING
    value, ends = text(row["value"]), bounds(row)
    if ends is None and row.get("low") is not None and row.get("never"):
        return f"{value} [{text(row['low'])}, ∞)"  # so many resamples never reach the target
    return value if ends is None else f"{value} [{text(ends[0])}, {text(ends[1])}]"


def _signed(value: float, digits: int) -> str:
    text = number(value, digits)
    return text if value <= 0 or not float(text) else f"+{text}"
