"""What decides the depth that the oracle gives a sequence: the fourth open question of arXiv 2410.20022."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynskip.evaluation.routers.path_router import Integers
from dynskip.evaluation.stats.intervals import (
    Floats,
    Interval,
    bootstrap,
    bootstrap_mean,
    correlations,
    explained_by_groups,
    permutation_p,
    spearman,
)
from dynskip.evaluation.stats.knapsack import Knapsack, operating_points
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.path_families import Member, choices, family_generations, family_items, notes_on_choices
from dynskip.evaluation.tasks.prompt_facts import NUMBERS, facts_items, read_numbers
from dynskip.evaluation.tasks.routes import reader_of

NUM_BINS = 5


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: greedy generations along the oracle's candidates, and the facts of the prompts."""
    items: list[WorkItem] = []
    for name, members in choices(setup).items():
        items += [*family_items(setup, members), *facts_items(setup, reader_of(setup, name), setup.split)]
    return items


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: by family, budget and feature how the chosen depth follows the feature, with intervals."""
    rows: list[dict[str, Any]] = []
    notes = [
        "Depths are those that the exact knapsack chooses on greedy ROUGE-L at the mean budgets named. A sequence that "
        "scores alike on every path, nothing for one, is given the cheapest.",
        "full_rouge_l is what the oracle itself looks at: a sequence that scores high at full depth is one that it has "
        "reason to give layers to. Its correlation is a yardstick, not a finding.",
        "Types of tasks are named by the verb of the instruction; explained_by_task is the share of the variance of "
        "depth between types, with the probability that shuffled types explain as much.",
        *notes_on_choices(setup),
    ]
    for family, members in choices(setup).items():
        generations = family_generations(setup, store, members)
        costs = [member.budget for member in members]
        facts = facts_items(setup, reader_of(setup, family), setup.split)
        features = read_numbers(store, facts)
        assert set(features) == set(NUMBERS), "facts hold every number"
        features["generated_length"] = generations.num_tokens[:, -1].astype(np.float64)
        features["full_rouge_l"] = generations.rouge_l[:, -1]
        tasks = store.column(facts, "task_type")
        knapsack = Knapsack(generations.rouge_l, costs)
        depths = {at: _depths(costs, knapsack.choose(at)) for at in operating_points(generations.rouge_l, costs)}
        reliable = _reliability(setup, store, members, list(depths))
        if not reliable:
            notes.append(f"{family}: the reliability of depths needs the sampled generations of `dynskip eval oracle`.")
        for at, depth in depths.items():
            labels = {"family": family, "at": at}
            for name, feature in features.items():
                for metric, interval in correlations(feature, depth).items():
                    rows.append(interval.row(metric=metric, feature=name, **labels))
                rows += _bins(name, feature, depth, labels)
            rows += _by_task(tasks, depth, labels)
            if at in reliable:
                rows.append(reliable[at].row(metric="reliability", **labels))
        if not depths:
            notes.append(f"{family}: the cheapest path is as good as any, so that no depth is chosen.")
    return {"n": setup.prompts, "seeds": 1, "rows": rows, "notes": notes}


def _depths(costs: list[int], chosen: Integers) -> Floats:
    return np.array(costs, dtype=np.float64)[chosen]


def _reliability(setup: Setup, store: ItemStore, members: list[Member], budgets: list[float]) -> dict[float, Interval]:
    """By budget the rank correlation of the depths chosen on two sampled generations; empty where none were sampled.

    Pairs of seeds that share no generation count alike.
    """
    seeds = [seed for seed in setup.sample_seeds if not store.missing(family_items(setup, members, seed))]
    if len(seeds) < 2:
        return {}
    costs = [member.budget for member in members]
    knapsacks = [Knapsack(family_generations(setup, store, members, seed).rouge_l, costs) for seed in seeds]
    pairs = [(first, first + 1) for first in range(0, len(seeds) - 1, 2)]

    def mean_correlation(*depths: Floats) -> float:
        return float(np.mean([spearman(depths[first], depths[second]) for first, second in pairs]))

    return {
        at: bootstrap(mean_correlation, *(_depths(costs, knapsack.choose(at)) for knapsack in knapsacks))
        for at in budgets
    }


def _bins(name: str, feature: Floats, depth: Floats, labels: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean depth in bins of about equally many sequences; equal values stay in one bin."""
    edges = np.unique(np.quantile(feature, np.linspace(0, 1, NUM_BINS + 1)))
    place = np.clip(np.searchsorted(edges, feature, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for number in np.unique(place):
        inside = place == number
        bounds = {"bin_low": float(feature[inside].min()), "bin_high": float(feature[inside].max())}
        interval = bootstrap_mean(depth[inside])
        rows.append(interval.row(metric="binned_depth", feature=name, **bounds, num=int(inside.sum()), **labels))
    return rows


def _by_task(tasks: list[str], depth: Floats, labels: dict[str, Any]) -> list[dict[str, Any]]:
    names, groups = np.unique(tasks, return_inverse=True)
    rows = []
    for number in np.argsort(-np.bincount(groups), kind="stable"):
        inside = depth[groups == number]
        named = {"task_type": str(names[number]), "num": len(inside), **labels}
        rows.append(bootstrap_mean(inside).row(metric="mean_depth", **named))
    p = permutation_p(depth, groups)
    explained = bootstrap(explained_by_groups, depth, groups.astype(np.float64))
    rows.append(explained.row(metric="explained_by_task", p=round(p, 6), **labels))
    return rows
