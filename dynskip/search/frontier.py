"""The frontier of found paths on rows that no search saw, beside static rules, with intervals over rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynskip.evaluation.stats.intervals import bootstrap_mean, point
from dynskip.measure.passes import Measured
from dynskip.paths import LayerPath
from dynskip.search.drafts import DraftGains
from dynskip.search.gauge import Gauge, Kind
from dynskip.speculation.draft import Draft, DraftEntries

# Families of paths, the found ones first; of the random ones several are drawn.
FAMILIES = ("found", "uniform", "exit", "random")
_NUM_RANDOM = 3
# The metric that each kind of measure gives.
METRICS: dict[Kind, str] = {"loss": "nats", "own": "agreement", "path": "agreement_path"}


def static_paths(num_layers: int, budget: int) -> dict[str, list[LayerPath]]:
    """By family: the paths of ``budget`` layers that need no search."""
    return {
        "uniform": [LayerPath.uniform(num_layers, budget)],
        "exit": [LayerPath.early_exit(num_layers, budget)],
        "random": [LayerPath.random(num_layers, budget, seed) for seed in range(_NUM_RANDOM)],
    }


def mean_value(kind: Kind, measured: Measured) -> float:
    """Nats a response token, or the share of response tokens that agree."""
    return sum(measured.nats if kind == "loss" else measured.agreed) / sum(measured.num_tokens)


def frontier(
    gauge: Gauge, kind: Kind, found: Mapping[int, LayerPath], budgets: Iterable[int], gains: DraftGains | None
) -> list[dict[str, Any]]:
    """Rows of a summary: ``kind``'s metric at full depth and of each family at ``budgets``, with 95 % intervals.

    gains: adds what each path would gain as a draft, where ``kind`` is about guesses.
    """
    num_layers = gauge.model.num_layers
    families = {(num_layers, "full"): [LayerPath.full(num_layers)]}
    for budget in sorted(budgets, reverse=True):
        every = {"found": [found[budget]], **static_paths(num_layers, budget)}
        families |= {(budget, family): paths for family, paths in every.items()}
    paths = [path for members in families.values() for path in members]
    measured = dict(zip(paths, gauge.measure(kind, paths), strict=True))
    rows = []
    for (budget, family), members in families.items():
        labels = {"metric": METRICS[kind], "family": family, "budget": budget}
        labels["layers"] = list(members[0].layers) if len(members) == 1 else None
        rows.append(_interval([measured[path] for path in members], kind, labels))
        if gains is not None and kind != "loss" and family != "full":
            entries: DraftEntries = "own" if kind == "own" else "path"
            gained = [gains.gain(Draft(path, entries), mean_value(kind, measured[path])) for path in members]
            rows.append(point(sum(gained) / len(gained), **{**labels, "metric": f"gain_{entries}"}))
    return rows


def _interval(measured: Sequence[Measured], kind: Kind, labels: dict[str, Any]) -> dict[str, Any]:
    """The mean over texts, weighted by their tokens, of one path or of several."""
    weights = np.array(measured[0].num_tokens, dtype=np.float64)
    sums = np.array([each.nats if kind == "loss" else each.agreed for each in measured], dtype=np.float64)
    return bootstrap_mean(sums.mean(0) / weights, weights).row(**labels)
