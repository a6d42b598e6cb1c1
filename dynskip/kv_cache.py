"""The key-value cache: one pool of token entries, and for each layer a table of which entries a sequence owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynskip.flat_rows import FlatRows
from dynskip.plan import KVPolicy, LayerPlan, Plan


class KVCacheMemoryError(MemoryError):
    """The key-value cache does not fit in memory."""


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


class KVCache:
    """Keys and values of a batch of sequences, stored only where a sequence runs a layer.

    All layers draw entries (one key and one value of all heads) from one pool, so a skipped layer holds no memory and
    two layers may share an entry. ``slot_tables[l, b, i]`` is the pool slot of the i-th entry of sequence b in layer l.

    k_cache, v_cache: [num_slots, H, D], the pool.
    slot_tables: [L, B, S_max], int32, -1 where unused.
    context_lens: [L, B], int32, the number of entries.
    slot_cursor: [1], int32, the next free slot where the device itself takes slots: see `reserve`.
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
    ) -> None:
        shape = (num_slots, num_heads, head_size)
        table_bytes = num_layers * num_seqs * max_context_len * 4
        needed_bytes = 2 * num_slots * num_heads * head_size * dtype.itemsize + table_bytes
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
        self.slot_tables = torch.full((num_layers, num_seqs, max_context_len), -1, dtype=torch.int32, device=device)
        self.context_lens = torch.zeros((num_layers, num_seqs), dtype=torch.int32, device=device)
        self.slot_cursor = torch.zeros(1, dtype=torch.int32, device=device)
        self.num_slots = num_slots
        self.num_slots_used = 0
        self._device_slots_used = 0  # what the host says of the slots used when the cursor was last right
        self._index: tuple[Plan, Tensor, EntryIndex] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held by the pool and the tables."""
        tensors = (self.k_cache, self.v_cache, self.slot_tables, self.context_lens, self.slot_cursor)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def holds(self, num_seqs: int, max_context_len: int, num_slots: int) -> bool:
        """Whether the whole cache would do for a batch of that size."""
        _, most_seqs, longest = self.slot_tables.shape
        return num_seqs <= most_seqs and max_context_len <= longest and num_slots <= self.num_slots

    def clear(self) -> None:
        """Forget all entries."""
        self.context_lens.zero_()
        self.slot_cursor.zero_()
        self.num_slots_used = self._device_slots_used = 0
        self._index = None

    def allocate(self, num_slots: int) -> Tensor:
        """[num_slots], int32: fresh pool slots."""
        first = self.num_slots_used
        self._use(num_slots, "allocate")
        return torch.arange(first, first + num_slots, dtype=torch.int32, device=self.k_cache.device)

    def reserve(self, num_slots: int) -> None:
        """Let the device take up to ``num_slots`` fresh slots from `slot_cursor` on, in order.

        The host counts them all as used. Slots that the device left are given to its next steps, until the host
        allocates again.
        """
        if self._device_slots_used != self.num_slots_used:
            self.slot_cursor.fill_(self.num_slots_used)
        self._use(num_slots, "reserve")
        self._device_slots_used = self.num_slots_used

    def _use(self, num_slots: int, function: str) -> None:
        num_left = self.num_slots - self.num_slots_used
        if num_slots > num_left:
            raise KVCacheMemoryError(
                f"KVCache.{function}: num_slots must be at most {num_left}, the slots left of {self.num_slots}, got "
                f"{num_slots}. Create the cache with more slots."
            )
        self.num_slots_used += num_slots

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

    def gather(self, layer: int, cache_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of all keys and values, each [S, H, D], of some sequences in one layer, and their cu_seqlens [B + 1].

        cache_ids: [B], int64, the sequences.
        """
        context_lens = self.context_lens[layer, cache_ids]
        cu_seqlens = torch.zeros(len(cache_ids) + 1, dtype=torch.int32, device=context_lens.device)
        torch.cumsum(context_lens, 0, dtype=torch.int32, out=cu_seqlens[1:])
        places = torch.arange(self.slot_tables.shape[2], device=context_lens.device)
        slots = self.slot_tables[layer, cache_ids][places < context_lens[:, None]].long()
        return self.k_cache[slots], self.v_cache[slots], cu_seqlens

    def fork(self, source: int, target: int) -> None:
        """Make the empty sequence ``target`` begin with all entries of ``source``: shared, not copied."""
        assert not self.context_lens[:, target].any(), "the target of a fork holds entries"
        self.slot_tables[:, target] = self.slot_tables[:, source]
        self.context_lens[:, target] = self.context_lens[:, source]


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
