"""What learned controllers say: whether what they read helps to choose layers."""

from __future__ import annotations

from dynskip.evaluation.report import claims, findings
from dynskip.evaluation.report.evidence import detectable, direction
from dynskip.evaluation.report.numbers import listed, number, signed
from dynskip.evaluation.report.rows import Row, Summary, select

_BY_NATS = "over_fixed_nats"
_RECIPE_SCORES = {"over_fixed": "by ROUGE-L", _BY_NATS: "by log-likelihood"}


def controllers(section: Row, summary: Summary) -> list[str]:
    """Whether reading anything helps to choose layers, and why that is untested where it is."""
    found = claims.Controllers(section)
    if found.recipes:
        return _recipes(found)
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
            f"What one draw of the noise does: {listed(found.twins)} differs from its baseline, with an interval that "
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


def _recipes(found: claims.Controllers) -> list[str]:
    """Recipes over their trainings and draws, by both scores."""
    if len(found.recipes) == 1 and found.verdict == "tested":
        return [_one_recipe(found.recipes[0])]
    counted = ", ".join(f"{found.num_with(verdict)} {verdict}" for verdict in ("better", "worse", "open", "untested"))
    whole = "is **untested**" if found.verdict == "untested" else "has these verdicts"
    if found.verdict == "untested" and len(found.recipes) == 1 and (only := found.recipes[0])["value"] is not None:
        whole += f", {signed(only, 4)}{_unit(only)} at {number(only['layers'], 1)} layers"
    metrics = {row["metric"] for row in found.recipes}
    scores = " and ".join(name for metric, name in _RECIPE_SCORES.items() if metric in metrics)
    lines = [
        f"Whether what is read helps to choose layers {whole}: of {_comparisons(len(found.recipes))} with fixed-input "
        f"controllers at as many layers, {scores}, {counted}, after control of false discoveries."
    ]
    reasons = {
        "beyond": "with layers that no fixed-input controller reaches",
        "trainings": f"with fewer than {claims.NUM_TRAININGS} trainings, of their own or of the fixed input",
        "noise": f"with fewer than {claims.NUM_NOISE_SEEDS} draws of the noise of their decisions",
        "curves": "with a training whose losses are not known, of their own or of the fixed input",
        "rows": f"with a training on fewer than {claims.NUM_ROWS:,} rows",
        "moving": "with a validation loss that still moved at the end, of their own or of the fixed input",
    }
    for name in found.reasons:
        count = sum(name in row["reasons"] for row in found.recipes)
        lines.append(f"Why untested: {count} of {len(found.recipes)} {reasons[name]}.")
    seen = [row for row in found.recipes if row["verdict"] in ("better", "worse", "open") and row["metric"] == _BY_NATS]
    if seen:
        first = min(seen, key=lambda row: row["q"])
        moved = f"; {findings.still_moving(first)}" if findings.still_moving(first) else ""
        lines.append(
            f"The clearest by log-likelihood is {first['recipe']}: {signed(first, 4)} nats a token over the fixed "
            f"input at {number(first['layers'], 1)} layers{moved}."
        )
    return lines


def _one_recipe(row: Row) -> str:
    """The one comparison of a recipe that there is, and was a test."""
    told = {"better": "chooses layers better than", "worse": "chooses layers worse than"}
    seen = detectable(row)
    power = "" if seen is None else f"; one of {number(seen, 4)} could have been seen (80 % power)"
    return (
        f"A controller that reads something ({row['recipe']}) {told.get(row['verdict'], 'is not told apart from')} "
        f"fixed-input ones at as many layers, {number(row['layers'], 1)}: {signed(row, 4)}{_unit(row)} over "
        f"{row['trainings']} trainings{power}."
    )


def _unit(row: Row) -> str:
    return " nats a token" if row["metric"] == _BY_NATS else " ROUGE-L"


def _comparisons(count: int) -> str:
    return "1 comparison" if count == 1 else f"{count} comparisons"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
