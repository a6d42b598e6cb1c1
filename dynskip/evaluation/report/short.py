"""The report in short: five sentences, one for each question, each with one number and its interval."""

from __future__ import annotations

from collections.abc import Callable

from dynskip.evaluation.report import claims, findings
from dynskip.evaluation.report.evidence import direction
from dynskip.evaluation.report.figures import FAMILIES, WEIGHTS
from dynskip.evaluation.report.numbers import percent, signed
from dynskip.evaluation.report.rows import Row, Summary, bounds, distinct, select

# A question's section, and what is untested where a run does not ask it.
_QUESTIONS = {
    "hidden_states": "Whether skipping layers ends closer to the full model than early exit",
    "static": "What the static path of most layers loses to full depth",
    "controllers": "Whether hidden states help to choose layers",
    "oracle": "How much of an oracle's gain needs no choice of depth",
    "router": "Whether the prompt alone tells which depth a sequence needs",
}


def in_short(summary: Summary) -> list[str]:
    """Five sentences, in the order of the paper; a question that the run does not ask is called untested."""
    tell: dict[str, Callable[[Row, Summary], str | None]] = {
        "hidden_states": _hidden_states,
        "static": _static,
        "controllers": _controllers,
        "oracle": _oracle,
        "router": _router,
    }
    return [
        tell[name](summary.get(name) or {}, summary) or f"{question} is **untested** in this run."
        for name, question in _QUESTIONS.items()
    ]


def _hidden_states(section: Row, summary: Summary) -> str | None:
    untrained = claims.never_skipped(section)
    weights = untrained or next(iter(distinct(select(section, metric="cosine_final"), "weights")), None)
    uniform = claims.Strategies(summary, weights).uniform if weights else {}
    rows = {budget: row for budget, row in uniform.items() if bounds(row) is not None}
    if not rows:
        return None
    words = {1: "closer to the full model than early exit", -1: "farther", 0: "not told apart"}
    by_sign = {sign: [budget for budget, row in rows.items() if direction(row) == sign] for sign in words}
    if not by_sign[1]:
        words = {-1: "farther from the full model than early exit", 0: "not told apart from early exit"}
    found = ", ".join(f"{words[sign]} at {_listed(by_sign[sign])} layers" for sign in words if by_sign[sign])
    first = min(rows)
    as_such = "" if untrained else "; whether skipping as such does is **untested**"
    return (
        f"With {WEIGHTS.get(str(weights), weights)}, uniform skipping ends {found}: {signed(rows[first])} in cosine at "
        f"{first} layers{as_such}."
    )


def _static(section: Row, summary: Summary) -> str | None:
    num_layers = summary["conditions"].get("num_layers")
    found = findings.losses(section, num_layers)
    if found is None:
        return None
    deepest = found.rows[-1]
    of, at = f"With {FAMILIES.get(found.family, found.family)}", f"at {deepest['budget']} of {num_layers} layers"
    trained = claims.trained_paths(summary["conditions"].get("model"))
    if found.family == "paths" and trained is not None and deepest["budget"] not in trained.budgets:
        at += ", along a path that these weights were not tuned for,"
    if found.by_nats:
        alike = ", and is equivalent by two one-sided tests" if deepest.get("verdict") == "equivalent" else ""
        return f"{of}, a token of the reference costs {signed(deepest, 4)} nats more {at} than at full depth{alike}."
    told = {-1: "lower than at full depth", 1: "higher than at full depth", 0: "not told apart from full depth's"}
    return f"{of}, ROUGE-L {at} is {told[direction(deepest)]}: {signed(deepest, 4)}."


def _controllers(section: Row, summary: Summary) -> str | None:
    found = findings.AgainstFixed(section)
    if found.row is None:
        return None
    unit = "nats a token" if found.by_nats else "ROUGE-L"
    at = f"{found.row['layers']:.0f}" if "layers" in found.row else "as many"
    measured = f"{signed(found.row, 4)} {unit} over the line between fixed-input controllers at {at} layers"
    if found.verdict == "untested":
        return f"{_QUESTIONS['controllers']} is **untested**: {measured} are no test."
    told = {
        "better": "Hidden states help to choose layers",
        "worse": "Hidden states do not help to choose layers",
        "open": "Hidden states are not seen to help to choose layers",
    }
    which = f", in the clearest of {found.num_all} comparisons" if found.num_all > 1 else ""
    which += f", {found.num} of them tested" if found.num < found.num_all else ""
    return f"{told[found.verdict]}: {measured}{which}."


def _oracle(section: Row, summary: Summary) -> str | None:
    found = findings.equal_depth(section)
    if not found:
        return None
    row = found[-1]
    score = "log-likelihood" if row["metric"].endswith("_nats") else "ROUGE-L"
    return (
        f"In {score}, with {FAMILIES.get(row['family'], row['family'])}, a choice among as many "
        f"{findings.paths_of_one_depth(row)} gains {percent(row)} of what an oracle over depths gains at a mean of "
        f"{row['at']:.0f} layers."
    )


def _router(section: Row, summary: Summary) -> str | None:
    best = findings.best_router(section)
    if best is None:
        return None
    return (
        f"With {FAMILIES.get(best.row['family'], best.row['family'])}, the best of {best.num} routers that read the "
        f"prompt alone captures {percent(best.row)} of the oracle's gain; picked as the best, its share is flattered."
    )


def _listed(budgets: list[int]) -> str:
    return ", ".join(map(str, sorted(budgets)))
