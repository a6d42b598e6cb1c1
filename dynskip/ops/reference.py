"""The five ops in plain PyTorch: the specification that every backend is compared with.

Written to be read, not to be fast. Sums, statistics and softmax run in float32, or in float64 for float64 inputs, and
every op is differentiable: what an op mutates is never needed again by the backward pass of the op before it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over values of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Returns the LayerNorm of the chosen rows of `x`, packed: `[R, C]`, dtype of `x`.

    x: `[N, C]`. row_ids: `[R], int32`, or None for all rows. weight, bias: `[C]`, or None. The variance is the biased
    one.
    """
    rows = x if row_ids is None else x[row_ids.long()]
    rows = rows.to(accumulation_dtype(x.dtype))
    centered = rows - rows.mean(dim=-1, keepdim=True)
    variance = (centered * centered).mean(dim=-1, keepdim=True)
    normed = centered / torch.sqrt(variance + eps)
    if weight is not None:
        normed = normed * weight.to(normed.dtype)
    if bias is not None:
        normed = normed + bias.to(normed.dtype)
    return normed.to(x.dtype)


def scatter_add(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    """Adds row r of `y` to row `row_ids[r]` of `x`, in place.

    x: `[N, C]`, mutated. row_ids: `[R], int32`, distinct, or None for all rows. y: `[R, C]`. One rounding, after the
    sum.
    """
    accumulation = accumulation_dtype(x.dtype)
    if row_ids is None:
        x.copy_((x.to(accumulation) + y.to(accumulation)).to(x.dtype))
        return
    index = row_ids.long()
    x[index] = (x[index].to(accumulation) + y.to(accumulation)).to(x.dtype)


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row r of `k` and `v` to slot `slot_mapping[r]` of the caches, in place; a slot of -1 stores nothing.

    k, v: `[R, H, D]`. k_cache, v_cache: `[num_slots, H, D]`, mutated. slot_mapping: `[R], int32`, distinct where not
    -1.
    """
    stored = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[stored].long()
    k_cache[slots] = k[stored]
    v_cache[slots] = v[stored]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query over its keys. q: `[H, D]`. k, v: `[S, H, D]`, S may be 0. Returns `[H, D]`, dtype of `q`."""
    accumulation = accumulation_dtype(q.dtype)
    scores = torch.einsum("hd,shd->hs", q.to(accumulation), k.to(accumulation)) * scale
    return torch.einsum("hs,shd->hd", scores.softmax(dim=-1), v.to(accumulation)).to(q.dtype)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot_table: Tensor, seq_ids: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Returns the attention of one query a row over the cached tokens of its sequence: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`. k_cache, v_cache: `[num_slots, H, D]`. slot_table: `[B, S_max], int32`. seq_ids, context_lens: `[R],
    int32`. Row r attends to the first `context_lens[r]` entries of `slot_table[seq_ids[r]]`; without any, its result is
    zero.
    """
    rows = []
    for row, (sequence, length) in enumerate(zip(seq_ids.tolist(), context_lens.tolist(), strict=True)):
        slots = slot_table[sequence, :length].long()
        rows.append(_attend(q[row], k_cache[slots], v_cache[slots], scale))
    return torch.stack(rows) if rows else q.new_empty(q.shape)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_limits: Tensor, scale: float
) -> Tensor:
    """Returns the attention of packed queries over the packed keys of their own sequence: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`. k, v: `[S, H, D]`. cu_seqlens_q, cu_seqlens_k: `[B + 1], int32`: where each sequence's queries and
    keys begin. key_limits: `[R], int32`: row r attends to the first `key_limits[r]` keys of its sequence; without any,
    its result is zero.
    """
    limits = key_limits.tolist()
    query_starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = []
    for sequence in range(len(query_starts) - 1):
        first_key = key_starts[sequence]
        for row in range(query_starts[sequence], query_starts[sequence + 1]):
            keys = slice(first_key, first_key + limits[row])
            rows.append(_attend(q[row], k[keys], v[keys], scale))
    return torch.stack(rows) if rows else q.new_empty(q.shape)
