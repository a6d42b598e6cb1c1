"""`TASKS`: the function that does each kind of work item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynskip.evaluation.experiments.hidden_states import probe_states, run_states
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.items import WorkItem
from dynskip.evaluation.tasks.controller_runs import probe_controlled, probe_timed, run_controlled, run_timed
from dynskip.evaluation.tasks.generations import probe_generate, run_generate
from dynskip.evaluation.tasks.prompt_facts import probe_facts, run_facts
from dynskip.evaluation.tasks.router_cost import probe_overhead, run_overhead
from dynskip.evaluation.tasks.timing import probe_time, run_time
from dynskip.evaluation.tasks.trained_routes import probe_route, run_route


@dataclass(frozen=True, slots=True)
class Task:
    """run: does an item. probe: the seconds that it should take. alone: nothing else may run meanwhile."""

    run: Callable[[WorkItem, Context], dict[str, Any]]
    probe: Callable[[WorkItem, Context], float]
    alone: bool = False


TASKS = {
    "generate": Task(run_generate, probe_generate),
    "states": Task(run_states, probe_states),
    "facts": Task(run_facts, probe_facts),
    "controlled": Task(run_controlled, probe_controlled),
    "route": Task(run_route, probe_route),
    "time-controlled": Task(run_timed, probe_timed, alone=True),
    "overhead": Task(run_overhead, probe_overhead, alone=True),
    "time": Task(run_time, probe_time, alone=True),
}


def run_item(item: WorkItem, context: Context) -> dict[str, Any]:
    """The result of ``item``, as JSON holds it: a function of the item and of what its hashes name."""
    if item.task not in TASKS:
        raise ValueError(f"run_item: the task must be one of {', '.join(TASKS)}, got {item.task!r}.")
    return TASKS[item.task].run(item, context)
