"""`TASKS` and `EXPERIMENTS`: what does each kind of work item, and what `dynskip eval` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynskip.evaluation.experiments import controllers, depth, hidden_states, oracle, router, siblings, static
from dynskip.evaluation.experiments.hidden_states import run_states
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.tasks.controller_runs import run_controlled, run_controlled_likelihood, run_timed
from dynskip.evaluation.tasks.generations import run_generate
from dynskip.evaluation.tasks.label_matches import run_labels
from dynskip.evaluation.tasks.likelihoods import run_likelihood
from dynskip.evaluation.tasks.prompt_facts import run_facts, run_features
from dynskip.evaluation.tasks.rivals import run_influence
from dynskip.evaluation.tasks.router_cost import run_overhead
from dynskip.evaluation.tasks.routes import run_route
from dynskip.evaluation.tasks.timing import run_time


@dataclass(frozen=True, slots=True)
class Task:
    """run: does an item. alone: nothing else may run meanwhile."""

    run: Callable[[WorkItem, Context], dict[str, Any]]
    alone: bool = False


TASKS = {
    "generate": Task(run_generate),
    "states": Task(run_states),
    "likelihood": Task(run_likelihood),
    "influence": Task(run_influence),
    "labels": Task(run_labels),
    "facts": Task(run_facts),
    "features": Task(run_features),
    "controlled": Task(run_controlled),
    "controlled-likelihood": Task(run_controlled_likelihood),
    "route": Task(run_route),
    "time-controlled": Task(run_timed, alone=True),
    "overhead": Task(run_overhead, alone=True),
    "time": Task(run_time, alone=True),
}
ALONE = frozenset(name for name, task in TASKS.items() if task.alone)


def run_item(item: WorkItem, context: Context) -> dict[str, Any]:
    """The result of ``item``, as JSON holds it: a function of the item and of what its hashes name."""
    if item.task not in TASKS:
        raise ValueError(f"run_item: the task must be one of {', '.join(TASKS)}, got {item.task!r}.")
    return TASKS[item.task].run(item, context)


# Modules by the names of the command line. plan(setup, store): the items that the experiment needs; asked again when
# all of them are done, so that later items may depend on results, until nothing is missing. summarise(setup, store):
# the section, from the results.
EXPERIMENTS = {
    "oracle": oracle,
    "hidden-states": hidden_states,
    "static": static,
    "router": router,
    "controllers": controllers,
    "depth": depth,
    "siblings": siblings,
}


def section_name(experiment: str) -> str:
    """What the section of an experiment is called in summary.json."""
    return experiment.replace("-", "_")
