"""Two caches side by side."""

from __future__ import annotations

from dynskip.execution.kv_cache import KVCache


def assert_same_entries(cache: KVCache, expected: KVCache) -> None:
    """Both hold the same bits of the same tokens in the same slots, NaN among them."""
    assert cache.context_lens.equal(expected.context_lens)
    for layer, seq in cache.context_lens.nonzero().tolist():
        held = cache.slot_tables[layer, seq, : cache.context_lens[layer, seq]].long()
        assert held.equal(expected.slot_tables[layer, seq, : len(held)].long())
        for ours, theirs in ((cache.k_cache, expected.k_cache), (cache.v_cache, expected.v_cache)):
            assert ours[held].nan_to_num(1e4).equal(theirs[held].nan_to_num(1e4)), (layer, seq)
    assert cache.num_slots_used == expected.num_slots_used
