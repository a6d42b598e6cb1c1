"""What the rows of a summary carry, as numbers and verdicts; ``sentences`` puts them into words.

Nothing is resampled here: what would take the single items has the verdict "untested".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

from dynskip.assets import find_adapter
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.evidence import apart, ceiling, direction, holm, kept_by_means, luck, negated, p_value
from dynskip.evaluation.report.rows import Row, Summary, curves_of, distinct, find, score_suffix, select
from dynskip.evaluation.stats.decisions import false_discovery
from dynskip.evaluation.stats.knapsack import smallest_budgets
from dynskip.evaluation.stats.oracle_controls import NullModel
from dynskip.found import FOUND_PATHS, FoundPaths
from dynskip.paths import LayerPath

# Repetitions from which on a comparison of controllers says something of their kind, not of one training or one draw.
NUM_TRAININGS, NUM_NOISE_SEEDS = 3, 5
NUM_ROWS = 1600  # of a training
GRID_STEPS = 500  # mean budgets of the paper's oracle: 0.04 layers of 24
NUM_NULL_DRAWS = 200  # draws of the null model that its band is of
NEAR_FLOOR = 0.1  # of the way from the cheapest path to full depth: below it a budget is near the cheapest path
SAME_DEPTH = 0.05  # a router whose mean is this near to the cheapest path's layers has chosen next to nothing
SMALL_CORRELATION = 0.1  # intervals within it on both sides are those of no correlation that matters
# Correlations that no question is asked of, by the score: features that the reference makes.
YARDSTICKS = {"": ("full_rouge_l", "sd_of_draws"), "_nats": ("full_loss",)}


class Strategies:
    """Uniform and random skipping against early exit, by budget; 1: closer to the full model, -1: farther, 0: open.

    uniform: the paired difference uniform - exit. uniform_layers: the same of the mean over layers. random,
    random_first: by the paired difference where there is one, else by whether intervals are apart, which is stricter.
    exit, first: the rows.
    """

    def __init__(self, summary: Summary, weights: str) -> None:
        def by_budget(strategy: str, metric: str = "cosine_final") -> dict[int, Row]:
            found = select(summary["hidden_states"], metric=metric, weights=weights, strategy=strategy)
            return {row["budget"]: row for row in found}

        def against_exit(strategy: str) -> dict[int, int]:
            if paired := by_budget(f"{strategy} - exit"):
                return {budget: direction(row) for budget, row in paired.items()}
            rows = by_budget(strategy)
            return {budget: apart(row, self.exit[budget]) for budget, row in rows.items() if budget in self.exit}

        self.uniform, self.uniform_layers = by_budget("uls - exit"), by_budget("uls - exit", "cosine_layers")
        self.exit, self.first = by_budget("exit"), by_budget("rls-first")
        self.random, self.random_first = against_exit("rls"), against_exit("rls-first")


@dataclass(frozen=True)
class TrainedPaths:
    """The paths with layers left out that weights were trained along. rule: what names their layers."""

    rule: str
    budgets: tuple[int, ...]


def trained_paths(model: str | None) -> TrainedPaths | None:
    """The paths that a model of the package was trained along, by its recipe or its adapter; None of any other."""
    from dynskip.training.pretrain.config import PRESETS

    if model in PRESETS:
        phases = PRESETS[model]().phases
        return TrainedPaths("uniform", tuple(sorted({b for phase in phases for b in phase.budget_weights_end})))
    adapter = find_adapter(model)
    if adapter is None:
        return None
    return TrainedPaths("searched", tuple(sorted(FoundPaths.read(adapter / FOUND_PATHS).layers)))


# Weights that were never trained along a path with layers left out; those of the paper's protocol first.
NEVER_SKIPPED = ("full-tuned", "backbone")


def never_skipped(section: Row) -> str | None:
    """The weights of a section on hidden states that say what skipping as such does, None where there are none."""
    known = distinct(select(section, metric="cosine_final", strategy="uls - exit"), "weights")
    return next((weights for weights in NEVER_SKIPPED if weights in known), None)


class Controllers:
    """Controllers that read something against fixed-input ones at as many layers, and why that is no test.

    reach: the most layers that a fixed-input controller runs. beyond: names of those that run more: part of their
    baseline is the full pass. num_alike: how many fixed-input controllers have one score, so that one counts several
    times. twins: names of those that equal their baseline by likelier decisions, and differ from it by sampled ones.
    better, worse: how many differ from zero after Holm's correction.
    recipes: rows that compare a recipe over its trainings and draws, each with its verdict; none of an older run.
    """

    def __init__(self, section: Row) -> None:
        layers = {row["controller"]: row["value"] for row in select(section, metric="layers")}
        learned = [row for row in select(section, metric="rouge_l") if row.get("kind") != "static"]
        self.recipes = [row for row in section.get("rows", ()) if "verdict" in row]
        rivals = [] if self.recipes else select(section, metric="over_fixed")
        reach: dict[tuple[Any, ...], float] = {}
        did: dict[tuple[Any, ...], set[str]] = {}
        for row in learned:
            if row.get("kind") == "fixed":
                alike = _labels(row, "backbone", "choice", "seed")
                reach[alike] = max(reach.get(alike, 0.0), layers.get(row["controller"], 0.0))
                did.setdefault(alike + _labels(row, "value", "low", "high"), set()).add(row["controller"])
        trainings = Counter(_labels(row, *_RECIPE) for row in learned if row.get("choice") != "sampled")
        sampled = [row for row in rivals if row.get("choice") == "sampled"]
        likelier = [row for row in rivals if row.get("choice") != "sampled"]
        same = {_labels(row, *_RECIPE) for row in likelier if row["value"] == 0 and p_value(row) == 1}
        adjusted = holm([1.0 if (p := p_value(row)) is None else p for row in rivals])
        apart_from_zero = [row["value"] for row, p in zip(rivals, adjusted, strict=True) if p < 0.05]

        self.names = [row["controller"] for row in rivals]
        self.reach = max(reach.values(), default=0.0)
        self.beyond = {
            row["controller"]
            for row in rivals
            if layers.get(row["controller"], 0.0) > reach.get(_labels(row, "backbone", "choice", "seed"), 0.0) + 1e-6
        }
        self.num_alike = max(map(len, did.values()), default=0)
        self.twins = [row["controller"] for row in sampled if _labels(row, *_RECIPE) in same and direction(row)]
        self.num_sampled = len(sampled)
        self.num_noise_seeds = len({row.get("seed") for row in learned if row.get("choice") == "sampled"})
        self.num_trainings = min((row["trainings"] for row in self.recipes), default=min(trainings.values(), default=0))
        self.better = sum(value > 0 for value in apart_from_zero)
        self.worse = sum(value < 0 for value in apart_from_zero)

    @property
    def reasons(self) -> list[str]:
        """By name what keeps the comparison from being a test, empty where nothing does."""
        if self.recipes:
            return list(dict.fromkeys(name for row in self.recipes for name in row["reasons"]))
        found = {
            "beyond": bool(self.beyond),
            "alike": self.num_alike > 1,
            "noise": self.num_sampled > 0 and self.num_noise_seeds < NUM_NOISE_SEEDS,
            "trainings": self.num_trainings < NUM_TRAININGS,
        }
        return [name for name, holds in found.items() if holds]

    @property
    def verdict(self) -> str:
        """``"untested"`` where there is a reason, of recipes where each has one, or nothing to compare; else
        ``"tested"``."""
        if self.recipes:
            return "untested" if self.num_with("untested") == len(self.recipes) else "tested"
        return "untested" if self.reasons or not self.names else "tested"

    def num_with(self, verdict: str) -> int:
        """How many comparisons of recipes have that verdict."""
        return sum(row["verdict"] == verdict for row in self.recipes)


# What two trainings of one kind have in common.
_RECIPE = ("kind", "width", "alpha", "target_layers", "backbone")


def _labels(row: Row, *names: str) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


@dataclass(frozen=True)
class PaperNull:
    """The null model on the paper's own four means: its noise, where it matches full depth, its best up to a depth."""

    sd: float
    matching_share: float
    best_up_to: Mapping[int, float]


@cache
def paper_null() -> PaperNull:
    """The null model fitted to the mean of the best that the paper reports."""
    costs, means = tuple(paper.STATIC_ROUGE_L), tuple(paper.STATIC_ROUGE_L.values())
    model = NullModel.fitted(means, costs, paper.BEST_UP_TO[paper.NUM_LAYERS])
    matching = model.matching_budget(means[-1], np.linspace(costs[0], costs[-1], GRID_STEPS + 1))
    best = np.maximum.accumulate(model.scores(), axis=1).mean(0)
    return PaperNull(model.sd, matching / paper.NUM_LAYERS, dict(zip(costs, best.tolist(), strict=True)))


def null_band(section: Row, family: str) -> Row | None:
    """The null model's curve with what 95 % of draws of as many sequences stay within; None where there is none."""
    curve = curves_of(section, family).get("null")
    model = next((each for each in section.get("null_model", ()) if each["family"] == family), None)
    if curve is None or model is None:
        return curve
    costs = distinct(
        [row for row in section["rows"] if (row["metric"], row.get("family")) == ("mean", family)], "budget"
    )
    return {**curve, **_null_ends(tuple(model["means"]), tuple(costs), model["sd"], section["n"], *curve["budgets"])}


@cache
def _null_ends(
    means: tuple[float, ...], costs: tuple[int, ...], sd: float, num_seqs: int, *budgets: float
) -> Mapping[str, list[float]]:
    model = NullModel(means, costs, sd, num_seqs)
    curves = [model.curve(budgets, seed) for seed in range(1, NUM_NULL_DRAWS + 1)]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return {"low": low.tolist(), "high": high.tolist()}


class Floor:
    """How near the oracle's matching budget lies to the cheapest path, below which nothing can be chosen.

    share: the cheapest path's of the layers. way: the matching budget's from there to all layers; near: whether that is
    near the floor. lead: full depth
    minus the cheapest path, paired where the section ``static`` has the difference. num_cheapest: how many of num_seqs
    sequences run the cheapest path, where that is known.
    """

    def __init__(self, summary: Summary, family: str, matching: Row, means: Sequence[Row]) -> None:
        self.matching, self.num_layers = matching, summary["conditions"]["num_layers"]
        self.cheapest = means[0]["budget"]
        self.share = self.cheapest / self.num_layers
        self.way = (matching["value"] - self.cheapest) / (self.num_layers - self.cheapest)
        self.near = self.way < NEAR_FLOOR
        loss = find(summary.get("static") or {}, metric="rouge_l - full", family=family, budget=self.cheapest)
        self.lead = {"value": means[-1]["value"] - means[0]["value"]} if loss is None else negated(loss)
        histogram = summary["oracle"].get("histogram", ())
        counts: Mapping[str, int] = next((each["counts"] for each in histogram if each["family"] == family), {})
        self.num_cheapest, self.num_seqs = counts.get(str(self.cheapest)), sum(counts.values())


def floor(summary: Summary, family: str) -> Floor | None:
    """The floor of a family's oracle; None where it never matches full depth."""
    matching = find(summary["oracle"], metric="matching_budget", family=family, control="oracle")
    means = sorted(select(summary["oracle"], metric="mean", family=family), key=lambda row: row["budget"])
    return None if matching is None or len(means) < 2 else Floor(summary, family, matching, means)


class Matching:
    """Where choices match full depth, those together that are scored on texts of one kind; None: nowhere, or unknown.

    oracle, equal_greedy, null: on greedy texts, the second among paths of one depth. sampled_oracle, equal_depth: on
    sampled ones; the first is read off its curve where it has no row.
    """

    def __init__(self, section: Row, family: str) -> None:
        self.oracle, self.null, self.equal_depth, self.equal_greedy = (
            find(section, metric="matching_budget", family=family, control=name)
            for name in ("oracle", "null", "equal depth", "equal depth, greedy")
        )
        self.sampled_oracle: float | None = None
        sampled = find(section, metric="matching_budget", family=family, control="in-sample")
        if sampled is not None:
            self.sampled_oracle = sampled["value"]
            return
        means = sorted(select(section, metric="mean_sampled", family=family), key=lambda row: row["budget"])
        curve = curves_of(section, family).get("in-sample")
        if curve is not None and means:
            values, target = np.array([curve["values"]]), np.array([means[-1]["value"]])
            found = float(smallest_budgets(np.array(curve["budgets"]), values, target)[0])
            self.sampled_oracle = found if np.isfinite(found) else None


class EqualPaths:
    """The paths of one depth that a control chooses among in place of depths. num: how many. budget: their layers.

    shared: how many layers two of them share, the mean over pairs; by_chance: how many two paths of that many layers
    share that are drawn at random.
    """

    def __init__(self, paths: Sequence[str], num_layers: int) -> None:
        layers = [set(LayerPath.parse(path, num_layers).layers) for path in paths]
        self.num, self.budget = len(layers), len(layers[0])
        self.shared = float(np.mean([len(first & second) for first, second in combinations(layers, 2)]))
        self.by_chance = self.budget**2 / num_layers


def equal_paths(section: Row, family: str, num_layers: int) -> EqualPaths | None:
    """The paths of the control of one depth of a family; None where a run has none, or does not name them."""
    paths = next((each["paths"] for each in section.get("equal_paths", ()) if each["family"] == family), ())
    return EqualPaths(paths, num_layers) if len(paths) > 1 else None


class Surviving:
    """What survives of the oracle's gain at one mean budget, and what the same data allow a better choice.

    share: of the gain on one draw, on another. ceiling: what a choice by expected scores would keep; where the share's
    interval holds zero, it holds zero too. luck: what a choice on noise alone would show by the same reasoning, beside
    the measured equal_depth; room: the largest ceiling that equal_depth leaves. by_means, expected_by_means: measured
    and expected of a choice on the mean of half of the draws. none_known: whether the share's interval holds zero or
    lies below it, so that nothing need survive.
    """

    def __init__(self, section: Row, share: Row) -> None:
        def under(control: str) -> Row | None:
            same = {label: share[label] for label in ("metric", "family", "place")}
            return find(section, control=control, **same)

        self.at, self.share, self.none_known = share["at"], share, direction(share) <= 0
        self.ceiling, self.luck, self.equal_depth = ceiling(share), luck(share), under("equal depth")
        self.by_means, self.greedy = under("cross-fitted means"), under("cross-fitted greedy")
        self.expected_by_means = kept_by_means(share, max(1, section.get("draws", 2) // 2))
        self.room: float | None = None
        if self.equal_depth is not None and self.equal_depth.get("low") is not None:
            self.room = (1 - min(1.0, max(0.0, self.equal_depth["low"])) ** 2) ** 0.5


def surviving(section: Row, family: str) -> Surviving | None:
    """What survives at a third of the depth, or the next larger part at which the family leaves a choice."""
    for place in ("third", "half", "full"):
        share = find(section, metric="surviving_share", family=family, place=place, control="cross-fitted")
        if share is not None:
            return Surviving(section, share)
    return None


class Routers:
    """The prompt-only routers of one family. shares: what each captures; the others' choice leaves none to capture.

    above: how many gain with an interval above zero. num_shallow: how many run next to no layer more than the cheapest
    path. best: the share of the one that gains most.
    """

    def __init__(self, section: Row, family: str) -> None:
        self.gains = select(section, metric="gain", family=family)
        self.shares = select(section, metric="captured_share", family=family)
        layers = [row["value"] for row in select(section, metric="layers", family=family)]
        by_gain = {_labels(row, "predictor", "at"): row["value"] for row in self.gains}
        known = [row for row in self.shares if _labels(row, "predictor", "at") in by_gain]
        self.above = sum(direction(row) > 0 for row in self.gains)
        self.num_shallow = sum(value <= min(layers) + SAME_DEPTH for value in layers)
        self.best = max(known, key=lambda row: by_gain[_labels(row, "predictor", "at")], default=None)


class RoutersInNats:
    """The routers of one family by log-likelihood, beside the cascade, which learns nothing.

    shares: what of the oracle's gain each captures, of those that learned from the most prompts, ``size``. adjusted:
    the p-value of each, by Benjamini and Hochberg for all routers of the section, of every family and size: as a run
    has it, or of an older one from the intervals. above: how many capture a share above zero after that. best: the
    share of the one that captures most. over_static: what that one gains over the best mix of fixed depths. cascade:
    its share. more_prompts: by how much a share moves from the fewest prompts learned from to the most, paired. moved:
    those of which that stays after control of false discoveries.
    """

    def __init__(self, section: Row, family: str) -> None:
        tested = select(section, metric="captured_share_nats")
        if all("q" in row for row in tested):
            q = [float(row["q"]) for row in tested]
        else:
            q = false_discovery([1.0 if (p := p_value(row)) is None else p for row in tested])
        own = [(row, each) for row, each in zip(tested, q, strict=True) if row["family"] == family]
        self.cascade = next((row for row, _ in own if row["predictor"] == "cascade"), None)
        routers = [(row, each) for row, each in own if row["predictor"] != "cascade"]
        self.size = max((row["size"] for row, _ in routers), default=0)
        learned = [(row, each) for row, each in routers if row["size"] == self.size]
        self.shares, self.adjusted = [row for row, _ in learned], [each for _, each in learned]
        self.above = sum(each < 0.05 and row["value"] > 0 for row, each in learned)
        self.best = max(self.shares, key=lambda row: float(row["value"]), default=None)
        labels = {} if self.best is None else {name: self.best[name] for name in _ROUTER_LABELS}
        self.over_static = find(section, metric="over_static_nats", family=family, **labels) if labels else None
        self.more_prompts = select(section, metric=MORE_PROMPTS, family=family)
        self.moved = [row for row in self.more_prompts if row["q"] < 0.05]


MORE_PROMPTS = "captured_share_nats - fewest prompts"
_ROUTER_LABELS = ("predictor", "features", "size", "at")


class Correlations:
    """All rank correlations of the chosen depth in a section, over families, budgets and features; yardsticks left out.

    adjusted: the p-value of each by the correction: that of the section, or Holm's. clear: those with an interval that
    leaves zero out. kept: those that stay after the correction. ties: whether sequences that score alike on every path
    are among them.
    """

    def __init__(self, section: Row) -> None:
        score = score_suffix(section)
        rows = [row for row in select(section, metric=f"spearman{score}") if row["feature"] not in YARDSTICKS[score]]
        self.correction, self.ties = section.get("corrected", "Holm"), "corrected" not in section
        known = [(row, p) for row in rows if (p := p_value(row)) is not None]
        self.rows = [row for row, _ in known]
        self.adjusted = holm([p for _, p in known]) if self.ties else [row["q"] for row in self.rows]
        self.clear = [row for row in self.rows if direction(row)]
        self.kept = [row for row, p in zip(self.rows, self.adjusted, strict=True) if p < 0.05]
