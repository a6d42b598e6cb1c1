"""A router that sees the prompt only: which share of the oracle's gain it captures, and what it costs.

Trained on the oracle's choices on prompts of the training split; the third of the open questions of arXiv 2410.20022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from dynskip.evaluation.captured import Captured, captured_share
from dynskip.evaluation.checkpoints import Checkpoint
from dynskip.evaluation.facts import facts_items, read_features
from dynskip.evaluation.families import DESCRIPTIONS, Member, candidates, families, greedy, greedy_items
from dynskip.evaluation.generations import generate_items, read_generations
from dynskip.evaluation.items import WorkItem
from dynskip.evaluation.knapsack import Knapsack
from dynskip.evaluation.operating_points import operating_points
from dynskip.evaluation.path_router import Integers, PathRouter, PredictorName
from dynskip.evaluation.router_cost import overhead_items
from dynskip.evaluation.setup import Setup
from dynskip.evaluation.statistics import Floats, Interval, bootstrap, bootstrap_mean
from dynskip.evaluation.store import ItemStore
from dynskip.evaluation.timing import Part, read_speedups, read_times, time_item

TRAIN = "train"
_FULL = "full"


@dataclass(frozen=True, eq=False)
class Routed:
    """What one kind of router chose on the test prompts at one budget.

    chosen: [S, N], int64, the column of each prompt's path, for S seeds. oracle: [N], the oracle's at the same cost.
    """

    predictor: str
    at: float
    chosen: Integers
    oracle: Integers

    @property
    def label(self) -> str:
        """A name that is unique within a family."""
        return f"{self.predictor} at {self.at:g}"


@dataclass(frozen=True, eq=False)
class FamilyRoutes:
    """Scores [N, K] of the test prompts along K paths of given layers, and all routers' choices among them."""

    members: tuple[Member, ...]
    scores: Floats
    routed: tuple[Routed, ...]

    @property
    def costs(self) -> list[int]:
        """[K]: the layers of each path."""
        return [member.budget for member in self.members]


def plan(setup: Setup, store: ItemStore) -> list[WorkItem]:
    """The items: generations and facts of training and test prompts, then the times of what the routers chose."""
    items = overhead_items(setup)
    for name, members in routed_families(setup).items():
        reader = reader_of(setup, name)
        for split in (TRAIN, setup.split):
            items += [*split_items(setup, members, split), *facts_items(setup, reader, split)]
    if store.missing(items):
        return items
    return items + [time_item(setup, _batches(setup, routes(setup, store, name))) for name in routed_families(setup)]


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: by family, predictor and budget what the router scores, captures, costs and saves."""
    rows: list[dict[str, Any]] = []
    statements: list[str] = []
    overhead = {item.path: store.result(item) for item in overhead_items(setup)}
    for name in routed_families(setup):
        found = routes(setup, store, name)
        timed = time_item(setup, _batches(setup, found))
        times, speedups = read_times(store, timed), read_speedups(store, timed, _FULL)
        shares: dict[Routed, Captured] = {}
        for routed in found.routed:
            labels = {"family": name, "predictor": routed.predictor, "at": routed.at}
            captured = captured_share(found.scores, routed.chosen, routed.oracle)
            layers = bootstrap_mean(np.array(found.costs, dtype=np.float64)[routed.chosen].mean(0))
            over_mix = _over_static_mix(found, routed, layers.value)
            single, batched = (_median(overhead[routed.predictor][f"{kind}_ms"]) for kind in ("single", "batched"))
            rows += [
                captured.score.row(metric="rouge_l", **labels),
                captured.random.row(metric="random", **labels),
                captured.oracle.row(metric="oracle", **labels),
                captured.gain.row(metric="gain", **labels),
                over_mix.row(metric="over_static", **labels),
                layers.row(metric="layers", **labels),
                times[routed.label].row(metric="ms_per_token", **labels),
                speedups[routed.label].row(metric="speedup", **labels),
                single.row(metric="overhead_ms_single", **labels),
                batched.row(metric="overhead_ms_batched", **labels),
            ]
            if captured.share is not None:
                rows.append(captured.share.row(metric="captured_share", **labels))
                shares[routed] = captured
        full = times[_FULL]
        rows.append(full.row(metric="ms_per_token", family=name, predictor=_FULL, at=float(setup.num_layers)))
        if shares:
            statements += _sentences(name, found, shares, times, overhead)
        else:
            statements.append(f"With {DESCRIPTIONS[name]}, the oracle leaves a router nothing to capture.")
    notes = [
        f"Learned from {setup.train_prompts or setup.prompts} training prompts, judged on {setup.prompts} prompts "
        f"of the {setup.split} split; trained once for each of {setup.seeds} seeds, which count alike.",
        "random is the expected score of the router's own depths dealt to the prompts at random; oracle is the exact "
        "knapsack on the test scores at the router's own mean cost; captured_share is the place between them.",
        "over_static is the router's score minus that of the best mix of fixed budgets of the same mean cost.",
        "overhead_ms is the time from token ids to a path; ms_per_token is that of a decode step of a batch whose "
        "paths have the router's histogram, without the overhead.",
    ]
    return {"n": setup.prompts, "seeds": setup.seeds, "rows": rows, "notes": notes, "statements": statements}


def routed_families(setup: Setup) -> dict[str, list[Member]]:
    """The candidates of the families that an oracle is computed for, by name."""
    found = families(setup)
    return {name: candidates(setup, found[name]) for name in ("siblings", "paths") if name in found}


def reader_of(setup: Setup, family: str) -> Checkpoint:
    """The weights whose embeddings describe the prompts of a family, and whose loss is the full model's."""
    return setup.full_checkpoint if family == "siblings" else setup.checkpoint


def split_items(setup: Setup, members: Sequence[Member], split: str) -> list[WorkItem]:
    """The greedy generations of ``members`` on ``split``: those paths and no others, by weights in one batch."""
    if split == setup.split:
        return greedy_items(setup, list(members))
    return [item for items in _by_weights(setup, members, split).values() for item in items]


def split_scores(setup: Setup, store: ItemStore, members: Sequence[Member], split: str) -> Floats:
    """[N, K]: ROUGE-L of the prompts of ``split`` along each of ``members``."""
    if split == setup.split:
        return greedy(setup, store, list(members)).rouge_l
    read = {key: read_generations(store, items) for key, items in _by_weights(setup, members, split).items()}
    return np.concatenate([read[member.checkpoint.hash].along([member.path]).rouge_l for member in members], axis=1)


@lru_cache(maxsize=8)
def routes(setup: Setup, store: ItemStore, family: str) -> FamilyRoutes:
    """The choices of all routers of a family; all items that they are trained on must be done."""
    members = routed_families(setup)[family]
    costs = [member.budget for member in members]
    reader = reader_of(setup, family)
    features, test_features = (
        read_features(store, facts_items(setup, reader, split)) for split in (TRAIN, setup.split)
    )
    scores, test_scores = (split_scores(setup, store, members, split) for split in (TRAIN, setup.split))
    knapsack, test_knapsack = Knapsack(scores, costs), Knapsack(test_scores, costs)
    routed = []
    for at in operating_points(scores, costs):
        labels = knapsack.choose(at)
        for predictor in get_args(PredictorName):
            chosen = np.stack(
                [
                    PathRouter(predictor, costs, seed).fit(features, scores, labels, at).choose(test_features)
                    for seed in range(setup.seeds)
                ]
            )
            cost = float(np.array(costs)[chosen].mean())
            routed.append(Routed(predictor, at, chosen, test_knapsack.choose(cost)))
    return FamilyRoutes(tuple(members), test_scores, tuple(routed))


def histogram_parts(members: Sequence[Member], chosen: Integers, batch: int) -> list[Part]:
    """A batch of ``batch`` sequences whose paths are as frequent as in ``chosen``, to the nearest sequence."""
    exact = np.bincount(chosen.ravel(), minlength=len(members)) / chosen.size * batch
    counts = np.floor(exact).astype(int)
    for column in np.argsort(counts - exact, kind="stable")[: batch - counts.sum()]:
        counts[column] += 1
    return [
        Part(member.checkpoint.hash, member.path, int(count))
        for member, count in zip(members, counts, strict=True)
        if count
    ]


def _batches(setup: Setup, found: FamilyRoutes) -> dict[str, list[Part]]:
    full = found.members[-1]
    batches = {_FULL: [Part(full.checkpoint.hash, full.path, setup.timed_batch)]}
    for routed in found.routed:
        batches[routed.label] = histogram_parts(found.members, routed.chosen, setup.timed_batch)
    return batches


def _by_weights(setup: Setup, members: Sequence[Member], split: str) -> dict[str, list[WorkItem]]:
    found: dict[str, list[WorkItem]] = {}
    for member in members:
        together = [other.path for other in members if other.checkpoint == member.checkpoint]
        found.setdefault(member.checkpoint.hash, generate_items(setup, member.checkpoint, together, split))
    return found


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


def _sentences(
    family: str,
    found: FamilyRoutes,
    shares: dict[Routed, Captured],
    times: dict[str, Interval],
    overhead: dict[str, dict[str, Any]],
) -> list[str]:
    clear = [captured for captured in shares.values() if captured.gain.low > 0]
    best, captured = max(shares.items(), key=lambda pair: pair[1].gain.value)
    share = captured.share
    assert share is not None, "only shares that exist are told"
    layers = np.array(found.costs)[best.chosen].mean()
    return [
        f"With {DESCRIPTIONS[family]}, {len(clear)} of {len(found.routed)} prompt-only routers gain more than random "
        "assignment of the same depths with an interval above zero. The one that gains most (picked as such, so its "
        f"share flatters it) is {best.predictor} at a budget of {best.at:g}: it captures {share.value:.0%} "
        f"[{share.low:.0%}, {share.high:.0%}] of the oracle's gain.",
        f"That router scores ROUGE-L {captured.score.value:.4f}, random assignment of its depths "
        f"{captured.random.value:.4f}, the oracle at the same {layers:.1f} layers {captured.oracle.value:.4f}, all "
        f"layers {found.scores[:, -1].mean():.4f}; a token takes {times[best.label].value:.3f} ms instead of "
        f"{times[_FULL].value:.3f}, and choosing a path {_median(overhead[best.predictor]['single_ms']).value:.2f} ms "
        "a prompt.",
    ]
