"""What the report says: sentences from the verdicts of ``claims.py``, each section's, and the few that stand on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynskip.evaluation.report import claims, oracle_sentences
from dynskip.evaluation.report.evidence import detectable, direction, negated
from dynskip.evaluation.report.figures import FAMILIES
from dynskip.evaluation.report.numbers import MISSING, interval, number, signed
from dynskip.evaluation.report.rows import Row, Summary, distinct, families_of, select

WEIGHTS = {"paths": "the weights shared by all paths", "full-tuned": "the weights tuned at full depth only"}


def hidden_states(section: Row, summary: Summary) -> list[str]:
    """Skipping against exiting, and what the weights were trained along."""
    lines = []
    for weights in distinct(select(section), "weights"):
        found = claims.strategies(summary, weights)
        of = f"With {WEIGHTS.get(weights, weights)}"
        if found.uniform:
            told = _ordered({budget: direction(row) for budget, row in found.uniform.items()})
            first = min(found.uniform)
            lines.append(
                f"{of}, by the cosine of final states uniform skipping is {told}; the difference at {first} layers is "
                f"{signed(found.uniform[first])}."
            )
        behind = [budget for budget, row in found.uniform_layers.items() if direction(row) < 0]
        if behind:
            lines.append(
                f"{of}, on the mean over layers early exit is closer to the full model than uniform "
                f"skipping at {_listed(behind)} layers{' (difference at the last)' if len(behind) > 1 else ''}: "
                f"{signed(negated(found.uniform_layers[behind[-1]]), 4)}; its states in the layers that it runs are "
                "the full model's own."
            )
        if found.random:
            lines.append(f"{of}, random skipping is {_ordered(found.random)}.")
        if found.random_first:
            deepest = max(found.random_first)
            lines.append(
                f"{of}, random skipping that keeps layer 0 is {_ordered(found.random_first)}; the cosines at "
                f"{deepest} layers are {interval(found.first[deepest])} and {interval(found.exit[deepest])}."
            )
    return [*lines, trained(summary)] if lines else []


def trained(summary: Summary) -> str:
    """What the comparison of skipping with exiting cannot tell apart."""
    model = summary["conditions"].get("model", "the model")
    budgets = claims.trained_budgets(model)
    if budgets is None:
        return (
            "Which paths the weights were trained along is not in the summary: whether skipping as such stays closer "
            "than exiting is untested."
        )
    compared = distinct(select(summary["hidden_states"], strategy="uls"), "budget")
    new = [budget for budget in compared if budget not in budgets]
    besides = f" Uniform paths of {_listed(new)} layers were not trained." if new else ""
    return (
        f"{model} was trained along uniform paths of {_listed(budgets)} layers and never on exits, so that whether "
        f"skipping as such stays closer than exiting is untested.{besides}"
    )


def static(section: Row, summary: Summary) -> list[str]:
    """The loss against full depth as a paired difference, and which loss would have been missed."""
    lines = []
    num_layers = summary["conditions"].get("num_layers")
    for family in families_of(section, metric="rouge_l - full"):
        rows = [r for r in select(section, metric="rouge_l - full", family=family) if r["budget"] != num_layers]
        if not rows:
            continue
        of = f"With {FAMILIES.get(family, family)}"
        for sign, word in ((-1, "lower"), (1, "higher")):
            if moved := [row for row in rows if direction(row) == sign]:
                lines.append(
                    f"{of}, ROUGE-L is {word} than at full depth at {_budgets(moved)} layers; the paired difference at "
                    f"{moved[0]['budget']} layers is {signed(moved[0], 4)}."
                )
        open_ = [row for row in rows if not direction(row)]
        if open_:
            lines.append(
                f"{of}, the paired difference to full depth is not told apart from zero at {_budgets(open_)} layers, "
                f"which is no equality: it is {signed(open_[0], 4)} at {open_[0]['budget']} layers, where a true "
                f"loss under {number(detectable(open_[0]), 4)} would be missed in more than one run of five."
            )
    return lines


def controllers(section: Row, summary: Summary) -> list[str]:
    """Whether reading anything helps to choose layers, and why that is untested where it is."""
    found = claims.controllers(section)
    if not found.names:
        return [
            "Whether hidden states help to choose layers is untested: there is no fixed-input controller at as many "
            "layers as one that reads them."
        ]
    counted = (
        f"{found.better} of {len(found.names)} controllers that read hidden states or the prompt (likelier and sampled "
        f"decisions counted apart) score more than fixed-input ones at as many layers and {found.worse} less, after "
        "Holm's correction"
    )
    if found.verdict == "tested":
        return [f"{counted}."]
    reasons = {
        "beyond": f"{len(found.beyond)} of {len(found.names)} run more layers than the {number(found.reach, 1)} that "
        "fixed-input controllers reach, so that part of their baseline is the full pass",
        "alike": f"{found.num_alike} fixed-input controllers have one and the same score, so that one baseline counts "
        f"{found.num_alike} times",
        "noise": f"the noise of sampled decisions is shared by all sequences, which intervals over sequences cannot "
        f"see, and was drawn {_times(found.num_noise_seeds)}",
        "trainings": f"each kind was trained {_times(found.num_trainings)}",
    }
    lines = [
        "Whether hidden states help to choose layers is **untested**.",
        *(f"Why untested: {reasons[name]}." for name in found.reasons),
    ]
    if found.twins:
        lines.append(
            f"What one draw of the noise does: {_listed(found.twins)} differs from its baseline, with an interval that "
            "leaves zero out, though the likelier decisions of both are the same."
        )
    rows = [
        row
        for row in select(section, metric="over_static")
        if row.get("kind") != "fixed" and row.get("choice") != "sampled"
    ]
    if rows:
        signs = [direction(row) for row in rows]
        lines.append(
            f"Against mixes of uniform paths at as many layers, {signs.count(1)} of the {len(rows)} that read "
            f"something score more by their likelier decisions and {signs.count(-1)} less, by uncorrected intervals."
        )
    return lines


# By section what it says; in the order of the paper.
SENTENCES: Mapping[str, Callable[[Row, Summary], list[str]]] = {
    "hidden_states": hidden_states,
    "static": static,
    "controllers": controllers,
    "oracle": oracle_sentences.oracle,
    "router": oracle_sentences.router,
    "depth": oracle_sentences.depth,
}


def section_sentences(summary: Summary, name: str) -> list[str]:
    """What the section ``name`` of a summary says; nothing where it is not there or has no rows."""
    section = summary.get(name) or {}
    return SENTENCES[name](section, summary) if section.get("rows") else []


def _ordered(signs: Mapping[int, int]) -> str:
    """At which budgets something is closer to the full model than early exit, farther, and neither."""
    words = {
        1: "closer to the full model than early exit",
        -1: "farther from the full model than early exit",
        0: "not told apart from early exit",
    }
    by_sign = {sign: [budget for budget, found in signs.items() if found == sign] for sign in words}
    return "; ".join(f"{words[sign]} at {_listed(found)} layers" for sign, found in by_sign.items() if found)


def _budgets(rows: Sequence[Row]) -> str:
    return _listed([row["budget"] for row in rows])


def _listed(things: Sequence[Any]) -> str:
    return ", ".join(map(str, things)) or MISSING


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
