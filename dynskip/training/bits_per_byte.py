"""Bits per byte of responses given their prompts: a score that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dynskip.data.batches import IGNORED, group_in_order, pad_examples
from dynskip.data.examples import Example


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """A score and what it was taken over. The end token's bits are counted, it stands for no byte."""

    value: float
    num_rows: int
    num_bytes: int


@torch.no_grad()
def bits_per_byte(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    examples: Sequence[Example],
    pad_id: int,
    tokens_per_batch: int = 8192,
    on_rows: Callable[[int], None] = lambda num_rows: None,
) -> BitsPerByte:
    """Negative log2 likelihood of all responses given their prompts, divided by the bytes of the responses.

    ``logits_of`` maps ``input_ids`` [B, T], int64, padded on the right, to logits [B, T, V]; causality keeps the
    padding out of what is scored. Likelihoods are summed in float64.
    """
    if not examples:
        raise ValueError("bits_per_byte: examples must not be empty, got 0 rows. Check the data file and the cut.")
    total_nats = 0.0
    for indices in group_in_order([example.num_tokens for example in examples], tokens_per_batch):
        batch = pad_examples([examples[index] for index in indices], pad_id, response_only=True)
        logits = logits_of(batch["input_ids"])[:, :-1].float()
        labels = batch["labels"][:, 1:].to(logits.device)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total_nats += losses.double().sum().item()
        on_rows(len(indices))
    num_bytes = sum(example.num_bytes for example in examples)
    if not math.isfinite(total_nats):
        raise ValueError(f"bits_per_byte: logits must be finite, got a total of {total_nats}. Check the weights.")
    return BitsPerByte(total_nats / math.log(2) / num_bytes, len(examples), num_bytes)
