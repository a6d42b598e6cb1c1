"""A router that sees the prompt only: which share of the oracle's gain it captures, and what it costs.

Trained on the oracle's choices on prompts of the training split; the third of the open questions of arXiv 2410.20022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynskip.evaluation.routers.gain_share import captured_share
from dynskip.evaluation.stats.intervals import Interval, bootstrap, bootstrap_mean
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.path_families import choices, notes_on_choices
from dynskip.evaluation.tasks.prompt_facts import facts_items
from dynskip.evaluation.tasks.router_cost import overhead_items
from dynskip.evaluation.tasks.routes import (
    FITTED,
    TRAIN,
    TRAINED,
    FamilyRoutes,
    Routed,
    reader_of,
    routes,
    split_items,
    trained_items,
)
from dynskip.evaluation.tasks.timing import Part, mixed_batch, read_timings, time_item

_FULL = "full"


def plan(setup: Setup, store: ItemStore) -> list[WorkItem]:
    """The items: generations and facts of training and test prompts, then what routers choose that take long to train,
    and the times of what was chosen."""
    items = overhead_items(setup)
    for name, members in choices(setup).items():
        reader = reader_of(setup, name)
        for split in (TRAIN, setup.split):
            items += [*split_items(setup, members, split), *facts_items(setup, reader, split)]
    if store.missing(items):
        return items
    for name in choices(setup):
        trained = [item for alike in trained_items(setup, store, name).values() for item in alike]
        items += [*trained, _time_item(setup, routes(setup, store, name, FITTED))]
        if not store.missing(trained):
            items.append(_time_item(setup, routes(setup, store, name, TRAINED)))
    return items


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: by family, predictor and budget what the router scores, captures, costs and saves."""
    rows: list[dict[str, Any]] = []
    overhead = {item.path: store.result(item) for item in overhead_items(setup)}
    for name in choices(setup):
        fitted, trained = (routes(setup, store, name, predictors) for predictors in (FITTED, TRAINED))
        timings = {found: read_timings(store, _time_item(setup, found), _FULL) for found in (fitted, trained)}
        timed_as = {routed: timings[found] for found in timings for routed in found.routed}
        by_budget = sorted((*fitted.routed, *trained.routed), key=lambda routed: routed.at)
        found = FamilyRoutes(fitted.members, fitted.scores, tuple(by_budget))
        for routed in found.routed:
            labels = {"family": name, "predictor": routed.predictor, "at": routed.at}
            captured = captured_share(found.scores, routed.chosen, routed.oracle)
            layers = bootstrap_mean(np.array(found.costs, dtype=np.float64)[routed.chosen].mean(0))
            measured = {
                "rouge_l": captured.score,
                "random": captured.random,
                "oracle": captured.oracle,
                "gain": captured.gain,
                "over_static": _over_static_mix(found, routed, layers.value),
                "layers": layers,
                **{metric: timed[routed.label] for metric, timed in timed_as[routed].items()},
                "overhead_ms_single": _median(overhead[routed.predictor]["single_ms"]),
                "overhead_ms_batched": _median(overhead[routed.predictor]["batched_ms"]),
            }
            if captured.share is not None:
                measured["captured_share"] = captured.share
            rows += [interval.row(metric=metric, **labels) for metric, interval in measured.items()]
        full = timings[fitted]["ms_per_token"][_FULL]
        rows.append(full.row(metric="ms_per_token", family=name, predictor=_FULL, at=float(setup.num_layers)))
    notes = [
        f"Learned from {setup.train_prompts or setup.prompts} training prompts, judged on {setup.prompts} prompts "
        f"of the {setup.split} split; trained once for each of {setup.seeds} seeds, which count alike.",
        "transformer is one encoder layer over the prompt's token embeddings, trained until prompts held out gain "
        "nothing; the others read means of the embeddings, and counts.",
        "random is the expected score of the router's own depths dealt to the prompts at random; oracle is the exact "
        "knapsack on the test scores at the router's own mean cost; captured_share is the place between them.",
        "over_static is the router's score minus that of the best mix of fixed budgets of the same mean cost.",
        "overhead_ms is the time from token ids to a path; ms_per_token is that of a decode step of a batch whose "
        "paths have the router's histogram, without the overhead.",
        *notes_on_choices(setup),
    ]
    return {"n": setup.prompts, "seeds": setup.seeds, "rows": rows, "notes": notes}


def _time_item(setup: Setup, found: FamilyRoutes) -> WorkItem:
    """The item that times batches with the histogram of each router's paths, in turns with full passes."""
    full = found.members[-1]
    batches = {_FULL: [Part(full.checkpoint.hash, full.path, setup.timed_batch)]}
    for routed in found.routed:
        batches[routed.label] = mixed_batch(found.members, routed.chosen, setup.timed_batch)
    return time_item(setup, batches)


def _over_static_mix(found: FamilyRoutes, routed: Routed, cost: float) -> Interval:
    """The router's score minus that of the best mix of two fixed budgets of the same mean cost, paired."""
    costs, means = np.array(found.costs, dtype=np.float64), found.scores.mean(0)
    mixes = [
        (share * means[low] + (1 - share) * means[high], share, low, high)
        for low in range(len(costs))
        for high in range(len(costs))
        if costs[low] <= cost <= costs[high]
        for share in [1.0 if costs[low] == costs[high] else (costs[high] - cost) / (costs[high] - costs[low])]
    ]
    _, share, low, high = max(mixes)
    mixed = share * found.scores[:, low] + (1 - share) * found.scores[:, high]
    picked = found.scores[np.arange(len(found.scores)), routed.chosen].mean(0)
    return bootstrap_mean(picked - mixed)


def _median(samples: Sequence[float]) -> Interval:
    return bootstrap(np.median, np.array(samples, dtype=np.float64))
