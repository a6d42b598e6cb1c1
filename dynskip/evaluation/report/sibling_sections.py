"""What the report says of weights that were tuned for one budget each."""

from __future__ import annotations

from dynskip.evaluation.report import figures
from dynskip.evaluation.report.document import Block, Figure, Paragraph, Table
from dynskip.evaluation.report.evidence import detectable, direction
from dynskip.evaluation.report.likelihood_table import likelihoods
from dynskip.evaluation.report.numbers import MISSING, cell, number, signed
from dynskip.evaluation.report.rows import Row, Summary, families_of, find, select


def siblings(section: Row, summary: Summary) -> list[Block]:
    """Experiment 2 by the paper's protocol; nothing where no siblings were scored."""
    if not select(section, metric="nats"):
        return [Paragraph("Not run.")]
    families, budgets = families_of(section, metric="nats"), _budgets(section)
    names = [figures.FAMILIES.get(family, family) for family in families]
    shallower = [budget for budget in budgets if budget != summary["conditions"]["num_layers"]]
    others = _others(section)
    told = [figures.FAMILIES.get(family, family) for family in others]
    oracle = [
        [name, cell(section, "matching_budget", 2, family=family), cell(section, "gain", 4, family=family)]
        for family, name in zip(families, names, strict=True)
        if find(section, metric="matching_budget", family=family)
    ]
    by_oracle = [Table("An oracle by log-likelihood", ["weights", "matches full depth on", "gain"], oracle)]
    return [
        Paragraph(
            "The paper tunes at full depth and from there once for each budget. Siblings are such weights: each is "
            "scored along the one path that it was tuned for, beside others along the same path. What a path loses is "
            "told against full depth of the same weights: what tuning teaches at every depth is not in it, what else "
            "tells two tunings apart, their data and their loss, is."
        ),
        Figure(
            figures.siblings(section),
            "Minus the log-likelihood of a token of the reference, teacher-forced. Bars are 95 % intervals over "
            "sequences.",
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
            ["layers", *(text for name in told for text in (name, "verdict"))],
            [
                [str(budget), *(text for family in others for text in _difference(section, family, budget))]
                for budget in budgets
            ],
        ),
        Table(
            "What siblings lose against full depth, and how much more that is than what other weights lose",
            ["layers", "loss", "seen from", *(text for name in told for text in (f"beside {name}", "q"))],
            [
                [
                    str(budget),
                    *_loss(section, budget),
                    *(text for family in others for text in _beside(section, family, budget)),
                ]
                for budget in shallower
            ],
        ),
        *(by_oracle if oracle else []),
        *likelihoods(section),
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
    words = {-1: "less", 1: "more", 0: "neither more nor less, as far as seen,"}
    for family in _others(section):
        rows = select(section, metric=f"loss - loss of {family}")
        for sign, word in words.items():
            if own := [row for row in rows if _sign(row) == sign]:
                at = ", ".join(f"{row['budget']} ({signed(row, 3)})" for row in reversed(own))
                name = figures.FAMILIES.get(family, family)
                lines.append(f"Siblings lose {word} than {name}, by nats, at {at} layers.")
    return lines


def _others(section: Row) -> list[str]:
    """The families that siblings are held against."""
    return [family for family in figures.FAMILIES if select(section, metric=f"nats - {family}")]


def _sign(row: Row) -> int:
    return direction(row) if row.get("q") is not None and row["q"] < 0.05 else 0


def _budgets(section: Row) -> list[int]:
    return sorted({int(row["budget"]) for row in select(section, metric="nats", family="siblings")}, reverse=True)


def _difference(section: Row, family: str, budget: int) -> list[str]:
    row = find(section, metric=f"nats - {family}", budget=budget)
    return [MISSING] * 2 if row is None else [signed(row, 4), str(row["verdict"])]


def _loss(section: Row, budget: int) -> list[str]:
    row = find(section, metric="nats - full", family="siblings", budget=budget)
    return [MISSING] * 2 if row is None else [signed(row, 4), number(detectable(row), 4)]


def _beside(section: Row, family: str, budget: int) -> list[str]:
    row = find(section, metric=f"loss - loss of {family}", budget=budget)
    return [MISSING] * 2 if row is None else [signed(row, 4), number(row.get("q"))]
