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
from dynskip.evaluation.stats.intervals import Floats, bootstrap, bootstrap_mean
from dynskip.evaluation.sweep.checkpoints import ControllerFolder
from dynskip.evaluation.sweep.setup import Setup, path_text
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.controller_runs import ARGMAX, controlled_items, timed_item
from dynskip.evaluation.tasks.path_families import families, family_generations, family_items
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
        return _mean_layers(self.num_run, self.num_decided)


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: every controller's generations, those along uniform paths, and the time of all in turns."""
    if not setup.controllers:
        return []
    items = family_items(setup, families(setup)["paths"])
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
    for point in (*static, *learned):
        labels = {"controller": point.name, **point.labels}
        measured = {
            "rouge_l": bootstrap_mean(point.rouge_l, resamples=setup.resamples),
            "layers": bootstrap(_mean_layers, point.num_run, point.num_decided, resamples=setup.resamples),
            "num_tokens": bootstrap_mean(point.num_tokens, resamples=setup.resamples),
        }
        timed_as = point.labels["timed_as"]
        measured |= {metric: by_label[timed_as] for metric, by_label in times.items() if timed_as in by_label}
        rows += [interval.row(metric=metric, **labels) for metric, interval in measured.items()]
        if point.labels["kind"] == STATIC:
            continue
        # Weights that were trained alike, and a controller that chooses alike.
        same = {"kind": FIXED, **{name: point.labels[name] for name in ("backbone", "choice", "seed")}}
        alike = [other for other in learned if same.items() <= other.labels.items()]
        for metric, frontier in (("over_fixed", [*alike, static[-1]]), ("over_static", static)):
            if metric == "over_fixed" and (point.labels["kind"] == FIXED or not alike):
                continue
            difference = _over(point, frontier)
            if difference is not None:
                rows.append(bootstrap_mean(difference, resamples=setup.resamples).row(metric=metric, **labels))
    return {"n": setup.prompts, "seeds": setup.controller_seeds, "rows": rows, "notes": notes}


def _mean_layers(num_run: Floats, num_decided: Floats) -> float:
    return float(num_run.sum() / max(num_decided.sum(), 1.0))


def _static_points(setup: Setup, store: ItemStore) -> list[Point]:
    members = families(setup)["paths"]
    generations = family_generations(setup, store, members)
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
    labels = {name: getattr(controller, name) for name in ("kind", "width", "alpha", "target_layers", "backbone")}
    labels |= {
        "parameters": num_parameters(controller),
        "kv_policy": controller.kv_policy,
        "choice": "argmax" if seed == ARGMAX else "sampled",
        "seed": seed,
        "timed_as": controller.label if seed == ARGMAX else None,
    }
    name = controller.label if seed == ARGMAX else f"{controller.label}, sampled {seed}"
    columns = (store.column(items, column) for column in ("rouge_l", "num_tokens", "num_run", "num_decided"))
    return Point(name, labels, *(np.array(values, dtype=np.float64) for values in columns))


def num_parameters(controller: ControllerFolder) -> int:
    """How many numbers the controller learned, those of layers that always run left out where they are apart."""
    return sum(parameter.numel() for parameter in load_controller(controller.directory).parameters())


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
