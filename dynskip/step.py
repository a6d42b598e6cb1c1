"""One step: the new tokens of a batch of sequences, and the plan of what each layer does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynskip.plan import Plan


@dataclass
class Step:
    """The packed new tokens of one step.

    token_ids: [N], int64.
    position_ids: [N], int64, from 0.
    cache_ids: [B], int64, the index in the cache of each sequence of the step.
    plan: what each layer does with the N rows.
    decode: True when every sequence brings one token and attends through the cache.
    """

    token_ids: Tensor
    position_ids: Tensor
    cache_ids: Tensor
    plan: Plan
    decode: bool = False


@dataclass
class RowCounts:
    """How many rows an executor really computed, layer by layer, since it was made or reset.

    run: [L], rows through attention and feed-forward.
    kv: [L], rows whose key and value were computed.
    """

    num_layers: int
    run: list[int] = field(init=False)
    kv: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.run = [0] * self.num_layers
        self.kv = [0] * self.num_layers


def packed_positions(num_new_tokens: Sequence[int], device: torch.device) -> Tensor:
    """[N], int64: positions 0, 1, ... of each sequence, one sequence after another."""
    return torch.cat([torch.arange(count) for count in num_new_tokens]).to(device)
