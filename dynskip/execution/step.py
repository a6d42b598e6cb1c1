"""One step: the new tokens of a batch of sequences, and the plan of what each layer does with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.routing.plan import Plan


@dataclass
class Step:
    """The packed new tokens of one step.

    token_ids: [N], int64.
    position_ids: [N], int64, from 0.
    cache_ids: [B], int64, the index in the cache of each sequence of the step.
    plan: what each layer does with the N rows.
    decode: True when every sequence brings one token and attends through the cache.
    fresh: True when no sequence has entries in the cache yet, so that rows attend to the rows of the step alone.
    begun: rows that begin with a state in place of their embedding: their numbers, [R], int64, and the states, [R, C].
        They skip the layers that the states have run, where the cache has their entries already.
    """

    token_ids: Tensor
    position_ids: Tensor
    cache_ids: Tensor
    plan: Plan
    decode: bool = False
    fresh: bool = False
    begun: tuple[Tensor, Tensor] | None = None

    @property
    def cache_ids_of_rows(self) -> Tensor:
        """[N], int64: the place in the cache of each row's sequence."""
        rows = self.plan.rows
        if rows.num_rows == self.cache_ids.shape[0]:
            return self.cache_ids
        return self.cache_ids[rows.seq_ids.to(self.cache_ids.device).long()]

    def begin_(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states``, the embeddings of all rows, [N, C], with the states of those that have begun."""
        return hidden_states if self.begun is None else hidden_states.index_copy_(0, *self.begun)


class RowCounts:
    """How many rows an executor really computed, layer by layer, since it was made or reset.

    Counts that only a device knows stay there until they are read: reading waits for the device.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.on_device: Tensor | None = None  # [2, L], int64: run and kv counts not yet fetched
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self._run = [0] * self.num_layers
        self._kv = [0] * self.num_layers
        if self.on_device is not None:
            self.on_device.zero_()

    def add(self, layer: int, num_run: int = 0, num_kv: int = 0) -> None:
        """Count rows of ``layer`` that the host knows of."""
        self._run[layer] += num_run
        self._kv[layer] += num_kv

    @property
    def run(self) -> list[int]:
        """[L], rows through attention and feed-forward."""
        self._fetch()
        return self._run

    @property
    def kv(self) -> list[int]:
        """[L], rows whose key and value were computed."""
        self._fetch()
        return self._kv

    def _fetch(self) -> None:
        if self.on_device is None:
            return
        for layer, (num_run, num_kv) in enumerate(self.on_device.t().tolist()):
            self.add(layer, num_run, num_kv)
        self.on_device.zero_()


def packed_positions(num_new_tokens: Sequence[int], device: torch.device) -> Tensor:
    """[N], int64: positions 0, 1, ... of each sequence, one sequence after another."""
    return torch.cat([torch.arange(count) for count in num_new_tokens]).to(device)
