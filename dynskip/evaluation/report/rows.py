"""Reading a summary: the rows of a section by their labels, and numbers as a reader wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Summary = Mapping[str, Any]
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


def families_of(section: Row, **labels: Any) -> list[str]:
    """The families that a section has rows of."""
    return distinct(select(section, **labels), "family")


def curves_of(section: Row, family: str) -> dict[str, Row]:
    """The curves of a family by name."""
    return {curve["name"]: curve for curve in section.get("curves", ()) if curve["family"] == family}


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and a true minus, or a dash for none."""
    if value is None:
        return MISSING
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def bounds(row: Row) -> tuple[float, float] | None:
    """The ends of the interval of ``row``, None without one."""
    low, high = row.get("low"), row.get("high")
    return None if low is None or high is None else (low, high)


def interval(row: Row | None, digits: int = 3) -> str:
    """The value of ``row`` and its interval in brackets, where it has one."""
    return _written(row, lambda value: number(value, digits))


def percent(row: Row | None, digits: int = 0) -> str:
    """The same of a share, in percent."""
    return _written(row, lambda value: f"{number(100 * value, digits)} %")


def signed(row: Row | None, digits: int = 3) -> str:
    """The same of a difference, a plus in front of what is above zero."""
    return _written(row, lambda value: _signed(value, digits))


def cell(section: Row, metric: str, digits: int = 3, **labels: Any) -> str:
    """The value and the interval of the first row of ``metric`` with ``labels``, or a dash."""
    return interval(find(section, metric=metric, **labels), digits)


def _written(row: Row | None, text: Callable[[float], str]) -> str:
    if row is None or row.get("value") is None:
        return MISSING
    value, ends = text(row["value"]), bounds(row)
    return value if ends is None else f"{value} [{text(ends[0])}, {text(ends[1])}]"


def _signed(value: float, digits: int) -> str:
    text = number(value, digits)
    return text if value <= 0 or not float(text) else f"+{text}"
