"""How far the final states of a skipping model are from those of the full one (arXiv 2410.20022, section 3.1).

Teacher-forced, in float32, the final LayerNorm on both sides, on the tokens that predict the response. Uniform layer
skipping (ULS), random skipping (RLS, with and without the first layer kept) and early exit, at equal budgets, each
against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynskip.data.batches import group_in_order
from dynskip.evaluation.stats.decisions import false_discovery, mean_p
from dynskip.evaluation.stats.intervals import Floats, Interval, bootstrap_mean, point
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.dataset import Row
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, Option, WorkItem
from dynskip.evaluation.tasks.prompt_facts import TOKENS_PER_BATCH, padded
from dynskip.evaluation.tasks.strategies import DRAWN, FIXED, strategy_path
from dynskip.llm import LLM
from dynskip.paths import LayerPath

METRICS = ("cosine_final", "cosine_layers", "log_distance", "kl", "nats", "same_token")
PAIRS = tuple(combinations(("uls", "rls", "rls-first", "exit"), 2))
# Cosines of float32 states are no nearer to 1 than this.
_LEAST_DISTANCE = 1e-7
_SHARD_SIZE = 50


def plan(setup: Setup, _: ItemStore) -> list[WorkItem]:
    """The items: by weights, by shard, the fixed strategies once and the drawn ones for each seed."""
    shards: dict[str, Option] = {"device": setup.device, "num_rows": num_prompts(setup), "shard_size": _SHARD_SIZE}
    shards["metrics"] = " ".join(METRICS)
    items = []
    for checkpoint in setup.weights_compared.values():
        for seed in range(setup.seeds + 1):
            strategies = [f"{name}:{budget}" for name in (DRAWN if seed else FIXED) for budget in setup.budgets]
            items += shard_items(setup, "states", checkpoint, " ".join(strategies), setup.split, seed, True, **shards)
    return items


def num_prompts(setup: Setup) -> int:
    """How many prompts the states are compared on."""
    return setup.state_prompts or setup.prompts


def run_states(item: WorkItem, context: Context) -> dict[str, Any]:
    """By strategy and metric the mean over the response of each prompt in the shard; and how many tokens that were.

    trajectories: by strategy the cosine of the states after each layer, [L], the mean over all tokens of the shard.
    """
    rows = context.shard(item)
    return compare_states(context.llm(item.checkpoint, "float32"), rows, item.path.split(), item.seed)


@torch.no_grad()
def compare_states(llm: LLM, rows: Sequence[Row], strategies: Sequence[str], seed: int) -> dict[str, Any]:
    """As ``run_states``, for any rows."""
    model = llm.model
    results: dict[str, dict[str, list[float]]] = {
        strategy: {metric: [0.0] * len(rows) for metric in METRICS} for strategy in strategies
    }
    trajectories = {strategy: torch.zeros(model.num_layers, dtype=torch.float64) for strategy in strategies}
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
    for indices in group_in_order(lengths, TOKENS_PER_BATCH):
        batch = [rows[index] for index in indices]
        targets = torch.tensor([token for row in batch for token in row.response_ids], device=model.device)
        input_ids, attention_mask, scored = padded(batch, model.device)
        full_states, full_logits = _states(llm, input_ids, attention_mask, scored, None)
        counts = scored.sum(1).tolist()
        for strategy in strategies:
            name, _, budget = strategy.partition(":")
            paths = [strategy_path(name, int(budget), model.num_layers, seed, row.index) for row in batch]
            states, logits = _states(llm, input_ids, attention_mask, scored, paths)
            per_layer = _cosines(full_states, states)
            trajectories[strategy] += per_layer.double().sum(1).cpu()
            tokens = _compare(per_layer, full_logits, logits, targets)
            for metric, values in tokens.items():
                for index, part in zip(indices, torch.split(values.double(), counts), strict=True):
                    results[strategy][metric][index] = round(float(part.mean()), 8)
    return {
        "rows": [row.index for row in rows],
        "num_tokens": [len(row.response_ids) for row in rows],
        "strategies": results,
        "trajectories": {
            strategy: [round(float(value), 8) for value in total / sum(len(row.response_ids) for row in rows)]
            for strategy, total in trajectories.items()
        },
    }


def _states(
    llm: LLM, input_ids: Tensor, attention_mask: Tensor, scored: Tensor, paths: Sequence[LayerPath] | None
) -> tuple[list[Tensor], Tensor]:
    """The state after each layer, L tensors [R, E] behind the final LayerNorm, and the logits [R, V]."""
    output = llm.model(input_ids, attention_mask, paths, output_hidden_states=True)
    # Each entry is the input of a layer, so the output of the one before; the last has its LayerNorm behind it.
    *inputs, last = output.hidden_states
    finish = llm.model.decoder.finish
    return [finish(state[scored]) for state in inputs[1:]] + [last[scored]], output.logits[scored]


def _cosines(full_states: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """[L, R]: the cosine of each token's states after each layer."""
    cosine = torch.nn.functional.cosine_similarity
    return torch.stack([cosine(ours, full, dim=-1) for ours, full in zip(states, full_states, strict=True)])


def _compare(per_layer: Tensor, full_logits: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Each metric of each token, [R], from the cosines [L, R] and both models' logits [R, V]."""
    full_logprobs, logprobs = full_logits.log_softmax(-1), logits.log_softmax(-1)
    return {
        "cosine_final": per_layer[-1],
        "cosine_layers": per_layer.mean(0),
        "log_distance": (1 - per_layer[-1]).clamp_min(_LEAST_DISTANCE).log10(),
        "kl": (full_logprobs.exp() * (full_logprobs - logprobs)).sum(-1),
        "nats": -logprobs.gather(1, targets[:, None])[:, 0],
        "same_token": (full_logits.argmax(-1) == logits.argmax(-1)).float(),
    }


def summarise(setup: Setup, store: ItemStore) -> dict[str, Any]:
    """The section: each metric by weights, strategy and budget, each strategy minus each other, and trajectories."""
    items = plan(setup, store)
    rows: list[dict[str, Any]] = []
    num_tokens = 0
    for weights, checkpoint in setup.weights_compared.items():
        values, tokens = _read(store, [item for item in items if item.checkpoint == checkpoint.hash])
        num_tokens = int(tokens.sum())
        for budget in setup.budgets:
            for metric in METRICS:
                labels = {"metric": metric, "weights": weights, "budget": budget}
                for strategy in (*FIXED, *DRAWN):
                    interval = _mean(setup, values[strategy, budget, metric], tokens)
                    rows.append(interval.row(strategy=strategy, **labels))
                for first, second in PAIRS:
                    difference = values[first, budget, metric] - values[second, budget, metric]
                    p = round(mean_p(difference, tokens), 6)
                    rows.append(_mean(setup, difference, tokens).row(strategy=f"{first} - {second}", p=p, **labels))
        rows += _trajectories(store, [item for item in items if item.checkpoint == checkpoint.hash], weights)
    tested = [row for row in rows if "p" in row]
    for row, q in zip(tested, false_discovery([row["p"] for row in tested]), strict=True):
        row["q"] = round(q, 6)
    notes = [
        "Teacher-forced on the first prompts of the split; float32; the final LayerNorm before every comparison, also "
        "between the states of inner layers; means over response tokens, intervals by bootstrap over sequences.",
        "cosine_layers is the mean over the states after each layer; a skipped layer passes its state on, and early "
        "exit repeats the state that it left with.",
        "rls draws a path for each sequence and seed; rls-first keeps layer 0 in it. kl is that of the full model's "
        "next-token distribution to the skipping model's, in nats; nats is minus the log-likelihood of a token of the "
        "reference; log_distance the decimal logarithm of 1 - cosine of the final states, mean over tokens.",
        "q: p of a t-test of the paired difference of two strategies, adjusted by Benjamini and Hochberg for all of "
        "them. trajectory: the cosine of the states after each layer, mean over all tokens.",
        *_notes_on_weights(setup),
    ]
    return {"n": num_prompts(setup), "seeds": setup.seeds, "num_tokens": num_tokens, "rows": rows, "notes": notes}


def _trajectories(store: ItemStore, items: Sequence[WorkItem], weights: str) -> list[dict[str, Any]]:
    """By strategy and budget the cosine after each layer, the mean over all tokens and seeds."""
    sums: dict[str, Floats] = {}
    counts: dict[str, int] = {}
    for item in items:
        result = store.result(item)
        tokens = sum(result["num_tokens"])
        for strategy, values in result["trajectories"].items():
            sums[strategy] = sums.get(strategy, 0.0) + tokens * np.array(values)
            counts[strategy] = counts.get(strategy, 0) + tokens
    rows = []
    for strategy, total in sums.items():
        name, _, budget = strategy.partition(":")
        labels = {"metric": "trajectory", "weights": weights, "strategy": name, "budget": int(budget)}
        rows += [point(value, layer=layer, **labels) for layer, value in enumerate(total / counts[strategy])]
    return rows


def _notes_on_weights(setup: Setup) -> list[str]:
    if not setup.siblings:
        return [] if setup.backbone is None else ["backbone: the weights before any tuning."]
    notes = ["paths: the weights that all paths share, those of the model."]
    if setup.full_checkpoint != setup.checkpoint:
        notes[0] += f" full-tuned: the sibling of {setup.num_layers} layers, tuned at full depth only."
    smaller = [budget for budget, _ in setup.siblings if budget != setup.num_layers]
    if smaller:
        notes.append(
            f"The siblings of {', '.join(map(str, smaller))} layers are not compared: a model tuned for one shallower "
            "path has no full pass to be close to."
        )
    return notes


def _read(store: ItemStore, items: Sequence[WorkItem]) -> tuple[dict[tuple[str, int, str], Floats], Floats]:
    """By strategy, budget and metric [N], the mean over seeds for each sequence; and [N], the tokens of each."""
    parts: dict[tuple[str, int, str], dict[int, list[float]]] = {}
    tokens: list[int] = []
    for item in sorted(items, key=lambda item: (item.seed, item.shard)):
        result = store.result(item)
        if item.seed == 0:
            tokens += result["num_tokens"]
        for strategy, metrics in result["strategies"].items():
            name, _, budget = strategy.partition(":")
            for metric, values in metrics.items():
                parts.setdefault((name, int(budget), metric), {}).setdefault(item.seed, []).extend(values)
    means = {key: np.mean([by_seed[seed] for seed in sorted(by_seed)], axis=0) for key, by_seed in parts.items()}
    return means, np.array(tokens, dtype=np.float64)


def _mean(setup: Setup, values: Floats, tokens: Floats) -> Interval:
    return bootstrap_mean(values, tokens, resamples=setup.resamples)
