"""The oracle over depths (arXiv 2410.20022, section 3.3) with the controls that tell its gain from luck."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap_mean, percentiles, point
from dynskip.evaluation.stats.knapsack import Integers, Knapsack
from dynskip.evaluation.stats.oracle_controls import Choice, Matching, OracleScores
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.generations import GREEDY, generate_items, read_generations
from dynskip.evaluation.tasks.likelihoods import Likelihoods, member_items, member_likelihoods
from dynskip.evaluation.tasks.path_families import (
    Member,
    choices,
    equal_paths,
    family_generations,
    family_items,
    notes_on_choices,
)
from dynskip.evaluation.tasks.timing import batches_alone, mixed_batch, read_timings, time_item
from dynskip.paths import LayerPath

FAMILIES = ("paths", "siblings")
MIX = "oracle at its matching budget"
# Mean depths, as shares of the layers, at which gains are compared.
_PLACES = {"quarter": 1 / 4, "third": 1 / 3, "half": 1 / 2, "full": 1.0}
# What a control is compared with: the same procedure judged on the texts that it chose on.
REFERENCES = {
    "cross-fitted": "in-sample",
    "cross-fitted means": "in-sample",
    "equal depth": "in-sample",
    "cross-fitted greedy": "oracle",
    "equal depth, greedy": "oracle",
}
# The second score: metrics of it end so. It has no draws, so that nothing can be cross-fitted.
NATS = "_nats"


def plan(setup: Setup, store: ItemStore) -> list[WorkItem]:
    """The items: greedy and sampled generations along each candidate, then the time of the mix that was chosen.

    Raises ValueError where there are fewer draws than candidates.
    """
    most, num_draws = max(map(len, _families(setup).values())), len(setup.sample_seeds)
    if most > num_draws and not setup.likelihood_only:
        raise ValueError(
            f"eval: candidates must be at most the {num_draws} draws of each prompt, got {most} with the full "
            "depth. Give fewer --candidates or more --draws."
        )
    items: list[WorkItem] = []
    for members in _families(setup).values():
        items += [*member_items(setup, members), *member_items(setup, _equal_members(setup, members))]
        if setup.likelihood_only:
            continue
        needed = [item for seed in (GREEDY, *setup.sample_seeds) for item in family_items(setup, members, seed)]
        items += [*needed, *_equal_items(setup, members)]
        if not store.missing(needed):
            items.append(_time_item(setup, store, members))
    return items


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: the oracle by family, its curve, its controls, and what survives them."""
    section: dict[str, Any] = {
        "n": setup.num_judged,
        "seeds": setup.seeds,
        "draws": len(setup.sample_seeds),
        "rows": [],
        "curves": [],
        "null_model": [],
        "histogram": [],
        "equal_paths": [],
        "notes": [*_notes(setup), *notes_on_choices(setup)],
    }
    for family, members in _families(setup).items():
        _add_likelihoods(setup, section, family, store, members)
        if alike := _equal_members(setup, members):
            section["equal_paths"].append({"family": family, "paths": [member.path for member in alike]})
        if setup.likelihood_only:
            continue
        draws = [family_generations(setup, store, members, seed).rouge_l for seed in setup.sample_seeds]
        costs = tuple(member.budget for member in members)
        greedy = family_generations(setup, store, members).rouge_l
        equal = _equal_items(setup, members)
        equal_greedy = read_generations(store, equal) if equal else None
        scores = OracleScores(
            costs,
            greedy,
            np.stack(draws),
            setup.resamples,
            equal=None if equal_greedy is None else equal_greedy.rouge_l,
        )
        _add_means(section, family, scores)
        _add_matching(section, family, scores)
        _add_gains(section, family, scores)
        _add_curves(section, family, scores)
        timings = read_timings(store, _time_item(setup, store, members), str(setup.num_layers))
        paths = {str(member.budget): member.path for member in members}
        section["rows"] += [
            interval.row(metric=metric, family=family, mix=mix, path=paths.get(mix))
            for metric, by_mix in timings.items()
            for mix, interval in by_mix.items()
        ]
    return section


def _families(setup: Setup) -> dict[str, list[Member]]:
    found = choices(setup)
    return {name: found[name] for name in FAMILIES if name in found}


def _equal_members(setup: Setup, members: list[Member]) -> list[Member]:
    """As many paths of one depth through the model's own weights; none for weights that are tuned for each budget."""
    if any(member.checkpoint != setup.checkpoint for member in members):
        return []
    paths = equal_paths(setup, len(members))
    return [Member(LayerPath.parse(path, setup.num_layers).budget, setup.checkpoint, path) for path in paths]


def _equal_items(setup: Setup, members: list[Member]) -> list[WorkItem]:
    """The items that answer greedily along paths of one depth."""
    equal = _equal_members(setup, members)
    return generate_items(setup, setup.checkpoint, [member.path for member in equal]) if equal else []


def _time_item(setup: Setup, store: ItemStore, members: list[Member]) -> WorkItem:
    """The item that times each candidate and the mix of the oracle's choice at its matching budget."""
    knapsack = Knapsack(family_generations(setup, store, members).rouge_l, [member.budget for member in members])
    mix = mixed_batch(members, _matching_choice(knapsack), setup.timed_batch)
    return time_item(setup, {**batches_alone(members, setup.timed_batch), MIX: mix})


def _matching_choice(knapsack: Knapsack) -> Integers:
    return knapsack.choose(knapsack.smallest_budget(float(knapsack.scores[:, -1].mean())))


def _add_means(section: dict[str, Any], family: str, scores: OracleScores) -> None:
    assert scores.sampled is not None, "texts are drawn"
    rows = section["rows"]
    tables: dict[str, Floats] = {
        "mean": scores.greedy,
        "best_up_to": np.maximum.accumulate(scores.greedy, axis=1),
        "mean_sampled": scores.sampled.mean(0),
        "best_of_draws": scores.best_of_draws(),
        "best_of_draws - mean_sampled": scores.best_of_draws() - scores.sampled.mean(0),
    }
    for metric, table in tables.items():
        interval = bootstrap_mean(table, resamples=scores.resamples)
        for column, budget in enumerate(scores.costs):
            rows.append(interval.at(column).row(metric=metric, family=family, budget=budget))
    depths = scores.best_of_depths()
    of_full = depths - scores.sampled[:, :, -1].mean(0)
    for metric, values in (("best_of_depths", depths), ("best_of_depths - mean_sampled", of_full)):
        rows.append(bootstrap_mean(values, resamples=scores.resamples).row(metric=metric, family=family))
    # How far the same prompt's texts differ at equal depth: the noise that any choice on one text drinks from.
    spread = np.sqrt(scores.sampled.var(0, ddof=1).mean(0))
    for column, budget in enumerate(scores.costs):
        rows.append(point(spread[column], metric="sd_of_draws", family=family, budget=budget))


def _add_matching(section: dict[str, Any], family: str, scores: OracleScores) -> None:
    assert scores.sampled is not None, "texts are drawn"
    null, _, null_matching = scores.null_models()
    found = {"oracle": scores.matching_budget}
    if "equal depth, greedy" in scores.controls:
        found["equal depth, greedy"] = scores.matching_budget_of(scores.controls["equal depth, greedy"], scores.greedy)
    for control in ("in-sample", "cross-fitted", "cross-fitted means", "equal depth"):
        found[control] = scores.matching_budget_of(scores.controls[control], scores.sampled.mean(0))
    found["null"] = Matching(percentiles(null_matching[0], null_matching[1:]), 0.0)
    _add_matching_rows(section, family, scores.costs[-1], found)
    section["null_model"].append(
        {"family": family, "sd": round(null.sd, 5), "means": [round(mean, 6) for mean in null.means]}
        | {"matching_budget": point(null_matching[0])["value"]}
    )
    counts = np.bincount(_matching_choice(scores.knapsack), minlength=len(scores.costs))
    section["histogram"].append(
        {"family": family, "at": point(scores.matching_budget.budget.value)["value"]}
        | {"counts": {str(budget): int(count) for budget, count in zip(scores.costs, counts, strict=True)}}
    )


def _add_matching_rows(
    section: dict[str, Any], family: str, num_layers: int, found: dict[str, Matching], suffix: str = ""
) -> None:
    """never: the share of resamples in which the target is never reached; they count as infinite."""
    for control, matching in found.items():
        labels = {"family": family, "control": control, "never": round(matching.never, 4)}
        section["rows"].append(matching.budget.row(metric=f"matching_budget{suffix}", **labels))
        share = Interval(*(bound / num_layers for bound in matching.budget))
        section["rows"].append(share.row(metric=f"matching_share{suffix}", **labels))


def _add_gains(
    section: dict[str, Any], family: str, scores: OracleScores, suffix: str = "", names: dict[str, str] | None = None
) -> None:
    """Gain over random assignment at the matching budget and at shares of the depth, what survives, and the ceiling.

    Budgets that leave no choice, those of the cheapest path, are left out. names: what controls are called.
    """
    num_layers = scores.costs[-1]
    matching = scores.matching_budget if not suffix else scores.matching_budget_of(_oracle(scores), scores.greedy)
    places = {"matching": matching.budget.value} if np.isfinite(matching.budget.value) else {}
    places |= {name: share * num_layers for name, share in _PLACES.items()}
    for name, budget in places.items():
        column = scores.at(budget)
        if column == 0:
            continue
        labels = {"family": family, "place": name, "at": round(float(scores.grid[column]), 3)}
        for control, choice in scores.controls.items():
            called = (names or {}).get(control, control)
            for metric in ("score", "random", "gain"):
                interval = scores.interval(getattr(choice, metric)[:, column])
                section["rows"].append(interval.row(metric=metric + suffix, control=called, **labels))
            reference = REFERENCES.get(control)
            if reference is None:
                continue
            share = scores.surviving_share(control, reference, column)
            own = {"control": called, "reference": (names or {}).get(reference, reference), **labels}
            section["rows"].append(scores.interval(share).row(metric="surviving_share" + suffix, **own))
            if control == "cross-fitted":
                kept = np.clip(share, 0.0, 1.0)
                section["rows"].append(scores.interval(np.sqrt(kept)).row(metric="ceiling", **own))
                section["rows"].append(scores.interval(np.sqrt(1 - kept)).row(metric="luck", **own))


def _oracle(scores: OracleScores) -> Choice:
    return scores.controls["oracle"]


def _add_likelihoods(
    setup: Setup,
    section: dict[str, Any],
    family: str,
    store: ItemStore,
    members: list[Member],
) -> None:
    """The oracle on log-likelihoods: for each reference, and for each of its tokens."""
    costs = tuple(member.budget for member in members)
    equal = _equal_members(setup, members)
    found = member_likelihoods(setup, store, members)
    alike = member_likelihoods(setup, store, equal) if equal else None
    section["n_nats"] = len(found.nats)
    by_sequence = OracleScores(
        costs, found.scores, resamples=setup.resamples, equal=None if alike is None else alike.scores
    )
    means = by_sequence.interval(by_sequence.means(-by_sequence.greedy))
    best = by_sequence.interval(by_sequence.means(-np.maximum.accumulate(by_sequence.greedy, axis=1)))
    for column, budget in enumerate(costs):
        for metric, interval in (("mean", means), ("best_up_to", best)):
            row = interval.at(column).row(metric=metric + NATS, family=family, budget=budget)
            section["rows"].append(row)
    few, few_alike = (None if each is None else each.first(setup.num_judged) for each in (found, alike))
    assert few is not None, "what was found is there"
    by_token = _by_token(setup, costs, few, few_alike)
    section["tokens"] = len(by_token.greedy)
    for scores, names in ((by_sequence, {}), (by_token, _PER_TOKEN)):
        matching = {
            names.get(control, control): scores.matching_budget_of(choice, scores.greedy)
            for control, choice in scores.controls.items()
        }
        _add_matching_rows(section, family, costs[-1], matching, NATS)
        _add_gains(section, family, scores, NATS, names)


_PER_TOKEN = {"oracle": "oracle per token", "equal depth, greedy": "equal depth per token"}


def _by_token(setup: Setup, costs: tuple[int, ...], found: Likelihoods, alike: Likelihoods | None) -> OracleScores:
    """Each token of the references scored by itself; sequences are what is resampled."""
    return OracleScores(
        costs,
        -found.token_nats,
        resamples=setup.resamples,
        equal=None if alike is None else -alike.token_nats,
        units=found.token_units,
    )


def _add_curves(section: dict[str, Any], family: str, scores: OracleScores) -> None:
    budgets = [round(float(budget), 3) for budget in scores.grid]
    curves = {name: choice.score for name, choice in scores.controls.items()}
    curves["random, as the oracle's"] = scores.controls["oracle"].random
    curves["random, as in-sample"] = scores.controls["in-sample"].random
    curves["static mixture"] = scores.static
    for name, values in curves.items():
        interval = scores.interval(values)
        ends = {"values": _rounded(interval.value), "low": _rounded(interval.low), "high": _rounded(interval.high)}
        section["curves"].append({"family": family, "name": name, "budgets": budgets, **ends})
    _, null_curve, _ = scores.null_models(resamples=0)
    null = {"values": _rounded(null_curve), "low": None, "high": None}
    section["curves"].append({"family": family, "name": "null", "budgets": budgets, **null})


def _rounded(curve: Floats) -> list[float]:
    return [round(float(value), 5) for value in curve]


def _notes(setup: Setup) -> list[str]:
    return [
        f"Candidates: {', '.join(map(str, (*setup.candidates, setup.num_layers)))} layers. Greedy texts for the "
        f"oracle; {len(setup.sample_seeds)} draws at temperature {setup.temperature:g} and top_p {setup.top_p:g} "
        "for the controls.",
        "oracle: knapsack by dynamic programming on ROUGE-L of the greedy texts, which then judge it. in-sample: the "
        "same with one draw. Curves and intervals use the knapsack's convex hulls, which differ from it by less than a "
        "part of one sequence.",
        "random: the expectation of dealing the histogram of the choice to the sequences at random; gain: score minus "
        "random, so it is what knowing the sequence is worth.",
        "cross-fitted: chosen on one draw, judged on the others. cross-fitted means: chosen on the mean of half of the "
        "draws, judged on the other half. cross-fitted greedy: chosen on the mean of all draws, judged on the greedy "
        "texts. surviving_share: their gain as a share of that of in-sample, or of oracle for the last.",
        "equal depth: the oracle on draws that are all of full depth, means shifted to those of the depths. null: the "
        "means plus independent normal noise, fitted to the mean of the best of all candidates. Neither knows depth.",
        "best_of_draws: the best of as many draws at one depth as there are candidates.",
        "equal depth, greedy: the oracle on greedy texts along as many paths of one depth, the deepest candidate's and "
        "neighbours of it, means shifted to those of the depths. ceiling: the square root of the surviving share, what "
        "a choice by expected scores keeps where scores are a signal and noise, both normal; luck: sqrt(1 - share).",
        "never: the share of resamples that never reach the target; they count as infinite, and an interval that holds "
        "them has no upper end.",
        "Metrics that end in _nats: the mean log-likelihood of a token of the reference in place of ROUGE-L "
        "(mean_nats, best_up_to_nats: minus that). It has no draws; equal depth is its control. per token: a depth for "
        "each token of the references, each scored by a pass whose tokens all ran that depth.",
    ]
