"""Which rows stand in the batch of a step: a function of seed and step alone, so that a resumed run sees the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

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


class BatchPlan(Dataset[Batch]):
    """The batch of every step of one phase, up to ``num_steps``; ``first_step`` is the step that item 0 stands for.

    A step takes windows of passages with probability ``passage_share``, otherwise examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        windows: Sequence[tuple[int, ...]],
        *,
        pad_id: int,
        tokens_per_batch: int,
        passage_share: float,
        response_only: bool,
        seed: int,
        num_steps: int,
    ) -> None:
        if passage_share > 0 and not windows:
            raise ValueError(
                "BatchPlan: windows must not be empty when passage_share is positive, "
                f"got passage_share {passage_share}. Give a T0 file or a share of 0."
            )
        self.first_step = 0
        self._examples = examples
        self._windows = windows
        self._pad_id = pad_id
        self._tokens_per_batch = tokens_per_batch
        self._passage_share = passage_share
        self._response_only = response_only
        self._seed = seed
        self._num_steps = num_steps
        self._lengths = [example.num_tokens for example in examples]
        self._window_lengths = [len(window) for window in windows]
        self._choice = random.Random(f"{seed} source")
        self._epochs = {"examples": 0, "windows": 0}
        self._pending: dict[str, list[list[int]]] = {"examples": [], "windows": []}
        self._plan: list[tuple[str, list[int]]] = []

    def __len__(self) -> int:
        return self._num_steps - self.first_step

    def _extend(self) -> None:
        source = "windows" if self._choice.random() < self._passage_share else "examples"
        if not self._pending[source]:
            generator = random.Random(f"{self._seed} {source} {self._epochs[source]}")
            lengths = self._window_lengths if source == "windows" else self._lengths
            self._pending[source] = group_by_length(lengths, self._tokens_per_batch, generator)
            self._epochs[source] += 1
        self._plan.append((source, self._pending[source].pop()))

    def __getitem__(self, item: int) -> Batch:
        step = self.first_step + item
        while len(self._plan) <= step:
            self._extend()
        source, indices = self._plan[step]
        if source == "examples":
            chosen = [self._examples[index] for index in indices]
            return pad_examples(chosen, self._pad_id, self._response_only)
        input_ids = torch.tensor([self._windows[index] for index in indices])
        return {"input_ids": input_ids, "labels": input_ids.clone()}
