"""`Turns`: sequences that guess tokens in steps, each but the first of which runs what the step before has chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dynskip.execution.step import Step
from dynskip.ops.transfer import to_device
from dynskip.paths import LayerPath
from dynskip.routing.plan import Plan
from dynskip.routing.routes import path_plan
from dynskip.sampling import NOT_FINITE, Choice


class BegunRows(NamedTuple):
    """The first rows of a sequence in a step, which have run the first ``num_layers`` layers of the decoder before.

    states: [R, C], what came out of these layers; the cache has the rows' entries there.
    """

    num_layers: int
    states: Tensor


class Guesses(NamedTuple):
    """What sequences have guessed. tokens: of each; the last may be `NOT_FINITE`.

    states: [K, B, C], the last row of each sequence in each step behind `Turns.num_common` layers; None without those.
    """

    tokens: list[list[int]]
    states: Tensor | None = None


def rows_step(
    tokens: Sequence[list[int]],
    first_positions: Sequence[int],
    cache_ids: Sequence[int],
    paths: Sequence[LayerPath],
    device: torch.device,
    decode: bool = True,
    begun: Sequence[BegunRows | None] = (),
) -> Step:
    """The step of the new ``tokens`` of some sequences, each along a path of its own, as decode rows or as prompts.

    begun: of each sequence, its first rows if they have begun; empty where none has any.
    """
    flat = [token for each in tokens for token in each]
    positions = [
        position for first, each in zip(first_positions, tokens, strict=True) for position in _count(first, each)
    ]
    token_ids, position_ids = to_device(torch.tensor([flat, positions]), device)
    ids = to_device(torch.tensor(cache_ids), device)
    counts = tuple(map(len, tokens))
    fresh = not decode and not any(first_positions)
    rows = [*begun] if any(begun) else []
    if not rows:
        return Step(token_ids, position_ids, ids, path_plan(tuple(paths), counts), decode=decode, fresh=fresh)
    plan = _begun_plan(
        tuple(paths), counts, tuple((0, 0) if each is None else (len(each.states), each.num_layers) for each in rows)
    )
    firsts = plan.rows.cu_seqlens.tolist()
    numbers = [row for first, each in zip(firsts, rows, strict=False) if each for row in _count(first, each.states)]
    states = torch.cat([each.states for each in rows if each is not None])
    begun_rows = to_device(torch.tensor(numbers), device), states
    return Step(token_ids, position_ids, ids, plan, decode=decode, begun=begun_rows)


@functools.lru_cache(maxsize=256)
def _begun_plan(paths: tuple[LayerPath, ...], counts: tuple[int, ...], begun: tuple[tuple[int, int], ...]) -> Plan:
    """The plan of paths; begun: of each sequence, how many of its rows skip how many of the decoder's first layers."""
    plan = Plan.per_sequence(paths, counts)
    assert plan.active is not None, "a path is known"
    active = plan.active.clone()
    for first, (num_rows, num_layers) in zip(plan.rows.cu_seqlens.tolist(), begun, strict=False):
        active[:num_layers, first : first + num_rows] = False
    return Plan(plan.rows, plan.num_layers, plan.kv_policy, active=active)


@dataclass
class Turns:
    """What some sequences guess along paths of their own, by decode steps that they share.

    The first step brings ``tokens`` of each, from ``first_positions`` on, at ``cache_ids``; what is chosen behind the
    last of them is the first guess, and its row in the next step. `NOT_FINITE` ends the guesses of its sequence.

    num_guesses: of each sequence, at least one. choices: how the first guess of each is chosen; each next one is chosen
    at the next position. num_common: of each sequence, behind how many of the decoder's first layers its states are
    wanted, 0 for none; None where no sequence's are.
    """

    tokens: Sequence[list[int]]
    first_positions: Sequence[int]
    cache_ids: Sequence[int]
    paths: Sequence[LayerPath]
    num_guesses: Sequence[int]
    choices: Sequence[Choice]
    device: torch.device
    num_common: Sequence[int] | None = None

    @cached_property
    def first_step(self) -> Step:
        """The step of the rows that the sequences bring."""
        return rows_step(self.tokens, self.first_positions, self.cache_ids, self.paths, self.device)

    @property
    def num_entries(self) -> int:
        """The key-value entries of all steps, where no guess ends early."""
        counts = zip(self.paths, self.tokens, self.num_guesses, strict=True)
        return sum(path.budget * (len(tokens) + num_guesses - 1) for path, tokens, num_guesses in counts)

    @property
    def last_rows(self) -> Tensor | None:
        """[B], int64: the last row of each sequence in the first step; None where it has no other."""
        counts = list(map(len, self.tokens))
        return None if max(counts) == 1 else to_device(torch.tensor(counts).cumsum(0) - 1, self.device)

    def next_step(self, guesses: Sequence[list[int]]) -> tuple[list[int], Step] | None:
        """The sequences that go on behind ``guesses``, those of each so far, and their step; None where none does."""
        indices = [
            index
            for index, (tokens, most) in enumerate(zip(guesses, self.num_guesses, strict=True))
            if len(tokens) < most and tokens[-1] != NOT_FINITE
        ]
        if not indices:
            return None
        step = rows_step(
            [guesses[index][-1:] for index in indices],
            [self.first_positions[index] + len(self.tokens[index]) + len(guesses[index]) - 1 for index in indices],
            [self.cache_ids[index] for index in indices],
            [self.paths[index] for index in indices],
            self.device,
        )
        return indices, step

    @property
    def num_steps(self) -> int:
        """How many steps there are, where no guess ends early."""
        return max(self.num_guesses)

    def choice(self, index: int, num_before: int) -> Choice:
        """How a sequence's guess behind ``num_before`` others is chosen."""
        choice = self.choices[index]
        return choice._replace(position=choice.position + num_before)


def _count(first: int, items: Sequence[int] | Tensor) -> range:
    return range(first, first + len(items))
