"""Which rows stand in the batch of a step: a function of seed and step alone, so that a resumed run sees the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import count

import torch
from torch.utils.data import Dataset

from dynskip.data.examples import Example

IGNORED = -100
Batch = dict[str, torch.Tensor]


def pad_examples(examples: Sequence[Example], pad_id: int, response_only: bool, multiple: int = 16) -> Batch:
    """``input_ids`` and ``labels``, both [B, T] int64, padded on the right to a multiple; no loss on padding,
    nor on prompts when ``response_only``."""
    width = -(-max(example.num_tokens for example in examples) // multiple) * multiple
    input_ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.prompt_ids + example.response_ids)
        input_ids[row, : len(ids)] = ids
        start = len(example.prompt_ids) if response_only else 0
        labels[row, start : len(ids)] = ids[start:]
    return {"input_ids": input_ids, "labels": labels}


def group_by_length(lengths: Sequence[int], tokens_per_batch: int, generator: random.Random) -> list[list[int]]:
    """One epoch: indices in shuffled batches of about equal length that hold at most ``tokens_per_batch`` padded."""
    order = list(range(len(lengths)))
    generator.shuffle(order)
    # Sorting within large chunks keeps padding low and still changes the company of a row from epoch to epoch.
    chunk = 8192
    batches: list[list[int]] = []
    for start in range(0, len(order), chunk):
        batch: list[int] = []
        for index in sorted(order[start : start + chunk], key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[index] > tokens_per_batch:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    generator.shuffle(batches)
    return batches


def group_in_order(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices by length, longest first, in batches of at most ``tokens_per_batch`` padded tokens (or one row)."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > tokens_per_batch:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


class Plan(Dataset[Batch]):
    """The batches of one stage of training, for the Trainer of one process.

    Item i is micro-batch ``i % num_micro_batches`` of step ``first_step + i // num_micro_batches``.
    """

    num_steps: int
    num_micro_batches = 1
    first_step = 0

    def __len__(self) -> int:
        # As long from every first step: a Trainer that resumes counts its epochs by the length, and ends by its steps.
        return self.num_steps * self.num_micro_batches

    def __getitem__(self, item: int) -> Batch:
        if not 0 <= item < len(self):
            raise IndexError(f"{type(self).__name__}: item must lie in 0..{len(self) - 1}, got {item}.")
        step, micro = divmod(item, self.num_micro_batches)
        return self.micro_batch(self.first_step + step, micro)

    def micro_batch(self, step: int, micro: int) -> Batch:
        """A part of the batch of ``step``, of the process that the plan is for."""
        raise NotImplementedError


@dataclass(eq=False)
class BatchPlan(Plan):
    """Batches of at most ``tokens_per_batch`` padded tokens, of examples or, with probability ``passage_share``, of
    windows of passages."""

    examples: Sequence[Example]
    windows: Sequence[tuple[int, ...]]
    _: KW_ONLY
    pad_id: int
    tokens_per_batch: int
    passage_share: float
    response_only: bool
    seed: int
    num_steps: int

    def __post_init__(self) -> None:
        if self.passage_share > 0 and not self.windows:
            raise ValueError(
                "BatchPlan: windows must not be empty when passage_share is positive, "
                f"got passage_share {self.passage_share}. Give a T0 file or a share of 0."
            )
        self._choice = random.Random(f"{self.seed} source")
        self._batches = {
            "examples": self._grouped("examples", [example.num_tokens for example in self.examples]),
            "windows": self._grouped("windows", [len(window) for window in self.windows]),
        }
        self._plan: list[tuple[str, list[int]]] = []

    def _grouped(self, source: str, lengths: Sequence[int]) -> Iterator[list[int]]:
        """The batches of a source, epoch after epoch."""
        for epoch in count():
            generator = random.Random(f"{self.seed} {source} {epoch}")
            yield from reversed(group_by_length(lengths, self.tokens_per_batch, generator))

    def micro_batch(self, step: int, micro: int) -> Batch:
        """The batch of ``step``."""
        while len(self._plan) <= step:
            source = "windows" if self._choice.random() < self.passage_share else "examples"
            self._plan.append((source, next(self._batches[source])))
        source, indices = self._plan[step]
        if source == "examples":
            return pad_examples([self.examples[index] for index in indices], self.pad_id, self.response_only)
        input_ids = torch.tensor([self.windows[index] for index in indices])
        return {"input_ids": input_ids, "labels": input_ids.clone()}


@lru_cache(maxsize=2)
def _shuffled(num_rows: int, seed: str) -> list[int]:
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    return order


@dataclass(eq=False)
class StepPlan(Plan):
    """Batches of ``batch_size`` examples: step s takes rows s * batch_size and on of one shuffled pass after the other.
    response_only: prompts carry no label.

    Every batch is full, and the same for any number of processes. Within a step the rows are sorted by length and
    dealt to processes: less padding, the same sum of gradients.
    """

    examples: Sequence[Example]
    _: KW_ONLY
    pad_id: int
    batch_size: int
    micro_batch_size: int
    num_steps: int
    seed: int
    rank: int = 0
    num_processes: int = 1
    response_only: bool = True

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError("StepPlan: examples must not be empty, got 0 rows. Check the data file and the cut.")
        share = self.micro_batch_size * self.num_processes
        if self.batch_size % share:
            raise ValueError(
                f"StepPlan: batch_size must be a multiple of micro_batch_size * processes, got {self.batch_size} for "
                f"{self.micro_batch_size} * {self.num_processes}. Choose a micro-batch that divides it."
            )
        self.num_micro_batches = self.batch_size // share

    def rows(self, step: int) -> list[int]:
        """The indices of the examples of ``step``, over all processes, shortest first."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = (divmod(place, len(self.examples)) for place in places)
        rows = [_shuffled(len(self.examples), f"{self.seed} rows {epoch}")[rank] for epoch, rank in epochs]
        return sorted(rows, key=lambda row: (self.examples[row].num_tokens, row))

    def micro_batch(self, step: int, micro: int) -> Batch:
        """This process's share of the micro-batch."""
        place = (micro * self.num_processes + self.rank) * self.micro_batch_size
        rows = self.rows(step)[place : place + self.micro_batch_size]
        examples = [self.examples[row] for row in rows]
        return pad_examples(examples, self.pad_id, self.response_only, multiple=8)
