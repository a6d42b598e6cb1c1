"""What each section of the report says: sentences from the verdicts of ``claims.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from dynskip.evaluation.report import claims
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.evidence import detectable, direction, negated
from dynskip.evaluation.report.figures import FAMILIES, FEATURES, RULES, WEIGHTS
from dynskip.evaluation.report.numbers import MISSING, interval, number, percent, signed
from dynskip.evaluation.report.oracle_figures import READS
from dynskip.evaluation.report.rows import Row, Summary, distinct, families_of, find, select
from dynskip.evaluation.report.sibling_sections import siblings_sentences


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
    """What the weights were trained along, and which of them say whether skipping as such stays closer."""
    section, model = summary["hidden_states"], summary["conditions"].get("model", "the model")
    known, untrained = claims.trained_paths(model), claims.never_skipped(section)
    if known is None:
        along = f"Which paths {model} was trained along is not known here"
    else:
        along = (
            f"{model} was trained along {known.rule} paths of {_listed(known.budgets)} layers and never on early exits"
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
    return [*lines, *losses_in_nats(section, num_layers), *tuning(section), *rules(section)]


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
        "beyond": "run layers that no fixed-input controller reaches",
        "trainings": f"have fewer than {claims.NUM_TRAININGS} trainings, of their own or of the fixed input",
        "noise": f"have fewer than {claims.NUM_NOISE_SEEDS} draws of the noise of their decisions",
        "curves": "have a training whose losses are not known, of their own or of the fixed input",
        "rows": f"have a training on fewer than {claims.NUM_ROWS:,} rows",
        "moving": "have a validation loss that still moved at the end, of their own or of the fixed input",
    }
    for name in found.reasons:
        count = sum(name in row["reasons"] for row in found.recipes)
        lines.append(f"Why untested: {count} of {len(found.recipes)} {reasons[name]}.")
    seen = [row for row in found.recipes if row["verdict"] in ("better", "worse", "open") and row["metric"] == _BY_NATS]
    if seen:
        first = min(seen, key=lambda row: row["q"])
        lines.append(
            f"The clearest by log-likelihood is {first['recipe']}: {signed(first, 4)} nats a token over the fixed "
            f"input at {number(first['layers'], 1)} layers."
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


_BY_NATS = "over_fixed_nats"
_RECIPE_SCORES = {"over_fixed": "by ROUGE-L", _BY_NATS: "by log-likelihood"}


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


def router(section: Row, summary: Summary) -> list[str]:
    """How many routers gain, how many choose at all, and which share they could have shown."""
    lines = []
    for family in families_of(section, metric="gain"):
        found = claims.Routers(section, family)
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
    return lines + router_in_nats(section)


def router_in_nats(section: Row) -> list[str]:
    """By log-likelihood: the routers that learned from most prompts, the one that gains most, and the cascade."""
    lines = []
    for family in families_of(section, metric="captured_share_nats"):
        found = claims.RoutersInNats(section, family)
        if found.best is not None:
            lines.append(
                f"By log-likelihood, with {FAMILIES.get(family, family)}, {found.above} of {len(found.shares)} routers "
                f"that learned from {found.size:,} prompts capture a share of the oracle's gain above zero after "
                f"control of false discoveries; the one that captures most (picked as such, so its share flatters it), "
                f"{found.best['predictor']} on {_read(found.best)}, captures {percent(found.best)} of it and "
                f"gains {signed(found.over_static)} nats a token over the best mix of fixed depths."
            )
        if found.shares:
            lines.append(_more_prompts(found, family))
        if found.cascade is not None:
            lines.append(
                "A cascade, the shallowest path first and full depth where it is unsure, captures "
                f"{percent(found.cascade)}."
            )
    return lines


def _read(row: Row) -> str:
    return str(READS.get(row["features"], row["features"]))


def _more_prompts(found: claims.RoutersInNats, family: str) -> str:
    """Whether routers capture more once they have learned from more prompts, and which change would have been seen."""
    of = f"with {FAMILIES.get(family, family)}"
    if not found.more_prompts:
        return (
            f"Whether more prompts to learn from help is **untested** {of}: the run has no paired "
            "comparison of shares at two numbers of them."
        )
    fewest = min(row["fewest"] for row in found.more_prompts)
    most = max(found.more_prompts, key=lambda row: abs(row["value"]))
    seen = [size for row in found.more_prompts if (size := detectable(row)) is not None]
    power = f"; the median router could have shown a change of {number(median(seen))} (80 % power)" if seen else ""
    return (
        f"From {fewest:,} to {found.size:,} prompts learned from, {of}, the share that a router captures moves for "
        f"{len(found.moved) or 'none'} of {len(found.more_prompts)} after control of false discoveries; it moves most "
        f"for {most['predictor']} on {_read(most)}, by {signed(most)} of the "
        f"oracle's gain{power}."
    )


# Difficulties that are known before any reference is, and the one that takes a reference to score the draws.
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


# By section what it says; in the order of the paper.
SENTENCES: Mapping[str, Callable[[Row, Summary], list[str]]] = {
    "hidden_states": hidden_states,
    "static": static,
    "siblings": siblings_sentences,
    "controllers": controllers,
    "oracle": oracle,
    "router": router,
    "depth": depth,
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
