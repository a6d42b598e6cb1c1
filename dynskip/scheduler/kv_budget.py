"""The memory of keys and values, counted: what is held, what is free, what a sequence would take."""

from __future__ import annotations

from collections.abc import Sequence

from dynskip.paths import LayerPath
from dynskip.scheduler.sequence import SequenceState


class KVBudget:
    """A number of slots, each one token's key and value in one layer, given out in pages.

    num_slots: the capacity. page_size: tokens of one page, which belongs to one sequence and one layer.
    """

    def __init__(self, num_slots: int, page_size: int = 1) -> None:
        for name, value in (("num_slots", num_slots), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"KVBudget: {name} must be at least 1, got {value}.")
        self.page_size = page_size
        self.num_slots = num_slots - num_slots % page_size
        self.num_used = 0
        self.peak_used = 0

    @property
    def num_free(self) -> int:
        """Slots that are free."""
        return self.num_slots - self.num_used

    def slots(self, num_tokens: int, num_layers: int) -> int:
        """The slots of the pages that hold ``num_tokens`` tokens in ``num_layers`` layers."""
        return -(-num_tokens // self.page_size) * self.page_size * num_layers

    def growth(self, sequence: SequenceState) -> int:
        """The slots that one more token of ``sequence`` takes: a page in each layer, or room in those it has."""
        return 0 if sequence.num_cached % self.page_size else self.page_size * sequence.path.budget

    def growth_of(self, path: LayerPath, sequences: Sequence[SequenceState]) -> int:
        """What one more token of each of ``sequences``, all along ``path``, takes."""
        return len(sequences) * path.budget if self.page_size == 1 else sum(map(self.growth, sequences))

    def take(self, num_slots: int) -> None:
        """Count ``num_slots`` more as held."""
        assert num_slots <= self.num_free, "num_slots <= num_free"
        self.num_used += num_slots
        self.peak_used = max(self.peak_used, self.num_used)

    def num_ready(self, sequence: SequenceState) -> int:
        """Tokens at the beginning of ``sequence``, which waits, whose keys and values are there: they need not run."""
        return 0

    def admit(self, sequence: SequenceState) -> None:
        """Count what the tokens of ``sequence`` so far take as held. Of those that are ready it has run all."""
        self.take(self.slots(sequence.num_tokens, sequence.path.budget))

    def reclaim(self, num_slots: int) -> None:
        """Free what is held only to be faster, until ``num_slots`` are free or nothing of it is left."""

    def release(self, sequence: SequenceState) -> None:
        """Count all that ``sequence`` holds as free."""
        self.num_used -= self.slots(sequence.num_cached, sequence.path.budget)
        assert self.num_used >= 0, "a sequence returns what it took"
        sequence.num_cached = 0

    def leave(self, sequence: SequenceState) -> None:
        """``sequence`` has ended in this step: what it holds is free from the next on, if not at once."""
        self.release(sequence)

    def check_fits(self, sequence: SequenceState) -> None:
        """Raise ValueError where ``sequence`` could not end even with all the memory to itself."""
        needed = self.slots(sequence.max_cached, sequence.path.budget)
        if needed <= self.num_slots:
            return
        raise ValueError(
            f"Scheduler.add: prompt and max_tokens must fit into {self.num_slots} key-value slots, got "
            f"{sequence.num_prompt_tokens} + {sequence.max_tokens} tokens through {sequence.path.budget} layers, which "
            f"take {needed}. Along this path at most {self.most_tokens(sequence.path)} tokens fit, prompt and output "
            "together."
        )

    def most_tokens(self, path: LayerPath) -> int:
        """Tokens of prompt and output that fit along ``path`` with all the memory to themselves."""
        # The last one is never run.
        return self.num_slots // self.page_size // max(path.budget, 1) * self.page_size + 1
