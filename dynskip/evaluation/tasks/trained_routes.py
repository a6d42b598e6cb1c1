"""What routers choose that take long to train: items of the task "route"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynskip.evaluation.routers.path_router import PathRouter, PredictorName, router_inputs
from dynskip.evaluation.stats.knapsack import Integers
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, num_rows
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.prompt_facts import embed, template_heads

TRAIN = "train"


def route_item(
    setup: Setup,
    reader: Checkpoint,
    predictor: PredictorName,
    costs: Sequence[int],
    labels: Integers,
    at: float,
    seed: int,
) -> WorkItem:
    """The item that trains a router on the oracle's choices and routes the prompts of the setup's split.

    reader: the weights whose token embeddings it reads. costs: [K], of the paths. labels: [N], the column of the
    oracle's path of each training prompt, at a mean cost of ``at``.
    """
    text = json.dumps({"predictor": predictor, "at": at, "costs": list(costs), "labels": labels.tolist()})
    options = (
        ("max_tokens", setup.max_tokens),
        ("num_rows", num_rows(setup, setup.split)),
        ("split_seed", setup.split_seed),
        ("template", setup.template),
    )
    return WorkItem("route", reader.hash, text, setup.data_hash, setup.split, seed, 0, options)


def run_route(item: WorkItem, context: Context) -> dict[str, Any]:
    """The column of the path of each prompt of the split, and the price of a layer that the router has set."""
    task = json.loads(item.path)
    llm = context.llm(item.checkpoint)
    heads = template_heads(llm.tokenizer, context.setup.template)
    inputs = []
    for split in (TRAIN, item.split):
        prompts = [row.prompt_ids for row in context.prompts(item.checkpoint, split).rows]
        inputs.append(router_inputs(task["predictor"], prompts, [embed(llm, ids) for ids in prompts], heads))
    labels = np.array(task["labels"], dtype=np.int64)
    # The oracle's choice is all that such a router learns from: of the scores it is told which path was chosen.
    chosen = np.eye(len(task["costs"]))[labels]
    router = PathRouter(task["predictor"], task["costs"], item.seed).fit(inputs[0], chosen, labels, task["at"])
    return {"chosen": router.choose(inputs[1]).tolist(), "price": router.price}


def read_chosen(store: ItemStore, items: Sequence[WorkItem]) -> Integers:
    """[S, N], int64: what the routers of S seeds chose for the prompts of the split."""
    return np.array([store.result(item)["chosen"] for item in items], dtype=np.int64)
