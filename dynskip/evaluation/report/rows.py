"""Reading a summary: the rows of a section by their labels, and numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MISSING = "–"


def select(section: Row, **labels: Any) -> list[Row]:
    """The rows of ``section`` that carry all ``labels``, in order; rows without a value are left out."""
    return [
        row
        for row in section.get("rows", ())
        if row.get("value") is not None and all(row.get(name) == wanted for name, wanted in labels.items())
    ]


def find(section: Row, **labels: Any) -> Row | None:
    """The first row with ``labels``, or None."""
    found = select(section, **labels)
    return found[0] if found else None


def distinct(rows: Sequence[Row], label: str) -> list[Any]:
    """The values of ``label`` in the order in which they come, each once; None where a row lacks it is left out."""
    return list(dict.fromkeys(row[label] for row in rows if row.get(label) is not None))


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and a true minus, or a dash for none."""
    if value is None:
        return MISSING
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def interval(row: Row | None, digits: int = 3) -> str:
    """The value of ``row`` and its interval in brackets, where it has one."""
    if row is None or row.get("value") is None:
        return MISSING
    value = number(row["value"], digits)
    if row.get("low") is None or row.get("high") is None:
        return value
    return f"{value} [{number(row['low'], digits)}, {number(row['high'], digits)}]"


def percent(row: Row | None, digits: int = 0) -> str:
    """The same of a share, in percent."""
    if row is None or row.get("value") is None:
        return MISSING
    value = f"{number(100 * row['value'], digits)} %"
    if row.get("low") is None or row.get("high") is None:
        return value
    return f"{value} [{number(100 * row['low'], digits)} %, {number(100 * row['high'], digits)} %]"


def signed(row: Row | None, digits: int = 3) -> str:
    """The same of a difference, a plus in front of what is above zero."""
    if row is None or row.get("value") is None:
        return MISSING
    if row.get("low") is None or row.get("high") is None:
        return _signed(row["value"], digits)
    return f"{_signed(row['value'], digits)} [{_signed(row['low'], digits)}, {_signed(row['high'], digits)}]"


def _signed(value: float, digits: int) -> str:
    text = number(value, digits)
    return text if value <= 0 or not float(text) else f"+{text}"
