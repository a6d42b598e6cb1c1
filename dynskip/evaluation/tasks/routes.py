"""What prompt-only routers learn from, and what they choose; items of the task "route" for those slow to train."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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
from dynskip.evaluation.tasks.likelihoods import member_items, member_likelihoods
from dynskip.evaluation.tasks.path_families import Member, choices, family_generations, family_items
from dynskip.evaluation.tasks.prompt_facts import FEATURES, embed, feature_items, read_features, template_heads

# Predictors that are timed in turns. The first are fitted within seconds, whenever a section is summarised; the others
# take minutes, so that what they choose is an item of its own.
FITTED: tuple[PredictorName, ...] = ("logistic", "boosting", "ridge")
TRAINED: tuple[PredictorName, ...] = ("transformer",)
_BOOSTED = ("state", "entropy")  # what trees read by log-likelihood: of wider features they would take hours
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
    """What routers of a family learn from, on prompts that no weights were trained on, and are judged on.

    labels: by mean budget [M], the column of the oracle's path of each prompt to learn from. scores: [M, K], of these
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
    """The problem of a family by ROUGE-L, means over draws; its generations must be done."""
    members = choices(setup)[family]

    def mean_scores(split: str) -> Floats:
        draws = [family_generations(setup, store, members, seed, split).rouge_l for seed in setup.sample_seeds]
        return np.asarray(np.mean(draws, axis=0))

    return _problem(setup, family, members, mean_scores(setup.learn_split), mean_scores(setup.split))


@lru_cache(maxsize=8)
def likelihood_problem(setup: Setup, store: ItemStore, family: str) -> Problem:
    """The problem of a family by the mean log-likelihood of a token of the reference; its items must be done."""
    members = choices(setup)[family]
    scores, test_scores = (
        member_likelihoods(setup, store, members, split).scores for split in (setup.learn_split, setup.split)
    )
    return _problem(setup, family, members, scores, test_scores)


def _problem(setup: Setup, family: str, members: Sequence[Member], scores: Floats, test_scores: Floats) -> Problem:
    costs = [member.budget for member in members]
    knapsack = Knapsack(scores, costs)
    labels = {at: knapsack.choose(at) for at in operating_points(scores, costs)}
    return Problem(tuple(members), reader_of(setup, family), labels, scores, test_scores)


def problem_items(setup: Setup, family: str) -> list[WorkItem]:
    """The items that both problems of a family are made of."""
    members = choices(setup)[family]
    items: list[WorkItem] = []
    for split in (setup.learn_split, setup.split):
        if not setup.likelihood_only:
            items += [item for seed in setup.sample_seeds for item in family_items(setup, members, seed, split)]
        items += [*member_items(setup, members, split), *feature_items(setup, reader_of(setup, family), split)]
    return items


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
    features, test_features = features_of(setup, store, task, "embedding")
    test_features = test_features[: len(task.test_scores)]
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


def features_of(setup: Setup, store: ItemStore, task: Problem, what: str) -> tuple[Floats, Floats]:
    """What a router reads of the prompts to learn from and of those to judge on."""
    learn, judge = (
        read_features(store, feature_items(setup, task.reader, split), what)
        for split in (setup.learn_split, setup.split)
    )
    return learn, judge


def sizes(num_rows: int) -> list[int]:
    """How many prompts the routers of a learning curve learn from: from 250 on twice as many, and all."""
    return [*(size for size in (250 * 2**step for step in range(20)) if size < num_rows), num_rows]


@dataclass(frozen=True, eq=False)
class Learned:
    """What a router that has learned from log-likelihoods chose. features: what it read. size: prompts it has seen.

    chosen: [S, N], for S seeds. oracle: [N], the oracle's choice at the same cost.
    """

    predictor: str
    features: str
    size: int
    at: float
    chosen: Integers
    oracle: Integers


def learned_routes(setup: Setup, store: ItemStore, family: str) -> Iterator[Learned]:
    """The routers of a family by log-likelihood: ridge over all features and sizes, boosting on all prompts, and the
    cascade, which runs the cheapest path and goes on to full depth where that path is unsure of what comes next."""
    task = likelihood_problem(setup, store, family)
    costs = np.array(task.costs, dtype=np.float64)
    test_knapsack = Knapsack(task.test_scores, task.costs)
    members = list(task.members)
    entropy, test_entropy = (
        member_likelihoods(setup, store, members, split).entropy[:, 0] for split in (setup.learn_split, setup.split)
    )
    tables = {what: features_of(setup, store, task, what) for what in FEATURES}
    tables["entropy"] = (entropy[:, None], test_entropy[:, None])

    def found(predictor: str, features: str, size: int, at: float, chosen: Sequence[Integers]) -> Learned:
        stacked = np.stack(chosen)
        return Learned(predictor, features, size, at, stacked, test_knapsack.choose(float(costs[stacked].mean())))

    num_rows = len(task.scores)
    for what, (features, test_features) in tables.items():
        for size in sizes(num_rows):
            routers = []
            for seed in range(setup.seeds):
                rows = np.random.default_rng(seed).permutation(num_rows)[:size]
                # It learns scores, which are the same for every budget, and no labels.
                no_labels = np.zeros(size, dtype=np.int64)
                router = PathRouter("ridge", task.costs, seed)
                routers.append(router.fit(features[rows], task.scores[rows], no_labels, float(costs.max())))
            for at in task.labels:
                chosen = [router.spend(at).choose(test_features) for router in routers]
                yield found("ridge", what, size, at, chosen)
    for at, labels in task.labels.items():
        for what in _BOOSTED:
            features, test_features = tables[what]
            trees = (PathRouter("boosting", task.costs, seed) for seed in range(setup.seeds))
            chosen = [each.fit(features, task.scores, labels, at).choose(test_features) for each in trees]
            yield found("boosting", what, num_rows, at, chosen)
        yield found("cascade", "entropy", num_rows, at, [cascade(entropy, test_entropy, costs, at)])


def cascade(entropy: Floats, test_entropy: Floats, costs: Floats, budget: float) -> Integers:
    """[N], int64: full depth, the last column, where ``test_entropy`` [N] is large, else the cheapest path, the first.

    The threshold is where choices on the prompts to learn from, of ``entropy`` [M], keep to the mean ``budget``.
    """
    share = min(1.0, max(0.0, (budget - costs[0]) / (costs[-1] - costs[0])))
    threshold = np.quantile(entropy, 1 - share, method="higher")
    return np.where(test_entropy > threshold, len(costs) - 1, 0).astype(np.int64)


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
    options |= {"learned_on": setup.learn_split, "num_rows": num_rows(setup, setup.split)}
    named = tuple(sorted(options.items()))
    return WorkItem("route", reader.hash, text, setup.data_hash, setup.split, seed, 0, named)


def run_route(item: WorkItem, context: Context) -> dict[str, Any]:
    """The column of the path of each prompt of the split, and the price of a layer that the router has set."""
    task = json.loads(item.path)
    llm = context.llm(item.checkpoint)
    heads = template_heads(llm.tokenizer, context.setup.template)
    inputs = []
    for split in (context.setup.learn_split, item.split):
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
