"""What prompt-only routers learn from, and what they choose; items of the task "route" for those slow to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import numpy as np

from dynskip.evaluation.routers.path_router import Integers, PathRouter, PredictorName, router_inputs
from dynskip.evaluation.stats.intervals import Floats
from dynskip.evaluation.stats.knapsack import Knapsack, operating_points
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, num_rows
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, Option, WorkItem
from dynskip.evaluation.tasks.path_families import Member, choices, family_generations
from dynskip.evaluation.tasks.prompt_facts import embed, facts_items, read_features, template_heads

TRAIN = "train"
# Predictors that are timed in turns. The first are fitted within seconds, whenever a section is summarised; the others
# take minutes, so that what they choose is an item of its own.
FITTED: tuple[PredictorName, ...] = ("logistic", "boosting", "ridge")
TRAINED: tuple[PredictorName, ...] = ("transformer",)
assert {*FITTED, *TRAINED} == {*get_args(PredictorName)}, "every predictor is one or the other"


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


def reader_of(setup: Setup, family: str) -> Checkpoint:
    """The weights whose embeddings describe the prompts of a family, and whose loss is the full model's."""
    return setup.full_checkpoint if family == "siblings" else setup.checkpoint


@dataclass(frozen=True, eq=False)
class Problem:
    """What routers of a family learn from and are judged on.

    labels: by mean budget [M], the column of the oracle's path of each training prompt. scores: [M, K], of the training
    prompts. test_scores: [N, K].
    """

    members: tuple[Member, ...]
    reader: Checkpoint
    labels: dict[float, Integers]
    scores: Floats
    test_scores: Floats

    @property
    def costs(self) -> list[int]:
        """[K]: the layers of each path."""
        return [member.budget for member in self.members]


@lru_cache(maxsize=8)
def problem(setup: Setup, store: ItemStore, family: str) -> Problem:
    """The problem of a family; its generations must be done."""
    members = choices(setup)[family]
    costs = [member.budget for member in members]
    scores, test_scores = (
        family_generations(setup, store, members, split=split).rouge_l for split in (TRAIN, setup.split)
    )
    knapsack = Knapsack(scores, costs)
    labels = {at: knapsack.choose(at) for at in operating_points(scores, costs)}
    return Problem(tuple(members), reader_of(setup, family), labels, scores, test_scores)


def trained_items(setup: Setup, store: ItemStore, family: str) -> dict[tuple[PredictorName, float], list[WorkItem]]:
    """By predictor and budget the items that train routers of a family, one for each seed."""
    task = problem(setup, store, family)
    return {
        (predictor, at): [
            route_item(setup, task.reader, predictor, task.costs, labels, at, seed) for seed in range(setup.seeds)
        ]
        for at, labels in task.labels.items()
        for predictor in TRAINED
    }


@lru_cache(maxsize=8)
def routes(setup: Setup, store: ItemStore, family: str, predictors: tuple[PredictorName, ...]) -> list[Routed]:
    """The choices of the routers of a family that are such predictors; all items that they learn from must be done."""
    task = problem(setup, store, family)
    features, test_features = (
        read_features(store, facts_items(setup, task.reader, split)) for split in (TRAIN, setup.split)
    )
    test_knapsack = Knapsack(task.test_scores, task.costs)
    trained = trained_items(setup, store, family)

    def choose(predictor: PredictorName, at: float, labels: Integers) -> Integers:
        if predictor in TRAINED:
            return read_chosen(store, trained[predictor, at])
        routers = (PathRouter(predictor, task.costs, seed) for seed in range(setup.seeds))
        return np.stack([router.fit(features, task.scores, labels, at).choose(test_features) for router in routers])

    routed = []
    for at, labels in task.labels.items():
        for predictor in predictors:
            chosen = choose(predictor, at, labels)
            cost = float(np.array(task.costs)[chosen].mean())
            routed.append(Routed(predictor, at, chosen, test_knapsack.choose(cost)))
    return routed


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
    options: dict[str, Option] = {name: getattr(setup, name) for name in ("max_tokens", "split_seed", "template")}
    options["num_rows"] = num_rows(setup, setup.split)
    named = tuple(sorted(options.items()))
    return WorkItem("route", reader.hash, text, setup.data_hash, setup.split, seed, 0, named)


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
