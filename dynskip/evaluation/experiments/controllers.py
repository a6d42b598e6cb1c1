"""Learned controllers: scores against layers and against milliseconds (arXiv 2410.20022, section 3.2).

Does the hidden state help, and from which capacity on? Each recipe, over its trainings and its draws of noise, is held
against the measured frontier of recipes with a fixed input, which know the layer and nothing else, at as many layers;
and each controller against static paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynskip.controllers.storage import load_controller
from dynskip.evaluation.stats.decisions import false_discovery
from dynskip.evaluation.stats.frontiers import Comparison, Measured, compare
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap, bootstrap_mean, point, tidy
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.sweep.training_curves import TrainingCurve
from dynskip.evaluation.tasks.controller_runs import (
    ARGMAX,
    controlled_items,
    controlled_likelihood_items,
    timed_item,
)
from dynskip.evaluation.tasks.likelihoods import member_items, member_likelihoods
from dynskip.evaluation.tasks.path_families import families, family_generations, family_items
from dynskip.evaluation.tasks.timing import read_timings

FIXED, STATIC = "fixed", "static"
# Repetitions from which on a comparison says something of a recipe, not of one training or one draw.
NUM_TRAININGS, NUM_NOISE_SEEDS = 3, 5
# Rows from which on a training counts as one: 200 steps of 8.
NUM_ROWS = 1600
_FULL = "full"


@dataclass(frozen=True, eq=False)
class Texts:
    """What was generated, per sequence [N]: ROUGE-L, tokens, layers that decided tokens ran, how many those were."""

    rouge_l: Floats
    num_tokens: Floats
    num_run: Floats
    num_decided: Floats

    @property
    def layers(self) -> float:
        """Mean layers of a decided token."""
        return _mean_layers(self.num_run, self.num_decided)


@dataclass(frozen=True, eq=False)
class Point:
    """A controller, or a static path, as it did.

    likelihood: of references, teacher-forced: minus nats, tokens, layers, decided. texts: what it generated, where it
    was asked to. layer_shares: [L], the share of decided tokens, of texts where there are any, that run each layer.
    trained: how; None for paths, and for controllers whose folders do not say.
    """

    name: str
    labels: dict[str, Any]
    likelihood: Measured
    texts: Texts | None = None
    layer_shares: Floats | None = None
    trained: TrainingCurve | None = None

    @property
    def by_rouge_l(self) -> Measured:
        """ROUGE-L of texts, at the layers of their decided tokens."""
        assert self.texts is not None, "asked where texts were generated"
        scores = self.texts.rouge_l
        return Measured(scores, np.ones_like(scores), self.texts.num_run, self.texts.num_decided)


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: how likely references are under every controller and what it generates, the same along static paths,
    and the time of all in turns."""
    if not setup.controllers:
        return []
    members = families(setup)["paths"]
    items = member_items(setup, members)
    for controller in setup.controllers:
        for seed in range(setup.controller_seeds + 1):
            items += controlled_likelihood_items(setup, controller, seed)
    if setup.likelihood_only:
        return items
    items += family_items(setup, members)
    for controller in setup.controllers:
        for seed in range(setup.controller_seeds + 1):
            items += controlled_items(setup, controller, seed)
    return [*items, *(timed_item(setup, setup.controllers, batch) for batch in (setup.timed_batch, 1))]


def _notes(setup: Setup) -> list[str]:
    of_texts = [
        "Greedy tokens; layers is the mean over decided tokens: neither the first generated one nor the prompt's.",
        "over_static: ROUGE-L minus that of two static paths, weighted so that their mean layers are the controller's "
        "own; paired by sequence. over_fixed: as over_fixed_nats, of ROUGE-L.",
        "skip_rate: the share of decided tokens of generated texts that leave a layer out.",
        "Times are those of the likelier decisions; what a controller computes itself is in them.",
    ]
    return [
        "nats: minus the log-likelihood of a token of the reference, teacher-forced. The prompt runs all layers for "
        "controllers that decide per token, and the path for static ones. layers_nats is the mean over decided tokens, "
        "which the first of a response and the prompt are not.",
        "over_static_nats: the log-likelihood of a token minus that of two static paths, weighted so that their mean "
        "layers are the controller's own; paired by sequence.",
        "over_fixed_nats: the log-likelihood of a token under a recipe, all its trainings and draws of noise together, "
        "minus the frontier of recipes with a fixed input at as many layers: a line between two of them. A frontier "
        "that is curved as that of static paths is lies above it, and gains are at most these. Intervals resample "
        "trainings, draws and sequences, and are wider by Student's t for the few trainings. Beyond the layers of the "
        "fixed input nothing is made up: untested. q: p, adjusted by Benjamini and Hochberg for all recipes and both "
        "scores.",
        "Layers do not count what a layer costs that a token leaves out: where kv_policy is propagate it still makes "
        "key and value, under gates of either kind.",
        "verdict: of a recipe and of the fixed ones that it is held against, neighbours. untested where the frontier "
        f"does not reach, or with fewer than {NUM_TRAININGS} trainings of one of them, or where a training has no "
        f"curves or saw fewer than {NUM_ROWS:,} rows, or where the validation loss of one of them (nats a token and "
        f"the price of layers; the mean over its trainings, signs kept) moved by more than {setup.margin_nats:g} over "
        f"the last quarter of the steps; or of sampled decisions with fewer than {NUM_NOISE_SEEDS} draws; else better "
        "or worse where q is below 0.05, else open.",
        "The noise of sampled decisions is drawn by seed, sequence, layer and position.",
        *(
            ["skip_rate_nats: the share of decided tokens that leave a layer out."]
            if setup.likelihood_only
            else of_texts
        ),
    ]


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section; without rows where the setup names no controller."""
    if not setup.controllers:
        given = "No controller was given: name folders with --controller."
        return {"n": 0, "seeds": 0, "rows": [], "notes": [given]}
    static = _static_points(setup, store)
    learned = [
        _learned_point(setup, store, controller, seed)
        for controller in setup.controllers
        for seed in range(setup.controller_seeds + 1)
    ]
    times = _times(setup, store)
    rows: list[dict[str, Any]] = []
    for each in (*static, *learned):
        labels = {"controller": each.name, **each.labels}
        measured = _intervals(setup, each)
        timed_as = each.labels["timed_as"]
        measured |= {metric: by_label[timed_as] for metric, by_label in times.items() if timed_as in by_label}
        rows += [interval.row(metric=metric, **labels) for metric, interval in measured.items()]
        if each.labels["kind"] == STATIC:
            continue
        if each.layer_shares is not None:
            skipped, metric = 1 - each.layer_shares, "skip_rate_nats" if each.texts is None else "skip_rate"
            rows += [point(v, metric=metric, layer=layer, **labels) for layer, v in enumerate(skipped)]
        difference = _over(each, static)
        if difference is not None:
            rows.append(bootstrap_mean(difference, resamples=setup.resamples).row(metric="over_static", **labels))
        by_nats = _over_static_nats(setup, each, static)
        if by_nats is not None:
            rows.append(by_nats.row(metric="over_static_nats", **labels))
    rows += _recipe_rows(setup, learned)
    num_texts = setup.num_controlled if setup.likelihood_only else setup.prompts
    found: dict[str, Any] = {"n": num_texts, "n_nats": setup.num_controlled, "noise": "by sequence"}
    found["trained"] = [_trained(each) for each in learned if each.labels["seed"] == ARGMAX]
    return {**found, "seeds": setup.controller_seeds, "rows": rows, "notes": _notes(setup)}


def _trained(each: Point) -> dict[str, Any]:
    """How a controller was trained: rows seen, what the validation loss moved by at the end, losses by step."""
    labels = {"controller": each.name, **{name: each.labels[name] for name in ("recipe", "kind", "training_seed")}}
    if each.trained is None:
        return {**labels, "num_rows": None, "moved": None, "training": [], "validation": []}
    curves = {"training": each.trained.training, "validation": each.trained.validation}
    rounded = {name: [[step, round(loss, 5)] for step, loss in curve] for name, curve in curves.items()}
    moved = None if each.trained.moved is None else round(each.trained.moved, 5)
    return {**labels, "num_rows": each.trained.num_rows, "moved": moved, **rounded}


def _times(setup: Setup, store: ItemStore) -> dict[str, dict[str, Interval]]:
    """By metric and then by label what a token takes and saves, in a batch and alone; none where nothing is timed."""
    if setup.likelihood_only:
        return {}
    batched, single = (
        read_timings(store, timed_item(setup, setup.controllers, batch), _FULL) for batch in (setup.timed_batch, 1)
    )
    return {
        metric + suffix: timings[metric]
        for metric in batched
        for suffix, timings in (("", batched), ("_single", single))
    }


def _intervals(setup: Setup, each: Point) -> dict[str, Interval]:
    """By metric how a controller or a path did."""
    found: dict[str, Interval] = {}
    if (texts := each.texts) is not None:
        found["rouge_l"] = bootstrap_mean(texts.rouge_l, resamples=setup.resamples)
        found["layers"] = bootstrap(_mean_layers, texts.num_run, texts.num_decided, resamples=setup.resamples)
        found["num_tokens"] = bootstrap_mean(texts.num_tokens, resamples=setup.resamples)
    scored = each.likelihood
    found["nats"] = bootstrap_mean(-scored.score / scored.weight, scored.weight, resamples=setup.resamples)
    found["layers_nats"] = bootstrap(_mean_layers, scored.cost, scored.decided, resamples=setup.resamples)
    return found


def _mean_layers(num_run: Floats, num_decided: Floats) -> float:
    return float(num_run.sum() / max(num_decided.sum(), 1.0))


def _static_points(setup: Setup, store: ItemStore) -> list[Point]:
    members = families(setup)["paths"]
    scored = member_likelihoods(setup, store, members).first(setup.num_controlled)
    generated = None if setup.likelihood_only else family_generations(setup, store, members)
    points = []
    for column, member in enumerate(members):
        texts = None
        if generated is not None:
            num_tokens = generated.num_tokens[:, column].astype(np.float64)
            decided = num_tokens - 1
            texts = Texts(generated.rouge_l[:, column], num_tokens, decided * member.budget, decided)
        labels = {"kind": STATIC, "timed_as": None if texts is None else member.path}
        decided = np.maximum(scored.num_tokens - 1, 0)
        likelihood = Measured(-scored.nats[:, column], scored.num_tokens, decided * member.budget, decided)
        points.append(Point(member.path, labels, likelihood, texts))
    return points


def _learned_point(setup: Setup, store: ItemStore, controller: ControllerFolder, seed: int) -> Point:
    labels = {name: getattr(controller, name) for name in ("kind", "width", "alpha", "target_layers", "backbone")}
    labels |= {
        "recipe": _recipe(controller.recipe, seed),
        "training_seed": controller.training_seed,
        "parameters": num_parameters(controller),
        "kv_policy": controller.kv_policy,
        "choice": "argmax" if seed == ARGMAX else "sampled",
        "seed": seed,
        "timed_as": controller.label if seed == ARGMAX and not setup.likelihood_only else None,
    }
    name = controller.label if seed == ARGMAX else f"{controller.label}, sampled {seed}"
    items = controlled_likelihood_items(setup, controller, seed)
    nats, *counts = _columns(store, items, "nats", "num_tokens", "num_run", "num_decided")
    likelihood, texts = Measured(-nats, *counts), None
    if not setup.likelihood_only:
        items = controlled_items(setup, controller, seed)
        texts = Texts(*_columns(store, items, "rouge_l", "num_tokens", "num_run", "num_decided"))
    runs = np.sum([store.result(item)["layer_runs"] for item in items], axis=0)
    decided = likelihood.decided if texts is None else texts.num_decided
    shares = runs / max(decided.sum(), 1.0)
    return Point(name, labels, likelihood, texts, shares, TrainingCurve.of(controller.directory))


def _columns(store: ItemStore, items: Sequence[WorkItem], *names: str) -> list[Floats]:
    return [np.array(store.column(items, name), dtype=np.float64) for name in names]


def _over_static_nats(setup: Setup, each: Point, static: Sequence[Point]) -> Interval | None:
    """The log-likelihood of a token under a controller less that of static paths at as many layers; None beyond."""
    frontier = {other.name: [[other.likelihood]] for other in static}
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
            if measure == _BY_TEXTS and setup.likelihood_only:
                continue
            found = compare(
                {name: _by_training(points, measure) for name, points in others.items()},
                {name: _by_training(points, measure) for name, points in fixed.items()},
                setup.resamples,
            )
            for name, comparison in found.items():
                reasons = _reasons(comparison, others[name], fixed, setup.margin_nats)
                held = [others[name], *(fixed[each] for each in comparison.neighbours)]
                rows.append(_comparison_row(f"over_fixed{suffix}", name, held, comparison, reasons))
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


_BY_TEXTS = "by_rouge_l"
_SCORES = {"": _BY_TEXTS, "_nats": "likelihood"}


def _reasons(
    comparison: Comparison, points: Sequence[Point], fixed: dict[str, list[Point]], margin: float
) -> list[str]:
    """By name what keeps a comparison from being a test.

    Of the fixed recipes those count that it is held against; all, where there is no difference. margin: of a
    validation loss that stands still. It is that of a recipe, the mean over its trainings, which is what is compared:
    on its own each of a dozen moves by more now and then, as single decisions turn over.
    """

    def trainings(of: Sequence[Point]) -> int:
        return len({each.labels["training_seed"] for each in of})

    sampled = points[0].labels["choice"] == "sampled"
    held = [points, *(fixed[name] for name in comparison.neighbours or fixed)]
    seeds = [len({each.labels["seed"] for each in of}) for of in held]
    curves = [each.trained for of in held for each in of]
    known = [curve for curve in curves if curve is not None]
    found = {
        "beyond": not comparison.is_within,
        "trainings": min(map(trainings, held)) < NUM_TRAININGS,
        "noise": sampled and min(seeds) < NUM_NOISE_SEEDS,
        "curves": len(known) < len(curves),
        "rows": any(curve.num_rows < NUM_ROWS for curve in known),
        "moving": _moved(held)[0] > margin,
    }
    return [name for name, holds in found.items() if holds]


def _moved(held: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """How far the validation loss of a recipe moved at the end, of any of ``held``: the mean over its trainings, and
    one of these; infinite where it was seen once."""
    by_recipe = [[each.trained.moved for each in of if each.trained is not None] for of in held]
    if any(moved is None for of in by_recipe for moved in of):
        return np.inf, np.inf
    known = [np.array(of, dtype=np.float64) for of in by_recipe if of]
    means, single = [abs(float(of.mean())) for of in known], [float(np.abs(of).max()) for of in known]
    return max(means, default=0.0), max(single, default=0.0)


def _comparison_row(
    metric: str, name: str, held: Sequence[Sequence[Point]], comparison: Comparison, reasons: list[str]
) -> dict[str, Any]:
    """held: the runs of the recipe, and then those of the fixed ones next to it."""
    points = held[0]
    shared = ("kind", "width", "alpha", "target_layers", "backbone", "choice")
    labels = {"recipe": name, **{label: points[0].labels[label] for label in shared}}
    labels |= {"trainings": len({each.labels["training_seed"] for each in points}), "runs": len(points)}
    labels |= {"layers": round(float(comparison.cost.value), 4), "inside": round(comparison.inside, 4)}
    labels |= {"neighbours": list(comparison.neighbours)}
    labels |= dict(zip(("moved", "moved_single"), map(tidy, _moved(held)), strict=True))
    labels |= {"reasons": reasons, "p": None if comparison.p is None else round(comparison.p, 6), "q": None}
    if comparison.difference is None:
        return {"metric": metric, **labels, "value": None, "low": None, "high": None}
    return comparison.difference.row(metric=metric, **labels)


def num_parameters(controller: ControllerFolder) -> int:
    """How many numbers the controller learned, those of layers that always run left out where they are apart."""
    return sum(parameter.numel() for parameter in load_controller(controller.directory).parameters())


def _over(each: Point, frontier: Sequence[Point]) -> Floats | None:
    """[N]: the ROUGE-L of ``each`` less that of the two neighbours on the frontier, weighted to as many layers.

    None where nothing was generated, or the frontier does not reach as low, or as high.
    """
    own, others = each.texts, [other.texts for other in frontier if other.texts is not None]
    if own is None:
        return None
    below = [other for other in others if other.layers <= own.layers]
    above = [other for other in others if other.layers >= own.layers]
    if not below or not above:
        return None
    low, high = max(below, key=lambda other: other.layers), min(above, key=lambda other: other.layers)
    gap = high.layers - low.layers
    share = (own.layers - low.layers) / gap if gap > 0 else 0.0
    return own.rouge_l - ((1 - share) * low.rouge_l + share * high.rouge_l)
