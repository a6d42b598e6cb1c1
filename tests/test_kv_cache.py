"""The key-value cache: what lands where, what is shared, and what happens when there is no room."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynskip import LayerPath, kv_cache
from dynskip.kv_cache import EntryIndex, KVCache, KVCacheMemoryError
from dynskip.plan import KVPolicy, Plan

CPU = torch.device("cpu")


def new_cache(num_layers: int = 3, num_seqs: int = 3, max_context_len: int = 8, num_slots: int = 64) -> KVCache:
    return KVCache(num_layers, num_seqs, max_context_len, num_slots, 1, 1, torch.float32, CPU)


def append(cache: KVCache, plan: Plan, cache_ids: list[int]) -> torch.Tensor:
    """Append the entries of a whole plan; returns the key limits of its run rows."""
    ids = torch.tensor(cache_ids)
    index = EntryIndex.of(plan.all_layers(CPU), 0, ids, cache.context_lens.shape[1])
    return cache.append(index, cache.allocate(index.entry_indptr[-1]))


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=3, unique_by=lambda item: item[0]
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.sets(st.integers(0, 2)), min_size=3, max_size=3),
)
def test_tables_hold_what_plain_lists_would_hold(
    steps: list[list[tuple[int, int]]], layers_of_seq: list[set[int]]
) -> None:
    """Steps of any sequences, in any order, against lists that grow entry by entry."""
    cache = new_cache()
    expected: dict[tuple[int, int], list[int]] = {(layer, seq): [] for layer in range(3) for seq in range(3)}
    next_slot = 0
    for step in steps:
        seqs, counts = [seq for seq, _ in step], [count for _, count in step]
        paths = [LayerPath.of(3, layers_of_seq[seq], allow_empty=True) for seq in seqs]
        key_limits = append(cache, Plan.per_sequence(paths, counts), seqs)
        expected_limits = []
        for layer in range(3):
            for seq, count in step:
                if layer in layers_of_seq[seq]:
                    for _ in range(count):
                        expected[layer, seq].append(next_slot)
                        next_slot += 1
                        expected_limits.append(len(expected[layer, seq]))
        assert key_limits.tolist() == expected_limits
    assert cache.num_slots_used == next_slot
    for (layer, seq), slots in expected.items():
        length = len(slots)
        assert cache.context_lens[layer, seq] == length
        assert cache.slot_tables[layer, seq, :length].tolist() == slots
        assert (cache.slot_tables[layer, seq, length:] == -1).all()


def test_gather_returns_the_entries_of_each_sequence_in_order() -> None:
    cache = new_cache()
    cache.k_cache.copy_(torch.arange(64.0)[:, None, None])
    cache.v_cache.copy_(-torch.arange(64.0)[:, None, None])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    append(cache, Plan.per_token(mask, [2, 1, 1], KVPolicy.EVICT), [2, 0, 1])
    # Slots are handed out layer by layer: layer 0 takes 0 and 1, layer 1 takes 2 to 4.
    key, value, cu_seqlens = cache.gather(1, torch.tensor([0, 1, 2]))
    assert key.flatten().tolist() == [4, 2, 3] and value.flatten().tolist() == [-4, -2, -3]
    assert cu_seqlens.tolist() == [0, 1, 1, 3] and cu_seqlens.dtype == torch.int32
    key, _, cu_seqlens = cache.gather(2, torch.tensor([0, 1, 2]))
    assert key.shape == (0, 1, 1) and cu_seqlens.tolist() == [0, 0, 0, 0]


def test_a_fork_shares_entries_and_grows_apart() -> None:
    cache = new_cache(num_layers=2)
    append(cache, Plan.per_sequence([LayerPath.full(2)], [3]), [0])
    cache.fork(0, 1)
    assert cache.num_slots_used == 6
    append(cache, Plan.per_sequence([LayerPath.full(2)] * 2, [1, 1]), [0, 1])
    assert cache.slot_tables[0, 0, :4].tolist() == [0, 1, 2, 6]
    assert cache.slot_tables[0, 1, :4].tolist() == [0, 1, 2, 7]
    assert cache.num_slots_used == 10


def test_allocate_beyond_the_pool() -> None:
    cache = new_cache(num_slots=4)
    cache.allocate(3)
    with pytest.raises(KVCacheMemoryError, match=r"num_slots must be at most 1, the slots left of 4, got 2"):
        cache.allocate(2)
    assert cache.num_slots_used == 3


def test_the_device_takes_slots_that_the_host_reserved() -> None:
    cache = new_cache(num_slots=10)
    cache.allocate(2)
    cache.reserve(4)
    assert int(cache.slot_cursor) == 2 and cache.num_slots_used == 6
    cache.slot_cursor += 1  # what a step took of its 4
    cache.reserve(2)
    assert int(cache.slot_cursor) == 3 and cache.num_slots_used == 8
    assert cache.allocate(1).tolist() == [8]
    cache.reserve(1)
    assert int(cache.slot_cursor) == 9
    with pytest.raises(KVCacheMemoryError, match=r"KVCache.reserve: num_slots must be at most 0, .* of 10, got 1"):
        cache.reserve(1)
    cache.clear()
    assert cache.num_slots_used == int(cache.slot_cursor) == 0 and cache.holds(3, 8, 10) and not cache.holds(3, 9, 10)


def test_num_bytes_is_what_the_tensors_take() -> None:
    cache = KVCache(3, 2, 5, 7, 4, 16, torch.bfloat16, CPU)
    assert cache.num_bytes == 2 * 7 * 4 * 16 * 2 + 3 * 2 * 5 * 4 + 3 * 2 * 4 + 4


def test_too_little_memory_says_what_is_needed_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "available_bytes", lambda device: 10 * 2**20)
    with pytest.raises(
        KVCacheMemoryError,
        match=r"needs 20.0 MiB for 10240 entries of 1 sequences, got 10.0 MiB free on cpu, which holds 5\d\d\d "
        r"entries\. "
        r"Use fewer sequences at a time, smaller max_tokens or shorter paths",
    ):
        KVCache(1, 1, 1, 10240, 4, 64, torch.float32, CPU)
    assert KVCache(1, 1, 1, 5119, 4, 64, torch.float32, CPU).num_slots == 5119


def test_available_bytes_is_below_all_memory() -> None:
    import psutil

    assert 0 < kv_cache.available_bytes(CPU) <= psutil.virtual_memory().total
