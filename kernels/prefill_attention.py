"""Attention of packed queries over the packed keys of their own sequence, each query with a limit of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.attend_tokens import LOG2_E, NO_SCORE
from dynskip.kernels.configs import get_config
from dynskip.kernels.launches import launch, next_power_of_2

# The sequences that a program looks at side by side, in search of its own: up to so many, one kernel. A loop over fewer
# at a time would spill on sm_80 or sm_100.
_BLOCK_B = 512


@triton.jit(
    do_not_specialize=["num_sequences", "window"],
    do_not_specialize_on_alignment=[
        "cu_seqlens_q_ptr",
        "cu_seqlens_k_ptr",
        "key_limits_ptr",
        "position_ids_ptr",
        "key_positions_ptr",
    ],
)
def prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_limits_ptr,
    slopes_ptr,
    position_ids_ptr,
    key_positions_ptr,
    out_ptr,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    num_sequences,
    scale,
    window,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program for each head and tile of BLOCK_M queries of one sequence.

    A sequence of T queries starting at packed row c owns the tiles from c // BLOCK_M + its index on: one tile more than
    it may need, which ends at once. So the grid needs no lengths on the host, and tiles never straddle sequences.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sequences = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_seqlens_q_ptr + sequences, mask=sequences < num_sequences, other=0)
    owned_from = starts // BLOCK_M + sequences
    sequence = tl.sum(((owned_from <= tile) & (sequences < num_sequences)).to(tl.int32), axis=0) - 1
    first_row = tl.load(cu_seqlens_q_ptr + sequence)
    end_row = tl.load(cu_seqlens_q_ptr + sequence + 1)
    first_row_of_tile = first_row + (tile - first_row // BLOCK_M - sequence) * BLOCK_M
    if first_row_of_tile >= end_row:
        return
    first_key = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)

    rows = first_row_of_tile + tl.arange(0, BLOCK_M)
    in_rows = rows < end_row
    limits = tl.load(key_limits_ptr + rows, mask=in_rows, other=0)
    rows = rows.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_SIZE
    head_offset = head * HEAD_SIZE + dims
    q_mask = in_rows[:, None] & in_head[None, :]
    q = tl.load(q_ptr + rows[:, None] * stride_q_row + head_offset[None, :], mask=q_mask, other=0.0)

    maxima = tl.full([BLOCK_M], NO_SCORE, tl.float32)
    totals = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    num_keys = tl.max(limits, axis=0)
    # Blocks of keys that every row of the tile sees need no mask; the blocks are the same, whichever loop they fall in.
    num_seen_by_all = tl.min(tl.where(in_rows, limits, num_keys), axis=0) // BLOCK_N * BLOCK_N
    kv_head = head // GROUP
    k_ptr += first_key * stride_k_row + kv_head * HEAD_SIZE
    v_ptr += first_key * stride_v_row + kv_head * HEAD_SIZE
    slope = 0.0
    positions = limits
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head) * LOG2_E
    if slopes_ptr is not None or HAS_WINDOW:
        positions = tl.load(position_ids_ptr + rows, mask=in_rows, other=0).to(tl.int32)
        key_positions_ptr += first_key
    for half in tl.static_range(2):
        maxima, totals, attended = attend_keys(
            *(q, k_ptr, v_ptr, stride_k_row, stride_v_row, limits, positions, key_positions_ptr, slope, window),
            num_seen_by_all if half else 0,
            num_keys if half else num_seen_by_all,
            *(scale * LOG2_E, maxima, totals, attended),
            *(HEAD_SIZE, slopes_ptr is not None, HAS_WINDOW, BLOCK_N, BLOCK_D),
            HAS_LIMITS=half == 1,
        )

    out = attended / tl.where(totals > 0.0, totals, 1.0)[:, None]
    out_offsets = rows[:, None] * (tl.num_programs(1) * HEAD_SIZE) + head_offset[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def attend_keys(
    q,
    k_ptr,
    v_ptr,
    stride_k_row,
    stride_v_row,
    limits,
    positions,
    key_positions_ptr,
    slope,
    window,
    start,
    end,
    scale,
    maxima,
    totals,
    attended,
    HEAD_SIZE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
):
    """The softmaxes of a tile of queries, taken on over the keys start to end - 1, each row's up to its limit.

    positions: of the rows, which a slope and a window need.
    """
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_SIZE
    for first in range(start, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        k_mask = in_head[:, None]
        v_mask = in_head[None, :]
        if HAS_LIMITS:
            k_mask = k_mask & (places < end)[None, :]
            v_mask = v_mask & (places < end)[:, None]
        keys = places.to(tl.int64)
        k = tl.load(k_ptr + keys[None, :] * stride_k_row + dims[:, None], mask=k_mask, other=0.0)
        products = tl.dot(q, k, input_precision="ieee")
        if HAS_LIMITS:
            products = tl.where(places[None, :] < limits[:, None], products, float("-inf"))
        if HAS_SLOPES or HAS_WINDOW:
            key_positions = tl.load(key_positions_ptr + keys, mask=places < end, other=0).to(tl.int32)
            distances = positions[:, None] - key_positions[None, :]
            if HAS_WINDOW:
                products = tl.where(distances < window, products, float("-inf"))
        if HAS_SLOPES:
            scores = products * scale - slope * distances.to(tl.float32)
            new_maxima = tl.maximum(maxima, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_maxima[:, None])
        else:
            new_maxima = tl.maximum(maxima, tl.max(products, axis=1) * scale)
            weights = tl.exp2(tl.fma(products, scale, -new_maxima[:, None]))
        rescale = tl.exp2(maxima - new_maxima)
        v = tl.load(v_ptr + keys[:, None] * stride_v_row + dims[None, :], mask=v_mask, other=0.0)
        totals = totals * rescale + tl.sum(weights, axis=1)
        attended = attended * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maxima = new_maxima
    return maxima, totals, attended


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
    """Returns the attention of packed queries over their keys: `[R, H, D]`. See `reference.prefill_attention`.

    Softmax and sums are float32, and float32 products are not rounded to TF32. Cost: 4 * H * D FLOPs a query and key.
    """
    num_rows, num_heads, head_size = q.shape
    num_sequences = cu_seqlens_q.shape[0] - 1
    out = torch.empty((num_rows, num_heads, head_size), dtype=q.dtype, device=q.device)
    if scale < 0:
        q, scale = -q, -scale
    # One config for any number of rows: a sequence does not depend on the others.
    config = get_config("prefill_attention", q.device, q.dtype, max(num_rows, 1), deterministic=True)
    block_m = config["BLOCK_M"]
    block_d = max(next_power_of_2(head_size), 16)
    launch(
        "prefill_attention",
        prefill_attention_kernel,
        (num_rows // block_m + num_sequences if num_rows else 0, num_heads),
        (q, k, v, cu_seqlens_q, cu_seqlens_k, key_limits, slopes, position_ids, key_positions, out),
        # Keys beyond a limit have the product minus infinity, whose score must not become NaN.
        (q.stride(0), k.stride(0), v.stride(0), num_sequences, max(scale, 1e-30), window),
        GROUP=num_heads // k.shape[1],
        HEAD_SIZE=head_size,
        HAS_WINDOW=window > 0,
        BLOCK_M=block_m,
        # BLOCK_N is for heads of at most 64: wider ones take as many keys fewer, in as many registers.
        BLOCK_N=max(config["BLOCK_N"] * 64 // max(block_d, 64), 16),
        BLOCK_D=block_d,
        BLOCK_B=max(_BLOCK_B, next_power_of_2(num_sequences)),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return out
