"""The memory of keys and values of an engine: the scheduler's count, and the cache that it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from dynskip.engine.prefixes import PrefixCache
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.reference import ReferenceCache
from dynskip.scheduler.kv_budget import KVBudget
from dynskip.scheduler.sequence import SequenceState, Status

Cache: TypeAlias = KVCache | ReferenceCache


@dataclass(slots=True)
class DraftPlace:
    """The entries that a draft has made for itself: of the first ``num_tokens`` tokens of its sequence."""

    cache_id: int
    num_tokens: int = 0


class KVPool(KVBudget):
    """A budget whose slots are those of a cache. A page is a single token: what is held is what is used.

    What the scheduler takes is counted at once; `settle` brings the count back to what the cache holds after a step,
    which is less where sequences share entries, or where a controller left some out. Entries that are only kept for
    requests to come count as free: `make_room` evicts them.

    peak_used counts what sequences held.

    cache: holds the entries. num_seqs: most sequences that it holds at a time. num_slots: most entries.
    prefixes: what sequences share; None: nothing, but outputs of one prompt that runs whole.
    """

    def __init__(self, cache: Cache, num_seqs: int, num_slots: int, prefixes: PrefixCache | None = None) -> None:
        super().__init__(num_slots, page_size=1)
        self.cache = cache
        self.prefixes = prefixes
        self._num_seqs = self._num_places = num_seqs
        self._free_ids = list(range(num_seqs))[::-1]
        self._left: list[tuple[SequenceState, int]] = []
        self._left_ids: list[int] = []
        self._drafts: dict[SequenceState, DraftPlace] = {}

    def make_place_for_drafts(self) -> bool:
        """Let each sequence have a second place in the tables, for a draft's own entries; whether the tables grew."""
        if self._num_places > self._num_seqs:
            return False
        self.cache.add_sequences(self._num_seqs)
        self._free_ids = [*range(self._num_seqs, 2 * self._num_seqs), *self._free_ids]
        self._num_places = 2 * self._num_seqs
        return True

    def draft_place(self, sequence: SequenceState) -> DraftPlace | None:
        """Where the own entries of the draft of ``sequence`` are; None where it has none."""
        return self._drafts.get(sequence)

    def open_draft(self, sequence: SequenceState) -> DraftPlace:
        """A place in the tables for own entries of the draft of ``sequence``."""
        assert self._num_places > self._num_seqs, "there are places for drafts"
        place = self._drafts[sequence] = DraftPlace(self._free_ids.pop(0))
        return place

    def drop_draft(self, sequence: SequenceState) -> None:
        """Forget the own entries of the draft of ``sequence``, if it has any."""
        place = self._drafts.pop(sequence, None)
        if place is not None:
            self.num_used -= self.cache.release([place.cache_id])
            self._free_ids.insert(0, place.cache_id)

    def reclaim(self, num_slots: int) -> None:
        """Drop own entries of drafts, those of the last arrivals first, until ``num_slots`` are free."""
        while self.num_free < num_slots and self._drafts:
            self.drop_draft(max(self._drafts, key=lambda sequence: sequence.order))

    @property
    def num_free_seqs(self) -> int:
        """How many more sequences the tables of the cache have a place for."""
        num_for_drafts = self._num_places - self._num_seqs
        return len(self._free_ids) - num_for_drafts + len(self._drafts)

    @property
    def num_kept(self) -> int:
        """Slots of entries that no sequence owns: they are kept for requests to come, and count as free."""
        return 0 if self.prefixes is None else self.prefixes.num_unused

    def make_room(self, num_slots: int = 0) -> None:
        """Evict what is kept until there are slots for all that is counted as held, and ``num_slots`` more."""
        num_lacking = self.num_used + num_slots + self.num_kept - self.num_slots
        if self.prefixes is not None and num_lacking > 0:
            self.prefixes.evict(num_lacking)

    def restart(self) -> None:
        """Forget all entries."""
        self.cache.clear()
        if self.prefixes is not None:
            self.prefixes.forget()
        self._left, self._left_ids = [], []
        self.num_used = 0
        self._drafts = {}
        self._free_ids = list(range(self._num_places))[::-1]

    def close(self) -> None:
        """Give the memory back; all sequences have left."""
        if self.prefixes is not None:
            self.prefixes.close()
        del self.cache

    def take(self, num_slots: int) -> None:
        """Count ``num_slots`` more as held."""
        assert num_slots <= self.num_free, "num_slots <= num_free"
        self.num_used += num_slots

    def num_ready(self, sequence: SequenceState) -> int:
        """Tokens at the beginning of ``sequence`` whose entries are there."""
        return 0 if self.prefixes is None else self.prefixes.find(sequence.owner)

    def admit(self, sequence: SequenceState) -> None:
        """Give ``sequence`` its place in the tables of the cache, where it begins with the entries that are there."""
        assert sequence.cache_id < 0, "a sequence has one place"
        sequence.cache_id = self._free_ids.pop()
        num_kept = self.num_kept
        if self.prefixes is not None:
            sequence.num_prefilled = self.prefixes.begin(sequence.owner)
        num_new = sequence.num_tokens - sequence.num_prefilled
        self.take(self.slots(num_new, sequence.path.budget) + num_kept - self.num_kept)

    def offer(self, sequence: SequenceState) -> None:
        """The prompt of ``sequence`` has run: others that begin alike may share its entries."""
        if self.prefixes is not None:
            self.prefixes.offer(sequence.owner)

    def fork(self, source: SequenceState, target: SequenceState) -> None:
        """Let ``target``, whose prompt is that of ``source`` and has not run, hold the same entries."""
        if self.prefixes is not None and self.prefixes.fork(source.owner, target.owner):
            self.cache.release([target.cache_id])
        self.cache.fork(source.cache_id, target.cache_id)

    def release(self, sequence: SequenceState) -> None:
        """Forget the entries of ``sequence``; those that no other sequence owns are free, be they kept or not."""
        self.drop_draft(sequence)
        if sequence.status is Status.PREFILLING:
            self.num_used -= _num_reserved(sequence)
        if sequence.cache_id >= 0:
            num_kept = self.num_kept
            if self.prefixes is not None:
                self.prefixes.end(sequence.owner, sequence.cache_id)
            self.num_used -= self.cache.release([sequence.cache_id]) + self.num_kept - num_kept
            self._free_ids.append(sequence.cache_id)
            sequence.cache_id = -1
        sequence.num_cached = 0

    def leave(self, sequence: SequenceState) -> None:
        """Forget the entries of ``sequence`` at the next `settle`, with those of all others that have left."""
        assert sequence.cache_id >= 0 and sequence.status is Status.RUNNING, "only a running sequence ends by itself"
        self._left.append((sequence, sequence.cache_id))
        self._left_ids.append(sequence.cache_id)
        if (place := self._drafts.pop(sequence, None)) is not None:
            self._left_ids.append(place.cache_id)
        sequence.cache_id = -1
        sequence.num_cached = 0

    def settle(self, prefilling: Iterable[SequenceState]) -> None:
        """Count what the cache holds for sequences, and what is kept free for the prompts of ``prefilling``."""
        self.cache.settle()
        self.peak_used = max(self.peak_used, self.cache.num_slots_used - self.num_kept)
        if self._left_ids:
            if self.prefixes is not None:
                for sequence, cache_id in self._left:
                    self.prefixes.end(sequence.owner, cache_id)
            self.cache.release(self._left_ids)
            self._free_ids += self._left_ids
            self._left, self._left_ids = [], []
        self.num_used = self.cache.num_slots_used - self.num_kept + sum(map(_num_reserved, prefilling))


def _num_reserved(sequence: SequenceState) -> int:
    return (sequence.num_cached - sequence.num_prefilled) * sequence.path.budget
