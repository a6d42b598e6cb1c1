"""What the depth that the oracle chooses goes with."""

from __future__ import annotations

from statistics import median

from dynskip.evaluation.report import claims
from dynskip.evaluation.report.evidence import detectable, direction
from dynskip.evaluation.report.figures import FAMILIES, FEATURES
from dynskip.evaluation.report.numbers import number, signed
from dynskip.evaluation.report.rows import Row, Summary, find, select

_WITHOUT_LABELS = ("prefill_entropy", "sd_of_draw_lengths")
_WITH_LABELS = "sd_of_draws"


def difficulties(section: Row) -> list[str]:
    """By family and score how depth follows the difficulties that take no label, beside the one that takes it."""
    lines = []
    for suffix, score in (("", "ROUGE-L"), ("_nats", "log-likelihood")):
        rows = [row for row in select(section, metric=f"spearman{suffix}") if row["feature"] in _WITHOUT_LABELS]
        for family, at in dict.fromkeys((row["family"], row["at"]) for row in rows):
            own = [row for row in rows if (row["family"], row["at"]) == (family, at)]
            labelled = find(section, metric=f"spearman{suffix}", feature=_WITH_LABELS, family=family, at=at)
            told = "; ".join(f"with the {FEATURES[row['feature']]} {_correlation(row)}" for row in own)
            beside = (
                ""
                if labelled is None
                else f"; with the {FEATURES[_WITH_LABELS]}, which takes the reference, {_correlation(labelled)}"
            )
            lines.append(
                f"Difficulty without labels: with {FAMILIES.get(family, family)}, the depth that the oracle chooses by "
                f"{score} at a mean of {at:g} layers correlates {told}{beside}."
            )
    return lines


def _correlation(row: Row) -> str:
    """A rank correlation with its interval and its n, and what it is: found, none that matters, or untested."""
    seen, q, num = detectable(row), row.get("q"), row.get("num")
    told = f"by {signed(row)}" + ("" if num is None else f" (n = {num:,})")
    found = direction(row) != 0 if q is None else q < 0.05
    if found or seen is None:
        return told
    if seen > claims.SMALL_CORRELATION:
        return f"{told}, **untested**: only one of {number(seen, 2)} or more could have been seen (80 % power)"
    return f"{told}, none found where one of {number(seen, 2)} could have been seen (80 % power)"


def _signs_by_score(section: Row) -> list[str]:
    """Of features that depths by ROUGE-L and by log-likelihood follow in opposite directions, both correlations."""
    lines = []
    for row in select(section, metric="spearman"):
        other = find(section, metric="spearman_nats", family=row["family"], feature=row["feature"])
        if other is not None and direction(row) * direction(other) < 0:
            lines.append(
                f"By log-likelihood the sign is the other one: with the {FEATURES.get(row['feature'], row['feature'])} "
                f"the depth chosen by ROUGE-L correlates by {signed(row, 2)}, the one by log-likelihood by "
                f"{signed(other, 2)}."
            )
    return lines


def depth(section: Row, summary: Summary) -> list[str]:
    """Which correlations stay after the correction for all that were looked at, and what ties do to them."""
    found = claims.Correlations(section)
    if not found.rows:
        return []
    lines = [
        f"Of {len(found.rows)} rank correlations of the oracle's depth, {len(found.clear)} have an uncorrected "
        f"interval that leaves zero out, and {len(found.kept)} stay after "
        + ("Holm's correction." if found.ties else f"the correction by {found.correction}.")
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
    lines += [*_signs_by_score(section), *difficulties(section)]
    if not found.ties:
        return [*lines, "Sequences that score alike on every path, and so tell nothing, are left out of them."]
    lines.append(
        "Ties can inflate them: a sequence that scores alike on every path, zero for one, is given the cheapest, and "
        "which sequences do follows lengths. How much of the correlations that is takes the single items: **untested**."
    )
    return lines
