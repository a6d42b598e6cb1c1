"""The key-value cache: what lands where, what is shared, and what happens when there is no room."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynskip import LayerPath, host
from dynskip.execution import kv_cache, slot_pool
from dynskip.execution.kv_cache import EntryIndex, KVCache, KVCacheMemoryError
from dynskip.execution.reference import ReferenceCache
from dynskip.host import ask_for_huge_pages
from dynskip.routing.plan import KVPolicy, Plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["numpy", "torch"], autouse=True)
def books(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kept by numpy, as on a CPU, and by torch, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (slot_pool, kv_cache):
            patch.setattr(module, "by_numpy", lambda _: request.param == "numpy")
        yield


def new_cache(num_layers: int = 3, num_seqs: int = 3, max_context_len: int = 8, num_slots: int = 64) -> KVCache:
    return KVCache(num_layers, num_seqs, max_context_len, num_slots, 1, 1, torch.float32, CPU)


def append(cache: KVCache, plan: Plan, cache_ids: list[int]) -> torch.Tensor:
    """Append the entries of a whole plan; returns the key limits of its run rows."""
    ids = torch.tensor(cache_ids)
    index = EntryIndex.of(plan.all_layers(CPU), 0, ids, cache.context_lens.shape[1])
    return cache.append(index, cache.allocate(index.entry_indptr[-1]))


def append_shared(cache: KVCache, seq: int, slots: torch.Tensor, layers: Iterable[int]) -> None:
    """Append the same entries to the tables of several layers."""
    cache.may_repeat = True
    num_layers, num_seqs = cache.context_lens.shape
    plans = Plan.per_sequence([LayerPath.full(num_layers)], [len(slots)]).all_layers(CPU)
    for layer in layers:
        cache.append(EntryIndex.of([plans[layer]], layer, torch.tensor([seq]), num_seqs), slots)


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
    key, value, cu_seqlens, _ = cache.gather(1, torch.tensor([0, 1, 2]))
    assert key.flatten().tolist() == [4, 2, 3] and value.flatten().tolist() == [-4, -2, -3]
    assert cu_seqlens.tolist() == [0, 1, 1, 3] and cu_seqlens.dtype == torch.int32
    key, _, cu_seqlens, _ = cache.gather(2, torch.tensor([0, 1, 2]))
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
    assert cache.allocate(1).tolist() == [3] and cache.num_slots_used == 4  # no slot is lost that the device left
    cache.reserve(6)
    assert int(cache.slot_cursor) == 4
    cache.slot_cursor += 6
    with pytest.raises(KVCacheMemoryError, match=r"KVCache.reserve: num_slots must be at most 0, .* of 10, got 1"):
        cache.reserve(1)
    cache.clear()
    assert cache.num_slots_used == int(cache.slot_cursor) == 0 and cache.holds(3, 8, 10) and not cache.holds(3, 9, 10)


def test_settling_counts_what_the_device_took() -> None:
    cache = new_cache(num_slots=10)
    cache.reserve(4)
    cache.slot_cursor += 3
    cache.settle()
    assert cache.num_slots_used == 3
    # Promises beyond the pool are kept while the device takes less than it was promised.
    for _ in range(3):
        cache.reserve(5)
        cache.slot_cursor += 1
    cache.settle()
    assert cache.num_slots_used == 6


def test_an_exact_count_is_not_read_back() -> None:
    cache = new_cache(num_slots=10)
    cache.allocate(2)
    cache.reserve(4, exact=True)
    cache.slot_cursor += 3  # a step that did not do what was said of it
    cache.settle()
    assert cache.num_slots_used == 6
    cache.reserve(1)
    cache.settle()
    assert cache.num_slots_used == 5


def test_released_entries_are_given_out_again() -> None:
    cache = new_cache(num_layers=2, num_slots=12)
    append(cache, Plan.per_sequence([LayerPath.full(2)] * 3, [2, 1, 3]), [0, 1, 2])
    assert cache.slot_tables[:, 1, 0].tolist() == [2, 8]
    assert cache.release([1]) == 2
    assert cache.num_slots_used == 10 and cache.context_lens.tolist() == [[2, 0, 3]] * 2
    assert sorted(cache.free_slots[10:].tolist()) == [2, 8]
    assert cache.release([1]) == 0
    assert sorted(cache.allocate(2).tolist()) == [2, 8]
    cache.sweep()
    assert cache.release([0, 2]) == 10 and cache.num_slots_used == 0


def test_the_device_goes_on_after_a_release() -> None:
    cache = new_cache(num_layers=1, num_slots=6)
    append(cache, Plan.per_sequence([LayerPath.full(1)] * 2, [2, 2]), [0, 1])
    cache.reserve(1, exact=True)
    cache.slot_cursor += 1
    cache.release([0])
    cache.reserve(3)
    assert int(cache.slot_cursor) == cache.num_slots_used - 3 == 3
    assert set(cache.free_slots[3:].tolist()) == {0, 1, 5}


def test_a_slot_is_free_when_its_last_owner_goes() -> None:
    cache = new_cache(num_layers=3)
    append(cache, Plan.per_sequence([LayerPath.of(3, [0, 2])], [3]), [0])
    cache.share(0, 1, 2)
    cache.fork(0, 2)
    assert cache.context_lens.tolist() == [[3, 2, 3], [0, 0, 0], [3, 2, 3]]
    assert cache.slot_tables[2, :, :3].tolist() == [[3, 4, 5]] * 3
    assert cache.num_slots_used == 6 and cache.num_extra_owners[:7].tolist() == [2, 2, 1, 2, 2, 1, 0]
    assert cache.release([0]) == 0
    assert cache.release([2, 1]) == 6
    assert cache.num_slots_used == 0 and not cache.num_extra_owners.any()


def test_two_owners_that_go_together() -> None:
    cache = new_cache(num_layers=2)
    append(cache, Plan.per_sequence([LayerPath.full(2)], [4]), [0])
    cache.fork(0, 1)
    assert cache.release([0, 1, 0]) == 8 and cache.num_slots_used == 0


def test_an_entry_in_tables_of_many_layers_is_freed_once() -> None:
    cache = new_cache(num_layers=3, num_slots=8)
    append_shared(cache, 1, cache.allocate(2), range(3))
    cache.allocate(1)
    cache.fork(1, 2)
    assert cache.num_extra_owners.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert cache.release([1]) == 0 and cache.release([2]) == 2
    assert sorted(cache.allocate(7).tolist()) == [0, 1, 3, 4, 5, 6, 7]


def test_sequences_without_entries_share_nothing() -> None:
    cache = new_cache()
    cache.share(0, 1, 2)
    cache.fork(0, 2)
    assert not cache.context_lens.any() and cache.release([0, 1, 2]) == 0
    cache.rewind(cache.mark([0, 1, 2]))
    assert cache.num_slots_used == 0


def test_what_cannot_be_shared() -> None:
    cache = new_cache(num_layers=2)
    append(cache, Plan.per_sequence([LayerPath.full(2)] * 2, [2, 2]), [0, 1])
    with pytest.raises(AssertionError, match="target of a fork holds entries"):
        cache.fork(0, 1)
    with pytest.raises(AssertionError, match="the source holds fewer tokens"):
        cache.share(0, 2, 3)
    append(cache, Plan.per_token(torch.tensor([[True, False]]), [1], KVPolicy.EVICT), [0])
    with pytest.raises(AssertionError, match="layers of the source hold different tokens"):
        cache.share(0, 2, 1)


def test_a_failed_step_is_taken_back() -> None:
    cache = new_cache(num_layers=2, num_slots=20)
    append(cache, Plan.per_sequence([LayerPath.full(2)] * 2, [2, 1]), [0, 1])
    cache.fork(0, 2)
    mark = cache.mark([0, 1])
    append(cache, Plan.per_sequence([LayerPath.full(2)] * 2, [1, 3]), [0, 1])
    cache.allocate(3)
    cache.reserve(2, exact=True)
    assert cache.num_slots_used == 19
    cache.rewind(mark)
    assert cache.context_lens.tolist() == [[2, 1, 2]] * 2 and cache.num_slots_used == 6
    assert cache.free_slots[6:].tolist() == list(range(6, 20))
    assert cache.num_extra_owners[:7].tolist() == [1, 1, 0, 1, 1, 0, 0]
    cache.reserve(1)
    assert int(cache.slot_cursor) == 6
    cache.rewind(None)
    assert cache.num_slots_used == 6


class Owners:
    """What a cache of 2 layers should hold: the slots of each table, as lists."""

    NUM_SLOTS, MAX_CONTEXT_LEN, NUM_SEQS = 40, 6, 4

    def __init__(self) -> None:
        self.cache = new_cache(2, self.NUM_SEQS, self.MAX_CONTEXT_LEN, self.NUM_SLOTS)
        self.tables: dict[int, list[list[int]]] = {seq: [[], []] for seq in range(self.NUM_SEQS)}
        self.kept: list[tuple[list[int], torch.Tensor]] = []  # layers, and their slots

    def owned(self, seq: int) -> set[int]:
        return {slot for table in self.tables[seq] for slot in table}

    def kept_slots(self) -> set[int]:
        return {slot for _, slots in self.kept for slot in slots.flatten().tolist()}

    def taken(self) -> set[int]:
        return self.kept_slots().union(*map(self.owned, self.tables))

    def is_empty(self, seq: int) -> bool:
        return not self.owned(seq)

    def has_room(self, seq: int, count: int) -> bool:
        return max(map(len, self.tables[seq])) + count <= self.MAX_CONTEXT_LEN

    def take(self, seq: int, layers: Sequence[int], slots: list[int]) -> None:
        """Write down that each layer in turn got its part of the slots; no slot that anyone owns may be among them."""
        assert not self.taken() & set(slots) and len(set(slots)) == len(slots)
        count = len(slots) // len(layers)
        for place, layer in enumerate(layers):
            self.tables[seq][layer] += slots[place * count : (place + 1) * count]

    def append(self, seq: int, layers: Sequence[int], count: int) -> None:
        if not self.has_room(seq, count):
            return
        num_new = count * len(layers)
        if num_new > self.NUM_SLOTS - len(self.taken()):
            with pytest.raises(KVCacheMemoryError):
                self.cache.allocate(num_new)
            return
        before = [len(table) for table in self.tables[seq]]
        append(self.cache, Plan.per_sequence([LayerPath.of(2, layers)], [count]), [seq])
        new = [
            slot for layer in layers for slot in self.cache.slot_tables[layer, seq, before[layer] :][:count].tolist()
        ]
        self.take(seq, layers, new)

    def append_shared(self, seq: int, count: int) -> None:
        if self.has_room(seq, count) and count <= self.NUM_SLOTS - len(self.taken()):
            slots = self.cache.allocate(count)
            self.take(seq, [0], slots.tolist())
            self.tables[seq][1] += slots.tolist()
            append_shared(self.cache, seq, slots, range(2))

    def append_on_device(self, seq: int, promised: int, count: int) -> None:
        """The device takes ``count`` of ``promised`` slots for one layer."""
        if not self.has_room(seq, count) or promised > self.NUM_SLOTS - len(self.taken()):
            return
        self.cache.reserve(promised)
        cursor = int(self.cache.slot_cursor)
        slots = self.cache.free_slots[cursor : cursor + count].clone()
        self.cache.slot_cursor += count
        self.take(seq, [0], slots.tolist())
        append_shared(self.cache, seq, slots, [0])

    def fork(self, source: int, target: int, num_tokens: int | None) -> None:
        if source == target or not self.is_empty(target):
            return
        lengths = {len(table) for table in self.tables[source]} - {0}
        if num_tokens is None:
            self.cache.fork(source, target)
        elif len(lengths) <= 1 and num_tokens <= min(lengths, default=num_tokens):
            self.cache.share(source, target, num_tokens)
        else:
            return
        self.tables[target] = [table[:num_tokens] for table in self.tables[source]]

    def release(self, seqs: Sequence[int]) -> None:
        before = self.taken()
        for seq in seqs:
            self.tables[seq] = [[], []]
        assert self.cache.release(seqs) == len(before - self.taken())

    def keep(self, seq: int, layers: Sequence[int], first: int, count: int) -> None:
        slots = [slot for layer in layers for slot in self.tables[seq][layer][first : first + count]]
        if len(slots) == len(layers) * count == len(set(slots) - self.kept_slots()):
            self.kept.append(([*layers], self.cache.keep(seq, layers, first, first + count)))
            assert self.kept[-1][1].flatten().tolist() == slots

    def let_go(self, picks: Sequence[int]) -> None:
        before = self.taken()
        gone = [self.kept.pop(pick % len(self.kept)) for pick in picks if self.kept]
        assert self.cache.let_go([slots for _, slots in gone]) == len(before - self.taken())

    def begin(self, seq: int, pick: int) -> None:
        if self.kept and self.is_empty(seq):
            layers, slots = self.kept[pick % len(self.kept)]
            self.cache.begin(seq, layers, slots)
            for layer, row in zip(layers, slots.tolist(), strict=True):
                self.tables[seq][layer] = row

    def fail(self, seqs: Sequence[int], count: int) -> None:
        """A step of some sequences that fails when it has written part of its entries."""
        tables = {seq: [list(table) for table in self.tables[seq]] for seq in seqs}
        mark = self.cache.mark(seqs)
        for seq in seqs:
            self.append(seq, [0], count)
        if count < self.NUM_SLOTS - len(self.taken()):
            self.cache.allocate(count)
            self.cache.reserve(1, exact=True)
        self.cache.rewind(mark)
        self.tables |= tables

    def check(self) -> None:
        cache = self.cache
        for seq, by_layer in self.tables.items():
            for layer, table in enumerate(by_layer):
                assert cache.context_lens[layer, seq] == len(table)
                assert cache.slot_tables[layer, seq, : len(table)].tolist() == table
        taken = self.taken()
        assert cache.num_slots_used >= len(taken)
        assert cache.num_slots_used == len(taken) or int(cache.slot_cursor) == len(taken)
        assert sorted(cache.free_slots[len(taken) :].tolist()) == sorted(set(range(self.NUM_SLOTS)) - taken)
        for slot, num_extra in enumerate(cache.num_extra_owners.tolist()):
            num_owners = sum(slot in self.owned(seq) for seq in self.tables) + (slot in self.kept_slots())
            assert num_extra == max(num_owners - 1, 0)


SEQS = st.integers(0, Owners.NUM_SEQS - 1)
SOME_SEQS = st.lists(SEQS, min_size=1, max_size=3, unique=True)
COUNTS = st.integers(1, 3)
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), SEQS, st.sampled_from([[0], [1], [0, 1]]), COUNTS),
    st.tuples(st.just("append_shared"), SEQS, COUNTS),
    st.tuples(st.just("append_on_device"), SEQS, st.just(3), st.integers(0, 3)),
    st.tuples(st.just("fork"), SEQS, SEQS, st.one_of(st.none(), st.integers(0, 3))),
    st.tuples(st.just("release"), SOME_SEQS),
    st.tuples(st.just("keep"), SEQS, st.sampled_from([[0], [1], [0, 1]]), st.integers(0, 2), COUNTS),
    st.tuples(st.just("let_go"), st.lists(SEQS, max_size=2)),
    st.tuples(st.just("begin"), SEQS, SEQS),
    st.tuples(st.just("fail"), SOME_SEQS, COUNTS),
)


@given(st.lists(OPERATIONS, max_size=30))
@settings(max_examples=200)
def test_no_slot_is_lost_and_none_is_owned_by_two(operations: list[tuple[Any, ...]]) -> None:
    owners = Owners()
    for name, *arguments in operations:
        getattr(owners, name)(*arguments)
        owners.check()
    owners.release(list(owners.tables))
    owners.check()
    owners.let_go([0] * len(owners.kept))
    owners.check()
    assert owners.cache.num_slots_used == 0 and owners.cache.allocate(Owners.NUM_SLOTS).unique().numel() == 40


def test_both_caches_hold_the_same_after_the_same() -> None:
    """Sequences that join, share a prefix, fail, go on and leave: entry for entry the same keys in both."""
    compact, plain = new_cache(2, 4, 8, 64), ReferenceCache()
    values = iter(range(1, 1000))

    def grow(seq: int, layers: Sequence[int], count: int) -> None:
        keys = torch.tensor([next(values) for _ in range(count)], dtype=torch.float32)[:, None, None]
        for layer in layers:
            slots = compact.allocate(count)
            compact.k_cache[slots.long()], compact.v_cache[slots.long()] = keys, -keys
            append_shared(compact, seq, slots, [layer])
            plain.append(layer, seq, (keys, -keys, torch.arange(count)))

    def check(num_shared: int = 0) -> None:
        for layer in range(2):
            for seq in range(4):
                key, value, _, _ = compact.gather(layer, torch.tensor([seq]))
                empty = torch.empty(0, 1, 1)
                wanted_key, wanted_value, _ = plain.entries.get((layer, seq), (empty, empty, empty))
                assert torch.equal(key, wanted_key) and torch.equal(value, wanted_value)
        # The reference counts an entry once for each of its owners.
        assert plain.num_slots_used == compact.num_slots_used + num_shared

    grow(0, [1], 4)
    grow(1, [0, 1], 3)
    for cache in (compact, plain):
        cache.share(0, 2, 3)
        cache.fork(1, 3)
    check(num_shared=9)
    grow(2, [1], 2)
    check(num_shared=9)
    marks = compact.mark([0, 2]), plain.mark([0, 2])
    grow(0, [1], 1)
    grow(2, [1], 3)
    compact.rewind(marks[0])
    plain.rewind(marks[1])
    check(num_shared=9)
    assert compact.release([0]) == 1 and plain.release([0]) == 4
    check(num_shared=6)
    assert compact.release([1, 3]) == 6 and plain.release([1, 3]) == 12
    check()
    for cache in (compact, plain):
        cache.settle()
        cache.rewind(None)
    compact.sweep()
    check()
    with pytest.raises(AssertionError, match="target of a fork holds entries"):
        plain.fork(1, 2)
    with pytest.raises(AssertionError, match="the source holds fewer tokens"):
        plain.share(2, 1, 6)


def test_num_bytes_is_what_the_tensors_take() -> None:
    cache = KVCache(3, 2, 5, 7, 4, 16, torch.bfloat16, CPU)
    # Of 7 slots: keys, values, three ints, a flag; tables and their lengths; one cursor, and 5 places in a table.
    assert cache.num_bytes == 2 * 7 * 4 * 16 * 2 + 7 * 13 + 3 * 2 * 5 * 4 + 3 * 2 * 4 + 4 + 5 * 4


def test_too_little_memory_says_what_is_needed_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "available_bytes", lambda device: 10 * 2**20)
    with pytest.raises(
        KVCacheMemoryError,
        match=r"needs 20.1 MiB for 10240 entries of 1 sequences, got 10.0 MiB free on cpu, which holds 5\d\d\d "
        r"entries\. "
        r"Use fewer sequences at a time, smaller max_tokens or shorter paths",
    ):
        KVCache(1, 1, 1, 10240, 4, 64, torch.float32, CPU)
    assert KVCache(1, 1, 1, 5080, 4, 64, torch.float32, CPU).num_slots == 5080


def test_what_torch_keeps_unused_on_a_gpu_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    known = {"mem_get_info": (300, 1000), "memory_reserved": 500, "memory_allocated": 200}
    for name, answer in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: {gpu: answer}[device])
    assert kv_cache.available_bytes(gpu) == 600


def test_available_bytes_is_below_all_memory() -> None:
    import psutil

    assert 0 < kv_cache.available_bytes(CPU) <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_whole_huge_pages_are_asked_for_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.arange(3 * 2**19, dtype=torch.int64)
    before, address, page = held.clone(), held.data_ptr(), 2**21
    ask_for_huge_pages(address, held.nbytes, is_written=True)
    assert torch.equal(held, before)

    asked: list[tuple[int, int, int]] = []

    class Libc:
        @staticmethod
        def madvise(begin: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
            asked.append((begin.value or 0, size.value, advice))
            return -1

    monkeypatch.setattr(host, "_libc", Libc)
    assert not ask_for_huge_pages(3 * page - 1, 4 * page + 1, is_written=False)
    assert not ask_for_huge_pages(page + 4096, 2 * page, is_written=True)
    assert not ask_for_huge_pages(page + 4096, 2 * page - 4096, is_written=True)
    assert not ask_for_huge_pages(page + 4096, page, is_written=True)
    assert asked == [(3 * page, 4 * page, 14), (2 * page, page, 25), (2 * page, page, 25)]
    asked.clear()
    cache = KVCache(2, 1, 8, 4096, 4, 64, torch.float32, torch.device("cpu"))
    assert len(asked) == 2 and all(advice == 14 for _, _, advice in asked)
    assert cache.k_cache.data_ptr() <= asked[0][0] < cache.k_cache.data_ptr() + page
