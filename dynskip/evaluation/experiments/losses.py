"""What paths lose against full depth, by family of weights: paired differences, equivalence within a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynskip.evaluation.stats.decisions import equivalence
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap_mean
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.tasks.path_families import Member


@dataclass(frozen=True)
class Loss:
    """A paired difference with its interval, and the p of two one-sided tests that it lies within ``margin``."""

    interval: Interval
    p_equivalent: float
    margin: float

    @property
    def verdict(self) -> str:
        """equivalent where that is shown, else lower or higher where the interval leaves zero out, else open."""
        if self.p_equivalent < 0.05:
            return "equivalent"
        return "higher" if self.interval.low > 0 else "lower" if self.interval.high < 0 else "open"

    def row_of(self, metric: str, labels: dict[str, Any]) -> dict[str, Any]:
        """As a row of a summary."""
        found = {"margin": self.margin, "p_equivalent": round(self.p_equivalent, 6), "verdict": self.verdict}
        return self.interval.row(metric=metric, **labels, **found)


def paired_loss(differences: Floats, weights: Floats | None, margin: float, resamples: int) -> Loss:
    """The mean of ``differences`` [N], weighted by ``weights`` [N] where given."""
    interval = bootstrap_mean(differences, weights, resamples=resamples)
    return Loss(interval, equivalence(differences, margin, weights), margin)


def score_rows(
    setup: Setup,
    metric: str,
    table: Floats,
    weights: Floats | None,
    margin: float,
    family: str,
    members: Sequence[Member],
) -> list[dict[str, Any]]:
    """The means of ``table`` [N, K] by budget, and the paired differences to the last column, full depth."""
    rows = []
    means = bootstrap_mean(table, weights, resamples=setup.resamples)
    for column, member in enumerate(members):
        labels = {"family": family, "budget": member.budget, "path": member.path}
        rows.append(means.at(column).row(metric=metric, **labels))
        difference = table[:, column] - table[:, -1]
        rows.append(paired_loss(difference, weights, margin, setup.resamples).row_of(f"{metric} - full", labels))
    return rows
