"""Learned controllers: scores against layers and against milliseconds (arXiv 2410.20022, section 3.2).

Does the hidden state help, and from which capacity on? Each recipe, over its trainings and its draws of noise, is held
against the measured frontier of recipes with a fixed input, which know the layer and nothing else, at as many layers;
and each controller against uniform paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynskip.controllers.storage import load_controller
from dynskip.evaluation.stats.decisions import false_discovery
from dynskip.evaluation.stats.frontiers import Comparison, Measured, compare
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap, bootstrap_mean, point
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.controller_runs import (
    ARGMAX,
    controlled_items,
    controlled_likelihood_items,
    timed_item,
)
from dynskip.evaluation.tasks.likelihoods import Likelihoods, member_items, member_likelihoods
from dynskip.evaluation.tasks.path_families import families, family_generations, family_items
from dynskip.evaluation.tasks.timing import read_timings

FIXED, STATIC = "fixed", "static"
# Repetitions from which on a comparison says something of a recipe, not of one training or one draw.
NUM_TRAININGS, NUM_NOISE_SEEDS = 3, 5
_FULL = "full"


@dataclass(frozen=True, eq=False)
class Point:
    """A controller, or a uniform path, as it did: per sequence [N] ROUGE-L, tokens, layers run and tokens decided.

    likelihood: the same of references, teacher-forced, where they were scored: minus nats, tokens, layers, decided.
    layer_shares: [L], the share of decided tokens that run each layer.
    """

    name: str
    labels: dict[str, Any]
    rouge_l: Floats
    num_tokens: Floats
    num_run: Floats
    num_decided: Floats
    likelihood: Measured | None = None
    layer_shares: Floats | None = None

    @property
    def layers(self) -> float:
        """Mean layers of a decided token."""
        return _mean_layers(self.num_run, self.num_decided)

    @property
    def by_rouge_l(self) -> Measured:
        """ROUGE-L of texts, at the layers of their decided tokens."""
        return Measured(self.rouge_l, np.ones_like(self.rouge_l), self.num_run, self.num_decided)


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: what every controller generates and how likely references are under it, the same along uniform paths,
    and the time of all in turns."""
    if not setup.controllers:
        return []
    members = families(setup)["paths"]
    items = [*family_items(setup, members), *member_items(setup, members)]
    for controller in setup.controllers:
        for seed in range(setup.controller_seeds + 1):
            items += controlled_items(setup, controller, seed)
            items += controlled_likelihood_items(setup, controller, seed)
    return [*items, *(timed_item(setup, setup.controllers, batch) for batch in (setup.timed_batch, 1))]


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section; without rows where the setup names no controller."""
    notes = [
        "Greedy tokens; the prompt runs all layers for controllers that decide per token, and the path for uniform "
        "ones. layers is the mean over decided tokens, which the first generated token and the prompt are not. nats: "
        "minus the log-likelihood of a token of the reference, teacher-forced, decided on in the same way.",
        "over_static: ROUGE-L minus that of two uniform paths, weighted so that their mean layers are the "
        "controller's own; paired by sequence. over_static_nats: the same of the log-likelihood of a token.",
        "over_fixed, over_fixed_nats: of a recipe, all its trainings and draws of noise together, minus the frontier "
        "of recipes with a fixed input at as many layers. Intervals resample trainings, draws and sequences. Beyond "
        "the layers of the fixed input nothing is made up: untested. q: p, adjusted by Benjamini and Hochberg for all "
        "recipes and both scores.",
        f"verdict: untested where the frontier does not reach, or with fewer than {NUM_TRAININGS} trainings of the "
        f"recipe or of a fixed one, or of sampled decisions fewer than {NUM_NOISE_SEEDS} draws; else better or worse "
        "where q is below 0.05, else open.",
        "The noise of sampled decisions is drawn by seed, sequence, layer and position. skip_rate: the share of "
        "decided tokens of generated texts that leave a layer out.",
        "Times are those of the likelier decisions; what a controller computes itself is in them.",
    ]
    if not setup.controllers:
        given = "No controller was given: name folders with --controller."
        return {"n": 0, "seeds": 0, "rows": [], "notes": [given]}
    static = _static_points(setup, store)
    learned = [
        _learned_point(setup, store, controller, seed)
        for controller in setup.controllers
        for seed in range(setup.controller_seeds + 1)
    ]
    batched, single = (
        read_timings(store, timed_item(setup, setup.controllers, batch), _FULL) for batch in (setup.timed_batch, 1)
    )
    times = {
        metric + suffix: timings[metric]
        for metric in batched
        for suffix, timings in (("", batched), ("_single", single))
    }
    rows: list[dict[str, Any]] = []
    for each in (*static, *learned):
        labels = {"controller": each.name, **each.labels}
        measured = {
            "rouge_l": bootstrap_mean(each.rouge_l, resamples=setup.resamples),
            "layers": bootstrap(_mean_layers, each.num_run, each.num_decided, resamples=setup.resamples),
            "num_tokens": bootstrap_mean(each.num_tokens, resamples=setup.resamples),
        }
        if each.likelihood is not None:
            nats, tokens = -each.likelihood.score, each.likelihood.weight
            measured["nats"] = bootstrap_mean(nats / tokens, tokens, resamples=setup.resamples)
        timed_as = each.labels["timed_as"]
        measured |= {metric: by_label[timed_as] for metric, by_label in times.items() if timed_as in by_label}
        rows += [interval.row(metric=metric, **labels) for metric, interval in measured.items()]
        if each.labels["kind"] == STATIC:
            continue
        if each.layer_shares is not None:
            skipped = 1 - each.layer_shares
            rows += [point(v, metric="skip_rate", layer=layer, **labels) for layer, v in enumerate(skipped)]
        difference = _over(each, static)
        if difference is not None:
            rows.append(bootstrap_mean(difference, resamples=setup.resamples).row(metric="over_static", **labels))
        by_nats = _over_static_nats(setup, each, static)
        if by_nats is not None:
            rows.append(by_nats.row(metric="over_static_nats", **labels))
    rows += _recipe_rows(setup, learned)
    found = {"n": setup.prompts, "n_nats": setup.num_likelihoods, "noise": "by sequence"}
    return {**found, "seeds": setup.controller_seeds, "rows": rows, "notes": notes}


def _mean_layers(num_run: Floats, num_decided: Floats) -> float:
    return float(num_run.sum() / max(num_decided.sum(), 1.0))


def _static_points(setup: Setup, store: ItemStore) -> list[Point]:
    members = families(setup)["paths"]
    generations = family_generations(setup, store, members)
    likelihoods = member_likelihoods(setup, store, members)
    points = []
    for column, member in enumerate(members):
        num_tokens = generations.num_tokens[:, column].astype(np.float64)
        decided = num_tokens - 1
        labels = {"kind": STATIC, "timed_as": member.path}
        scores = generations.rouge_l[:, column]
        likelihood = _static_likelihood(likelihoods, column, member.budget)
        points.append(Point(member.path, labels, scores, num_tokens, decided * member.budget, decided, likelihood))
    return points


def _static_likelihood(found: Likelihoods, column: int, budget: int) -> Measured:
    decided = np.maximum(found.num_tokens - 1, 0)
    return Measured(-found.nats[:, column], found.num_tokens, decided * budget, decided)


def _learned_point(setup: Setup, store: ItemStore, controller: ControllerFolder, seed: int) -> Point:
    items = controlled_items(setup, controller, seed)
    labels = {name: getattr(controller, name) for name in ("kind", "width", "alpha", "target_layers", "backbone")}
    labels |= {
        "recipe": _recipe(controller.recipe, seed),
        "training_seed": controller.training_seed,
        "parameters": num_parameters(controller),
        "kv_policy": controller.kv_policy,
        "choice": "argmax" if seed == ARGMAX else "sampled",
        "seed": seed,
        "timed_as": controller.label if seed == ARGMAX else None,
    }
    name = controller.label if seed == ARGMAX else f"{controller.label}, sampled {seed}"
    scores, lengths, text_runs, text_decided = (
        np.array(store.column(items, column), dtype=np.float64)
        for column in ("rouge_l", "num_tokens", "num_run", "num_decided")
    )
    runs = np.sum([store.result(item)["layer_runs"] for item in items], axis=0)
    scored = controlled_likelihood_items(setup, controller, seed)
    nats, tokens, num_run, num_decided = (
        np.array(store.column(scored, column), dtype=np.float64)
        for column in ("nats", "num_tokens", "num_run", "num_decided")
    )
    likelihood = Measured(-nats, tokens, num_run, num_decided)
    shares = runs / max(text_decided.sum(), 1.0)
    return Point(name, labels, scores, lengths, text_runs, text_decided, likelihood, shares)


def _over_static_nats(setup: Setup, each: Point, static: Sequence[Point]) -> Interval | None:
    """The log-likelihood of a token under a controller less that of uniform paths at as many layers; None beyond."""
    frontier = {other.name: [[other.likelihood]] for other in static if other.likelihood is not None}
    if each.likelihood is None or not frontier:
        return None
    return compare({"": [[each.likelihood]]}, frontier, setup.resamples)[""].difference


def _recipe(recipe: str, seed: int) -> str:
    return recipe if seed == ARGMAX else f"{recipe}, sampled"


def _recipe_rows(setup: Setup, learned: Sequence[Point]) -> list[dict[str, Any]]:
    """Each recipe that reads something against those with a fixed input that choose alike; on the same weights."""
    rows = []
    groups: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for each in learned:
        alike = (each.labels["choice"], each.labels["backbone"])
        groups.setdefault(alike, {}).setdefault(each.labels["recipe"], []).append(each)
    for recipes in groups.values():
        fixed = {name: points for name, points in recipes.items() if points[0].labels["kind"] == FIXED}
        others = {name: points for name, points in recipes.items() if name not in fixed}
        if not others or not fixed:
            continue
        for suffix, measure in _SCORES.items():
            found = compare(
                {name: _by_training(points, measure) for name, points in others.items()},
                {name: _by_training(points, measure) for name, points in fixed.items()},
                setup.resamples,
            )
            for name, comparison in found.items():
                reasons = _reasons(comparison, others[name], fixed)
                rows.append(_comparison_row(f"over_fixed{suffix}", name, others[name], comparison, reasons))
    tested = [row for row in rows if row["p"] is not None]
    for row, q in zip(tested, false_discovery([row["p"] for row in tested]), strict=True):
        row["q"] = round(q, 6)
    for row in rows:
        if row["reasons"]:
            row["verdict"] = "untested"
        elif row["q"] < 0.05:
            row["verdict"] = "better" if row["value"] > 0 else "worse"
        else:
            row["verdict"] = "open"
    return rows


def _by_training(points: Sequence[Point], measure: str) -> list[list[Measured]]:
    """By training the runs of a recipe, one for each draw of noise."""
    trainings: dict[Any, list[Measured]] = {}
    for each in points:
        trainings.setdefault(each.labels["training_seed"], []).append(getattr(each, measure))
    return list(trainings.values())


_SCORES = {"": "by_rouge_l", "_nats": "likelihood"}


def _reasons(comparison: Comparison, points: Sequence[Point], fixed: dict[str, list[Point]]) -> list[str]:
    """By name what keeps a comparison from being a test."""

    def trainings(of: Sequence[Point]) -> int:
        return len({each.labels["training_seed"] for each in of})

    sampled = points[0].labels["choice"] == "sampled"
    seeds = [len({each.labels["seed"] for each in of}) for of in (points, *fixed.values())]
    found = {
        "beyond": not comparison.is_within,
        "trainings": min(trainings(of) for of in (points, *fixed.values())) < NUM_TRAININGS,
        "noise": sampled and min(seeds) < NUM_NOISE_SEEDS,
    }
    return [name for name, holds in found.items() if holds]


def _comparison_row(
    metric: str, name: str, points: Sequence[Point], comparison: Comparison, reasons: list[str]
) -> dict[str, Any]:
    shared = ("kind", "width", "alpha", "target_layers", "backbone", "choice")
    labels = {"recipe": name, **{label: points[0].labels[label] for label in shared}}
    labels |= {"trainings": len({each.labels["training_seed"] for each in points}), "runs": len(points)}
    labels |= {"layers": round(float(comparison.cost.value), 4), "inside": round(comparison.inside, 4)}
    labels |= {"reasons": reasons, "p": None if comparison.p is None else round(comparison.p, 6), "q": None}
    if comparison.difference is None:
        return {"metric": metric, **labels, "value": None, "low": None, "high": None}
    return comparison.difference.row(metric=metric, **labels)


def num_parameters(controller: ControllerFolder) -> int:
    """How many numbers the controller learned, those of layers that always run left out where they are apart."""
    return sum(parameter.numel() for parameter in load_controller(controller.directory).parameters())


def _over(each: Point, frontier: Sequence[Point]) -> Floats | None:
    """[N]: the ROUGE-L of ``each`` less that of the two neighbours on the frontier, weighted to as many layers.

    None where the frontier does not reach as low, or as high.
    """
    below = [other for other in frontier if other.layers <= each.layers]
    above = [other for other in frontier if other.layers >= each.layers]
    if not below or not above:
        return None
    low, high = max(below, key=lambda other: other.layers), min(above, key=lambda other: other.layers)
    gap = high.layers - low.layers
    share = (each.layers - low.layers) / gap if gap > 0 else 0.0
    return each.rouge_l - ((1 - share) * low.rouge_l + share * high.rouge_l)
