"""Which rows every step of a fine-tune sees, whatever the number of processes and wherever it was resumed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch.utils.data import Dataset

from dynskip.data.batches import Batch, pad_examples
from dynskip.data.examples import Example


class StepPlan(Dataset[Batch]):
    """The micro-batches of one process. Item i belongs to step ``first_step + i // num_micro_batches``.

    Step s takes rows s * batch_size and on of one shuffled pass over the examples after the other, so every batch is
    full and a function of seed and step alone. Within a step the rows are sorted by length and dealt to processes:
    less padding, the same sum of gradients.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        pad_id: int,
        batch_size: int,
        micro_batch_size: int,
        num_steps: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if not examples:
            raise ValueError("StepPlan: examples must not be empty, got 0 rows. Check the data file and the cut.")
        share = micro_batch_size * num_processes
        if batch_size % share:
            raise ValueError(
                f"StepPlan: batch_size must be a multiple of micro_batch_size * processes, got {batch_size} for "
                f"{micro_batch_size} * {num_processes}. Choose a micro-batch that divides it."
            )
        self.first_step = 0
        self.num_micro_batches = batch_size // share
        self.num_steps = num_steps
        self._examples = examples
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._rank = rank
        self._num_processes = num_processes
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        # As long from every first step: a Trainer that resumes counts its epochs by the length, and ends by its steps.
        return self.num_steps * self.num_micro_batches

    def _row(self, place: int) -> int:
        epoch, rank = divmod(place, len(self._examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self._examples)))
            random.Random(f"{self._seed} rows {epoch}").shuffle(self._order)
        return self._order[rank]

    def rows(self, step: int) -> list[int]:
        """The indices of the examples of ``step``, over all processes, shortest first."""
        first = step * self._batch_size
        rows = [self._row(place) for place in range(first, first + self._batch_size)]
        return sorted(rows, key=lambda row: (self._examples[row].num_tokens, row))

    def __getitem__(self, item: int) -> Batch:
        if not 0 <= item < len(self):
            raise IndexError(f"StepPlan: item must lie in 0..{len(self) - 1}, got {item}.")
        step, micro = divmod(item, self.num_micro_batches)
        place = (micro * self._num_processes + self._rank) * self._micro_batch_size
        rows = self.rows(self.first_step + step)[place : place + self._micro_batch_size]
        return pad_examples([self._examples[row] for row in rows], self._pad_id, response_only=True, multiple=8)
