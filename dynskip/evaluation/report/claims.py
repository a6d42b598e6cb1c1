"""What the rows of a summary carry, as numbers and verdicts; ``sentences.py`` puts them into words.

Nothing is resampled here: what would take the single items has the verdict "untested".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynskip.evaluation.report.evidence import apart, direction, holm, p_value
from dynskip.evaluation.report.rows import Row, Summary, select

# Repetitions from which on a comparison of controllers says something of their kind, not of one training or one draw.
NUM_TRAININGS, NUM_NOISE_SEEDS = 3, 5


@dataclass(frozen=True)
class Strategies:
    """Uniform and random skipping against early exit, by budget; 1: closer to the full model, -1: farther, 0: open.

    uniform: the paired difference uniform - exit. uniform_layers: the same of the mean over layers. random,
    random_first: by whether intervals are apart, which is stricter than a paired difference. exit, first: the rows.
    trained: budgets of the uniform paths that the weights were trained along, None where that is not known.
    """

    weights: str
    uniform: Mapping[int, Row]
    uniform_layers: Mapping[int, Row]
    random: Mapping[int, int]
    random_first: Mapping[int, int]
    exit: Mapping[int, Row]
    first: Mapping[int, Row]
    trained: tuple[int, ...] | None


def strategies(summary: Summary, weights: str) -> Strategies:
    """How the strategies compare on cosines of states with the weights of that name."""
    section = summary["hidden_states"]

    def by_budget(strategy: str, metric: str = "cosine_final") -> dict[int, Row]:
        found = select(section, metric=metric, weights=weights, strategy=strategy)
        return {row["budget"]: row for row in found}

    exits, random, first = by_budget("exit"), by_budget("rls"), by_budget("rls-first")
    return Strategies(
        weights,
        by_budget("uls - exit"),
        by_budget("uls - exit", "cosine_layers"),
        {budget: apart(row, exits[budget]) for budget, row in random.items() if budget in exits},
        {budget: apart(row, exits[budget]) for budget, row in first.items() if budget in exits},
        exits,
        first,
        trained_budgets(summary["conditions"].get("model")),
    )


def trained_budgets(model: str | None) -> tuple[int, ...] | None:
    """The budgets of the uniform paths that the recipe of a model of the package trains along, or None."""
    from dynskip.training.pretrain.config import PRESETS

    if model not in PRESETS:
        return None
    phases = PRESETS[model]().phases
    return tuple(sorted({budget for phase in phases for budget in phase.budget_weights_end}))


@dataclass(frozen=True)
class Controllers:
    """Controllers that read something against fixed-input ones, and why the comparison is no test.

    reach: the most layers that a fixed-input controller runs. beyond: names of those that run more: part of their
    baseline is the full pass. num_alike: how many fixed-input controllers have one score, so that one counts several
    times. twins: names of those that equal their baseline by likelier decisions, and differ from it by sampled ones.
    better, worse: how many differ from zero after Holm's correction.
    """

    names: Sequence[str]
    reach: float
    beyond: frozenset[str]
    num_alike: int
    twins: Sequence[str]
    num_sampled: int
    num_noise_seeds: int
    num_trainings: int
    better: int
    worse: int

    @property
    def reasons(self) -> list[str]:
        """By name what keeps the comparison from being a test, empty where nothing does."""
        found = {
            "beyond": bool(self.beyond),
            "alike": self.num_alike > 1,
            "noise": self.num_sampled > 0 and self.num_noise_seeds < NUM_NOISE_SEEDS,
            "trainings": self.num_trainings < NUM_TRAININGS,
        }
        return [name for name, holds in found.items() if holds]

    @property
    def verdict(self) -> str:
        """``"untested"`` where there is a reason, or nothing to compare; else ``"tested"``."""
        return "untested" if self.reasons or not self.names else "tested"


def controllers(section: Row) -> Controllers:
    """The comparison with fixed-input controllers at as many layers."""
    layers = {row["controller"]: row["value"] for row in select(section, metric="layers")}
    learned = [row for row in select(section, metric="rouge_l") if row.get("kind") != "static"]
    fixed = [row for row in learned if row.get("kind") == "fixed"]
    rivals = select(section, metric="over_fixed")

    def steered_alike(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(label) for label in ("backbone", "choice", "seed"))

    reach: dict[tuple[Any, ...], float] = {}
    for row in fixed:
        reach[steered_alike(row)] = max(reach.get(steered_alike(row), 0.0), layers.get(row["controller"], 0.0))
    beyond = {
        row["controller"]
        for row in rivals
        if layers.get(row["controller"], 0.0) > reach.get(steered_alike(row), 0.0) + 1e-6
    }
    did: dict[tuple[Any, ...], set[str]] = {}
    for row in fixed:
        numbers = tuple(row.get(part) for part in ("value", "low", "high"))
        did.setdefault((*steered_alike(row), *numbers), set()).add(row["controller"])
    names = tuple(row["controller"] for row in rivals)
    adjusted = holm([1.0 if (p := p_value(row)) is None else p for row in rivals])
    apart_from_zero = [row["value"] for row, p in zip(rivals, adjusted, strict=True) if p < 0.05]
    sampled = {row.get("seed") for row in learned if row.get("choice") == "sampled"}

    def recipe(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(label) for label in ("kind", "width", "alpha", "target_layers", "backbone"))

    trainings = Counter(recipe(row) for row in learned if row.get("choice") != "sampled")
    same = {recipe(row) for row in rivals if row.get("choice") != "sampled" and row["value"] == 0 and p_value(row) == 1}
    twins = [row["controller"] for row in rivals if row.get("choice") == "sampled" and recipe(row) in same]
    return Controllers(
        names,
        max(reach.values(), default=0.0),
        frozenset(beyond),
        max(map(len, did.values()), default=0),
        [name for name, row in zip(names, rivals, strict=True) if name in twins and direction(row)],
        sum(row.get("choice") == "sampled" for row in rivals),
        len(sampled),
        min(trainings.values(), default=0),
        sum(value > 0 for value in apart_from_zero),
        sum(value < 0 for value in apart_from_zero),
    )
