"""The memory of keys and values of an engine: the scheduler's count, and the cache that it counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from dynskip.execution.kv_cache import KVCache
from dynskip.execution.reference import ReferenceCache
from dynskip.scheduler.kv_budget import KVBudget
from dynskip.scheduler.sequence import SequenceState, Status

Cache: TypeAlias = KVCache | ReferenceCache


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
        self._num_seqs = num_seqs
        self._free_ids = list(range(num_seqs))[::-1]
        self._left_ids: list[int] = []

    @property
    def num_free_seqs(self) -> int:
        """How many more sequences the tables of the cache have a place for."""
        return len(self._free_ids)

    def restart(self) -> None:
        """Forget all entries."""
        self.cache.clear()
        self._left_ids = []
        self.num_used = 0
        self._free_ids = list(range(self._num_seqs))[::-1]

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
