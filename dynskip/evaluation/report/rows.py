"""Reading a summary: the rows of a section by their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Summary = Mapping[str, Any]
# A metric of each section that only texts have.
_OF_TEXTS = frozenset(("rouge_l", "mean", "spearman"))


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


def score_suffix(section: Row) -> str:
    """What metrics end in by the score that a section is about: texts where there are any, else references."""
    metrics = {row["metric"] for row in section.get("rows", ())}
    return "" if metrics & _OF_TEXTS or not any(metric.endswith("_nats") for metric in metrics) else "_nats"


def bounds(row: Row) -> tuple[float, float] | None:
    """The ends of the interval of ``row``, None without one."""
    low, high = row.get("low"), row.get("high")
    return None if low is None or high is None else (low, high)


def mapped(row: Row, function: Callable[[float], float]) -> dict[str, Any]:
    """``row`` with a monotone ``function`` of its value and of the ends of its interval."""
    ends = bounds(row)
    low, high = (None, None) if ends is None else sorted(map(function, ends))
    return {**row, "value": function(row["value"]), "low": low, "high": high}
