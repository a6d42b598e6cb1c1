"""A router that sees the prompt only: which share of the oracle's gain it captures, and what it costs.

Trained on prompts that no weights were trained on, on means of draws and on log-likelihoods; the third of the open
questions of arXiv 2410.20022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynskip.evaluation.routers.gain_share import captured_share, captured_share_difference
from dynskip.evaluation.routers.path_router import Integers, PredictorName
from dynskip.evaluation.stats.decisions import false_discovery
from dynskip.evaluation.stats.intervals import Interval, bootstrap, bootstrap_mean, medians
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.path_families import choices, notes_on_choices
from dynskip.evaluation.tasks.router_cost import overhead_items
from dynskip.evaluation.tasks.routes import (
    FITTED,
    TRAINED,
    Learned,
    Problem,
    learned_routes,
    likelihood_problem,
    problem,
    problem_items,
    routes,
    trained_items,
)
from dynskip.evaluation.tasks.timing import Part, mixed_batch, read_timings, time_item

_FULL = "full"
_TIMED = (FITTED, TRAINED)  # each in an item of its own
# Shares of the oracle's gain, each beside the p-value of its being none: by score, and of what more prompts change.
_CAPTURED = ("captured_share", "captured_share_nats")
MORE_PROMPTS = "captured_share_nats - fewest prompts"


def plan(setup: Setup, store: ItemStore) -> list[WorkItem]:
    """The items: draws, likelihoods and facts of prompts to learn from and to judge on, then what routers choose that
    take long to train, and the times of what was chosen."""
    items = [item for name in choices(setup) for item in problem_items(setup, name)]
    if setup.likelihood_only:
        return items
    items += overhead_items(setup)
    if store.missing(items):
        return items
    for name in choices(setup):
        trained = [item for alike in trained_items(setup, store, name).values() for item in alike]
        items += [*trained, _time_item(setup, store, name, FITTED)]
        if not store.missing(trained):
            items.append(_time_item(setup, store, name, TRAINED))
    return items


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: by family, predictor and budget what the router scores, captures, costs and saves."""
    rows: list[dict[str, Any]] = []
    if not setup.likelihood_only:
        rows += _text_rows(setup, store)
    rows += [row for name in choices(setup) for row in _likelihood_rows(setup, store, name)]
    for metric in (*_CAPTURED, MORE_PROMPTS):
        add_q(rows, metric)
    learned = f"Learned from {setup.train_prompts or setup.prompts} prompts of the {setup.learn_split} split"
    notes = [
        f"{learned}, trained once for each of {setup.seeds} seeds, which count alike.",
        "Metrics that end in _nats: routers that learn from the mean log-likelihood of a token of the reference and "
        f"are judged by it, on {setup.num_likelihoods} prompts; features: embedding (means of token embeddings, and "
        "counts), state (the full model's state at the prompt's last token), both, or entropy (of what follows the "
        "prompt, along the cheapest path); size: prompts learned from.",
        "cascade: the cheapest path, and full depth where that path's entropy is above a threshold. The shallow prompt "
        "pass that it takes is not among its layers.",
        "random is the expected score of the router's own depths dealt to the prompts at random; oracle is the exact "
        "knapsack on the test scores at the router's own mean cost; captured_share is the place between them.",
        "p of a captured_share: of its being none, its error taken as normal from the interval; q: p, adjusted by "
        "Benjamini and Hochberg for all routers of the score, of every family, size and budget.",
        f"{MORE_PROMPTS}: the share that a router captures once it has learned from size prompts minus that from "
        "fewest of them, paired by prompt; q among these alone.",
        "over_static is the router's score minus that of the best mix of fixed budgets of the same mean cost.",
        *notes_on_choices(setup),
    ]
    if not setup.likelihood_only:
        notes += [
            f"By ROUGE-L: judged on {setup.prompts} prompts of the {setup.split} split, as a mean over "
            f"{len(setup.sample_seeds)} draws. transformer is one encoder layer over the prompt's token embeddings, "
            "trained until prompts held out gain nothing; the others read means of the embeddings, and counts.",
            "overhead_ms is the time from token ids to a path; ms_per_token is that of a decode step of a batch whose "
            "paths have the router's histogram, without the overhead.",
        ]
    found = {"n": setup.num_judged, "n_nats": setup.num_likelihoods, "learned_on": setup.learn_split}
    return {**found, "seeds": setup.seeds, "rows": rows, "notes": notes}


def _text_rows(setup: Setup, store: ItemStore) -> list[dict[str, Any]]:
    """What routers by ROUGE-L are worth and cost, and the time of full depth."""
    rows: list[dict[str, Any]] = []
    overhead = {item.path: store.result(item) for item in overhead_items(setup)}
    for name in choices(setup):
        task = problem(setup, store, name)
        timings = {alike: read_timings(store, _time_item(setup, store, name, alike), _FULL) for alike in _TIMED}
        timed = [(routed, timings[alike]) for alike in _TIMED for routed in routes(setup, store, name, alike)]
        for routed, by_metric in sorted(timed, key=lambda pair: pair[0].at):
            labels = {"family": name, "predictor": routed.predictor, "at": routed.at}
            captured = captured_share(task.test_scores, routed.chosen, routed.oracle)
            layers = bootstrap_mean(np.array(task.costs, dtype=np.float64)[routed.chosen].mean(0))
            share = {metric: captured.pop(metric) for metric in ("captured_share",) if metric in captured}
            measured = {
                **captured,
                "over_static": _over_static_mix(task, routed.chosen, layers.value),
                "layers": layers,
                **{metric: by_label[routed.label] for metric, by_label in by_metric.items()},
                "overhead_ms_single": _median(overhead[routed.predictor]["single_ms"]),
                "overhead_ms_batched": _median(overhead[routed.predictor]["batched_ms"]),
                **share,
            }
            rows += [interval.row(metric=metric, **labels) for metric, interval in measured.items()]
        full = timings[FITTED]["ms_per_token"][_FULL]
        rows.append(full.row(metric="ms_per_token", family=name, predictor=_FULL, at=float(setup.num_layers)))
    return rows


def _likelihood_rows(setup: Setup, store: ItemStore, family: str) -> list[dict[str, Any]]:
    """What routers by log-likelihood are worth, at each budget, size and kind of features."""
    task = likelihood_problem(setup, store, family)
    costs = np.array(task.costs, dtype=np.float64)
    rows = []
    every = list(learned_routes(setup, store, family))
    for routed in every:
        labels: dict[str, Any] = {"family": family, **_labels(routed), "size": routed.size, "at": routed.at}
        layers = bootstrap_mean(costs[routed.chosen].mean(0), resamples=setup.resamples)
        captured = captured_share(task.test_scores, routed.chosen, routed.oracle, resamples=setup.resamples)
        captured["score"] = captured.pop("rouge_l")
        captured |= {"over_static": _over_static_mix(task, routed.chosen, layers.value), "layers": layers}
        rows += [interval.row(metric=f"{metric}_nats", **labels) for metric, interval in captured.items()]
    for few, many in learning_curves(every):
        difference = captured_share_difference(
            task.test_scores, many.chosen, many.oracle, few.chosen, few.oracle, resamples=setup.resamples
        )
        if difference is not None:
            labels = {"family": family, **_labels(many), "size": many.size, "fewest": few.size, "at": many.at}
            rows.append(difference.row(metric=MORE_PROMPTS, **labels))
    return rows


def _labels(routed: Learned) -> dict[str, str]:
    return {"predictor": routed.predictor, "features": routed.features}


def learning_curves(every: Sequence[Learned]) -> list[tuple[Learned, Learned]]:
    """Of each kind of router at each budget the one that saw fewest prompts and the one that saw most, of several."""
    curves: dict[tuple[str, str, float], list[Learned]] = {}
    for routed in every:
        curves.setdefault((routed.predictor, routed.features, routed.at), []).append(routed)
    ordered = (sorted(curve, key=lambda routed: routed.size) for curve in curves.values())
    return [(curve[0], curve[-1]) for curve in ordered if curve[0].size < curve[-1].size]


def add_q(rows: Sequence[dict[str, Any]], metric: str) -> None:
    """p beside each value of ``metric`` with an interval, and q, adjusted for all of them."""
    tested = [row for row in rows if row["metric"] == metric and row.get("low") is not None]
    for row in tested:
        row["p"] = round(Interval(row["value"], row["low"], row["high"]).p, 8)
    for row, q in zip(tested, false_discovery([row["p"] for row in tested]), strict=True):
        row["q"] = round(q, 8)


def _time_item(setup: Setup, store: ItemStore, family: str, predictors: tuple[PredictorName, ...]) -> WorkItem:
    """The item that times batches with the histogram of each router's paths, in turns with full passes."""
    members = problem(setup, store, family).members
    batches = {_FULL: [Part(members[-1].checkpoint.hash, members[-1].path, setup.timed_batch)]}
    for routed in routes(setup, store, family, predictors):
        batches[routed.label] = mixed_batch(members, routed.chosen, setup.timed_batch)
    return time_item(setup, batches)


def _over_static_mix(task: Problem, chosen: Integers, cost: float) -> Interval:
    """The router's score minus that of the best mix of two fixed budgets of the same mean cost, paired."""
    costs, scores = np.array(task.costs, dtype=np.float64), task.test_scores
    means = scores.mean(0)
    mixes = [
        (share * means[low] + (1 - share) * means[high], share, low, high)
        for low in range(len(costs))
        for high in range(len(costs))
        if costs[low] <= cost <= costs[high]
        for share in [1.0 if costs[low] == costs[high] else (costs[high] - cost) / (costs[high] - costs[low])]
    ]
    _, share, low, high = max(mixes)
    mixed = share * scores[:, low] + (1 - share) * scores[:, high]
    picked = scores[np.arange(len(scores)), chosen].mean(0)
    return bootstrap_mean(picked - mixed)


def _median(samples: Sequence[float]) -> Interval:
    return bootstrap(medians, np.array(samples, dtype=np.float64), batched=True)
