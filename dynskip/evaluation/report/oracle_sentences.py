"""Sentences on the oracle, on routers that stand in for it, and on the depths that it chooses."""

from __future__ import annotations

from statistics import median

from dynskip.evaluation.report import oracle_claims as claims
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.evidence import detectable
from dynskip.evaluation.report.figures import FAMILIES, FEATURES
from dynskip.evaluation.report.numbers import interval, number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, families_of


def oracle(section: Row, summary: Summary) -> list[str]:
    """The null model on the paper's means, the floor, like beside like, and what survives."""
    lines = [paper_null(), papers_best()]
    for family in families_of(section):
        of = f"With {FAMILIES.get(family, family)}"
        near = claims.floor(summary, family)
        if near is not None:
            lines.append(f"{of}, {_floor(near)}.")
        lines += [f"{of}, {text}." for text in _matching(claims.matching(section, family))]
        found = claims.surviving(section, family)
        if found is not None:
            lines += [f"{of}, {text}." for text in _surviving(found)]
    return lines


def paper_null() -> str:
    """What noise alone does on the paper's own means."""
    return (
        f"On the paper's own four means, an oracle over noise that knows nothing of a sequence matches full depth at "
        f"{100 * claims.paper_null().matching_share:.1f} % of the layers (the paper's oracle: "
        f"{100 * paper.MATCHING_SHARE:.1f} %)."
    )


def papers_best() -> str:
    """The check of that null model on numbers that it was not fitted to."""
    null = claims.paper_null()
    between = list(paper.BEST_UP_TO)[1:-1]
    parts = [f"{null.best_up_to[b]:.3f} up to {b} layers (paper: {paper.BEST_UP_TO[b]:.3f})" for b in between]
    return (
        f"That noise, of standard deviation {null.sd:.3f}, is fitted to the mean of the best of all four; what it was "
        f"not fitted to, the best of fewer, it gives as {' and '.join(parts)}."
    )


def _floor(found: claims.Floor) -> str:
    where = (
        f"near the floor of {found.cheapest}, the cheapest path ({100 * found.share:.1f} % of the layers)"
        if found.near
        else f"well above the cheapest path's {found.cheapest}"
    )
    dealt = "" if found.num_cheapest is None else f": {found.num_cheapest} of {found.num_seqs} sequences run it"
    return (
        f"the oracle matches full depth at a mean of {interval(found.matching, 2)} of {found.num_layers} layers, "
        f"{where}{dealt}, and full depth leads the cheapest path by {signed(found.lead, 4)} ROUGE-L"
    )


def _matching(found: claims.Matching) -> list[str]:
    lines = []
    if found.oracle is not None and found.null is not None:
        lines.append(
            f"on greedy outputs the oracle matches full depth at {interval(found.oracle, 2)} layers, and noise fitted "
            f"to the same means at {interval(found.null, 2)}"
        )
    if found.sampled_oracle is not None and found.equal_depth is not None:
        lines.append(
            f"on sampled outputs the oracle matches full depth at {number(found.sampled_oracle, 2)} layers, and the "
            f"same choice among outputs of equal depth at {interval(found.equal_depth, 2)}"
        )
    return lines


def _surviving(found: claims.Surviving) -> list[str]:
    at = f"at a mean of {found.at:g} layers"
    lines = [
        f"{percent(found.share, 1)} of the oracle's gain on one draw survives {at} when another draw judges"
        + (
            f", an interval that does not lie above zero, where {percent({'value': detectable(found.share)}, 1)} could "
            "have been seen (80 % power)"
            if found.none_known
            else ""
        ),
        f"a choice by expected scores would then keep {percent(found.ceiling)} of it, the square root of that share"
        + (": an interval that holds 0 %" if found.none_known else ""),
    ]
    if found.by_means is not None:
        lines.append(
            f"the same reasoning expects {percent(found.expected_by_means)} of a choice on the mean of half of the "
            f"draws, where {percent(found.by_means)} is measured"
        )
    if found.equal_depth is not None and found.room is not None:
        lines.append(
            f"the same choice among outputs of equal depth gains {percent(found.equal_depth)} of the oracle's gain, "
            f"where the share that survives lets luck show {percent(found.luck)}: taken alone this control leaves room "
            f"for a ceiling of {percent({'value': found.room})}"
        )
    if found.greedy is not None:
        lines.append(
            f"chosen on the mean of all draws and judged on greedy outputs, {percent(found.greedy)} of the greedy "
            "oracle's gain remains"
        )
    return lines


def router(section: Row, summary: Summary) -> list[str]:
    """How many routers gain, how many choose at all, and which share they could have shown."""
    lines = []
    for family in families_of(section, metric="gain"):
        found = claims.routers(section, family)
        of = f"With {FAMILIES.get(family, family)}"
        lines.append(
            f"{of}, {found.above} of {len(found.gains)} prompt-only routers gain more than random assignment of the "
            f"same depths with an interval above zero; {found.num_shallow} run at most {claims.SAME_DEPTH:g} layers "
            "more than the shallowest, and so choose next to nothing."
        )
        if len(found.shares) < len(found.gains):
            lines.append(
                f"{of}, {len(found.gains) - len(found.shares)} of them leave no share to capture, and are in no figure."
            )
        seen = [size for row in found.shares if (size := detectable(row)) is not None]
        if seen:
            lines.append(
                f"{of}, the median router that has a share could have shown {percent({'value': median(seen)})} of the "
                f"oracle's gain (80 % power)."
            )
        if found.best is not None:
            lines.append(
                f"{of}, the one that gains most (picked as such, so its share flatters it), {found.best['predictor']} "
                f"at a budget of {found.best['at']:g}, captures {percent(found.best)} of the oracle's gain."
            )
    return lines


def depth(section: Row, summary: Summary) -> list[str]:
    """Which correlations stay after the correction for all that were looked at, and what ties do to them."""
    found = claims.correlations(section)
    if not found.rows:
        return []
    lines = [
        f"Of {len(found.rows)} rank correlations of the oracle's depth, {len(found.clear)} have an uncorrected "
        f"interval that leaves zero out, and {len(found.kept)} stay after Holm's correction."
    ]
    sizes = [size for row in found.rows if (size := detectable(row)) is not None]
    if len(found.kept) < len(found.rows) and sizes:
        lines.append(f"One of {number(median(sizes), 2)} could have been seen uncorrected (80 % power).")
    if found.kept:
        largest = max(found.kept, key=lambda row: abs(row["value"]))
        lines.append(
            f"The largest is that with the {FEATURES.get(largest['feature'], largest['feature'])}, "
            f"{signed(largest, 2)} at a mean of {largest['at']:g} layers, with "
            f"{FAMILIES.get(largest['family'], largest['family'])}."
        )
        turned = [
            row for row in found.clear if row["feature"] == largest["feature"] and row["value"] * largest["value"] < 0
        ]
        if turned:
            lines.append(
                f"Its sign depends on the budget: {signed(turned[0], 2)} at a mean of {turned[0]['at']:g} layers, with "
                f"{FAMILIES.get(turned[0]['family'], turned[0]['family'])}, uncorrected."
            )
    lines.append(
        "Ties can inflate them: a sequence that scores alike on every path, zero for one, is given the cheapest, and "
        "which sequences do follows lengths. How much of the correlations that is takes the single items: **untested**."
    )
    return lines
