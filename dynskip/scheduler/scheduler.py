"""The scheduler: requests in, and step by step who is preempted, whose prompt runs, and who decodes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from dynskip.scheduler.groups import PathGroup, PathGroups
from dynskip.scheduler.kv_budget import KVBudget
from dynskip.scheduler.policies.policy import Part, Policy
from dynskip.scheduler.sequence import SequenceState, Status


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``num_tokens`` tokens of ``sequence``, from its token ``first`` on. ``is_last``: a token is chosen."""

    sequence: SequenceState
    first: int
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether it ends the prefill, so that the sequence gets a token in this step."""
        return self.first + self.num_tokens == self.sequence.num_cached


@dataclass(frozen=True, slots=True)
class Decision:
    """What one step does, in this order.

    preempt: their keys and values are freed; they wait again, and will prefill prompt and output so far, or replay it.
    prefill: tokens of prompts to run. The last chunk of a sequence gives it a token.
    parts: the decode rows by path. Each row runs the last token of its sequence and gives it the next one.
    """

    step: int
    preempt: list[SequenceState]
    prefill: list[Chunk]
    parts: list[Part]

    @property
    def decode(self) -> list[SequenceState]:
        """The decode rows in the order of ``parts``."""
        return [sequence for _, sequences in self.parts for sequence in sequences]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to run."""
        return not self.prefill and not self.parts


@dataclass
class Counters:
    """What has happened since the scheduler began.

    longest_wait: the most steps from a sequence's own token to its next while it was resident.
    """

    num_added: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_preempted: int = 0
    num_steps: int = 0
    longest_wait: int = 0


@dataclass
class Scheduler:
    """Requests of one engine from arrival to end.

    policy: who is admitted, who steps. kv: the memory; a sequence is admitted when its tokens so far fit beside one
    more token of every resident, and where memory runs out nevertheless, those that arrived last are preempted.
    max_prefill_tokens: most prompt tokens of one step. A prompt is cut at multiples of it and nowhere else, so that its
        chunks do not depend on the company that it runs in.
    """

    policy: Policy
    kv: KVBudget
    max_prefill_tokens: int = 2048
    groups: PathGroups = field(default_factory=PathGroups)
    counters: Counters = field(default_factory=Counters)
    _sequences: dict[Hashable, SequenceState] = field(default_factory=dict)
    _prefilling: list[SequenceState] = field(default_factory=list)
    _num_orders: int = 0

    def __post_init__(self) -> None:
        if self.max_prefill_tokens < 1:
            raise ValueError(f"Scheduler: max_prefill_tokens must be at least 1, got {self.max_prefill_tokens}.")

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has neither finished nor been aborted."""
        return bool(self._sequences)

    @property
    def step(self) -> int:
        """The number of the last step."""
        return self.counters.num_steps

    def add(self, sequence: SequenceState) -> None:
        """Let a new request wait.

        Raises ValueError where its id is in use, or where it would not fit into the memory even alone.
        """
        if sequence.owner in self._sequences:
            raise ValueError(f"Scheduler.add: request_id must be new, got {sequence.owner!r}, which has not ended yet.")
        self.kv.check_fits(sequence)
        sequence.order = self._num_orders
        self._num_orders += 1
        sequence.queued_step = self.step
        self._sequences[sequence.owner] = sequence
        self.groups.enqueue(sequence)
        self.counters.num_added += 1

    def knows(self, owner: Hashable) -> bool:
        """Whether a request of that id has not ended."""
        return owner in self._sequences

    def sequence(self, owner: Hashable) -> SequenceState:
        """The state of a request that has not ended; raises ValueError for any other."""
        sequence = self._sequences.get(owner)
        if sequence is None:
            raise ValueError(f"Scheduler: request_id must be of a request that has not ended, got {owner!r}.")
        return sequence

    def finished(self, owner: Hashable) -> SequenceState:
        """The sequence, whose last token was its last: its memory is free from the next step on."""
        sequence = self._end(owner, Status.FINISHED, self.kv.leave)
        self.counters.num_finished += 1
        return sequence

    def abort(self, owner: Hashable) -> SequenceState:
        """The sequence, which is over wherever it stood: its memory is free."""
        sequence = self._end(owner, Status.ABORTED, self.kv.release)
        self.counters.num_aborted += 1
        return sequence

    def restart(self, sequences: Iterable[SequenceState]) -> None:
        """Let ``sequences`` wait again, after something was broken off; all memory is free by then.

        Those that had finished are back. All others are forgotten: their arrival was broken off.
        """
        known = self._sequences
        self._sequences = {state.owner: state for state in sorted(sequences, key=lambda state: state.order)}
        self.counters.num_finished -= sum(owner not in known for owner in self._sequences)
        self.groups = PathGroups(self.groups.num_groups)
        self._prefilling = []
        for sequence in self._sequences.values():
            if sequence.is_resident:
                sequence.num_preemptions += 1
                self.counters.num_preempted += 1
            sequence.begin_again(max(sequence.num_generated, sequence.num_replayed), self.step)
            self.groups.enqueue(sequence)

    @property
    def prefilling(self) -> Sequence[SequenceState]:
        """The sequences part of whose prompt has run."""
        return self._prefilling

    def schedule(self) -> Decision:
        """What the next step does, booked as if it had been done: the engine carries it out, or aborts its requests."""
        self.counters.num_steps += 1
        step = self.step
        parts = self.policy.choose(self.groups, step)
        preempted = self._make_room(parts)
        if preempted:
            gone = set(preempted)
            kept = ((group, [s for s in sequences if s not in gone]) for group, sequences in parts)
            parts = [(group, sequences) for group, sequences in kept if sequences]
        oldest_step = step - self.counters.longest_wait
        for group, sequences in parts:
            self.kv.take(self.kv.growth_of(group.path, sequences))
            for sequence in sequences:
                sequence.num_cached += 1
                sequence.num_generated += 1
                if sequence.last_step < oldest_step:
                    oldest_step = sequence.last_step
                sequence.last_step = step
            group.touch(sequences)
        self.counters.longest_wait = step - oldest_step
        return Decision(step, preempted, self._prefill(step, not preempted), parts)

    def _make_room(self, parts: list[Part]) -> list[SequenceState]:
        """Preempt, of all that are resident, those that arrived last, until the rows of ``parts`` can grow."""
        needed = sum(self.kv.growth_of(group.path, sequences) for group, sequences in parts)
        preempted: list[SequenceState] = []
        self.kv.reclaim(needed)
        if needed <= self.kv.num_free:
            return preempted
        growth = {sequence: self.kv.growth(sequence) for _, sequences in parts for sequence in sequences}
        residents = sorted([*self.groups.resident_sequences(), *self._prefilling], key=lambda s: s.order)
        while needed > self.kv.num_free:
            assert len(residents) > 1, "a sequence that fits alone never has to go for its own sake"
            sequence = residents.pop()
            needed -= growth.pop(sequence, 0)
            self._preempt(sequence)
            preempted.append(sequence)
        return preempted

    def _preempt(self, sequence: SequenceState) -> None:
        self.kv.release(sequence)
        if sequence.status is Status.PREFILLING:
            self._prefilling.remove(sequence)
        self.groups.leave(sequence, Status.WAITING)
        self.groups.enqueue(sequence)
        sequence.begin_again(max(sequence.num_generated, sequence.num_replayed), self.step)
        sequence.num_preemptions += 1
        self.counters.num_preempted += 1

    def _prefill(self, step: int, may_admit: bool) -> list[Chunk]:
        """Chunks of prompts: first of those that are resident, then of those that are admitted now."""
        left = self.max_prefill_tokens
        chunks: list[Chunk] = []
        for sequence in self._prefilling:
            if self._chunk_size(sequence.num_prefilled, sequence.num_cached) > left:
                break
            left -= self._add_chunk(sequence, chunks)
        while may_admit and left and self.groups.num_resident < self.policy.pool:
            group = self.policy.next_group(self.groups, step)
            if group is None or not self._fits(group, left):
                break
            sequence = self.groups.admit(group)
            sequence.admitted_step = step
            self.kv.admit(sequence)
            sequence.num_cached = sequence.num_tokens
            self._prefilling.append(sequence)
            left -= self._add_chunk(sequence, chunks)
        for chunk in chunks:
            if chunk.is_last:
                self._prefilling.remove(chunk.sequence)
                chunk.sequence.num_generated += 1
                chunk.sequence.last_step = step
                self.groups.start(chunk.sequence)
        return chunks

    def _chunk_size(self, first: int, end: int) -> int:
        """Of the chunk that begins with token ``first`` of a prompt of ``end`` tokens."""
        return min(self.max_prefill_tokens - first % self.max_prefill_tokens, end - first)

    def _add_chunk(self, sequence: SequenceState, chunks: list[Chunk]) -> int:
        num_tokens = self._chunk_size(sequence.num_prefilled, sequence.num_cached)
        chunks.append(Chunk(sequence, sequence.num_prefilled, num_tokens))
        sequence.num_prefilled += num_tokens
        return num_tokens

    def _fits(self, group: PathGroup, num_tokens_left: int) -> bool:
        """Whether the head of ``group`` fits into the step, and beside one more page in each layer of all resident."""
        head = group.head()
        assert head is not None, "a policy names a group with a queue"
        if self._chunk_size(self.kv.num_ready(head), head.num_tokens) > num_tokens_left:
            return False
        needed = self.kv.slots(head.num_known_tokens, head.path.budget)
        if self.groups.num_resident:
            needed += self._reserve(head)
        self.kv.reclaim(needed)
        return needed <= self.kv.num_free

    def _reserve(self, head: SequenceState) -> int:
        """The slots that one more token of every resident sequence, and of ``head``, may take."""
        num_layers = head.path.budget + sum(group.path.budget * group.num_resident for group in self.groups.resident)
        return num_layers * self.kv.page_size

    def _end(self, owner: Hashable, status: Status, free: Callable[[SequenceState], None]) -> SequenceState:
        sequence = self.sequence(owner)
        del self._sequences[owner]
        if sequence.status is Status.PREFILLING:
            self._prefilling.remove(sequence)
        if sequence.is_resident:
            free(sequence)
        self.groups.leave(sequence, status)
        return sequence
