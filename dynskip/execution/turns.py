"""`Turns`: sequences that guess tokens in steps, each but the first of which runs what the step before has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dynskip.execution.step import Step, to_device
from dynskip.paths import LayerPath
from dynskip.routing.routes import path_plan
from dynskip.sampling import NOT_FINITE, Choice


def rows_step(
    tokens: Sequence[list[int]],
    first_positions: Sequence[int],
    cache_ids: Sequence[int],
    paths: Sequence[LayerPath],
    device: torch.device,
    decode: bool = True,
) -> Step:
    """The step of the new ``tokens`` of some sequences, each along a path of its own, as decode rows or as prompts."""
    flat = [token for each in tokens for token in each]
    positions = [
        position for first, each in zip(first_positions, tokens, strict=True) for position in _count(first, each)
    ]
    token_ids, position_ids = to_device(torch.tensor([flat, positions]), device)
    ids = to_device(torch.tensor(cache_ids), device)
    plan = path_plan(tuple(paths), tuple(map(len, tokens)))
    fresh = not decode and not any(first_positions)
    return Step(token_ids, position_ids, ids, plan, decode=decode, fresh=fresh)


@dataclass
class Turns:
    """What some sequences guess along paths of their own, by decode steps that they share.

    The first step brings ``tokens`` of each, from ``first_positions`` on, at ``cache_ids``; what is chosen behind the
    last of them is the first guess, and its row in the next step. `NOT_FINITE` ends the guesses of its sequence.

    num_guesses: of each sequence, at least one. choices: how the first guess of each is chosen; each next one is chosen
    at the next position.
    """

    tokens: Sequence[list[int]]
    first_positions: Sequence[int]
    cache_ids: Sequence[int]
    paths: Sequence[LayerPath]
    num_guesses: Sequence[int]
    choices: Sequence[Choice]
    device: torch.device

    @cached_property
    def first_step(self) -> Step:
        """The rows that the sequences bring."""
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

    def choice(self, index: int, num_before: int) -> Choice:
        """How a sequence's guess behind ``num_before`` others is chosen."""
        choice = self.choices[index]
        return choice._replace(position=choice.position + num_before)


def _count(first: int, tokens: Sequence[int]) -> range:
    return range(first, first + len(tokens))
