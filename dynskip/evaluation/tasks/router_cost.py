"""What routing itself costs: items of the task "overhead"."""

from __future__ import annotations

import time
from typing import Any, get_args

import numpy as np
import torch

from dynskip.evaluation.routers.path_router import PathRouter, PredictorName, RouterController, router_inputs
from dynskip.evaluation.sweep.context import Context, num_rows
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.tasks.prompt_facts import embed, template_heads
from dynskip.evaluation.tasks.timing import machine_item
from dynskip.paths import LayerPath

_NUM_ROUNDS = 30
_WARM_ROUNDS = 3


def overhead_items(setup: Setup) -> list[WorkItem]:
    """One item for each predictor; on another machine they are other items."""
    options = {"batch": setup.timed_batch, "num_rows": num_rows(setup, setup.learn_split)}
    return [machine_item(setup, "overhead", name, **options) for name in get_args(PredictorName)]


def run_overhead(item: WorkItem, context: Context) -> dict[str, Any]:
    """Milliseconds per prompt from token ids to a path, one prompt alone and a batch, round by round.

    The router is fitted to choices that are dealt at random: what it has learned does not change how long it takes.
    """
    setup = context.setup
    llm = context.llm(item.checkpoint)
    heads = template_heads(llm.tokenizer, setup.template)
    rows = context.prompts(item.checkpoint, setup.learn_split).rows
    predictor: PredictorName = item.path  # type: ignore[assignment]  # one of them: PathRouter looks
    prompt_ids = [row.prompt_ids for row in rows]
    features = router_inputs(predictor, prompt_ids, [embed(llm, ids) for ids in prompt_ids], heads)
    budgets = sorted({*setup.candidates, setup.num_layers})
    paths = [LayerPath.uniform(setup.num_layers, budget=budget) for budget in budgets]
    generator = np.random.default_rng(item.seed)
    scores = generator.random((len(rows), len(paths)))
    router = PathRouter(predictor, budgets)
    router.fit(features, scores, scores.argmax(1), float(np.mean(budgets)))
    controller = RouterController(router, paths, heads)
    prompts = [torch.tensor(row.prompt_ids) for row in context.prompts(item.checkpoint, item.split).rows]

    def route(start: int, count: int) -> float:
        batch = [prompts[(start + place) % len(prompts)] for place in range(count)]
        begin = time.perf_counter()
        controller.choose_paths(batch, [embed(llm, prompt.tolist()) for prompt in batch])
        return (time.perf_counter() - begin) * 1e3 / count

    rounds = range(-_WARM_ROUNDS, _NUM_ROUNDS)
    single = [route(place, 1) for place in rounds][_WARM_ROUNDS:]
    batched = [route(place * setup.timed_batch, setup.timed_batch) for place in rounds][_WARM_ROUNDS:]
    return {"single_ms": [round(ms, 6) for ms in single], "batched_ms": [round(ms, 6) for ms in batched]}
