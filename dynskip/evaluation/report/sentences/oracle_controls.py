"""What the oracle and its controls say, on the paper's own means and on the run."""

from __future__ import annotations

from dynskip.evaluation.report import claims
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.evidence import detectable
from dynskip.evaluation.report.figures import FAMILIES
from dynskip.evaluation.report.numbers import interval, number, percent, signed
from dynskip.evaluation.report.rows import Row, Summary, families_of, find


def oracle(section: Row, summary: Summary) -> list[str]:
    """The null model on the paper's means, the floor, like beside like, and what survives."""
    lines = [paper_null(), papers_best()]
    for family in families_of(section):
        of = f"With {FAMILIES.get(family, family)}"
        near = claims.floor(summary, family)
        if near is not None:
            lines.append(f"{of}, {_floor(near)}.")
        lines += [f"{of}, {text}." for text in _matching(claims.Matching(section, family))]
        alike = claims.equal_paths(section, family, summary["conditions"].get("num_layers", 0))
        if alike is not None:
            lines.append(f"{of}, {_alike(alike)}.")
        found = claims.surviving(section, family)
        if found is not None:
            lines += [f"{of}, {text}." for text in _surviving(found)]
    return lines + oracle_in_nats(section)


def _alike(found: claims.EqualPaths) -> str:
    return (
        f"the {found.num} paths of one depth are near neighbours: two of them share a mean of "
        f"{number(found.shared, 1)} of their {found.budget} layers, two drawn at random would share "
        f"{number(found.by_chance, 1)}; so this control says what a choice among near neighbours gains, and puts no "
        "bound on what one among paths of one depth that differ more would gain"
    )


# What chooses by log-likelihood: for what, and the control that chooses among as many paths of one depth.
_IN_NATS = {
    "oracle": ("for each sequence", "equal depth, greedy"),
    "oracle per token": ("for each token", "equal depth per token"),
}


def oracle_in_nats(section: Row) -> list[str]:
    """What of the oracle's gain by log-likelihood paths of one depth have, too: a choice that has no depth in it."""
    lines = []
    for family in families_of(section, metric="surviving_share_nats"):
        for chooser, (each, control) in _IN_NATS.items():
            labels = {"family": family, "place": "matching", "control": control, "reference": chooser}
            share = find(section, metric="surviving_share_nats", **labels)
            gain = find(section, metric="gain_nats", family=family, place="matching", control=chooser)
            if share is not None and gain is not None:
                lines.append(
                    f"By log-likelihood, with {FAMILIES.get(family, family)}, an oracle that chooses a depth {each} "
                    f"gains {signed(gain)} nats a token at a mean of {gain['at']:g} layers over dealing its depths at "
                    f"random; a choice among as many paths of one depth gains {percent(share)} of that."
                )
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
        else f"{100 * found.way:.0f} % of the way from the cheapest path's {found.cheapest}"
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
    if found.oracle is not None and found.equal_greedy is not None:
        lines.append(
            f"among greedy outputs of as many paths of one depth the same choice matches full depth at "
            f"{interval(found.equal_greedy, 2)} layers"
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
