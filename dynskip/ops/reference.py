"""The ops in plain PyTorch: the specification that every backend is compared with.

Written to be read, not to be fast. Sums, statistics and softmax run in float32, or in float64 for float64 inputs, and
every op is differentiable: what an op mutates is never needed again by the backward pass of the op before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.clone,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
ACTIVATIONS = tuple(ACTIVATION_FUNCTIONS)
"""The functions of feed-forward layers, in the order of their codes in kernels."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over values of `dtype` are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
) -> Tensor:
    """Returns the LayerNorm of the chosen rows of `x`, with `rms` their RMSNorm, packed: `[R, C]`, dtype of `x`.

    x: `[N, C]`. row_ids: `[R], int32`, or None for all rows. weight, bias: `[C]`, or None. The variance is the biased
    one. RMSNorm (arXiv 1910.07467) leaves the mean where it is.
    """
    rows = x if row_ids is None else x[row_ids.long()]
    rows = rows.to(accumulation_dtype(x.dtype))
    centered = rows if rms else rows - rows.mean(dim=-1, keepdim=True)
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


def rotated(x: Tensor, position_ids: Tensor, cos_sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Returns `x` with each head turned to its row's position (arXiv 2104.09864), dtype of `x`.

    x: `[R, H, D]`. position_ids: `[R], int64`. cos_sin: `[P, E], float32`, E even and at most D: E/2 cosines, then E/2
    sines, of each position. Value i of a head makes a pair with value i + E/2; values from E on stay as they are.
    weight: `[D]`: each head is replaced by its RMSNorm first, with `eps`; None leaves that out.
    """
    heads = x.to(accumulation_dtype(x.dtype))
    if weight is not None:
        heads = gather_layer_norm(heads, None, weight, None, eps, rms=True)
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[position_ids].to(heads.dtype)[:, None].chunk(2, dim=-1)
    one, other, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1).to(x.dtype)


def rotate(x: Tensor, position_ids: Tensor, cos_sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> None:
    """Replaces `x` by what `rotated` returns."""
    x.copy_(rotated(x, position_ids, cos_sin, weight, eps))


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """Returns `x` `[R, F]` through `activation`; with `gated`, x `[R, 2 * F]`, its first half so, times its second.

    activation: one of `ACTIVATIONS`. "gelu_tanh" is the approximation of arXiv 1606.08415 by tanh.
    """
    values = x.to(accumulation_dtype(x.dtype))
    values, factors = values.chunk(2, dim=-1) if gated else (values, None)
    values = ACTIVATION_FUNCTIONS[activation](values)
    return (values if factors is None else values * factors).to(x.dtype)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None, window: int, distances: Tensor | None
) -> Tensor:
    """One query over its keys. q: `[H, D]`. k, v: `[S, KV heads, D]`, S may be 0. Returns `[H, D]`, dtype of `q`.

    distances: `[S]`, how many positions each key stands before the query; needed for slopes `[H]` and a window.
    """
    accumulation = accumulation_dtype(q.dtype)
    if window:
        assert distances is not None, "a window is one of positions"
        k, v, distances = (tensor[distances < window] for tensor in (k, v, distances))
    group = q.shape[0] // k.shape[1]
    keys, values = (tensor.to(accumulation).repeat_interleave(group, dim=1) for tensor in (k, v))
    scores = torch.einsum("hd,shd->hs", q.to(accumulation), keys) * scale
    if slopes is not None:
        assert distances is not None, "a slope is one of positions"
        scores = scores - slopes.to(accumulation)[:, None] * distances.to(accumulation)
    return torch.einsum("hs,shd->hd", scores.softmax(dim=-1), values).to(q.dtype)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    slot_positions: Tensor | None = None,
) -> Tensor:
    """Returns the attention of one query a row over the cached tokens of its sequence: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`. k_cache, v_cache: `[num_slots, G, D]`, G key-value heads, a divisor of H: query head h reads head
    h // (H / G). slot_table: `[B, S_max], int32`. seq_ids, context_lens: `[R], int32`. Row r attends to the first
    `context_lens[r]` entries of `slot_table[seq_ids[r]]`; without any, its result is zero.

    Positions count from 0 in a sequence. position_ids: `[R], int64`, of the queries. slot_positions: `[num_slots],
    int32`, of the token in each slot. Both are needed by: slopes, `[H], float32`: the score of a key that stands n
    positions before the query is lessened by n * slope (ALiBi, arXiv 2108.12409); window, in tokens, 0 for none: keys
    that stand `window` positions or more before the query are left out.
    """
    rows = []
    for row, (sequence, length) in enumerate(zip(seq_ids.tolist(), context_lens.tolist(), strict=True)):
        slots = slot_table[sequence, :length].long()
        distances = None
        if slot_positions is not None and position_ids is not None:
            distances = position_ids[row] - slot_positions[slots]
        rows.append(_attend(q[row], k_cache[slots], v_cache[slots], scale, slopes, window, distances))
    return torch.stack(rows) if rows else q.new_empty(q.shape)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_limits: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """Returns the attention of packed queries over the packed keys of their own sequence: `[R, H, D]`, dtype of `q`.

    q: `[R, H, D]`. k, v: `[S, G, D]`, heads as in `decode_attention`. cu_seqlens_q, cu_seqlens_k: `[B + 1], int32`:
    where each sequence's queries and keys begin. key_limits: `[R], int32`: row r attends to the first `key_limits[r]`
    keys of its sequence; without any, its result is zero. slopes, window: as in `decode_attention`; position_ids:
    `[R], int64`, of the queries, and key_positions: `[S]`, an integer, of the keys, which are needed then.
    """
    limits = key_limits.tolist()
    query_starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = []
    for sequence in range(len(query_starts) - 1):
        first_key = key_starts[sequence]
        for row in range(query_starts[sequence], query_starts[sequence + 1]):
            keys = slice(first_key, first_key + limits[row])
            distances = None
            if key_positions is not None and position_ids is not None:
                distances = position_ids[row] - key_positions[keys]
            rows.append(_attend(q[row], k[keys], v[keys], scale, slopes, window, distances))
    return torch.stack(rows) if rows else q.new_empty(q.shape)
