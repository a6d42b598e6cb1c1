"""Families of static paths: which weights run which path at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import Setup, path_text
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.evaluation.tasks.generations import GREEDY, Generations, generate_items, read_generations
from dynskip.paths import LayerPath

DESCRIPTIONS = {
    "paths": "one set of weights along every path",
    "siblings": "each budget its own weights, fine-tuned for it",
    "untuned": "the weights tuned at full depth only, along paths they were not tuned for",
    "backbone": "the weights before any tuning, along the same paths",
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
    found = {"paths": [Member(budget, setup.checkpoint, setup.path_of(budget)) for budget in budgets]}
    siblings = dict(setup.siblings)
    tuned = [budget for budget in budgets if budget in siblings and budget != num_layers]
    if tuned:
        members = [Member(budget, siblings[budget], _sibling_path(setup, budget)) for budget in tuned]
        found["siblings"] = [*members, Member(num_layers, setup.full_checkpoint, "full")]
    if num_layers in siblings:
        found["untuned"] = [Member(budget, siblings[num_layers], setup.path_of(budget)) for budget in budgets]
    if setup.backbone is not None:
        found["backbone"] = [Member(budget, setup.backbone, setup.path_of(budget)) for budget in budgets]
    return found


def _sibling_path(setup: Setup, budget: int) -> str:
    """The path of a sibling, which may hold only the layers that it runs."""
    num_layers = dict(setup.siblings)[budget].num_layers
    return setup.path_of(budget) if num_layers == setup.num_layers else path_text(budget, num_layers)


def family_items(
    setup: Setup, members: Sequence[Member], seed: int = GREEDY, split: str | None = None
) -> list[WorkItem]:
    """The items of a family's generations: greedy ones, or sampled with ``seed``, from 1 on.

    split: None for the setup's. On another the paths of ``members`` are run and no others.
    """
    return [item for member in members for item in _items_of(setup, members, member, seed, split)]


def family_generations(
    setup: Setup, store: ItemStore, members: Sequence[Member], seed: int = GREEDY, split: str | None = None
) -> Generations:
    """The generations of ``family_items``: a column for each member, in order."""
    read = [read_generations(store, _items_of(setup, members, member, seed, split)) for member in members]
    columns = [found.along([member.path]) for found, member in zip(read, members, strict=True)]
    rows = columns[0].rows
    assert all((column.rows == rows).all() for column in columns), "all weights answer the same prompts"
    return Generations(
        rows,
        tuple(member.path for member in members),
        np.concatenate([column.rouge_l for column in columns], axis=1),
        np.concatenate([column.num_tokens for column in columns], axis=1),
    )


def choices(setup: Setup) -> dict[str, list[Member]]:
    """By name the candidates of each family whose members were tuned for what they run, where there are several.

    Candidates are what the oracle chooses among.
    """
    found, budgets = families(setup), (*setup.candidates, setup.num_layers)
    tuned = {name: found[name] for name in ("siblings", "paths") if name in found}
    candidates = {name: [member for member in tuned[name] if member.budget in budgets] for name in tuned}
    return {name: members for name, members in candidates.items() if len(members) > 1}


def equal_paths(setup: Setup, count: int) -> list[str]:
    """``count`` paths as deep as the deepest candidate below full depth: its own, and neighbours of it.

    A neighbour runs, in place of one layer, one beside it; the first layer is exchanged last. Empty where there are
    fewer of them: a choice among paths of one depth is then not to be had.
    """
    num_layers = setup.num_layers
    budget = max(budget for budget in setup.candidates if budget < num_layers)
    own = setup.path_of(budget)
    base = LayerPath.parse(own, num_layers)
    swapped = [
        LayerPath.of(num_layers, {*base.layers} - {layer} | {new})
        for layer in (*base.layers[1:], base.layers[0])
        for new in (layer + 1, layer - 1)
        if 0 <= new < num_layers and new not in base.layers
    ]
    others = list(dict.fromkeys(swapped))
    if len(others) < count - 1:
        return []
    # Spread over the depth: neighbours of one layer alone would be alike.
    spread = [others[place * len(others) // (count - 1)] for place in range(count - 1)]
    return [own, *(f"layers:{','.join(map(str, path.layers))}" for path in spread)]


def notes_on_choices(setup: Setup) -> list[str]:
    """A note on each family that has weights but no choice of depth, for sections that need one."""
    missing = [name for name in ("siblings", "paths") if name in families(setup) and name not in choices(setup)]
    return [f"{name}: left out, only one of its budgets is among the candidates." for name in missing]


def _items_of(setup: Setup, members: Sequence[Member], member: Member, seed: int, split: str | None) -> list[WorkItem]:
    if split in (None, setup.split):
        paths = _paths_of(setup, member, seed)
    else:
        paths = [other.path for other in members if other.checkpoint == member.checkpoint]
    return generate_items(setup, member.checkpoint, paths, split, seed)


def _paths_of(setup: Setup, member: Member, seed: int) -> list[str]:
    """All paths that share a batch with the member's on the setup's split: those asked of the same weights."""
    if member.checkpoint.num_layers != setup.num_layers:
        return [member.path]
    budgets = {*setup.candidates} if seed != GREEDY else {*setup.budgets, *setup.candidates}
    siblings = dict(setup.siblings)
    ordered = sorted({*budgets, setup.num_layers})
    everything = [setup.path_of(budget) for budget in ordered]
    if member.checkpoint == setup.checkpoint:
        return everything
    if member.checkpoint == siblings.get(setup.num_layers):
        return everything if seed == GREEDY else ["full"]
    return [member.path]
