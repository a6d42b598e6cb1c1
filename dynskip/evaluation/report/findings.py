"""Of each question the rows with intervals that answer it, and a verdict: what the opening of the report stands on."""

from __future__ import annotations

from dataclasses import dataclass

from dynskip.evaluation.report import claims
from dynskip.evaluation.report.evidence import direction, holm, p_value
from dynskip.evaluation.report.numbers import number
from dynskip.evaluation.report.rows import Row, bounds, families_of, select

# Controllers that read the prompt, once per sequence, and no hidden state.
_READ_THE_PROMPT = frozenset(("window", "attention-pool"))
# Of an oracle's gain what a choice among paths of one depth has: by metric the controls that say so, the first known.
_EQUAL_DEPTH = {
    "surviving_share": ("equal depth, greedy", "equal depth"),
    "surviving_share_nats": ("equal depth, greedy",),
}


@dataclass(frozen=True)
class Losses:
    """Paired differences to full depth along static paths of one family, by budget; by_nats: more is worse."""

    family: str
    by_nats: bool
    rows: list[Row]

    @property
    def signs(self) -> list[int]:
        """By row 1 where a path scores better than full depth, -1 where worse, 0 where that is open."""
        return [-direction(row) if self.by_nats else direction(row) for row in self.rows]


def losses(section: Row, num_layers: int | None) -> Losses | None:
    """By log-likelihood where there is one, else by ROUGE-L; of weights per budget where there are any: the paper's."""
    for metric in ("nats - full", "rouge_l - full"):
        families = families_of(section, metric=metric)
        for family in ("siblings", "paths", *families):
            rows = [
                row
                for row in select(section, metric=metric, family=family)
                if row["budget"] != num_layers and bounds(row) is not None
            ]
            if rows:
                return Losses(family, metric.startswith("nats"), sorted(rows, key=lambda row: int(row["budget"])))
    return None


class AgainstFixed:
    """Controllers that read hidden states against fixed-input ones at as many layers: one verdict for all of them.

    verdict: ``"better"`` where any comparison is; ``"untested"`` where each is, or there is none; ``"worse"`` where all
    that were tests are; else ``"open"``. row: the clearest comparison of that verdict, None where none has an interval.
    num: how many comparisons were tests, or all where none was; num_all: how many there are. reasons: by name why what
    is untested is. by_nats: whether they are those by log-likelihood, which go first.
    """

    def __init__(self, section: Row) -> None:
        found = claims.Controllers(section)
        rows = [row for row in found.recipes if row.get("kind") not in _READ_THE_PROMPT]
        by_nats = [row for row in rows if row["metric"].endswith("_nats")]
        self.by_nats = bool(by_nats)
        self.reasons = found.reasons
        if found.recipes:
            verdicts = [(row, str(row["verdict"])) for row in by_nats or rows]
        else:
            named = set(found.names) if found.verdict == "tested" else set()
            singles = [
                row
                for row in select(section, metric="over_fixed")
                if row.get("kind") not in _READ_THE_PROMPT | {"fixed"}
            ]
            adjusted = holm([1.0 if (p := p_value(row)) is None else p for row in singles])
            signs = {1: "better", -1: "worse", 0: "open"}
            verdicts = [
                (row, signs[direction(row) if p < 0.05 else 0] if row["controller"] in named else "untested")
                for row, p in zip(singles, adjusted, strict=True)
            ]
        tested = [pair for pair in verdicts if pair[1] != "untested"]
        self.num, self.num_all = len(tested or verdicts), len(verdicts)
        told = {verdict for _, verdict in tested}
        self.verdict = (
            "better" if "better" in told else "untested" if not told else "worse" if told == {"worse"} else "open"
        )
        known = [row for row, verdict in verdicts if verdict == self.verdict and bounds(row) is not None]
        known.sort(key=lambda row: (1.0 if (p := p_value(row)) is None else p, -abs(row["value"])))
        self.row: Row | None = known[0] if known else None


def still_moving(row: Row) -> str:
    """How far the losses behind the comparison of a recipe still moved at the end; nothing where that is not known."""
    if row.get("moved") is None or row.get("moved_single") is None:
        return ""
    return (
        f"at the end the losses of these recipes still moved by {number(row['moved'])} at most, one training's by "
        f"{number(row['moved_single'])}"
    )


def paths_of_one_depth(row: Row) -> str:
    """What a control of one depth chooses among: the paths that its greedy texts ran are alike."""
    return "paths of one depth" + (", near neighbours," if row["control"] == "equal depth, greedy" else "")


def equal_depth(section: Row) -> list[Row]:
    """What a choice among as many paths of one depth has of an oracle's gain: by ROUGE-L and by log-likelihood."""
    found = []
    for metric, controls in _EQUAL_DEPTH.items():
        rows = [
            row
            for family in families_of(section, metric=metric)
            for control in controls
            for row in select(section, metric=metric, family=family, control=control)
            if bounds(row) is not None
        ]
        found += rows[:1]
    return found


@dataclass(frozen=True)
class BestRouter:
    """The share of the oracle's gain that the best of ``num`` routers captures. gains: after Holm's correction."""

    row: Row
    num: int
    gains: bool


def best_router(section: Row) -> BestRouter | None:
    """By log-likelihood, of those that learned from most prompts, where there are any; else by ROUGE-L."""
    for metric in ("captured_share_nats", "captured_share"):
        for family in families_of(section, metric=metric):
            routers = claims.RoutersInNats if metric.endswith("_nats") else claims.Routers
            found = routers(section, family)
            known = [row for row in found.shares if bounds(row) is not None]
            if found.best is not None and found.best in known:
                adjusted = holm([1.0 if (p := p_value(row)) is None else p for row in known])
                gains = direction(found.best) > 0 and adjusted[known.index(found.best)] < 0.05
                return BestRouter(found.best, len(known), gains)
    return None
