"""Attention of packed queries over the packed keys of their own sequence, each query with a limit of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.launches import launch


@triton.jit
def prefill_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    key_limits_ptr,
    out_ptr,
    stride_q_row,
    stride_k_row,
    stride_v_row,
    num_sequences,
    scale,
    HEAD_SIZE: tl.constexpr,
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

    maxima = tl.full([BLOCK_M], float("-inf"), tl.float32)
    totals = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    num_keys = tl.max(limits, axis=0)
    for start in range(0, num_keys, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        keys = first_key + positions
        in_keys = positions < num_keys
        k_offsets = keys[None, :] * stride_k_row + head_offset[:, None]
        k = tl.load(k_ptr + k_offsets, mask=in_keys[None, :] & in_head[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(positions[None, :] < limits[:, None], scores, float("-inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, axis=1))
        # A row that has seen no key yet has the maximum -inf: subtract 0 from its scores, so that their weights are 0.
        subtrahends = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
        rescale = tl.exp(maxima - subtrahends)
        weights = tl.exp(scores - subtrahends[:, None])
        v_offsets = keys[:, None] * stride_v_row + head_offset[None, :]
        v = tl.load(v_ptr + v_offsets, mask=in_keys[:, None] & in_head[None, :], other=0.0)
        totals = totals * rescale + tl.sum(weights, axis=1)
        attended = attended * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maxima = new_maxima

    out = attended / tl.where(limits > 0, totals, 1.0)[:, None]
    out_offsets = rows[:, None] * (tl.num_programs(1) * HEAD_SIZE) + head_offset[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=q_mask)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_limits: Tensor, scale: float
) -> Tensor:
    """Returns the attention of packed queries over their keys: `[R, H, D]`. See `reference.prefill_attention`.

    Softmax and sums are float32, and float32 products are not rounded to TF32. Cost: 4 * H * D FLOPs a query and key.
    """
    num_rows, num_heads, head_size = q.shape
    num_sequences = cu_seqlens_q.shape[0] - 1
    out = torch.empty((num_rows, num_heads, head_size), dtype=q.dtype, device=q.device)
    block_d = max(triton.next_power_of_2(head_size), 16)
    if q.dtype == torch.float32:
        # Exact float32 products run on the ordinary units, with operands in registers: small tiles, more warps.
        block_m, block_n, num_warps = 32, 32, 8
    else:
        # Heads wider than 64 would spill with 64 keys at a time.
        block_m, block_n, num_warps = 64, 64 if block_d <= 64 else 32, 4
    num_tiles = num_rows // block_m + num_sequences if num_rows else 0
    launch(
        "prefill_attention",
        prefill_attention_kernel,
        (num_tiles, num_heads),
        q.device,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        key_limits,
        out,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        num_sequences,
        scale,
        HEAD_SIZE=head_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_B=triton.next_power_of_2(max(num_sequences, 1)),
        num_warps=num_warps,
        num_stages=2,
    )
    return out
