"""A small transformer that reads the token embeddings of a prompt and tells its kinds apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dynskip.evaluation.stats.intervals import Floats
from dynskip.evaluation.stats.knapsack import Integers

WIDTH = 64
NUM_HEADS = 4
MAX_TOKENS = 128  # of a prompt behind its template: what is asked stands in front
HELD_OUT = 0.15  # of the prompts to learn from; when their loss stops falling, training does
_BATCH_SIZE = 32
_MAX_EPOCHS = 30
_PATIENCE = 4
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.05
_DROPOUT = 0.2


class PromptTransformer(nn.Module):
    """Gives each prompt the probability of each of K classes, from its token embeddings [T, E].

    One pre-LayerNorm encoder layer over projected embeddings with sinusoidal positions, then the mean over tokens.
    Before it has learned anything it gives every prompt the frequencies of the classes.
    """

    def __init__(self, embedding_size: int, num_classes: int, width: int = WIDTH, num_heads: int = NUM_HEADS) -> None:
        super().__init__()
        # Embeddings of a language model are small numbers of a scale of their own.
        self.embedding_norm = nn.LayerNorm(embedding_size, elementwise_affine=False)
        self.project = nn.Linear(embedding_size, width)
        self.layer = nn.TransformerEncoderLayer(
            width, num_heads, 2 * width, _DROPOUT, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(_DROPOUT)
        self.head = nn.Linear(width, num_classes)
        self.positions = nn.Buffer(_sinusoids(MAX_TOKENS, width), persistent=False)

    def forward(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """[B, K], float32, logits of prompts padded to [B, T, E] with ``lengths`` [B]."""
        num_tokens = embeddings.shape[1]
        padding = torch.arange(num_tokens) >= lengths[:, None]
        states = self.project(self.embedding_norm(embeddings)) + self.positions[:num_tokens]
        states = self.norm(self.layer(states, src_key_padding_mask=padding))
        pooled = states.masked_fill(padding[..., None], 0.0).sum(1) / lengths[:, None]
        return self.head(self.dropout(pooled))

    @staticmethod
    def fit(prompts: Sequence[Tensor], labels: Integers, num_classes: int, seed: int = 0) -> PromptTransformer:
        """A network trained on ``prompts``, N times [T, E], and their classes ``labels`` [N], the same for one seed.

        The weights are those of the epoch with the smallest cross-entropy on prompts that were held out; when none
        improves on the frequencies of the classes, these are all that it gives.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            order = torch.randperm(len(prompts)).tolist()
            num_held_out = max(1, round(HELD_OUT * len(prompts)))
            held_out, kept = order[:num_held_out], order[num_held_out:]
            prompts, targets = [_cut(prompt) for prompt in prompts], torch.from_numpy(labels)
            network = PromptTransformer(prompts[0].shape[1], num_classes)
            counts = torch.bincount(targets[kept], minlength=num_classes) + 1.0
            with torch.no_grad():
                network.head.weight.zero_()
                network.head.bias.copy_((counts / counts.sum()).log())
            network._learn(prompts, targets, kept, held_out)
        return network.eval()

    def _learn(self, prompts: Sequence[Tensor], targets: Tensor, kept: list[int], held_out: list[int]) -> None:
        """Train on the prompts at ``kept`` until those at ``held_out`` gain nothing more; take the best weights."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        best_loss, best, since_best = self._loss(prompts, targets, held_out), copy.deepcopy(self.state_dict()), 0
        for _ in range(_MAX_EPOCHS):
            self.train()
            shuffled = [kept[place] for place in torch.randperm(len(kept)).tolist()]
            for batch in _batches(shuffled, prompts):
                optimizer.zero_grad(set_to_none=True)
                logits = self(*_padded([prompts[index] for index in batch]))
                torch.autograd.backward(nn.functional.cross_entropy(logits, targets[batch]))
                optimizer.step()
            loss = self._loss(prompts, targets, held_out)
            since_best += 1
            if loss < best_loss:
                best_loss, best, since_best = loss, copy.deepcopy(self.state_dict()), 0
            if since_best == _PATIENCE:
                break
        self.load_state_dict(best)

    def probabilities(self, prompts: Sequence[Tensor]) -> Floats:
        """[N, K], float64: the probability of each class for each of ``prompts``, N times [T, E]."""
        prompts = [_cut(prompt) for prompt in prompts]
        logits = torch.empty(len(prompts), self.head.out_features)
        with torch.no_grad():
            for batch in _batches(range(len(prompts)), prompts):
                logits[batch] = self(*_padded([prompts[index] for index in batch]))
        return logits.double().softmax(1).numpy()

    def _loss(self, prompts: Sequence[Tensor], targets: Tensor, indices: list[int]) -> float:
        """The mean cross-entropy of the prompts at ``indices``, in nats."""
        self.eval()
        chosen = self.probabilities([prompts[index] for index in indices])[np.arange(len(indices)), targets[indices]]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def _cut(prompt: Tensor) -> Tensor:
    return prompt[:MAX_TOKENS].detach().float().cpu()


def _padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, T, E], float32, zeros behind each prompt, and their lengths [B], int64."""
    return nn.utils.rnn.pad_sequence(list(prompts), batch_first=True), torch.tensor([len(row) for row in prompts])


def _batches(order: Sequence[int], prompts: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places in ``order`` in batches, those of like length together within a few batches' worth of neighbours."""
    pool = 8 * _BATCH_SIZE
    for first in range(0, len(order), pool):
        near = sorted(order[first : first + pool], key=lambda index: len(prompts[index]))
        yield from (near[start : start + _BATCH_SIZE] for start in range(0, len(near), _BATCH_SIZE))


def _sinusoids(num_positions: int, width: int) -> Tensor:
    """[T, W]: sines and cosines of geometric frequencies (arXiv 1706.03762, section 3.5)."""
    angles = torch.arange(num_positions)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
