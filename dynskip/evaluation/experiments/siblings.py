"""Weights tuned for one budget each, beside one set of weights for all paths (arXiv 2410.20022, section 4).

The paper fine-tunes at full depth first and from there once for each budget. Is a path better in weights of its own
than in shared ones, and does it lose less against full depth tuned the same way? References are scored and nothing is
generated: once that is done the weights may go.
"""

from __future__ import annotations

from typing import Any

from dynskip.evaluation.experiments.losses import paired_loss, score_rows
from dynskip.evaluation.stats.decisions import false_discovery, mean_p
from dynskip.evaluation.stats.intervals import Floats, bootstrap_mean
from dynskip.evaluation.stats.oracle_controls import OracleScores
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.likelihoods import member_items, member_likelihoods
from dynskip.evaluation.tasks.path_families import DESCRIPTIONS, Member, families

SIBLINGS = "siblings"
# The families that siblings are held against, along the same paths.
OTHERS = ("untuned", "paths", "backbone")


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: references along each sibling's path through its own weights, and through those of others."""
    return [item for members in _families(setup).values() for item in member_items(setup, members)]


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section; without rows where the setup names no siblings, or none of full depth."""
    found = _families(setup)
    if not found:
        given = (
            "No siblings of full depth and of another of the budgets were given: name folders with --sibling "
            "BUDGET=FOLDER."
        )
        return {"n": 0, "seeds": 0, "rows": [], "notes": [given]}
    rows: list[dict[str, Any]] = []
    nats: dict[str, Floats] = {}
    for family, members in found.items():
        likelihoods = member_likelihoods(setup, store, members)
        tokens, nats[family] = likelihoods.num_tokens, -likelihoods.scores
        rows += score_rows(setup, "nats", nats[family], tokens, setup.margin_nats, family, members)
        if family in (SIBLINGS, "paths"):
            scores = OracleScores(tuple(each.budget for each in members), likelihoods.scores, resamples=setup.resamples)
            matching = scores.matching_budget_of(scores.controls["oracle"], scores.greedy)
            never = round(matching.never, 4)
            rows.append(matching.budget.row(metric="matching_budget", family=family, never=never))
    for family in (name for name in OTHERS if name in found):
        for column, (member, other) in enumerate(zip(found[SIBLINGS], found[family], strict=True)):
            if member.checkpoint == other.checkpoint:
                continue
            labels = {"family": SIBLINGS, "budget": member.budget, "path": member.path}
            difference = nats[SIBLINGS][:, column] - nats[family][:, column]
            loss = paired_loss(difference, tokens, setup.margin_nats, setup.resamples)
            rows.append(loss.row_of(f"nats - {family}", labels))
            if member.budget < setup.num_layers and found[family][-1].checkpoint != found[SIBLINGS][-1].checkpoint:
                # What the path loses against full depth of the same family, minus what it loses in the other one.
                gap = difference - (nats[SIBLINGS][:, -1] - nats[family][:, -1])
                p = round(mean_p(gap, tokens), 6)
                interval = bootstrap_mean(gap, tokens, resamples=setup.resamples)
                rows.append(interval.row(metric=f"loss - loss of {family}", p=p, **labels))
    tested = [row for row in rows if row["metric"].startswith("loss - ")]
    for row, q in zip(tested, false_discovery([row["p"] for row in tested]), strict=True):
        row["q"] = round(q, 6)
    return {"n": setup.num_likelihoods, "seeds": 1, "rows": rows, "notes": _notes(setup, found)}


def _families(setup: Setup) -> dict[str, list[Member]]:
    """By name the siblings, cheapest first, and the members of other families along the same paths."""
    found = families(setup)
    if SIBLINGS not in found or "untuned" not in found:
        return {}
    paths = [member.path for member in found[SIBLINGS]]
    others = {name: [member for member in found[name] if member.path in paths] for name in OTHERS if name in found}
    alike = {name: members for name, members in others.items() if [each.path for each in members] == paths}
    return {SIBLINGS: found[SIBLINGS], **alike}


def _notes(setup: Setup, found: dict[str, list[Member]]) -> list[str]:
    return [
        f"nats: minus the log-likelihood of a token of the reference, teacher-forced, on {setup.num_likelihoods} "
        "references; smaller is better. Differences are paired, intervals BCa by bootstrap over sequences.",
        "nats - FAMILY: the sibling of a budget minus the weights of that family along the same path. loss - loss of "
        "FAMILY: the same of the loss against full depth, that of siblings being the loss against the sibling of full "
        "depth. q: its p, adjusted by Benjamini and Hochberg. Intervals know sequences alone: each sibling is one "
        "training.",
        f"verdict: equivalent where two one-sided t-tests put a difference within {setup.margin_nats:g} nats, else "
        "lower or higher where the interval leaves zero out, else open.",
        "Weights of other families but those tuned at full depth only may have been tuned on other data, by another "
        "loss, on other numbers of rows. What tells them from siblings is not the number of budgets alone.",
        "matching_budget: the fewest mean layers at which an oracle by log-likelihood, which knows the references, is "
        "as good as full depth of the family. Any choice among noise gains, and siblings have no control of it.",
        *(f"{family}: {DESCRIPTIONS[family]}." for family in found),
    ]
