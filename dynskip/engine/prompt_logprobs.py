"""Log-probabilities of a prompt's own tokens, from the states of its rows, a bounded number of logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynskip.engine.request import Span

# Logits that are in memory at once, beside their log-probabilities: 64 MB of float32 each.
MOST_LOGITS = 2**24


def add_prompt_logprobs(span: Span, states: Tensor, head: Callable[[Tensor], Tensor], vocab_size: int) -> None:
    """Give the sequence of ``span`` what it lacks of its prompt's log-probabilities and ``states`` tell.

    states: [T, C], the last layer's output for the rows of ``span``. head: makes logits of such rows.
    """
    sequence, first, count = span
    known, num_top = sequence.prompt_logprobs, sequence.params.prompt_logprobs
    assert known is not None and num_top is not None, "asked for"
    # A row tells of the token behind it; that of the last row of a prompt is the output's.
    begin, end = len(known) - 1, min(first + count, len(sequence.prompt_ids) - 1)
    num_rows = max(MOST_LOGITS // vocab_size, 1)
    for row in range(begin, end, num_rows):
        rows = slice(row - first, min(row + num_rows, end) - first)
        tokens = sequence.prompt_ids[row + 1 : rows.stop + first + 1]
        known += top_logprobs(head(states[rows]), tokens, num_top)


def top_logprobs(logits: Tensor, tokens: list[int], num_top: int) -> list[dict[int, float]]:
    """For each row of ``logits`` [R, V] the log-probability of its token, and those of the ``num_top`` most likely."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, best = logprobs.topk(min(num_top, logprobs.shape[1]))
    rows = zip(tokens, own, best.tolist(), values.tolist(), strict=True)
    return [{token: value, **dict(zip(*top, strict=True))} for token, value, *top in rows]
