"""What decides the depth that the oracle gives a sequence: the fourth open question of arXiv 2410.20022."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynskip.evaluation.routers.path_router import Integers
from dynskip.evaluation.stats.decisions import (
    correlations,
    explained_by_groups,
    false_discovery,
    permutation_p,
    spearman,
    spearman_p,
    spearman_within,
    spearman_within_p,
)
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap, bootstrap_mean
from dynskip.evaluation.stats.knapsack import Knapsack, operating_points
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.likelihoods import member_items, member_likelihoods
from dynskip.evaluation.tasks.path_families import Member, choices, family_generations, family_items, notes_on_choices
from dynskip.evaluation.tasks.prompt_facts import NUMBERS, facts_items, read_numbers
from dynskip.evaluation.tasks.routes import reader_of

NUM_BINS = 5
# Correlations that no question is asked of: what the oracle itself looks at, and what goes with it.
YARDSTICKS = {"": ("full_rouge_l", "sd_of_draws"), "_nats": ("full_loss",)}
_LEAST = 3  # sequences that a correlation takes


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: greedy generations and likelihoods along the oracle's candidates, and the facts of the prompts."""
    items: list[WorkItem] = []
    for name, members in choices(setup).items():
        if not setup.likelihood_only:
            items += family_items(setup, members)
        items += member_items(setup, members)
        items += facts_items(setup, reader_of(setup, name), setup.split)
    return items


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: by family, score, budget and feature how the chosen depth follows the feature, with intervals."""
    rows: list[dict[str, Any]] = []
    notes = [
        "Depths are those that the exact knapsack chooses at the mean budgets named, on greedy ROUGE-L, and in metrics "
        "that end in _nats on the log-likelihood of the references.",
        "pearson, spearman, spearman_within, binned_depth: without the sequences that score alike on every path, ties, "
        "which the knapsack gives the cheapest path whatever they are; num is how many are left. spearman_within: of "
        "ranks less the mean of their type of task. q: p, adjusted by Benjamini and Hochberg for all rank correlations "
        "of the section but the yardsticks'.",
        "full_rouge_l, and full_loss for depths by log-likelihood, are what the oracle itself looks at: a sequence "
        "that scores high at full depth is one that it has reason to give layers to; and sd_of_draws goes with the "
        "first. Yardsticks, not findings.",
        "prefill_entropy is that of the token that follows the prompt, at full depth; sd_of_draw_lengths the standard "
        "deviation of the tokens of a prompt's draws at full depth: neither takes a reference. sd_of_draws is that of "
        "their ROUGE-L, which takes one.",
        "Types of tasks are named by the verb of the instruction; explained_by_task is the share of the variance of "
        "depth between types, with the probability that shuffled types explain as much.",
        *notes_on_choices(setup),
    ]
    for family, members in choices(setup).items():
        likelihoods = member_likelihoods(setup, store, members)
        costs = [member.budget for member in members]
        facts = facts_items(setup, reader_of(setup, family), setup.split)
        known = read_numbers(store, facts)
        assert set(known) == set(NUMBERS), "facts hold every number"
        known |= {"full_loss": -likelihoods.scores[:, -1], "prefill_entropy": likelihoods.entropy[:, -1]}
        tasks = np.array(store.column(facts, "task_type"))
        judged = {"_nats": (likelihoods.scores, known)}
        draws = None
        if not setup.likelihood_only:
            generations = family_generations(setup, store, members)
            of_texts = {name: values[: setup.prompts] for name, values in known.items()}
            of_texts |= {
                "generated_length": generations.num_tokens[:, -1].astype(np.float64),
                "full_rouge_l": generations.rouge_l[:, -1],
            }
            draws = _draws(setup, store, members)
            if draws is None:
                notes.append(
                    f"{family}: sd_of_draws and the reliability of depths need the draws of `dynskip eval oracle`."
                )
            else:
                rouge, lengths = draws
                of_texts["sd_of_draws"] = rouge[:, :, -1].std(0, ddof=1)
                of_texts["sd_of_draw_lengths"] = lengths[:, :, -1].std(0, ddof=1)
            judged = {"": (generations.rouge_l, of_texts), **judged}
        for suffix, (scores, features) in judged.items():
            knapsack = Knapsack(scores, costs)
            depths = {at: _depths(costs, knapsack.choose(at)) for at in operating_points(scores, costs)}
            differs = np.ptp(scores, axis=1) > 0
            for at, depth in depths.items():
                labels = {"family": family, "at": at}
                rows.append(bootstrap_mean(~differs).row(metric=f"ties{suffix}", **labels))
                if differs.sum() >= _LEAST:
                    types = tasks[: len(depth)][differs]
                    for name, feature in features.items():
                        rows += _related(setup, suffix, name, feature[differs], depth[differs], types, labels)
                rows += _by_task(suffix, tasks[: len(depth)], depth, labels)
            if not suffix and draws is not None:
                for at, interval in _reliability(costs, draws[0], list(depths)).items():
                    rows.append(interval.row(metric="reliability", family=family, at=at))
            if not depths:
                notes.append(f"{family}: the cheapest path is as good as any, so that no depth is chosen.")
    _add_q(rows)
    found = {"n": setup.num_judged, "n_nats": setup.num_likelihoods, "corrected": "Benjamini and Hochberg"}
    return {**found, "seeds": 1, "rows": rows, "notes": notes}


def _depths(costs: list[int], chosen: Integers) -> Floats:
    return np.array(costs, dtype=np.float64)[chosen]


def _draws(setup: Setup, store: ItemStore, members: list[Member]) -> tuple[Floats, Floats] | None:
    """[M, N, K] each: ROUGE-L and tokens of a family's draws; None where those of fewer than two seeds are done."""
    seeds = [seed for seed in setup.sample_seeds if not store.missing(family_items(setup, members, seed))]
    if len(seeds) < 2:
        return None
    drawn = [family_generations(setup, store, members, seed) for seed in seeds]
    return np.stack([each.rouge_l for each in drawn]), np.stack([each.num_tokens for each in drawn]).astype(np.float64)


def _related(
    setup: Setup, suffix: str, name: str, feature: Floats, depth: Floats, types: Any, labels: dict[str, Any]
) -> list[dict[str, Any]]:
    """The correlations of a feature with the depth, over all sequences and within types of task, and the bins."""
    rows = []
    num = {"num": len(depth)}
    for metric, interval in correlations(feature, depth, resamples=setup.resamples).items():
        p = {"p": round(spearman_p(feature, depth), 8)} if metric == "spearman" else {}
        rows.append(interval.row(metric=metric + suffix, feature=name, **num, **p, **labels))
    _, groups = np.unique(types, return_inverse=True)
    within = bootstrap(spearman_within, feature, depth, groups, resamples=setup.resamples)
    p = {"p": round(spearman_within_p(feature, depth, groups), 8)}
    rows.append(within.row(metric=f"spearman_within{suffix}", feature=name, **num, **p, **labels))
    return rows + _bins(suffix, name, feature, depth, labels)


def _add_q(rows: list[dict[str, Any]]) -> None:
    """q beside each p of a correlation that is no yardstick."""
    tested = [
        row
        for suffix, yardsticks in YARDSTICKS.items()
        for row in rows
        if row["metric"] in (f"spearman{suffix}", f"spearman_within{suffix}") and row["feature"] not in yardsticks
    ]
    for row, q in zip(tested, false_discovery([row["p"] for row in tested]), strict=True):
        row["q"] = round(q, 8)


def _reliability(costs: list[int], draws: Floats, budgets: list[float]) -> dict[float, Interval]:
    """By budget the rank correlation of the depths chosen on two draws, of draws [M, N, K].

    Pairs of draws that share none count alike.
    """
    knapsacks = [Knapsack(scores, costs) for scores in draws]
    pairs = [(first, first + 1) for first in range(0, len(draws) - 1, 2)]

    def mean_correlation(*depths: Floats) -> float:
        return float(np.mean([spearman(depths[first], depths[second]) for first, second in pairs]))

    return {
        at: bootstrap(mean_correlation, *(_depths(costs, knapsack.choose(at)) for knapsack in knapsacks))
        for at in budgets
    }


def _bins(suffix: str, name: str, feature: Floats, depth: Floats, labels: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean depth in bins of about equally many sequences; equal values stay in one bin."""
    edges = np.unique(np.quantile(feature, np.linspace(0, 1, NUM_BINS + 1)))
    place = np.clip(np.searchsorted(edges, feature, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for number in np.unique(place):
        inside = place == number
        bounds = {"bin_low": float(feature[inside].min()), "bin_high": float(feature[inside].max())}
        bounds["bin_median"] = float(np.median(feature[inside]))
        interval = bootstrap_mean(depth[inside])
        labelled = {"feature": name, **bounds, "num": int(inside.sum()), **labels}
        rows.append(interval.row(metric=f"binned_depth{suffix}", **labelled))
    return rows


def _by_task(suffix: str, tasks: Any, depth: Floats, labels: dict[str, Any]) -> list[dict[str, Any]]:
    names, groups = np.unique(tasks, return_inverse=True)
    rows = []
    for number in np.argsort(-np.bincount(groups), kind="stable"):
        inside = depth[groups == number]
        named = {"task_type": str(names[number]), "num": len(inside), **labels}
        rows.append(bootstrap_mean(inside).row(metric=f"mean_depth{suffix}", **named))
    p = permutation_p(depth, groups)
    explained = bootstrap(explained_by_groups, depth, groups.astype(np.float64))
    rows.append(explained.row(metric=f"explained_by_task{suffix}", p=round(p, 6), **labels))
    return rows
