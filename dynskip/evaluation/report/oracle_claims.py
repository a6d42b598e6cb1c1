"""What the rows on the oracle, its stand-ins and its depths carry, as numbers and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.evidence import ceiling, direction, holm, kept_by_means, luck, negated, p_value
from dynskip.evaluation.report.rows import Row, Summary, curves_of, find, select
from dynskip.evaluation.stats.knapsack import smallest_budgets
from dynskip.evaluation.stats.oracle_controls import NullModel

GRID_STEPS = 500  # mean budgets of the paper's oracle: 0.04 layers of 24
NEAR_FLOOR = 0.1  # of the way from the cheapest path to full depth: below it a budget is near the cheapest path
SAME_DEPTH = 0.05  # a router whose mean is this near to the cheapest path's layers has chosen next to nothing
YARDSTICKS = frozenset(("full_rouge_l",))  # correlations that no question is asked of


@dataclass(frozen=True)
class PaperNull:
    """The null model on the paper's own four means: its noise, where it matches full depth, its best up to a depth."""

    sd: float
    matching_share: float
    best_up_to: Mapping[int, float]


@cache
def paper_null() -> PaperNull:
    """The null model fitted to the mean of the best that the paper reports."""
    costs, means = tuple(paper.STATIC_ROUGE_L), tuple(paper.STATIC_ROUGE_L.values())
    model = NullModel.fitted(means, costs, paper.BEST_UP_TO[paper.NUM_LAYERS])
    matching = model.matching_budget(means[-1], np.linspace(costs[0], costs[-1], GRID_STEPS + 1))
    best = np.maximum.accumulate(model.scores(), axis=1).mean(0)
    return PaperNull(model.sd, matching / paper.NUM_LAYERS, dict(zip(costs, best.tolist(), strict=True)))


@dataclass(frozen=True)
class Floor:
    """How near the oracle's matching budget lies to the cheapest path, below which nothing can be chosen.

    lead: full depth minus the cheapest path, paired where the section ``static`` has the difference.
    """

    cheapest: int
    num_layers: int
    matching: Row
    lead: Row
    num_cheapest: int | None
    num_seqs: int | None

    @property
    def share(self) -> float:
        """The cheapest path's share of the layers."""
        return self.cheapest / self.num_layers

    @property
    def near(self) -> bool:
        """Whether the matching budget is near the floor."""
        way = self.num_layers - self.cheapest
        return bool(self.matching["value"] - self.cheapest < NEAR_FLOOR * way)


def floor(summary: Summary, family: str) -> Floor | None:
    """The floor of a family's oracle; None where it never matches full depth."""
    section, num_layers = summary["oracle"], summary["conditions"]["num_layers"]
    matching = find(section, metric="matching_budget", family=family, control="oracle")
    means = sorted(select(section, metric="mean", family=family), key=lambda row: row["budget"])
    if matching is None or len(means) < 2:
        return None
    cheapest = means[0]["budget"]
    loss = find(summary.get("static") or {}, metric="rouge_l - full", family=family, budget=cheapest)
    lead = {"value": means[-1]["value"] - means[0]["value"]} if loss is None else negated(loss)
    counts: Mapping[str, int] = next(
        (each["counts"] for each in section.get("histogram", ()) if each["family"] == family), {}
    )
    num_cheapest = counts.get(str(cheapest)) if counts else None
    return Floor(cheapest, num_layers, matching, lead, num_cheapest, sum(counts.values()) if counts else None)


@dataclass(frozen=True)
class Matching:
    """Where choices match full depth, those together that are scored on texts of one kind; None: nowhere, or unknown.

    oracle, null: on greedy texts. sampled_oracle, equal_depth: on sampled ones.
    """

    oracle: Row | None
    null: Row | None
    sampled_oracle: float | None
    equal_depth: Row | None


def matching(section: Row, family: str) -> Matching:
    """The matching budgets of a family; that of the oracle on sampled texts is read off its curve."""
    rows = {
        name: find(section, metric="matching_budget", family=family, control=name)
        for name in ("oracle", "null", "equal depth")
    }
    means = sorted(select(section, metric="mean_sampled", family=family), key=lambda row: row["budget"])
    curve = curves_of(section, family).get("in-sample")
    sampled = None
    if curve is not None and means:
        values, target = np.array([curve["values"]]), np.array([means[-1]["value"]])
        found = float(smallest_budgets(np.array(curve["budgets"]), values, target)[0])
        sampled = found if np.isfinite(found) else None
    return Matching(rows["oracle"], rows["null"], sampled, rows["equal depth"])


@dataclass(frozen=True)
class Surviving:
    """What survives of the oracle's gain at one mean budget, and what the same data allow a better choice.

    share: of the gain on one draw, on another. ceiling: what a choice by expected scores would keep; empty where the
    share's interval holds zero, it holds zero too. luck: what a choice on noise alone would show by the same reasoning,
    beside the measured equal_depth; room: the largest ceiling that equal_depth leaves. by_means, expected_by_means:
    measured and expected of a choice on the mean of half of the draws.
    """

    family: str
    at: float
    share: Row
    ceiling: Row
    luck: Row
    equal_depth: Row | None
    room: float | None
    by_means: Row | None
    expected_by_means: Row
    greedy: Row | None

    @property
    def none_known(self) -> bool:
        """Whether the share's interval holds zero or lies below it, so that nothing need survive."""
        return direction(self.share) <= 0


def surviving(section: Row, family: str) -> Surviving | None:
    """What survives at a third of the depth, or the next larger part at which the family leaves a choice."""
    for place in ("third", "half", "full"):
        at = {"metric": "surviving_share", "family": family, "place": place}
        share = find(section, control="cross-fitted", **at)
        if share is None:
            continue
        equal = find(section, control="equal depth", **at)
        room = None
        if equal is not None and equal.get("low") is not None:
            room = (1 - min(1.0, max(0.0, equal["low"])) ** 2) ** 0.5
        return Surviving(
            family,
            share["at"],
            share,
            ceiling(share),
            luck(share),
            equal,
            room,
            find(section, control="cross-fitted means", **at),
            kept_by_means(share, max(1, section.get("draws", 2) // 2)),
            find(section, control="cross-fitted greedy", **at),
        )
    return None


@dataclass(frozen=True)
class Routers:
    """The prompt-only routers of one family. shares: what each captures; the others' choice leaves none to capture.

    above: how many gain with an interval above zero. num_shallow: how many run next to no layer more than the cheapest
    path. best: the share of the one that gains most.
    """

    family: str
    gains: Sequence[Row]
    shares: Sequence[Row]
    above: int
    num_shallow: int
    best: Row | None


def routers(section: Row, family: str) -> Routers:
    """The routers of a family."""
    gains = select(section, metric="gain", family=family)
    shares = select(section, metric="captured_share", family=family)
    layers = {(row["predictor"], row["at"]): row["value"] for row in select(section, metric="layers", family=family)}
    cheapest = min(layers.values(), default=0.0)
    by_gain = {(row["predictor"], row["at"]): row["value"] for row in gains}
    known = [row for row in shares if (row["predictor"], row["at"]) in by_gain]
    best = max(known, key=lambda row: by_gain[row["predictor"], row["at"]], default=None)
    return Routers(
        family,
        gains,
        shares,
        sum(direction(row) > 0 for row in gains),
        sum(value <= cheapest + SAME_DEPTH for value in layers.values()),
        best,
    )


@dataclass(frozen=True)
class Correlations:
    """Rank correlations of the chosen depth: every one that was looked at, with its p-value adjusted by Holm."""

    rows: Sequence[Row]
    adjusted: Sequence[float]

    @property
    def clear(self) -> list[Row]:
        """Those with an interval that leaves zero out."""
        return [row for row in self.rows if direction(row)]

    @property
    def kept(self) -> list[Row]:
        """Those that stay after the correction."""
        return [row for row, p in zip(self.rows, self.adjusted, strict=True) if p < 0.05]


def correlations(section: Row) -> Correlations:
    """All rank correlations of a section, over families, budgets and features; yardsticks left out."""
    rows = [row for row in select(section, metric="spearman") if row["feature"] not in YARDSTICKS]
    known = [(row, p) for row in rows if (p := p_value(row)) is not None]
    return Correlations([row for row, _ in known], holm([p for _, p in known]))
