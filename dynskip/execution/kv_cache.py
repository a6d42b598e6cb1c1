"""The key-value cache: one pool of token entries, and for each layer a table of which entries a sequence owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynskip.execution.cgroup import cgroup_memory
from dynskip.execution.slot_pool import BYTES_PER_SLOT, KVCacheMemoryError, SlotPool, by_numpy
from dynskip.execution.threads import check_fork
from dynskip.host import ask_for_huge_pages
from dynskip.routing.flat_rows import FlatRows
from dynskip.routing.plan import KVPolicy, LayerPlan, Plan

__all__ = ["CacheMark", "EntryIndex", "KVCache", "KVCacheMemoryError", "available_bytes"]


@dataclass(frozen=True)
class EntryIndex:
    """Where the entries of some layers of one step go: the layers' row sets laid end to end.

    table_ids: [E], int64, the table (layer * B_cache + cache sequence) of each new entry.
    ranks: [E], int32, its place among the new entries of that table.
    run_table_ids: [R], int64, and key_ranks: [R], int32: the same of the rows that run.
    run_cache_ids: [R], int32, the cache sequence of the rows that run.
    entry_indptr, run_indptr: where each layer's part begins, one longer than the number of layers.
    """

    table_ids: Tensor
    ranks: Tensor
    run_table_ids: Tensor
    run_cache_ids: Tensor
    key_ranks: Tensor
    entry_indptr: tuple[int, ...]
    run_indptr: tuple[int, ...]

    @staticmethod
    def of(plans: Sequence[LayerPlan], first_layer: int, cache_ids: Tensor, num_cache_seqs: int) -> EntryIndex:
        """The index of consecutive layers from ``first_layer`` on, for sequences at ``cache_ids`` ([B], int64)."""
        entry_indptr, run_indptr = [0], [0]
        table_ids, run_table_ids = [], []
        for layer, plan in enumerate(plans, start=first_layer):
            table_ids.append(cache_ids[plan.entries.seq_ids.long()] + layer * num_cache_seqs)
            same = plan.run is plan.entries
            run_table_ids.append(table_ids[-1] if same else cache_ids[plan.run.seq_ids.long()] + layer * num_cache_seqs)
            entry_indptr.append(entry_indptr[-1] + plan.entries.num_rows)
            run_indptr.append(run_indptr[-1] + plan.run.num_rows)
        run_tables = torch.cat(run_table_ids)
        return EntryIndex(
            torch.cat(table_ids),
            torch.cat([plan.entries.ranks for plan in plans]),
            run_tables,
            (run_tables % num_cache_seqs).int(),
            torch.cat([plan.key_ranks for plan in plans]),
            tuple(entry_indptr),
            tuple(run_indptr),
        )

    @staticmethod
    def of_flat(flat: FlatRows, cache_ids: Tensor, num_cache_seqs: int) -> EntryIndex:
        """The index of all layers, whose entries are those of the rows that run; ``cache_ids`` as in `of`."""
        run_cache_ids = cache_ids[flat.seq_ids.long()]
        table_ids = run_cache_ids + flat.layer_ids * num_cache_seqs
        indptr = flat.indptr
        return EntryIndex(table_ids, flat.ranks, table_ids, run_cache_ids.int(), flat.key_ranks, indptr, indptr)


@dataclass(frozen=True)
class CacheMark:
    """How many entries some sequences held at one time: see `KVCache.mark`. context_lens: [L, B], int32, of all."""

    cache_ids: Sequence[int]
    context_lens: Tensor | NDArray[np.int32]


class KVCache:
    """Keys and values of a batch of sequences, stored only where a sequence runs a layer.

    All layers draw entries (one key and one value of all heads) from one pool, so a skipped layer holds no memory and
    two layers may share an entry. ``slot_tables[l, b, i]`` is the pool slot of the i-th entry of sequence b in layer l.
    Sequences may share entries, too: a slot is free again when the last of its owners is released. One of them may be
    no sequence: what is kept outlives those that made it.

    k_cache, v_cache: [num_slots, G, D], the pool.
    slot_positions: [num_slots], int32, where the token of each slot stands, or None where attention does not ask.
    slot_tables: [L, B, S_max], int32, undefined behind a sequence's entries; -1 where nothing was ever stored.
    context_lens: [L, B], int32, the number of entries.
    free_slots: [num_slots], int32: from place ``num_slots_used`` on the free slots.
    slot_cursor: [1], int32, the place in ``free_slots`` from which the device itself takes slots: see `reserve`.
    num_extra_owners: [num_slots], int32, how many own a taken slot besides the first: sequences, and what `keep` keeps.
    may_repeat: whether one sequence may have a slot in tables of several layers; set by what writes such tables.
    """

    def __init__(
        self,
        num_layers: int,
        num_seqs: int,
        max_context_len: int,
        num_slots: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        has_positions: bool = False,
    ) -> None:
        check_fork()
        shape = (num_slots, num_heads, head_size)
        table_bytes = num_layers * num_seqs * max_context_len * 4
        entry_bytes = 2 * num_heads * head_size * dtype.itemsize + BYTES_PER_SLOT + (4 if has_positions else 0)
        needed_bytes = num_slots * entry_bytes + table_bytes
        free_bytes = available_bytes(device)
        if needed_bytes > free_bytes:
            slot_bytes = needed_bytes / max(num_slots, 1)
            raise KVCacheMemoryError(
                f"KVCache: the cache needs {needed_bytes / 2**20:.1f} MiB for {num_slots} entries of {num_seqs} "
                f"sequences, got {free_bytes / 2**20:.1f} MiB free on {device}, which holds "
                f"{int(free_bytes / slot_bytes)} entries. Use fewer sequences at a time, smaller max_tokens or "
                "shorter paths."
            )
        self.k_cache = torch.empty(shape, dtype=dtype, device=device)
        self.v_cache = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cpu":
            for cache in (self.k_cache, self.v_cache):
                ask_for_huge_pages(cache.data_ptr(), cache.nbytes, is_written=False)
        self.slot_positions = torch.zeros(num_slots, dtype=torch.int32, device=device) if has_positions else None
        self.slot_tables = torch.full((num_layers, num_seqs, max_context_len), -1, dtype=torch.int32, device=device)
        self.context_lens = torch.zeros((num_layers, num_seqs), dtype=torch.int32, device=device)
        self._context_lens_view = self._view_of_context_lens()
        self.num_slots = num_slots
        self.pool = SlotPool(num_slots, device)
        self.free_slots, self.slot_cursor = self.pool.free_slots, self.pool.cursor
        self.num_extra_owners = self.pool.num_extra_owners
        self.may_repeat = False
        self._places = torch.arange(max_context_len, dtype=torch.int32, device=device)
        self._index: tuple[Plan, Tensor, EntryIndex] | None = None

    @property
    def num_slots_used(self) -> int:
        """How many slots are taken; after `reserve` the device may have taken fewer, which `settle` finds out."""
        return self.pool.num_used

    @property
    def num_bytes(self) -> int:
        """Bytes held by entries, tables and the list of slots."""
        tensors = (
            self.k_cache,
            self.v_cache,
            self.slot_positions,
            self.slot_tables,
            self.context_lens,
            self._places,
        )
        return self.pool.num_bytes + sum(held.numel() * held.element_size() for held in tensors if held is not None)

    def holds(self, num_seqs: int, max_context_len: int, num_slots: int) -> bool:
        """Whether the whole cache would do for a batch of that size."""
        _, most_seqs, longest = self.slot_tables.shape
        return num_seqs <= most_seqs and max_context_len <= longest and num_slots <= self.num_slots

    def clear(self) -> None:
        """Forget all entries."""
        self.context_lens.zero_()
        self.pool.clear()
        self.may_repeat = False
        self._index = None

    def allocate(self, num_slots: int) -> Tensor:
        """[num_slots], int32: free slots, the next of `free_slots`; settles first.

        Raises KVCacheMemoryError where fewer are free.
        """
        return self.pool.take(num_slots, "KVCache.allocate")

    def reserve(self, num_slots: int, exact: bool = False) -> None:
        """Let the device take up to ``num_slots`` slots of `free_slots` from `slot_cursor` on, with ``exact`` all.

        The host counts them all as used, until it settles. Slots that the device left are given to its next steps.
        Raises KVCacheMemoryError where fewer are free.
        """
        self.pool.reserve(num_slots, "KVCache.reserve", exact)

    def settle(self) -> None:
        """Set `num_slots_used` to what the device took; one int is read back, and none where the count is exact."""
        self.pool.settle()

    def release(self, cache_ids: Sequence[int]) -> int:
        """Forget all entries of these sequences; how many slots became free. Those that others own stay taken.

        Settles first. Cost: linear in the entries, independent of the size of the pool; waits for the device.
        """
        self.settle()
        ids = torch.tensor(list(dict.fromkeys(cache_ids)), dtype=torch.int64, device=self.context_lens.device)
        slots = self._entries_of(ids)
        is_distinct = not (self.may_repeat or self.pool.may_share) or self.pool.distinct(slots) is slots
        if is_distinct:
            num_freed = self.pool.drop_owner(slots)
        else:  # each sequence that owns a slot is one owner, however often the slot stands in its tables
            num_freed = sum(self.pool.drop_owner(self._slots_of(ids[i : i + 1])) for i in range(len(ids)))
        self.context_lens.index_fill_(1, ids, 0)
        return num_freed

    def index(self, plan: Plan, cache_ids: Tensor) -> EntryIndex | None:
        """The entries of all layers of a step at once; None where the plan knows them only layer by layer.

        cache_ids: [B], int64, the step's sequences. Decode steps repeat plan and sequences: the last index is kept.
        """
        if plan.active is None or plan.kv_policy is KVPolicy.SHARE:
            return None
        if self._index is None or self._index[0] is not plan or self._index[1] is not cache_ids:
            device, num_cache_seqs = cache_ids.device, self.context_lens.shape[1]
            flat = plan.flat(device)
            if flat is None:
                index = EntryIndex.of(plan.all_layers(device), 0, cache_ids, num_cache_seqs)
            else:
                index = EntryIndex.of_flat(flat, cache_ids, num_cache_seqs)
            self._index = (plan, cache_ids, index)
        return self._index[2]

    def append(self, index: EntryIndex, slots: Tensor) -> Tensor:
        """Append the entries of ``index`` at ``slots`` ([E], int32) to their tables.

        Returns key_limits, [R], int32: how many entries of its own table each run row may attend to, itself included.
        """
        context_lens = self.context_lens.view(-1)
        places = context_lens[index.table_ids] + index.ranks
        key_limits = context_lens[index.run_table_ids] + index.key_ranks
        self.slot_tables.view(-1, self.slot_tables.shape[2])[index.table_ids, places.long()] = slots
        context_lens.index_add_(0, index.table_ids, torch.ones_like(slots))
        return key_limits

    def gather(self, layer: int, cache_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Copies of all keys and values, each [S, G, D], of some sequences in one layer, their cu_seqlens [B + 1], and
        their positions [S], int32, or None where the cache has none.

        cache_ids: [B], int64, the sequences.
        """
        context_lens = self.context_lens[layer, cache_ids]
        cu_seqlens = torch.zeros(len(cache_ids) + 1, dtype=torch.int32, device=context_lens.device)
        torch.cumsum(context_lens, 0, dtype=torch.int32, out=cu_seqlens[1:])
        slots = self.slot_tables[layer, cache_ids][self._places < context_lens[:, None]].long()
        positions = None if self.slot_positions is None else self.slot_positions[slots]
        return self.k_cache[slots], self.v_cache[slots], cu_seqlens, positions

    def fork(self, source: int, target: int) -> None:
        """Make the empty sequence ``target`` begin with all entries of ``source``: shared, not copied."""
        self._begin(source, target, self.context_lens[:, source])

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Make the empty sequence ``target`` begin with the first ``num_tokens`` tokens of ``source``: shared.

        For sequences with a fixed path, whose layers hold entries of all their tokens, or none.
        """
        context_lens = self.context_lens[:, source]
        held = context_lens > 0
        # An absent path holds nothing of any token.
        assert bool(((context_lens == context_lens.max()) | ~held).all()), "layers of the source hold different tokens"
        assert bool((context_lens[held] >= num_tokens).all()), "the source holds fewer tokens"
        self._begin(source, target, held * num_tokens)

    def keep(self, cache_id: int, layers: Sequence[int], first: int, end: int) -> Tensor:
        """[len(layers), end - first], int32: the slots of tokens ``first`` to ``end``, which stay taken until `let_go`.

        For sequences with a fixed path, that of ``layers``, whose slots there are not kept.
        """
        if by_numpy(self.slot_tables.device):
            slots = torch.from_numpy(self.slot_tables.numpy()[[*layers], cache_id, first:end])
        else:
            slots = self.slot_tables[self._layer_ids(layers), cache_id, first:end]
        self.pool.keep(slots.reshape(-1))
        return slots

    def let_go(self, slots: Sequence[Tensor]) -> int:
        """Keep ``slots`` no more; how many became free. Those that sequences own stay taken. Settles first."""
        self.settle()
        if not slots:
            return 0
        if by_numpy(self.slot_tables.device):
            return self.pool.let_go(torch.from_numpy(np.concatenate([each.numpy().ravel() for each in slots])))
        return self.pool.let_go(torch.cat([each.reshape(-1) for each in slots]))

    def begin(self, cache_id: int, layers: Sequence[int], slots: Tensor) -> None:
        """Make an empty sequence begin with the entries at ``slots`` ([len(layers), T], int32): shared, not copied."""
        if by_numpy(self.slot_tables.device):
            self.slot_tables.numpy()[[*layers], cache_id, : slots.shape[1]] = slots.numpy()
            self.context_lens.numpy()[[*layers], cache_id] = slots.shape[1]
        else:
            layer_ids = self._layer_ids(layers)
            self.slot_tables[layer_ids, cache_id, : slots.shape[1]] = slots
            self.context_lens[layer_ids, cache_id] = slots.shape[1]
        self.pool.add_owner(slots.reshape(-1))

    def truncate(
        self,
        cache_ids: Sequence[int],
        num_tokens: Sequence[int],
        num_more: Sequence[int],
        first_layers: Sequence[int] | None = None,
    ) -> None:
        """Keep the first ``num_tokens`` entries of these sequences in each layer, which hold at most ``num_more`` more.

        first_layers: of each sequence, the layer from which on that holds; None for all layers.
        For sequences with a fixed path. Settles first. Cost: linear in the sum of ``num_more``, for each layer.
        """
        self.settle()
        # One column an entry: whose it is, and which of those behind the kept ones.
        owned = [(index, place) for index, count in enumerate(num_more) for place in range(count)]
        if by_numpy(self.context_lens.device):
            self._truncate_by_numpy(cache_ids, num_tokens, owned, first_layers)
            return
        device = self.context_lens.device
        ids = torch.tensor(cache_ids, dtype=torch.int64, device=device)
        context_lens = self.context_lens.index_select(1, ids)
        kept = torch.minimum(context_lens, torch.tensor(num_tokens, dtype=torch.int32, device=device))
        if first_layers is not None:
            is_before = torch.arange(len(kept), device=device)[:, None] < torch.tensor(first_layers, device=device)
            kept = torch.where(is_before, context_lens, kept)
        owners, behind = torch.tensor(owned, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
        places = kept[:, owners] + behind
        layers = torch.arange(len(places), device=device)[:, None]
        inside = places.clamp(max=self.slot_tables.shape[2] - 1)
        slots = self.slot_tables[layers, ids[owners], inside]
        self.pool.drop_owner(slots[places < context_lens[:, owners]])
        self.context_lens[:, ids] = kept

    def _truncate_by_numpy(
        self,
        cache_ids: Sequence[int],
        num_tokens: Sequence[int],
        owned: Sequence[tuple[int, int]],
        first_layers: Sequence[int] | None,
    ) -> None:
        """`truncate`; every step with guesses calls it."""
        ids, tables = np.array(cache_ids, np.intp), self.slot_tables.numpy()
        context_lens = self.context_lens.numpy()[:, ids]
        kept = np.minimum(context_lens, np.array(num_tokens, np.int32))
        layers = np.arange(len(kept))[:, None]
        if first_layers is not None:
            kept = np.where(layers < np.array(first_layers, np.intp), context_lens, kept)
        owners, behind = np.array(owned, np.intp).reshape(-1, 2).T
        places = kept[:, owners] + behind
        slots = tables[layers, ids[owners], np.minimum(places, tables.shape[2] - 1)]
        self.pool.drop_owner(torch.from_numpy(slots[places < context_lens[:, owners]]))
        self.context_lens.numpy()[:, ids] = kept

    def add_sequences(self, num_seqs: int) -> None:
        """Make room in the tables for ``num_seqs`` more sequences, behind those that there are.

        Raises KVCacheMemoryError where there is no memory for that.
        """
        num_layers, _, longest = self.slot_tables.shape
        needed_bytes = self.slot_tables.nbytes + 4 * num_layers * num_seqs * longest
        free_bytes = available_bytes(self.slot_tables.device)
        if needed_bytes > free_bytes:
            raise KVCacheMemoryError(
                f"KVCache.add_sequences: tables for {num_seqs} more sequences need {needed_bytes / 2**20:.1f} MiB, got "
                f"{free_bytes / 2**20:.1f} MiB free. Use a smaller pool or max_context_len."
            )
        self.slot_tables = torch.cat(
            [self.slot_tables, self.slot_tables.new_full((num_layers, num_seqs, longest), -1)], 1
        )
        self.context_lens = torch.cat([self.context_lens, self.context_lens.new_zeros((num_layers, num_seqs))], 1)
        self._context_lens_view = self._view_of_context_lens()
        self._index = None

    def mark(self, cache_ids: Sequence[int]) -> CacheMark:
        """What `rewind` needs to take back the entries that these sequences get from now on."""
        view = self._context_lens_view
        return CacheMark(cache_ids, self.context_lens.clone() if view is None else view.copy())

    def rewind(self, mark: CacheMark | None) -> None:
        """Forget what the sequences of ``mark`` got since then, and `sweep`. They were not released meanwhile."""
        if mark is not None:
            before, ids = torch.as_tensor(mark.context_lens), list(mark.cache_ids)
            self.context_lens[:, ids] = before[:, ids]
        self.sweep()

    def sweep(self) -> None:
        """Find out from all tables, and what is kept, which slots are taken: those of a failed step are free again.

        Cost: linear in the entries of all sequences and in the pool.
        """
        num_owners = torch.zeros_like(self.num_extra_owners)
        for cache_id in self.context_lens.any(0).nonzero():
            slots = self._slots_of(cache_id)
            num_owners.index_add_(0, slots, torch.ones_like(slots))
        self.pool.rebuild(num_owners)

    def _view_of_context_lens(self) -> NDArray[np.int32] | None:
        """`context_lens` as numpy sees them: every step is marked, and numpy copies little things sooner than torch."""
        return self.context_lens.numpy() if by_numpy(self.context_lens.device) else None

    def _layer_ids(self, layers: Sequence[int]) -> Tensor:
        return torch.tensor(layers, dtype=torch.int64, device=self.slot_tables.device)

    def _begin(self, source: int, target: int, context_lens: Tensor) -> None:
        assert source >= 0 and target >= 0, "both have a place in the tables"
        assert not self.context_lens[:, target].any(), "the target of a fork holds entries"
        if by_numpy(self.slot_tables.device):
            tables, longest = self.slot_tables.numpy(), int(self.context_lens[:, source].max())
            tables[:, target, :longest] = tables[:, source, :longest]
        else:
            self.slot_tables[:, target] = self.slot_tables[:, source]
        self.context_lens[:, target] = context_lens
        self.pool.add_owner(self._slots_of(torch.tensor([target], device=self.context_lens.device)))

    def _slots_of(self, cache_id: Tensor) -> Tensor:
        """[N], int32: the slots that a sequence owns, each once: with SHARE a slot stands in tables of many layers."""
        slots = self._entries_of(cache_id)
        return self.pool.distinct(slots) if self.may_repeat else slots

    def _entries_of(self, cache_ids: Tensor) -> Tensor:
        """[N], int32: the slots of all entries of some sequences ([B], int64)."""
        if by_numpy(cache_ids.device):
            ids, lens = cache_ids.numpy(), self.context_lens.numpy()[:, cache_ids.numpy()]
            entries = self.slot_tables.numpy()[:, ids, : lens.max(initial=0)]
            return torch.from_numpy(entries[np.arange(entries.shape[2]) < lens[:, :, None]])
        context_lens = self.context_lens.index_select(1, cache_ids)
        longest = int(context_lens.max()) if context_lens.numel() else 0
        tables = self.slot_tables[:, cache_ids, :longest]
        return tables.masked_select(self._places[:longest] < context_lens[:, :, None])


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``.

    On a GPU also those that torch keeps there, unused; on a CPU no more than this process's control groups leave.
    """
    if device.type == "cuda":
        unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused_bytes
    import psutil

    memory = psutil.virtual_memory()
    group = cgroup_memory(machine_bytes=memory.total)
    return int(memory.available) if group is None else min(int(memory.available), group.available_bytes)
