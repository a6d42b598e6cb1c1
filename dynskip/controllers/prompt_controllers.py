"""Learned controllers that decide once for each sequence, from a pooled prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynskip.controllers.learned import LearnedSequenceController, ModelSizes
from dynskip.controllers.token_controllers import margin_bias


class PooledPromptController(LearnedSequenceController):
    """One linear map from a pooled prompt to the logits of all layers; a subclass pools."""

    def __init__(self, sizes: ModelSizes, argument: str = "") -> None:
        super().__init__(sizes, argument)
        self.weight = nn.Parameter(torch.zeros(sizes.num_layers * 2, sizes.embedding_size))
        self.bias = margin_bias(sizes.num_layers)

    def pool(self, embeddings: Tensor) -> Tensor:
        """[E]: one vector for a prompt [T, E]."""
        raise NotImplementedError

    def logits(self, prompt_embeddings: Sequence[Tensor]) -> Tensor:
        """[B, L, 2]: a linear map of the pooled prompts, each divided by its root mean square."""
        pooled = torch.stack([self.pool(embeddings) for embeddings in prompt_embeddings])
        pooled = F.rms_norm(pooled, pooled.shape[-1:], eps=1e-6)
        return F.linear(pooled, self.weight).view(len(pooled), -1, 2) + self.bias


class WindowController(PooledPromptController):
    """``window:W``: the mean of the last W token embeddings of the prompt."""

    def __init__(self, sizes: ModelSizes, argument: str = "16") -> None:
        super().__init__(sizes, argument)
        if not argument.isdecimal() or int(argument) < 1:
            raise ValueError(
                f"WindowController: argument must be a number of tokens, got {argument!r}. Write window:16."
            )
        self.window = int(argument)

    def pool(self, embeddings: Tensor) -> Tensor:
        """[E]: the mean of the window."""
        return embeddings[-self.window :].mean(0)


class AttentionPoolController(PooledPromptController):
    """``attention-pool``: the mean of the prompt's token embeddings, weighted by one learned query."""

    def __init__(self, sizes: ModelSizes, argument: str = "") -> None:
        super().__init__(sizes, argument)
        self.refuse_argument()
        self.query = nn.Parameter(torch.randn(sizes.embedding_size) * 0.02)

    def pool(self, embeddings: Tensor) -> Tensor:
        """[E]: softmax pooling."""
        rows = F.rms_norm(embeddings, embeddings.shape[-1:], eps=1e-6)
        weights = torch.softmax(rows @ self.query, dim=0)
        return weights @ embeddings
