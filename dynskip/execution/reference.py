"""The executor that is the specification: each sequence alone, layer by layer, in plain PyTorch. Differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynskip.execution.executor import Executor
from dynskip.execution.step import RowCounts, Step
from dynskip.models.decoder import Decoder, DecoderLayer, Positions
from dynskip.models.linear import Linear
from dynskip.ops import reference
from dynskip.routing.plan import LayerPlan, RowSet

# The keys and values, each [S, G, D], and the positions, [S], int64, of some entries.
Entries = tuple[Tensor, Tensor, Tensor]


class ReferenceCache:
    """The entries of every (layer, cache sequence) that has any."""

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], Entries] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(2 * key.numel() * key.element_size() for key, _, _ in self.entries.values())

    def append(self, layer: int, seq: int, new: Entries) -> Entries:
        """All entries of ``seq`` in ``layer``, the ``new`` ones last."""
        old = self.entries.get((layer, seq), ())
        key, value, positions = (torch.cat(parts) for parts in zip(old, new, strict=True)) if old else new
        self.entries[layer, seq] = key, value, positions
        return key, value, positions

    @property
    def num_slots_used(self) -> int:
        """How many entries all sequences hold; one that several hold counts once for each."""
        return sum(key.shape[0] for key, _, _ in self.entries.values())

    def clear(self) -> None:
        """Forget all entries."""
        self.entries.clear()

    def settle(self) -> None:
        """Nothing: what is held is always known."""

    def release(self, cache_ids: Sequence[int]) -> int:
        """Forget all entries of these sequences; how many they held."""
        before = self.num_slots_used
        self.entries = {place: entry for place, entry in self.entries.items() if place[1] not in cache_ids}
        return before - self.num_slots_used

    def fork(self, source: int, target: int) -> None:
        """Make the empty sequence ``target`` begin with all entries of ``source``."""
        self._begin(source, target, None)

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Make the empty sequence ``target`` begin with the first ``num_tokens`` tokens of ``source``.

        For sequences with a fixed path, whose layers hold entries of all their tokens, or none.
        """
        lengths = {key.shape[0] for (_, seq), (key, _, _) in self.entries.items() if seq == source}
        assert len(lengths) <= 1, "layers of the source hold different tokens"
        assert all(length >= num_tokens for length in lengths), "the source holds fewer tokens"
        self._begin(source, target, num_tokens)

    def truncate(
        self,
        cache_ids: Sequence[int],
        num_tokens: Sequence[int],
        num_more: Sequence[int],
        first_layers: Sequence[int] | None = None,
    ) -> None:
        """See `KVCache.truncate`."""
        firsts = [0] * len(cache_ids) if first_layers is None else first_layers
        kept = {seq: (count, first) for seq, count, first in zip(cache_ids, num_tokens, firsts, strict=True)}
        for (layer, seq), (key, value, positions) in list(self.entries.items()):
            count, first = kept.get(seq, (0, layer + 1))
            if layer >= first:
                self.entries[layer, seq] = key[:count], value[:count], positions[:count]

    def add_sequences(self, num_seqs: int) -> None:
        """Nothing: it has room for any sequence."""

    def mark(self, cache_ids: Sequence[int]) -> ReferenceMark:
        """What `rewind` needs to take back the entries that these sequences get from now on."""
        entries = {place: entry for place, entry in self.entries.items() if place[1] in cache_ids}
        return ReferenceMark(tuple(cache_ids), entries)

    def rewind(self, mark: ReferenceMark | None) -> None:
        """Forget what the sequences of ``mark`` got since then."""
        if mark is not None:
            self.release(mark.cache_ids)
            self.entries.update(mark.entries)

    def _begin(self, source: int, target: int, num_tokens: int | None) -> None:
        assert all(seq != target for _, seq in self.entries), "the target of a fork holds entries"
        for (layer, seq), (key, value, positions) in list(self.entries.items()):
            if seq == source:
                self.entries[layer, target] = key[:num_tokens], value[:num_tokens], positions[:num_tokens]


@dataclass(frozen=True)
class ReferenceMark:
    """The entries of some sequences at one time: see `ReferenceCache.mark`."""

    cache_ids: tuple[int, ...]
    entries: dict[tuple[int, int], Entries]


class ReferenceExecutor(Executor[ReferenceCache]):
    """Runs steps one sequence at a time with F.linear and F.layer_norm: slow, obvious, and differentiable."""

    def __init__(self, decoder: Decoder, lm_head: Linear) -> None:
        self.decoder = decoder
        self.lm_head = lm_head
        self.row_counts = RowCounts(len(decoder.layers))

    def new_cache(self, num_seqs: int, max_context_len: int, num_slots: int) -> ReferenceCache:
        """An empty cache, which grows as it is used."""
        return ReferenceCache()

    def run(
        self, step: Step, cache: ReferenceCache | None, on_layer: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """[N, C]: the last layer's output for every row of ``step``; the arguments are those of `Executor.run`."""
        num_seqs = step.plan.rows.num_seqs
        bounds = step.plan.rows.cu_seqlens.tolist()
        cache_ids = step.cache_ids.tolist()
        cache = ReferenceCache() if cache is None else cache
        hidden_states = step.begin_(self.decoder.embed(step.token_ids, step.position_ids))
        # Keys and values by row, [N, G, D]: SHARE reuses those of the last layer that a row ran.
        last: list[tuple[Tensor, Tensor] | None] = [None] * num_seqs
        for index, layer in enumerate(self.decoder.stack()):
            if on_layer is not None:
                on_layer(index, hidden_states)
            plan = step.plan.layer(index, hidden_states)
            parts = []
            for seq in range(num_seqs):
                begin, end = bounds[seq], bounds[seq + 1]
                part, rows = _SequencePart.of(plan, seq, begin), hidden_states[begin:end]
                positions = Positions(step.position_ids[begin:end], self.decoder.cos_sin)
                done, last[seq] = self._run_layer(index, layer, part, rows, positions, last[seq], cache, cache_ids[seq])
                parts.append(done)
            hidden_states = torch.cat(parts)
        return hidden_states

    def head(self, hidden_states: Tensor) -> Tensor:
        """[R, V]: the logits of the last layer's output ``hidden_states``, [R, C]."""
        return nn.functional.linear(self.finish(hidden_states), self.lm_head.dense_weight(), self.lm_head.bias)

    def finish(self, hidden_states: Tensor) -> Tensor:
        """See `Executor.finish`."""
        return self.decoder.finish(hidden_states)

    def _run_layer(
        self,
        index: int,
        layer: DecoderLayer,
        part: _SequencePart,
        rows: Tensor,
        positions: Positions,
        last: tuple[Tensor, Tensor] | None,
        cache: ReferenceCache,
        cache_id: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        if not part.entries.numel():
            return rows, last
        key, value = layer.key_value(rows[part.kv], positions.of(part.kv))
        self.row_counts.add(index, num_kv=key.shape[0])
        if last is None:
            shape = (rows.shape[0], *key.shape[1:])
            last = rows.new_zeros(shape), rows.new_zeros(shape)
        # index_copy, not assignment: the caller may want gradients through every key and value.
        last = last[0].index_copy(0, part.kv, key), last[1].index_copy(0, part.kv, value)
        new = last[0][part.entries], last[1][part.entries], positions.ids[part.entries]
        keys, values, key_positions = cache.append(index, cache_id, new)
        if not part.run.numel():
            return rows, last
        num_old = keys.shape[0] - new[0].shape[0]
        query = layer.query(rows[part.run], positions.of(part.run))
        self.row_counts.add(index, num_run=query.shape[0])
        attention = reference.prefill_attention(
            query,
            keys,
            values,
            torch.tensor([0, query.shape[0]], dtype=torch.int32, device=rows.device),
            torch.tensor([0, keys.shape[0]], dtype=torch.int32, device=rows.device),
            part.key_ranks + num_old,
            layer.scale,
            self.decoder.slopes,
            layer.window,
            positions.ids[part.run],
            key_positions,
        )
        return rows.index_copy(0, part.run, layer.output(rows[part.run], attention)), last


class _SequencePart(NamedTuple):
    """The part of a layer's plan that concerns one sequence, in rows counted from the sequence's first."""

    run: Tensor
    kv: Tensor
    entries: Tensor
    key_ranks: Tensor

    @staticmethod
    def of(plan: LayerPlan, seq: int, first_row: int) -> _SequencePart:
        begin, end = int(plan.run.cu_seqlens[seq]), int(plan.run.cu_seqlens[seq + 1])
        run, kv, entries = (_rows_of(row_set, seq, first_row) for row_set in (plan.run, plan.kv, plan.entries))
        return _SequencePart(run, kv, entries, plan.key_ranks[begin:end])


def _rows_of(row_set: RowSet, seq: int, first_row: int) -> Tensor:
    begin, end = int(row_set.cu_seqlens[seq]), int(row_set.cu_seqlens[seq + 1])
    if row_set.row_ids is None:
        return torch.arange(end - begin, device=row_set.seq_ids.device)
    return row_set.row_ids[begin:end].long() - first_row
