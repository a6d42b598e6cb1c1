"""What hidden states and static paths say, of the weights before any tuning and after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynskip.evaluation.report import claims
from dynskip.evaluation.report.evidence import detectable, direction, negated
from dynskip.evaluation.report.figures import FAMILIES, RULES, WEIGHTS
from dynskip.evaluation.report.numbers import interval, listed, number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, distinct, families_of, find, select


def hidden_states(section: Row, summary: Summary) -> list[str]:
    """Skipping against exiting, and what the weights were trained along."""
    lines = []
    for weights in distinct(select(section), "weights"):
        found = claims.Strategies(summary, weights)
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
                f"skipping at {listed(behind)} layers{' (difference at the last)' if len(behind) > 1 else ''}: "
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
    """What the weights were trained along, and which of them say whether skipping as such stays closer."""
    section, model = summary["hidden_states"], summary["conditions"].get("model", "the model")
    known, untrained = claims.trained_paths(model), claims.never_skipped(section)
    if known is None:
        along = f"Which paths {model} was trained along is not known here"
    else:
        along = (
            f"{model} was trained along {known.rule} paths of {listed(known.budgets)} layers and never on early exits"
        )
    if untrained is None:
        return f"{along}: whether skipping as such stays closer than exiting is **untested**."
    return (
        f"{along}; what skipping as such does is said by {WEIGHTS[untrained]}, which were never trained along a path "
        "with layers left out."
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
        if alike := [row for row in rows if row.get("verdict") == "equivalent"]:
            lines.append(
                f"{of}, ROUGE-L is equivalent to full depth's at {_budgets(alike)} layers: two one-sided tests put the "
                f"difference within {number(alike[0]['margin'], 3)}."
            )
    return [
        *lines,
        *losses_in_nats(section, num_layers),
        *labels(section, num_layers),
        *tuning(section),
        *rules(section),
    ]


def labels(section: Row, num_layers: int | None) -> list[str]:
    """By weights at which budgets fewer closed labels are right than at full depth, and where none is told apart."""
    lines = []
    majority = find(section, metric="label_match", rule="majority")
    for family in families_of(section, metric="label_match - full"):
        rows = [r for r in select(section, metric="label_match - full", family=family) if r["budget"] != num_layers]
        full = find(section, metric="label_match", family=family, budget=num_layers)
        if not rows or full is None:
            continue
        of = f"With {FAMILIES.get(family, family)}"
        beside = (
            "" if majority is None else f", where each template's most frequent one is right in {percent(majority)}"
        )
        lines.append(f"{of}, of closed labels {percent(full)} are right at full depth{beside}.")
        for sign, word in ((-1, "fewer"), (1, "more")):
            if moved := [row for row in rows if direction(row) == sign]:
                deepest = max(moved, key=lambda row: int(row["budget"]))
                lines.append(
                    f"{of}, {word} are right than at full depth at {_budgets(moved)} layers; the paired difference at "
                    f"{deepest['budget']} layers is {signed(deepest)}."
                )
        if open_ := [row for row in rows if not direction(row)]:
            deepest = max(open_, key=lambda row: int(row["budget"]))
            lines.append(
                f"{of}, at {_budgets(open_)} layers the difference is not told apart from none, which is no equality: "
                f"at {deepest['budget']} a loss under {number(detectable(deepest))} would be missed in more than one "
                "run of five."
            )
    return lines


def losses_in_nats(section: Row, num_layers: int | None) -> list[str]:
    """By weights what a token of the reference costs at the deepest budget below full depth, and where no more."""
    lines = []
    for family in families_of(section, metric="nats - full"):
        rows = [r for r in select(section, metric="nats - full", family=family) if r["budget"] != num_layers]
        if not rows:
            continue
        of, deepest = f"With {FAMILIES.get(family, family)}", max(rows, key=lambda row: int(row["budget"]))
        lines.append(
            f"{of}, by log-likelihood a token of the reference costs {signed(deepest, 4)} nats more at "
            f"{deepest['budget']} layers than at full depth."
        )
        if alike := [row for row in rows if row.get("verdict") == "equivalent"]:
            lines.append(
                f"{of}, it is equivalent to full depth's at {_budgets(alike)} layers: two one-sided tests put the "
                f"difference within {number(alike[0]['margin'], 3)} nats."
            )
    return lines


def tuning(section: Row) -> list[str]:
    """What tuning for paths changes at full depth, and along the path of fewest layers."""
    rows = sorted(select(section, metric="nats - backbone"), key=lambda row: int(row["budget"]))
    if not rows:
        return []
    first, full = rows[0], rows[-1]
    words = {"equivalent": f"within the margin of {number(full['margin'], 3)}", "open": "not told apart from none"}
    return [
        f"Tuning for paths changes a token of the reference by {signed(first)} nats at {first['budget']} layers.",
        f"At full depth it changes it by {signed(full, 4)} nats, {words.get(full['verdict'], full['verdict'])}.",
    ]


def rules(section: Row) -> list[str]:
    """By weights the rule for the layers whose paths cost least at the deepest budget, beside uniform ones."""
    lines = []
    for weights in distinct(select(section, metric="rule_nats"), "weights"):
        by_rule = [row for row in select(section, metric="rule_nats", weights=weights) if row["rule"] in RULES]
        deepest = [row for row in by_rule if row["budget"] == max(each["budget"] for each in by_rule)]
        best = min(deepest, key=lambda row: float(row["value"]), default=None)
        uniform = next((row for row in deepest if row["rule"] == "uniform"), None)
        if best is not None and uniform is not None:
            lines.append(
                f"With {WEIGHTS.get(weights, weights)}, of the rules for {best['budget']} layers {RULES[best['rule']]} "
                f"has the fewest nats, {interval(best)}, and uniform {interval(uniform)}."
            )
    return lines


def _ordered(signs: Mapping[int, int]) -> str:
    """At which budgets something is closer to the full model than early exit, farther, and neither."""
    words = {
        1: "closer to the full model than early exit",
        -1: "farther from the full model than early exit",
        0: "not told apart from early exit",
    }
    by_sign = {sign: [budget for budget, found in signs.items() if found == sign] for sign in words}
    return "; ".join(f"{words[sign]} at {listed(found)} layers" for sign, found in by_sign.items() if found)


def _budgets(rows: Sequence[Row]) -> str:
    return listed([row["budget"] for row in rows])
