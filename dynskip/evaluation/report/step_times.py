"""What a token takes along each path that a run has timed in a batch, whichever experiment timed it."""

from __future__ import annotations

from dynskip.evaluation.report.numbers import interval
from dynskip.evaluation.report.rows import Row, Summary, select

NOT_MEASURED = "not measured"


class StepTimes:
    """Milliseconds a token through the weights of all paths, by path, from the sections of ``summary``.

    header: of a column of them, with the sequences of the batch.
    """

    def __init__(self, summary: Summary) -> None:
        batch = summary["conditions"].get("timed_batch")
        self.header = "ms a token, batch" + ("" if batch is None else f" of {batch}")
        self._by_path: dict[str, Row] = {}
        for name in ("static", "oracle"):
            for row in select(summary.get(name) or {}, metric="ms_per_token", family="paths"):
                if row.get("path") is not None:
                    self._by_path.setdefault(row["path"], row)

    def cell(self, path: str | None) -> str:
        """The time along ``path`` with its interval, or that it was not measured."""
        row = None if path is None else self._by_path.get(path)
        return NOT_MEASURED if row is None else interval(row)
