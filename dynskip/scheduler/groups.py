"""Requests by path: a queue and the resident sequences of each."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator

from dynskip.paths import LayerPath
from dynskip.scheduler.sequence import SequenceState, Status


class PathGroup:
    """The requests of one path.

    waiting: in the order of arrival; aborted ones stay in it until they come to its head. num_waiting: without those.
    running: those that may decode, the one whose last token is oldest first. num_resident: with those in prefill.
    number: no two groups of one scheduler share it. mask: the layers of the path as bits.
    """

    __slots__ = ("mask", "num_resident", "num_waiting", "number", "path", "running", "waiting")

    def __init__(self, path: LayerPath, number: int) -> None:
        self.path = path
        self.number = number
        self.mask = sum(1 << layer for layer in path.layers)
        self.waiting: deque[SequenceState] = deque()
        self.num_waiting = 0
        self.running: dict[SequenceState, None] = {}
        self.num_resident = 0

    def head(self) -> SequenceState | None:
        """The request of this path that arrived first, of those that wait."""
        while self.waiting and self.waiting[0].status is not Status.WAITING:
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None

    def oldest(self) -> SequenceState | None:
        """The running sequence whose last token is oldest."""
        return next(iter(self.running), None)

    def touch(self, sequences: Iterable[SequenceState]) -> None:
        """``sequences`` of this path have stepped: put them behind the others."""
        running = self.running
        for sequence in sequences:
            del running[sequence]
            running[sequence] = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits and nothing is resident."""
        return not self.num_waiting and not self.num_resident


class PathGroups:
    """All requests of a scheduler that have not ended. No operation takes longer for a longer queue, but for a log.

    num_groups: how many groups the scheduler has had before, whose numbers are not given out again.
    """

    def __init__(self, num_groups: int = 0) -> None:
        self._groups: dict[LayerPath, PathGroup] = {}
        self._resident: dict[PathGroup, None] = {}
        self._heads: list[tuple[int, int, PathGroup]] = []  # heap of (order of the head, number, group), some outdated
        self._known: set[tuple[int, int]] = set()  # what of each the heap holds: nothing is pushed twice
        self._num_groups = num_groups
        self.num_waiting = 0
        self.num_resident = 0
        self.num_running = 0

    @property
    def resident(self) -> Iterator[PathGroup]:
        """The groups with resident sequences."""
        return iter(self._resident)

    @property
    def num_groups(self) -> int:
        """How many groups there have been."""
        return self._num_groups

    def resident_sequences(self) -> Iterator[SequenceState]:
        """All running sequences; those in prefill are the scheduler's."""
        for group in self._resident:
            yield from group.running

    def of(self, sequence: SequenceState) -> PathGroup:
        """The group of a sequence that has not ended."""
        return self._groups[sequence.path]

    def enqueue(self, sequence: SequenceState) -> None:
        """Let ``sequence`` wait: behind the others of its path, or before them where it arrived before them."""
        group = self._groups.get(sequence.path)
        if group is None:
            group = self._groups[sequence.path] = PathGroup(sequence.path, self._num_groups)
            self._num_groups += 1
        sequence.status = Status.WAITING
        head = group.head()
        if head is None or sequence.order < head.order:
            group.waiting.appendleft(sequence)
            self._push(sequence.order, group)
        else:
            assert sequence.order > group.waiting[-1].order, "a path's queue is in the order of arrival"
            group.waiting.append(sequence)
        group.num_waiting += 1
        self.num_waiting += 1

    def oldest_waiting(self, full: int | None = None) -> PathGroup | None:
        """The group whose head arrived first; with ``full``, of those with fewer resident sequences than that."""
        passed: list[tuple[int, int, PathGroup]] = []
        found = None
        while self._heads:
            entry = self._heads[0]
            head = entry[2].head()
            if head is None or head.order != entry[0]:
                heapq.heappop(self._heads)
                self._known.discard(entry[:2])
                if head is not None and head.order > entry[0]:
                    self._push(head.order, entry[2])
                continue
            if full is None or entry[2].num_resident < full:
                found = entry[2]
                break
            passed.append(heapq.heappop(self._heads))
        for entry in passed:
            heapq.heappush(self._heads, entry)
        return found

    def admit(self, group: PathGroup) -> SequenceState:
        """The head of ``group``, now in prefill."""
        sequence = group.head()
        assert sequence is not None, "a group without a queue admits none"
        group.waiting.popleft()
        group.num_waiting -= 1
        self.num_waiting -= 1
        group.num_resident += 1
        self.num_resident += 1
        self._resident[group] = None
        sequence.status = Status.PREFILLING
        return sequence

    def start(self, sequence: SequenceState) -> None:
        """Let ``sequence`` decode from the next step on: its prefill is complete."""
        sequence.status = Status.RUNNING
        self.of(sequence).running[sequence] = None
        self.num_running += 1

    def leave(self, sequence: SequenceState, status: Status) -> None:
        """Take ``sequence`` out, into a status in which it is neither resident nor waiting; `enqueue` may follow."""
        group = self.of(sequence)
        if sequence.status is Status.WAITING:
            group.num_waiting -= 1
            self.num_waiting -= 1
        else:
            if sequence.status is Status.RUNNING:
                del group.running[sequence]
                self.num_running -= 1
            group.num_resident -= 1
            self.num_resident -= 1
            if not group.num_resident:
                del self._resident[group]
        sequence.status = status
        if group.is_empty and status is not Status.WAITING:
            del self._groups[group.path]

    def _push(self, order: int, group: PathGroup) -> None:
        if (order, group.number) not in self._known:
            self._known.add((order, group.number))
            heapq.heappush(self._heads, (order, group.number, group))
