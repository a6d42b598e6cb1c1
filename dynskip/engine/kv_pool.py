"""The memory of keys and values of an engine: the scheduler's count, and the cache that it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

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
    which is less where sequences share entries, or where a controller left some out.

    peak_used counts what the cache held.

    cache: holds the entries. num_seqs: most sequences that it holds at a time. num_slots: most entries.
    """

    def __init__(self, cache: Cache, num_seqs: int, num_slots: int) -> None:
        super().__init__(num_slots, page_size=1)
        self.cache = cache
        self._num_seqs = self._num_places = num_seqs
        self._free_ids = list(range(num_seqs))[::-1]
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

    def restart(self) -> None:
        """Forget all entries."""
        self.cache.clear()
        self._left_ids = []
        self.num_used = 0
        self._drafts = {}
        self._free_ids = list(range(self._num_places))[::-1]

    def take(self, num_slots: int) -> None:
        """Count ``num_slots`` more as held."""
        assert num_slots <= self.num_free, "num_slots <= num_free"
        self.num_used += num_slots

    def open(self, sequence: SequenceState) -> None:
        """Give ``sequence`` its place in the tables of the cache."""
        assert sequence.cache_id < 0, "a sequence has one place"
        sequence.cache_id = self._free_ids.pop()

    def release(self, sequence: SequenceState) -> None:
        """Forget the entries of ``sequence``; those that no other sequence owns are free."""
        self.drop_draft(sequence)
        if sequence.status is Status.PREFILLING:
            self.num_used -= _num_reserved(sequence)
        if sequence.cache_id >= 0:
            self.num_used -= self.cache.release([sequence.cache_id])
            self._free_ids.append(sequence.cache_id)
            sequence.cache_id = -1
        sequence.num_cached = 0

    def leave(self, sequence: SequenceState) -> None:
        """Forget the entries of ``sequence`` at the next `settle`, with those of all others that have left."""
        assert sequence.cache_id >= 0 and sequence.status is Status.RUNNING, "only a running sequence ends by itself"
        self._left_ids.append(sequence.cache_id)
        if (place := self._drafts.pop(sequence, None)) is not None:
            self._left_ids.append(place.cache_id)
        sequence.cache_id = -1
        sequence.num_cached = 0

    def settle(self, prefilling: Iterable[SequenceState]) -> None:
        """Count what the cache holds, and what is kept free for the prompts of ``prefilling``."""
        self.cache.settle()
        self.peak_used = max(self.peak_used, self.cache.num_slots_used)
        if self._left_ids:
            self.cache.release(self._left_ids)
            self._free_ids += self._left_ids
            self._left_ids = []
        self.num_used = self.cache.num_slots_used + sum(map(_num_reserved, prefilling))


def _num_reserved(sequence: SequenceState) -> int:
    return (sequence.num_cached - sequence.num_prefilled) * sequence.path.budget
