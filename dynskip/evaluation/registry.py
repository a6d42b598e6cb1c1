"""`EXPERIMENTS`: what `dynskip eval` can run, by name, the most important first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynskip.evaluation.experiments import controllers, depth, hidden_states, oracle, router, static
from dynskip.evaluation.sweep.items import WorkItem
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore


@dataclass(frozen=True, slots=True)
class Experiment:
    """section: its name in summary.json. plan: the items it needs; asked again when all of them are done, so that later
    items may depend on results, until nothing is missing. summarise: the section, from the results."""

    section: str
    plan: Callable[[Setup, ItemStore], list[WorkItem]]
    summarise: Callable[[Setup, ItemStore], dict[str, Any]]


EXPERIMENTS = {
    "oracle": Experiment("oracle", oracle.plan, oracle.summarise),
    "hidden-states": Experiment("hidden_states", hidden_states.plan, hidden_states.summarise),
    "static": Experiment("static", static.plan, static.summarise),
    "router": Experiment("router", router.plan, router.summarise),
    "controllers": Experiment("controllers", controllers.plan, controllers.summarise),
    "depth": Experiment("depth", depth.plan, depth.summarise),
}
