"""The executor that saves time: it gathers the active rows of each layer, runs the layer once, and scatters back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dynskip.backends import Backend
from dynskip.kv_cache import EntryIndex, KVCache
from dynskip.plan import KVPolicy, LayerPlan
from dynskip.step import RowCounts, Step

if TYPE_CHECKING:
    from dynskip.opt import OPTDecoder, OPTDecoderLayer


class CompactExecutor:
    """Runs steps of many sequences, each layer once, on the compact rows that the plan gives it.

    backend: whose launchers gather, scatter and attend.
    deterministic: compute each row with the same bits whatever its neighbours are.
    """

    def __init__(self, decoder: OPTDecoder, backend: Backend, deterministic: bool = False) -> None:
        self.decoder = decoder
        self.backend = backend
        self.deterministic = deterministic
        self.row_counts = RowCounts(len(decoder.layers))

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> KVCache:
        """A cache for ``num_seqs`` sequences of at most ``max_context_len`` tokens and ``num_slots`` entries in all."""
        layer = self.decoder.stack()[0]
        table = self.decoder.embed_positions.weight
        return KVCache(
            len(self.decoder.layers),
            num_seqs,
            max_context_len,
            num_slots,
            layer.num_heads,
            layer.head_size,
            table.dtype,
            table.device,
        )

    @torch.no_grad()
    def run(self, step: Step, cache: KVCache | None, on_layer: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """[N, C]: the last layer's output for every row of ``step``.

        cache: takes the new entries; None where nothing will be decoded from them.
        on_layer: called with each layer's index and input, [N, C], which the layer then changes in place.
        """
        assert cache is not None or step.plan.kv_policy is not KVPolicy.SHARE, "sharing entries needs a cache"
        hidden_states = self.decoder.embed(step.token_ids, step.position_ids, self.deterministic)
        entries = _Entries(self, step, cache) if cache is not None else None
        for index, layer in enumerate(self.decoder.stack()):
            if on_layer is not None:
                on_layer(index, hidden_states)
            plan = step.plan.layer(index, hidden_states)
            if plan.entries.num_rows:
                self._run_layer(index, layer, plan, hidden_states, step, entries)
        return hidden_states

    def _run_layer(
        self,
        index: int,
        layer: OPTDecoderLayer,
        plan: LayerPlan,
        hidden_states: Tensor,
        step: Step,
        entries: _Entries | None,
    ) -> None:
        backend, deterministic = self.backend, self.deterministic
        run, kv = plan.run, plan.kv
        attention_input = key = value = None
        if kv.num_rows:
            attention_input = layer.attention_input(hidden_states, kv.row_ids, backend)
            key, value = layer.project_key_value(attention_input, deterministic)
            self.row_counts.kv[index] += key.shape[0]
        placed = entries.add(index, plan, key, value) if entries is not None else None
        if not run.num_rows:
            return
        if kv is not run or attention_input is None:
            attention_input = layer.attention_input(hidden_states, run.row_ids, backend)
        query = layer.project_query(attention_input, deterministic)
        self.row_counts.run[index] += query.shape[0]
        if step.decode:
            assert entries is not None and placed is not None, "decoding needs a cache"
            cache = entries.cache
            tables = cache.slot_tables[index]
            attention = backend.decode_attention(
                query, cache.k_cache, cache.v_cache, tables, placed.seq_ids, placed.key_limits, layer.scale
            )
        else:
            keys, values, cu_seqlens_k = (
                entries.visible(index, plan, key, value) if entries is not None else (key, value, kv.cu_seqlens)
            )
            assert keys is not None and values is not None, "a row that runs a layer has a key and a value there"
            key_limits = placed.key_limits if placed is not None else plan.key_ranks
            attention = backend.prefill_attention(
                query, keys, values, run.cu_seqlens, cu_seqlens_k, key_limits, layer.scale
            )
        layer.add_attention_(hidden_states, run.row_ids, attention, backend, deterministic)
        layer.add_feed_forward_(hidden_states, run.row_ids, backend, deterministic)


class _Placed(NamedTuple):
    """seq_ids: [R], int32, the cache sequence of each run row; key_limits: [R], int32, the entries it attends to."""

    seq_ids: Tensor
    key_limits: Tensor


class _Entries:
    """The cache entries of one step: placed for all layers at once if the plan allows, else layer by layer."""

    def __init__(self, executor: CompactExecutor, step: Step, cache: KVCache) -> None:
        self.backend = executor.backend
        self.step = step
        self.cache = cache
        self.first_step = not step.decode and cache.num_slots_used == 0
        self.index = cache.index(step.plan, step.cache_ids)
        if self.index is not None:
            self.slots = cache.allocate(self.index.entry_indptr[-1])
            self.key_limits = cache.append(self.index, self.slots)
        else:
            # The slot that holds each row's last key and value: SHARE lets later layers point to it.
            self.row_slots = torch.full_like(step.token_ids, -1, dtype=torch.int32)

    def add(self, layer: int, plan: LayerPlan, key: Tensor | None, value: Tensor | None) -> _Placed:
        """Store the new keys and values, each [K, H, D], of ``layer``; returns where its run rows stand."""
        index, part = self.index, layer
        if index is None:
            index, part = EntryIndex.of([plan], layer, self.step.cache_ids, self.cache.context_lens.shape[1]), 0
            slots = self.cache.allocate(plan.kv.num_rows)
            key_limits = self.cache.append(index, self._entry_slots(plan, slots))
        else:
            slots = self.slots[index.entry_indptr[part] : index.entry_indptr[part + 1]]
            key_limits = self.key_limits
        if key is not None and value is not None:
            self.backend.kv_store(key, value, self.cache.k_cache, self.cache.v_cache, slots)
        begin, end = index.run_indptr[part], index.run_indptr[part + 1]
        return _Placed(index.run_cache_ids[begin:end], key_limits[begin:end])

    def visible(
        self, layer: int, plan: LayerPlan, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Keys, values and their cu_seqlens that the run rows of ``layer`` attend to in a prefill step."""
        if self.first_step and plan.entries is plan.kv:
            return key, value, plan.kv.cu_seqlens
        return self.cache.gather(layer, self.step.cache_ids)

    def _entry_slots(self, plan: LayerPlan, slots: Tensor) -> Tensor:
        if plan.kv.row_ids is None:
            self.row_slots.copy_(slots)
        else:
            self.row_slots[plan.kv.row_ids.long()] = slots
        return slots if plan.entries is plan.kv else self.row_slots
