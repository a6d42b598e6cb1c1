"""Gumbel-Softmax over skip and run: differentiable while training, sampled or argmax when a model runs."""

from __future__ import annotations

import torch
from torch import Tensor

SKIP, RUN = 0, 1


def gumbel_noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 of ``shape``: independent draws of the standard Gumbel distribution, from torch's own generator."""
    uniform = torch.rand(shape, device=device).clamp_min(torch.finfo(torch.float32).tiny)
    # log(1 - u) would be -inf for the largest u that rand gives in some dtypes; -log(-log(u)) is finite for u < 1.
    return -torch.log(-torch.log(uniform))


def gumbel_gate(logits: Tensor, temperature: float, hard: bool, noise: Tensor | None = None) -> Tensor:
    """The gate, [...], float32 in 0..1: the share of "run" in the Gumbel-Softmax of ``logits`` [..., 2].

    Index 0 of the logits is skip, index 1 is run. hard: the gate is 0 or 1 (a tie runs) and its gradient that of the
    soft gate, straight through. noise: Gumbel noise like ``logits``; None leaves it out, and hard is then argmax.
    """
    noisy = logits.float() if noise is None else logits.float() + noise
    soft = torch.sigmoid((noisy[..., RUN] - noisy[..., SKIP]) / temperature)
    if not hard:
        return soft
    chosen = (noisy[..., RUN] >= noisy[..., SKIP]).to(soft)
    # The bracket is exactly zero, so a hard gate is exactly 0 or 1.
    return chosen + (soft - soft.detach())


def keyed_noise(seed: int, sequence_keys: Tensor | None, layer: int, position_ids: Tensor) -> Tensor:
    """[N], float32: logistic noise, the difference of two Gumbel draws, as a function of its arguments alone.

    sequence_keys: [N], int64, what tells sequences apart; None where nothing does, and rows at one position of two
    sequences share their noise. A row's noise knows its sequence, layer and position, never its neighbours, so that a
    sampled decision is the same in any batch.
    """
    mixed: Tensor | int = ((layer + 1) * 0x85EBCA77 + (seed + 1) * 0xC2B2AE3D) & 0xFFFFFFFF
    if sequence_keys is not None:
        mixed = _hashed(sequence_keys.to(torch.int64) * 0x165667B1 + mixed)
    key = _hashed(position_ids.to(torch.int64) * 0x9E3779B1 + mixed)
    uniform = ((key >> 8).double() + 0.5) / 2**24
    return torch.log(uniform / (1 - uniform)).float()


def _hashed(key: Tensor) -> Tensor:
    """[N], int64: 32 bits that depend on all of those of ``key``, by rounds of multiply and shift."""
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15), (0x9E3779B1, 16)):
        key = key & 0xFFFFFFFF
        key = ((key ^ (key >> shift)) * multiplier) & 0xFFFFFFFF
    return key ^ (key >> 16)
