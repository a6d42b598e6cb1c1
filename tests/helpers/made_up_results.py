"""Setups without a disk, and results for every item that they plan: numbers by a rule, in the form of real ones."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from dynskip.evaluation.experiments.hidden_states import METRICS, num_prompts
from dynskip.evaluation.registry import EXPERIMENTS
from dynskip.evaluation.routers.path_router import PredictorName
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.generations import stable_seed
from dynskip.evaluation.tasks.strategies import drawn_path, is_drawn
from dynskip.paths import LayerPath

NUM_LAYERS = 24


def made_up_setup(siblings: tuple[int, ...] = (), **changes: Any) -> Setup:
    """A setup of a model of 24 layers and siblings for those budgets, of which nothing is on the disk."""
    options: dict[str, Any] = {
        "prompts": 24,
        "seeds": 1,
        "shard_size": 16,
        "timed_batch": 4,
        "timed_rounds": 3,
        "resamples": 20,
        "budgets": (4, 8, 12),
        "candidates": (4, 8, 12),
    }
    return Setup(
        checkpoint=Checkpoint(Path("model"), "0" * 16, NUM_LAYERS),
        data=Path("data.json"),
        data_hash="f" * 16,
        siblings=tuple((budget, Checkpoint(Path(f"uls{budget}"), f"{budget:016}", NUM_LAYERS)) for budget in siblings),
        **{**options, **changes},
    )


def summary_of(setup: Setup, name: str, directory: Path) -> dict[str, Any]:
    """The section of an experiment, all of whose items have made-up results."""
    with ItemStore(directory / "items") as store:
        while missing := store.missing(EXPERIMENTS[name].plan(setup, store)):
            for item in missing:
                store.add(item, _RESULTS[item.task](setup, item), 1.0)
        section = EXPERIMENTS[name].summarise(setup, store)
    return json.loads(json.dumps(section))  # as a summary holds it


def _shard_rows(setup: Setup, item: WorkItem, size: int) -> range:
    total = int(item.option("num_rows"))
    return range(item.shard * size, min(total, (item.shard + 1) * size))


def _generator(item: WorkItem, *more: object) -> np.random.Generator:
    return np.random.default_rng(stable_seed(item.task, item.checkpoint, item.split, item.seed, item.shard, *more))


def budget_of(path: str) -> int:
    """How many layers a path runs."""
    return (drawn_path(path, NUM_LAYERS, 0) if is_drawn(path) else LayerPath.parse(path, NUM_LAYERS)).budget


def _generate(setup: Setup, item: WorkItem) -> dict[str, Any]:
    rows = _shard_rows(setup, item, setup.shard_size)
    paths = {}
    for path in item.path.split():
        budget = budget_of(path)
        scores = 0.3 - 0.2 / budget + 0.08 * _generator(item, path).standard_normal(len(rows))
        paths[path] = {"rouge_l": scores.tolist(), "num_tokens": [20] * len(rows), "token_ids": [[]] * len(rows)}
    return {"rows": list(rows), "paths": paths}


def _states(setup: Setup, item: WorkItem) -> dict[str, Any]:
    rows = range(item.shard * 50, min(num_prompts(setup), (item.shard + 1) * 50))
    values = {
        strategy: {metric: _generator(item, strategy, metric).random(len(rows)).tolist() for metric in METRICS}
        for strategy in item.path.split()
    }
    trajectories = {strategy: [0.9] * NUM_LAYERS for strategy in item.path.split()}
    found = {"rows": list(rows), "num_tokens": [10] * len(rows)}
    return {**found, "strategies": values, "trajectories": trajectories}


def _likelihood(setup: Setup, item: WorkItem) -> dict[str, Any]:
    rows = _shard_rows(setup, item, setup.shard_size)
    counts = [3 + row % 4 for row in rows]
    paths: dict[str, dict[str, Any]] = {}
    for path in item.path.split():
        drawn = _generator(item, path)
        tokens = [2 + 2 / budget_of(path) + 0.3 * drawn.standard_normal(count) for count in counts]
        paths[path] = {
            "nats": [float(each.sum()) for each in tokens],
            "entropy": drawn.uniform(0, 3, len(rows)).tolist(),
            "token_nats": base64.b64encode(np.concatenate(tokens).astype("<f2").tobytes()).decode(),
        }
    return {"rows": list(rows), "num_tokens": counts, "paths": paths}


def _influence(setup: Setup, item: WorkItem) -> dict[str, Any]:
    return {"influence": _generator(item).random(NUM_LAYERS).tolist(), "num_tokens": 100}


def _facts(setup: Setup, item: WorkItem) -> dict[str, Any]:
    rows = _shard_rows(setup, item, setup.shard_size)
    return {
        "rows": list(rows),
        "prompt_length": [10 + row % 7 for row in rows],
        "response_length": [20 + row % 5 for row in rows],
        "task_type": [("write", "classify")[row % 2] for row in rows],
    }


def _features(setup: Setup, item: WorkItem) -> dict[str, Any]:
    rows = _shard_rows(setup, item, setup.shard_size)
    numbers = _generator(item).random((len(rows), 6)).astype("<f4")
    return {
        "rows": list(rows),
        "features": [base64.b64encode(row.tobytes()).decode() for row in numbers],
        "state": [base64.b64encode(row[:3].tobytes()).decode() for row in numbers],
    }


def _time(setup: Setup, item: WorkItem) -> dict[str, Any]:
    """Half of a full pass's time is that of its layers, whatever the batch is called."""
    times = {}
    for label, parts in json.loads(item.path).items():
        count = sum(number for *_, number in parts)
        layers = sum(number * budget_of(path) for _, path, number in parts)
        times[label] = [1.0 + layers / count / NUM_LAYERS + 0.01 * turn for turn in range(setup.timed_rounds)]
    return {"ms_per_token": times}


def _overhead(setup: Setup, item: WorkItem) -> dict[str, Any]:
    slow: dict[PredictorName, float] = {"transformer": 0.9}
    single = slow.get(item.path, 0.3)  # type: ignore[call-overload]
    return {"single_ms": [single, single + 0.01], "batched_ms": [0.1 * single, 0.11 * single]}


def _route(setup: Setup, item: WorkItem) -> dict[str, Any]:
    columns = len(json.loads(item.path)["costs"])
    return {"chosen": _generator(item, item.path).integers(0, columns, setup.prompts).tolist(), "price": 0.01}


_RESULTS = {
    "generate": _generate,
    "likelihood": _likelihood,
    "influence": _influence,
    "states": _states,
    "facts": _facts,
    "features": _features,
    "time": _time,
    "overhead": _overhead,
    "route": _route,
}
