"""Plans: which token rows each layer computes in one step. Pure data, no model and no device.

A step handles N packed token rows, grouped by sequence, without padding. For each layer a plan answers three questions:
which rows run the layer (*run*), for which rows the layer computes a key and a value (*kv*), and which rows own an
entry in the layer's key-value table (*entry*). Both executors consume the same plan.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dynskip.paths import LayerPath
from dynskip.routing.flat_rows import FlatRows


class KVPolicy(Enum):
    """What a token leaves in the key-value table of a layer that it skips.

    ABSENT: nothing; the path is fixed for the whole sequence, so no later token asks for it.
    EVICT: nothing; later tokens of the sequence do not attend to the token in that layer.
    PROPAGATE: the key and value that the layer computes from the passed-through state (arXiv 2410.20022).
    SHARE: the entry of the last layer that the token ran; before its first layer, as PROPAGATE.
    """

    ABSENT = "absent"
    EVICT = "evict"
    PROPAGATE = "propagate"
    SHARE = "share"

    @staticmethod
    def per_token(name: str | None, function: str = "KVPolicy.per_token") -> KVPolicy:
        """The policy for per-token masks that ``name`` stands for; None is PROPAGATE.

        Raises ValueError, naming ``function``, for an unknown name.
        """
        if name is None:
            return KVPolicy.PROPAGATE
        if name not in ("propagate", "evict", "share"):
            raise ValueError(f"{function}: kv_policy must be 'propagate', 'evict' or 'share', got {name!r}.")
        return KVPolicy(name)


@dataclass(frozen=True)
class RowSet:
    """Some rows of a step, in increasing order.

    row_ids: [R], int32, the rows, or None for all rows of the step.
    seq_ids: [R], int32, the sequence of each row.
    ranks: [R], int32, how many rows of the set stand before each row in its own sequence.
    cu_seqlens: [B + 1], int32, where each sequence's rows begin in the set; its last entry is R.
    """

    row_ids: Tensor | None
    num_rows: int
    seq_ids: Tensor
    ranks: Tensor
    cu_seqlens: Tensor

    @staticmethod
    def of(mask: Tensor, rows: Rows) -> RowSet:
        """The rows where ``mask`` ([N], bool) holds."""
        if mask.all():
            return rows.all
        row_ids = mask.nonzero().squeeze(1)
        # Running count with a leading zero: its value at a sequence's first row is where the sequence begins.
        count = torch.zeros(rows.num_rows + 1, dtype=torch.int32)
        torch.cumsum(mask, 0, dtype=torch.int32, out=count[1:])
        seq_ids = rows.seq_ids[row_ids]
        cu_seqlens = count[rows.cu_seqlens.long()]
        ranks = count[row_ids] - cu_seqlens[seq_ids.long()]
        return RowSet(row_ids.int(), int(row_ids.numel()), seq_ids, ranks, cu_seqlens)

    def to(self, device: torch.device) -> RowSet:
        """The same set with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        row_ids = None if self.row_ids is None else self.row_ids.to(device)
        tensors = (self.seq_ids.to(device), self.ranks.to(device), self.cu_seqlens.to(device))
        return RowSet(row_ids, self.num_rows, *tensors)


@dataclass(frozen=True)
class Rows:
    """The packed token rows of one step: ``num_new_tokens[b]`` rows of each sequence b, one sequence after another."""

    num_new_tokens: tuple[int, ...]

    @property
    def num_seqs(self) -> int:
        """How many sequences take part."""
        return len(self.num_new_tokens)

    @cached_property
    def num_rows(self) -> int:
        """How many token rows the step has."""
        return sum(self.num_new_tokens)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """[B + 1], int32: where each sequence's rows begin; the last entry is N."""
        cu_seqlens = torch.zeros(self.num_seqs + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(self.num_new_tokens), 0, dtype=torch.int32, out=cu_seqlens[1:])
        return cu_seqlens

    @cached_property
    def seq_ids(self) -> Tensor:
        """[N], int32: the sequence of each row."""
        return torch.from_numpy(np.repeat(np.arange(self.num_seqs, dtype=np.int32), self.num_new_tokens))

    @cached_property
    def ranks(self) -> Tensor:
        """[N], int32: the place of each row among the new rows of its sequence, from 0."""
        return torch.arange(self.num_rows, dtype=torch.int32) - self.cu_seqlens[self.seq_ids.long()]

    @cached_property
    def all(self) -> RowSet:
        """Every row of the step."""
        return RowSet(None, self.num_rows, self.seq_ids, self.ranks, self.cu_seqlens)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does in one step.

    run: the rows that run attention and feed-forward.
    kv: the rows whose key and value the layer computes.
    entries: the rows that own an entry in the layer's table: ``kv``, and with SHARE those that reuse an entry.
    key_ranks: [R] of ``run``, int32, how many entries of its own sequence each row's new keys include, itself counted.
    """

    run: RowSet
    kv: RowSet
    entries: RowSet
    key_ranks: Tensor

    @staticmethod
    def of(active: Tensor, has_entry: Tensor, rows: Rows, kv_policy: KVPolicy) -> LayerPlan:
        """The plan of a layer that the rows with ``active`` ([N], bool) run.

        has_entry: [N], bool, the rows that ran an earlier layer (only SHARE looks at it).
        """
        run = RowSet.of(active, rows)
        if kv_policy in (KVPolicy.ABSENT, KVPolicy.EVICT):
            return LayerPlan(run, run, run, run.ranks + 1)
        key_ranks = rows.ranks + 1 if run.row_ids is None else rows.ranks[run.row_ids.long()] + 1
        kv = rows.all if kv_policy is KVPolicy.PROPAGATE else RowSet.of(active | ~has_entry, rows)
        return LayerPlan(run, kv, rows.all, key_ranks)

    @staticmethod
    def of_flat(flat: FlatRows, layer: int, num_rows: int) -> LayerPlan:
        """The plan of a layer whose running rows alone leave entries; ``num_rows``: of the step."""
        begin, end = flat.indptr[layer], flat.indptr[layer + 1]
        part = slice(begin, end)
        row_ids = None if end - begin == num_rows else flat.row_ids[part]
        run = RowSet(row_ids, end - begin, flat.seq_ids[part], flat.ranks[part], flat.cu_seqlens[layer])
        return LayerPlan(run, run, run, flat.key_ranks[part])

    def to(self, device: torch.device) -> LayerPlan:
        """The same plan with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        run = self.run.to(device)
        kv = run if self.kv is self.run else self.kv.to(device)
        entries = run if self.entries is self.run else kv if self.entries is self.kv else self.entries.to(device)
        return LayerPlan(run, kv, entries, self.key_ranks.to(device))


class Decide(Protocol):
    """Decides which rows run a layer once the layer's input is known."""

    def __call__(self, layer: int, hidden_states: Tensor) -> Tensor:
        """[N], bool: True where the row runs ``layer``; ``hidden_states`` is the layer's input, [N, C]."""
        ...


@dataclass
class Plan:
    """The work of one step, layer by layer.

    rows: the packed token rows.
    num_layers: L.
    kv_policy: what skipped layers store.
    active: [L, N], bool on the CPU, or None when ``decide`` tells layer by layer.
    """

    rows: Rows
    num_layers: int
    kv_policy: KVPolicy
    active: Tensor | None = None
    decide: Decide | None = None
    _layers: dict[torch.device, list[LayerPlan]] = field(default_factory=dict, repr=False)
    _flat: dict[torch.device, FlatRows] = field(default_factory=dict, repr=False)
    _cut: dict[torch.device, dict[int, LayerPlan]] = field(default_factory=dict, repr=False)
    _has_entry: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert (self.active is None) != (self.decide is None), "a plan has a mask or a decision, not both"

    @staticmethod
    def per_sequence(paths: Sequence[LayerPath], num_new_tokens: Sequence[int]) -> Plan:
        """The plan of a step in which sequence b brings ``num_new_tokens[b]`` rows along ``paths[b]``."""
        rows = Rows(tuple(num_new_tokens))
        masks = torch.stack([_mask(path) for path in paths], dim=1)
        active = torch.from_numpy(masks.numpy().take(rows.seq_ids.numpy(), axis=1))
        return Plan(rows, paths[0].num_layers, KVPolicy.ABSENT, active=active)

    @staticmethod
    def per_token(active: Tensor, num_new_tokens: Sequence[int], kv_policy: KVPolicy) -> Plan:
        """The plan of a step whose packed rows run the layers of ``active``, [N, L], bool."""
        rows = Rows(tuple(num_new_tokens))
        return Plan(rows, active.shape[1], kv_policy, active=active.t().contiguous().cpu())

    @staticmethod
    def decided(decide: Decide, num_layers: int, num_new_tokens: Sequence[int], kv_policy: KVPolicy) -> Plan:
        """The plan of a step in which ``decide`` chooses each layer's rows from the layer's input."""
        return Plan(Rows(tuple(num_new_tokens)), num_layers, kv_policy, decide=decide)

    def layer(self, layer: int, hidden_states: Tensor) -> LayerPlan:
        """What ``layer`` does, with tensors on the device of its input ``hidden_states`` [N, C].

        Layers are asked for in increasing order.
        """
        device = hidden_states.device
        if self.active is not None:
            flat = self.flat(device)
            if flat is None:
                return self.all_layers(device)[layer]
            # A layer's plan is cut out when it is asked for: the device works on the layers before meanwhile.
            cut = self._cut.setdefault(device, {})
            # Layers without rows are all alike.
            key = layer if flat.indptr[layer] < flat.indptr[layer + 1] else -1
            if key not in cut:
                cut[key] = LayerPlan.of_flat(flat, layer, self.rows.num_rows)
            return cut[key]
        active = self._decide(layer, hidden_states)
        if layer == 0:
            self._has_entry = torch.zeros_like(active)
        plan = LayerPlan.of(active, self._has_entry, self.rows, self.kv_policy)
        self._has_entry = self._has_entry | active
        return plan.to(device)

    def all_layers(self, device: torch.device) -> list[LayerPlan]:
        """What each layer does, for a plan whose mask is known; worked out once."""
        assert self.active is not None, "a controller decides layer by layer"
        if device not in self._layers:
            has_entry = torch.zeros(self.rows.num_rows, dtype=torch.bool)
            plans = []
            for active in self.active:
                plans.append(LayerPlan.of(active, has_entry, self.rows, self.kv_policy).to(device))
                has_entry = has_entry | active
            self._layers[device] = plans
        return self._layers[device]

    def flat(self, device: torch.device) -> FlatRows | None:
        """The rows of all layers laid end to end, for a plan whose mask is known, worked out by ``device`` once.

        None where other rows than those that run leave entries.
        """
        entries_are_run = self.kv_policy in (KVPolicy.ABSENT, KVPolicy.EVICT)
        if self.active is None or not entries_are_run:
            return None
        if device not in self._flat:
            self._flat[device] = FlatRows.of(self.active, self.rows.seq_ids, self.rows.cu_seqlens, device)
        return self._flat[device]

    @cached_property
    def num_rows_by_layer(self) -> list[tuple[int, int]]:
        """Per layer how many rows run it, and for how many it computes a key and a value; for a plan with a mask."""
        assert self.active is not None, "a controller decides layer by layer"
        num_run = self.active.sum(1).tolist()
        if self.kv_policy in (KVPolicy.ABSENT, KVPolicy.EVICT):
            return [(count, count) for count in num_run]
        if self.kv_policy is KVPolicy.PROPAGATE:
            return [(count, self.rows.num_rows) for count in num_run]
        # Before the first layer that it runs, a row has no entry to share: each layer computes one for it.
        ran_before = (self.active.cumsum(0) - self.active.long()) > 0
        return list(zip(num_run, (self.active | ~ran_before).sum(1).tolist(), strict=True))

    def _decide(self, layer: int, hidden_states: Tensor) -> Tensor:
        assert self.decide is not None
        active = self.decide(layer, hidden_states)
        if not isinstance(active, Tensor) or active.dtype != torch.bool or active.shape != (self.rows.num_rows,):
            got = f"{active.dtype} {list(active.shape)}" if isinstance(active, Tensor) else type(active).__name__
            raise TypeError(f"controller: active must return bool [{self.rows.num_rows}], got {got}.")
        return active.cpu()


@functools.lru_cache(maxsize=1024)
def _mask(path: LayerPath) -> Tensor:
    return path.mask
