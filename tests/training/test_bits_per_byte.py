"""Bits per byte: known values, and nothing but the responses counts."""

from __future__ import annotations

import math

import pytest
import torch

from dynskip.data.examples import Example
from dynskip.training.bits_per_byte import bits_per_byte

VOCAB_SIZE = 16
EXAMPLES = [
    Example((1, 2, 3), (4, 5, 1), 7),
    Example((1,), (6, 7, 8, 9, 1), 11),
    Example((1, 3, 3, 3, 3, 3), (2, 1), 2),
]


def uniform_logits(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*input_ids.shape, VOCAB_SIZE)


def bigram_logits(input_ids: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    table = 3 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator)
    return table[input_ids]


def test_uniform_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    score = bits_per_byte(uniform_logits, EXAMPLES, pad_id=0)
    num_response_tokens, num_bytes = 3 + 5 + 2, 7 + 11 + 2
    assert score.value == pytest.approx(num_response_tokens * math.log2(VOCAB_SIZE) / num_bytes)
    assert (score.num_rows, score.num_bytes) == (3, num_bytes)


def test_value_equals_the_sum_over_response_tokens() -> None:
    total_bits = 0.0
    for example in EXAMPLES:
        ids = torch.tensor(example.prompt_ids + example.response_ids)
        log_probs = bigram_logits(ids).double().log_softmax(-1)
        for position in range(len(example.prompt_ids), len(ids)):
            total_bits -= log_probs[position - 1, ids[position]].item() / math.log(2)
    score = bits_per_byte(bigram_logits, EXAMPLES, pad_id=0)
    assert score.value == pytest.approx(total_bits / 20, rel=1e-6)


@pytest.mark.parametrize("tokens_per_batch", [1, 16, 1000])
@pytest.mark.parametrize("pad_id", [0, 15])
def test_batching_order_and_padding_change_nothing(tokens_per_batch: int, pad_id: int) -> None:
    seen: list[int] = []
    score = bits_per_byte(bigram_logits, EXAMPLES[::-1], pad_id, tokens_per_batch, on_rows=seen.append)
    assert score.value == pytest.approx(bits_per_byte(bigram_logits, EXAMPLES, pad_id=0).value, rel=1e-6)
    assert sum(seen) == len(EXAMPLES)


def test_no_rows_and_no_numbers_are_errors() -> None:
    with pytest.raises(ValueError, match=r"bits_per_byte: examples must not be empty, got 0 rows"):
        bits_per_byte(uniform_logits, [], pad_id=0)
    with pytest.raises(ValueError, match=r"bits_per_byte: logits must be finite, got a total of nan"):
        bits_per_byte(lambda ids: uniform_logits(ids) * math.nan, EXAMPLES, pad_id=0)
