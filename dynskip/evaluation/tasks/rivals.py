"""Static rules for the layers of a budget, side by side; the influence of layers, items of the task "influence"."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.likelihoods import examples, likelihood_rows
from dynskip.evaluation.tasks.strategies import drawn_name
from dynskip.measure.passes import block_influence, by_influence, in_parts
from dynskip.paths import LayerPath

_MOST_ROWS = 256  # an influence is a mean over all tokens: more rows change its last digits
# What draws the layers of a rule.
_STRATEGIES = {"random": "rls", "random-first": "rls-first"}
RULES = ("uniform", "exit", "random", "random-first", "influence", "searched")


def influence_items(setup: Setup, checkpoint: Checkpoint) -> list[WorkItem]:
    """The items that measure the influence of each layer of ``checkpoint``."""
    num_rows = min(_MOST_ROWS, likelihood_rows(setup, setup.learn_split))
    return shard_items(setup, "influence", checkpoint, "full", setup.learn_split, dtype=setup.dtype, num_rows=num_rows)


def run_influence(item: WorkItem, context: Context) -> dict[str, Any]:
    """[L], the mean influence of each layer on the tokens of the shard, and how many those are."""
    model = context.llm(item.checkpoint).model
    parts = in_parts(examples(context.shard(item)))
    counts = [sum(text.num_tokens - 1 for text in part) for part in parts]
    influence = np.average([block_influence(model, part) for part in parts], axis=0, weights=counts)
    return {"influence": [round(float(value), 8) for value in influence], "num_tokens": sum(counts)}


def read_influence(store: ItemStore, items: list[WorkItem]) -> list[float]:
    """[L]: 1 - cosine of the input and the output of each layer."""
    results = [store.result(item) for item in items]
    weights = [result["num_tokens"] for result in results]
    return [float(value) for value in np.average([result["influence"] for result in results], axis=0, weights=weights)]


def rival_paths(setup: Setup, influence: list[float]) -> dict[str, dict[int, list[str]]]:
    """By rule and budget the paths that it gives: one, or of random layers by each seed one for each reference."""
    num_layers = setup.num_layers
    budgets = [budget for budget in setup.budgets if budget < num_layers]
    influential = by_influence(influence, min(budgets))
    searched = dict(setup.searched)
    fixed: dict[str, dict[int, LayerPath]] = {
        "uniform": {budget: LayerPath.uniform(num_layers, budget) for budget in budgets},
        "exit": {budget: LayerPath.early_exit(num_layers, budget) for budget in budgets},
        "influence": {budget: influential[budget] for budget in budgets},
        "searched": {b: LayerPath.parse(searched[b], num_layers) for b in budgets if b in searched},
    }
    rules = {name: {budget: [layers_text(path)] for budget, path in fixed[name].items()} for name in fixed}
    for name, strategy in _STRATEGIES.items():
        seeds = range(1, setup.seeds + 1)
        rules[name] = {budget: [drawn_name(strategy, budget, seed) for seed in seeds] for budget in budgets}
    return {name: rules[name] for name in RULES if rules[name]}


def layers_text(path: LayerPath) -> str:
    """``path`` by its layers, as `LayerPath.parse` reads it: rules that agree are one path, run once."""
    return "full" if path.budget == path.num_layers else f"layers:{','.join(map(str, path.layers))}"
