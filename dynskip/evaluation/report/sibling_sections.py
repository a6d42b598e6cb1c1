"""What the report says of weights that were tuned for one budget each."""

from __future__ import annotations

from collections.abc import Callable

from dynskip.evaluation.report import figures
from dynskip.evaluation.report.document import Block, Figure, Paragraph, Table
from dynskip.evaluation.report.evidence import detectable, direction
from dynskip.evaluation.report.numbers import MISSING, cell, number, signed
from dynskip.evaluation.report.rows import Row, Summary, families_of, find, select

# What columns call the families.
_COLUMNS = {
    "siblings": "siblings",
    "untuned": "tuned at full depth only",
    "paths": "shared weights",
    "backbone": "before any tuning",
}


def siblings(section: Row, summary: Summary) -> list[Block]:
    """Experiment 2 by the paper's protocol."""
    families, budgets = families_of(section, metric="nats"), _budgets(section)
    shallower = [budget for budget in budgets if budget != summary["conditions"]["num_layers"]]
    others = _others(section)
    losers = [family for family in others if select(section, metric=f"loss - loss of {family}")]
    names, told, lost = ([_COLUMNS[family] for family in own] for own in (families, others, losers))
    trained = [note for note in section["notes"] if note.startswith("Siblings of ")]
    oracle = [
        [name, cell(section, "matching_budget", 2, family=family)]
        for family, name in zip(families, names, strict=True)
        if find(section, metric="matching_budget", family=family)
    ]
    return [
        Paragraph(
            "The paper tunes at full depth and from there once for each budget. Siblings are such weights: each is "
            "scored along the one path that it was tuned for, beside others along the same path: weights that were "
            "tuned at full depth only, one set of weights for all paths, and the weights before any tuning. What a "
            "path loses is told against full depth of the same tuning: a gain that is equal at every depth is not in "
            f"it; data, loss and rows of two tunings may still differ. {' '.join(trained)}".strip()
        ),
        Figure(
            figures.siblings(section),
            "Minus the log-likelihood of a token of the reference, teacher-forced. Bars are 95 % intervals over "
            "sequences. At full depth siblings are those that were tuned at full depth only.",
        ),
        Table(
            "Nats a token by budget",
            ["layers", *names],
            [
                [str(budget), *(cell(section, "nats", family=family, budget=budget) for family in families)]
                for budget in budgets
            ],
        ),
        Table(
            "Nats of siblings minus those of other weights along the same path, paired",
            ["layers", *(text for name in told for text in (f"minus {name}", "seen from", "verdict"))],
            [
                [str(budget), *(text for family in others for text in _difference(section, family, budget))]
                for budget in budgets
            ],
        ),
        Table(
            "Loss of siblings against full depth, and how much more that is than the loss of other weights",
            ["layers", "loss", *(text for name in lost for text in (f"minus that of {name}", "seen from", "q"))],
            [
                [
                    str(budget),
                    cell(section, "nats - full", family="siblings", budget=budget),
                    *(text for family in losers for text in _beside(section, family, budget)),
                ]
                for budget in shallower
            ],
        ),
        *(
            [Table("An oracle by log-likelihood", ["weights", "mean layers at which it matches full depth"], oracle)]
            if oracle
            else []
        ),
    ]


def siblings_sentences(section: Row, summary: Summary) -> list[str]:
    """What a budget's own weights are worth: their loss, and whether it is less than that of shared ones."""
    lines = []
    num_layers = summary["conditions"].get("num_layers")
    losses = [row for row in select(section, metric="nats - full", family="siblings") if row["budget"] != num_layers]
    if losses:
        told = ", ".join(f"{signed(row, 3)} at {row['budget']} layers" for row in reversed(losses))
        costs = "a token of the reference costs more nats than at full depth"
        lines.append(f"In weights tuned for one budget each, {costs}: {told}.")
    for family in _others(section):
        name = _OF[family]
        told = _told(select(section, metric=f"nats - {family}"), _verdict, ("better", "worse", "not told apart"))
        lines.append(f"Beside {name} along the same path, siblings are {told}, in nats.")
        if rows := select(section, metric=f"loss - loss of {family}"):
            told = _told(rows, _sign, ("less", "more", "no less or more"))
            lines.append(f"What siblings lose against full depth, in nats, beside what {name} lose: {told}.")
    return lines


_OF = {
    "untuned": "weights tuned at full depth only",
    "paths": "shared weights",
    "backbone": "the weights before any tuning",
}


def _told(rows: list[Row], sign: Callable[[Row], int | None], words: tuple[str, str, str]) -> str:
    """Where something is smaller, greater, neither, and (None) small enough to be none, deepest budgets first."""
    found = []
    for each, word in zip((-1, 1, 0, None), (*words, "within the margin"), strict=True):
        if own := [row for row in reversed(rows) if sign(row) == each]:
            budgets = ", ".join(f"{row['budget']} ({signed(row, 3)})" for row in own)
            found.append(f"{word} at {budgets} layers")
    return ", ".join(found)


def _verdict(row: Row) -> int | None:
    return None if row["verdict"] == "equivalent" else direction(row)


def _others(section: Row) -> list[str]:
    """The families that siblings are held against."""
    return [family for family in figures.FAMILIES if select(section, metric=f"nats - {family}")]


def _sign(row: Row) -> int:
    return direction(row) if row.get("q") is not None and row["q"] < 0.05 else 0


def _budgets(section: Row) -> list[int]:
    return sorted({int(row["budget"]) for row in select(section, metric="nats", family="siblings")}, reverse=True)


def _difference(section: Row, family: str, budget: int) -> list[str]:
    row = find(section, metric=f"nats - {family}", budget=budget)
    return [MISSING] * 3 if row is None else [signed(row, 4), number(detectable(row), 4), str(row["verdict"])]


def _beside(section: Row, family: str, budget: int) -> list[str]:
    row = find(section, metric=f"loss - loss of {family}", budget=budget)
    if row is None:
        return [MISSING] * 3
    q = row.get("q")
    return [signed(row, 4), number(detectable(row), 4), MISSING if q is None else "< 0.001" if q < 0.001 else number(q)]
