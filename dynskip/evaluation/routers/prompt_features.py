"""What a router may know of a prompt before anything has run: its token embeddings and a few counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dynskip.evaluation.stats.intervals import Floats

OPENING_TOKENS = 4  # the words that follow the template's own: in Alpaca mostly the verb of the task


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share: those of the template, which tell nothing apart."""
    if not prompts:
        raise ValueError("common_prefix: prompts must hold at least one prompt, got none.")
    first, shortest = prompts[0], min(map(len, prompts))
    for place in range(shortest):
        if any(prompt[place] != first[place] for prompt in prompts):
            return place
    # Prompts that differ in nothing but their length: their last common token is as good an opening as any.
    return max(shortest - 1, 0)


def prompt_features(prompt_ids: Sequence[int], embeddings: Tensor, num_prefix: int = 0) -> Floats:
    """[2E + 4], float64: mean embedding of the prompt, of its opening words, and counts of its tokens.

    prompt_ids: the prompt's tokens. embeddings: [T, E], their embeddings without positions. num_prefix: tokens that
    belong to the template; the opening is what follows them.

    The counts are the number of tokens, its logarithm, the number of distinct tokens and their share.
    """
    num_tokens = len(prompt_ids)
    if embeddings.dim() != 2 or embeddings.shape[0] != num_tokens or not num_tokens:
        raise ValueError(
            f"prompt_features: embeddings must be [{num_tokens}, E] with at least one token, "
            f"got {list(embeddings.shape)}."
        )
    values = embeddings.detach().double().cpu().numpy()
    start = min(num_prefix, num_tokens - 1)
    num_distinct = len(set(prompt_ids))
    counts = [num_tokens, np.log(num_tokens), num_distinct, num_distinct / num_tokens]
    return np.concatenate([values.mean(0), values[start : start + OPENING_TOKENS].mean(0), counts])


def head_length(prompt_ids: Sequence[int], heads: Sequence[Sequence[int]]) -> int:
    """The length of the longest of ``heads``, what templates open with, that the prompt opens with; 0 for none."""
    return max((len(head) for head in heads if tuple(prompt_ids[: len(head)]) == tuple(head)), default=0)
