"""Learned controllers: ROUGE-L against layers and against milliseconds (arXiv 2410.20022, section 3.2).

Does the hidden state help, and from which capacity on? Compared are controllers at equal mean layers: each against
those with a fixed input, which know the layer and nothing else, and against uniform paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynskip.controllers.storage import load_controller
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap, bootstrap_mean
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.setup import Setup, path_text
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.controller_runs import ARGMAX, controlled_items, timed_item
from dynskip.evaluation.tasks.path_families import families, greedy, greedy_items
from dynskip.evaluation.tasks.timing import read_timings

FIXED, STATIC = "fixed", "static"
_FULL = "full"


@dataclass(frozen=True, eq=False)
class Point:
    """A controller, or a uniform path, as it did: per sequence [N] ROUGE-L, tokens, layers run and tokens decided."""

    name: str
    labels: dict[str, Any]
    rouge_l: Floats
    num_tokens: Floats
    num_run: Floats
    num_decided: Floats

    @property
    def layers(self) -> float:
        """Mean layers of a decided token."""
        return float(self.num_run.sum() / max(self.num_decided.sum(), 1.0))

    def layers_interval(self, resamples: int) -> Interval:
        """The same with its interval over sequences."""
        return bootstrap(
            lambda run, decided: run.sum() / max(decided.sum(), 1.0),
            self.num_run,
            self.num_decided,
            resamples=resamples,
        )


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: every controller's generations, those along uniform paths, and the time of all in turns."""
    if not setup.controllers:
        return []
    items = greedy_items(setup, families(setup)["paths"])
    for controller in setup.controllers:
        for seed in range(setup.controller_seeds + 1):
            items += controlled_items(setup, controller, seed)
    return [*items, *(timed_item(setup, setup.controllers, batch) for batch in (setup.timed_batch, 1))]


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section; without rows where the setup names no controller."""
    notes = [
        "Greedy tokens; the prompt runs all layers for controllers that decide per token, and the path for uniform "
        "ones. layers is the mean over decided tokens, which the first generated token and the prompt are not.",
        "over_fixed and over_static: ROUGE-L minus that of two fixed-input controllers (two uniform paths), weighted "
        "so that their mean layers are the controller's own; paired by sequence. A full pass ends both frontiers.",
        "Times are those of the likelier decisions; what a controller computes itself is in them.",
    ]
    if not setup.controllers:
        return {
            "n": 0,
            "seeds": 0,
            "rows": [],
            "notes": ["No controller was given: name folders with --controller."],
        }
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
    for point in (*static, *learned):
        labels = {"controller": point.name, **point.labels}
        rows += [
            bootstrap_mean(point.rouge_l, resamples=setup.resamples).row(metric="rouge_l", **labels),
            point.layers_interval(setup.resamples).row(metric="layers", **labels),
            bootstrap_mean(point.num_tokens, resamples=setup.resamples).row(metric="num_tokens", **labels),
        ]
        rows += [
            by_label[point.labels["timed_as"]].row(metric=metric, **labels)
            for metric, by_label in times.items()
            if point.labels["timed_as"] in by_label
        ]
        if point.labels["kind"] == STATIC:
            continue
        alike = [other for other in learned if other.labels["kind"] == FIXED and _comparable(other, point)]
        for metric, frontier in (("over_fixed", [*alike, static[-1]]), ("over_static", static)):
            if metric == "over_fixed" and (point.labels["kind"] == FIXED or not alike):
                continue
            difference = _over(point, frontier)
            if difference is not None:
                rows.append(bootstrap_mean(difference, resamples=setup.resamples).row(metric=metric, **labels))
    return {
        "n": setup.prompts,
        "seeds": setup.controller_seeds,
        "rows": rows,
        "notes": notes,
    }


def _static_points(setup: Setup, store: ItemStore) -> list[Point]:
    members = families(setup)["paths"]
    generations = greedy(setup, store, members)
    points = []
    for column, member in enumerate(members):
        num_tokens = generations.num_tokens[:, column].astype(np.float64)
        decided = num_tokens - 1
        labels = {"kind": STATIC, "timed_as": path_text(member.budget, setup.num_layers)}
        scores = generations.rouge_l[:, column]
        points.append(Point(member.path, labels, scores, num_tokens, decided * member.budget, decided))
    return points


def _learned_point(setup: Setup, store: ItemStore, controller: ControllerFolder, seed: int) -> Point:
    items = controlled_items(setup, controller, seed)

    def column(name: str) -> Floats:
        return np.array([value for item in items for value in store.result(item)[name]], dtype=np.float64)

    choice = "argmax" if seed == ARGMAX else "sampled"
    labels = {
        "kind": controller.kind,
        "width": controller.width,
        "alpha": controller.alpha,
        "target_layers": controller.target_layers,
        "backbone": controller.backbone,
        "parameters": num_parameters(controller),
        "kv_policy": controller.kv_policy,
        "choice": choice,
        "seed": seed,
        "timed_as": controller.label if seed == ARGMAX else None,
    }
    name = controller.label if seed == ARGMAX else f"{controller.label}, sampled {seed}"
    return Point(name, labels, column("rouge_l"), column("num_tokens"), column("num_run"), column("num_decided"))


def num_parameters(controller: ControllerFolder) -> int:
    """How many numbers the controller learned, those of layers that always run left out where they are apart."""
    return sum(parameter.numel() for parameter in load_controller(controller.directory).parameters())


def _comparable(first: Point, second: Point) -> bool:
    """Whether two controllers steer weights that were trained alike, and choose alike."""
    return all(first.labels[name] == second.labels[name] for name in ("backbone", "choice", "seed"))


def _over(point: Point, frontier: Sequence[Point]) -> Floats | None:
    """[N]: the score of ``point`` less that of the two neighbours on the frontier, weighted to as many layers.

    None where the frontier does not reach as low, or as high.
    """
    below = [other for other in frontier if other.layers <= point.layers]
    above = [other for other in frontier if other.layers >= point.layers]
    if not below or not above:
        return None
    low, high = max(below, key=lambda other: other.layers), min(above, key=lambda other: other.layers)
    gap = high.layers - low.layers
    share = (point.layers - low.layers) / gap if gap > 0 else 0.0
    return point.rouge_l - ((1 - share) * low.rouge_l + share * high.rouge_l)
