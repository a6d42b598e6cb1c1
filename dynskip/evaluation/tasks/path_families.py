"""Families of static paths: which weights run which path at each budget."""

from __future__ import annotations

from dataclasses import dataclass

from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import Setup, path_text
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.generations import GREEDY, Generations, generate_items, read_generations

DESCRIPTIONS = {
    "paths": "one set of weights along every path",
    "siblings": "each budget its own weights, fine-tuned for it",
    "untuned": "the weights tuned at full depth only, along paths they were not tuned for",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One budget of a family: the weights, and the path they run."""

    budget: int
    checkpoint: Checkpoint
    path: str


def families(setup: Setup) -> dict[str, list[Member]]:
    """By name the members of each family that the setup has weights for, cheapest first."""
    num_layers = setup.num_layers
    budgets = sorted({*setup.budgets, *setup.candidates, num_layers})
    found = {"paths": [Member(budget, setup.checkpoint, path_text(budget, num_layers)) for budget in budgets]}
    siblings = dict(setup.siblings)
    tuned = [budget for budget in budgets if budget in siblings and budget != num_layers]
    if tuned:
        # A sibling may hold only the layers that it runs.
        members = [Member(budget, siblings[budget], path_text(budget, siblings[budget].num_layers)) for budget in tuned]
        found["siblings"] = [*members, Member(num_layers, setup.full_checkpoint, "full")]
    if num_layers in siblings:
        found["untuned"] = [Member(budget, siblings[num_layers], path_text(budget, num_layers)) for budget in budgets]
    return found


def greedy_items(setup: Setup, members: list[Member]) -> list[WorkItem]:
    """The items of greedy generations of a family on the setup's split."""
    return [item for member in members for item in _items_of(setup, member, GREEDY)]


def greedy(setup: Setup, store: ItemStore, members: list[Member], split: str | None = None) -> Generations:
    """Greedy generations of a family: a column for each member, in order."""
    return _joined(store, [(member, _items_of(setup, member, GREEDY, split)) for member in members])


def sampled_items(setup: Setup, members: list[Member], seed: int) -> list[WorkItem]:
    """The items of generations that a family samples with ``seed``, from 1 on."""
    return [item for member in members for item in _items_of(setup, member, seed)]


def sampled(setup: Setup, store: ItemStore, members: list[Member], seed: int) -> Generations:
    """Generations that a family sampled with ``seed``."""
    return _joined(store, [(member, _items_of(setup, member, seed)) for member in members])


def candidates(setup: Setup, members: list[Member]) -> list[Member]:
    """Those members that the oracle chooses among."""
    return [member for member in members if member.budget in (*setup.candidates, setup.num_layers)]


def choices(setup: Setup) -> dict[str, list[Member]]:
    """By name the candidates of each family whose members were tuned for what they run, where there are several."""
    found = families(setup)
    tuned = {name: candidates(setup, found[name]) for name in ("siblings", "paths") if name in found}
    return {name: members for name, members in tuned.items() if len(members) > 1}


def notes_on_choices(setup: Setup) -> list[str]:
    """A note on each family that has weights but no choice of depth, for sections that need one."""
    missing = [name for name in ("siblings", "paths") if name in families(setup) and name not in choices(setup)]
    return [f"{name}: left out, only one of its budgets is among the candidates." for name in missing]


def _items_of(setup: Setup, member: Member, seed: int, split: str | None = None) -> list[WorkItem]:
    return generate_items(setup, member.checkpoint, _paths_of(setup, member, seed), split, seed)


def _paths_of(setup: Setup, member: Member, seed: int) -> list[str]:
    """All paths that share a batch with the member's: those asked of the same weights."""
    if member.checkpoint.num_layers != setup.num_layers:
        return [member.path]
    budgets = {*setup.candidates} if seed != GREEDY else {*setup.budgets, *setup.candidates}
    siblings = dict(setup.siblings)
    everything = [path_text(budget, setup.num_layers) for budget in sorted({*budgets, setup.num_layers})]
    if member.checkpoint == setup.checkpoint:
        return everything
    if member.checkpoint == siblings.get(setup.num_layers):
        return everything if seed == GREEDY else ["full"]
    return [member.path]


def _joined(store: ItemStore, parts: list[tuple[Member, list[WorkItem]]]) -> Generations:
    import numpy as np

    columns = [read_generations(store, items).along([member.path]) for member, items in parts]
    first = columns[0]
    assert all((column.rows == first.rows).all() for column in columns), "all weights answer the same prompts"
    return Generations(
        first.rows,
        tuple(member.path for member, _ in parts),
        np.concatenate([column.rouge_l for column in columns], axis=1),
        np.concatenate([column.num_tokens for column in columns], axis=1),
    )
