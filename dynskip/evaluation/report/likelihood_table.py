"""The rows of a section whose score is the log-likelihood of references, as one table."""

from __future__ import annotations

import re

from dynskip.evaluation.report.document import Block, Table
from dynskip.evaluation.report.numbers import MISSING, interval, number
from dynskip.evaluation.report.rows import Row, select

_BY_NATS = re.compile(r"(^|_)nats($| - )")
_NUMBERS = frozenset(("metric", "value", "low", "high", "detectable", "p", "q", "p_equivalent", "margin", "verdict"))
# Bins and task types are drawn, not listed; comparisons of recipes have a table of their own; skip rates are many.
_ELSEWHERE = ("binned_depth", "mean_depth", "over_fixed", "skip_rate")


def likelihoods(section: Row) -> list[Block]:
    """A table of all rows that are about log-likelihood, with the effect that each could have shown; none without."""
    rows = [
        row for row in select(section) if _BY_NATS.search(row["metric"]) and not row["metric"].startswith(_ELSEWHERE)
    ]
    if not rows:
        return []
    cells = [
        [row["metric"], _labels(row), interval(row, 4), number(row.get("detectable"), 4), _verdict(row)] for row in rows
    ]
    header = ["what", "of", "nats a token, or share", "seen from", "verdict, or q"]
    return [Table("By the log-likelihood of references", header, cells, folded=True)]


def _labels(row: Row) -> str:
    named = (f"{name} {value}" for name, value in row.items() if name not in _NUMBERS and value is not None)
    return ", ".join(named) or MISSING


def _verdict(row: Row) -> str:
    return str(row["verdict"]) if "verdict" in row else number(row.get("q"))
