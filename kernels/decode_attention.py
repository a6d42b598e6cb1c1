"""Attention of one query a row over cached tokens, each found through a table of slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.launches import launch


@triton.jit
def decode_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_table_ptr,
    seq_ids_ptr,
    context_lens_ptr,
    out_ptr,
    stride_q_row,
    stride_table_row,
    stride_slot,
    scale,
    HEAD_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for each row and head. Its context goes by in blocks of fixed size: no other row can change a bit."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    table_row = slot_table_ptr + tl.load(seq_ids_ptr + row).to(tl.int64) * stride_table_row
    context_len = tl.load(context_lens_ptr + row)

    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_SIZE
    head_offset = head * HEAD_SIZE + dims
    q = tl.load(q_ptr + row * stride_q_row + head_offset, mask=in_head, other=0.0).to(tl.float32) * scale

    maximum = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    attended = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, context_len, BLOCK_S):
        positions = start + tl.arange(0, BLOCK_S)
        in_context = positions < context_len
        slots = tl.load(table_row + positions, mask=in_context, other=0).to(tl.int64)
        offsets = slots[:, None] * stride_slot + head_offset[None, :]
        loaded = in_context[:, None] & in_head[None, :]
        # One query a head: a matrix product would waste 15 of its 16 rows, so multiply and sum.
        k = tl.load(k_cache_ptr + offsets, mask=loaded, other=0.0).to(tl.float32)
        scores = tl.where(in_context, tl.sum(q[None, :] * k, axis=1), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=0))
        rescale = tl.exp(maximum - new_maximum)
        weights = tl.exp(scores - new_maximum)
        v = tl.load(v_cache_ptr + offsets, mask=loaded, other=0.0).to(tl.float32)
        total = total * rescale + tl.sum(weights, axis=0)
        attended = attended * rescale + tl.sum(weights[:, None] * v, axis=0)
        maximum = new_maximum

    # Without context the total is zero and so is the result.
    out = attended / tl.where(context_len > 0, total, 1.0)
    out_row = out_ptr + row * tl.num_programs(1) * HEAD_SIZE
    tl.store(out_row + head_offset, out.to(out_ptr.dtype.element_ty), mask=in_head)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Returns the attention of each row over its cached tokens: `[R, H, D]`. See `reference.decode_attention`.

    Softmax and sums are float32. Cost: reads 2 * H * D values and 4 FLOPs for each of them, for each attended token.
    """
    num_rows, num_heads, head_size = q.shape
    out = torch.empty((num_rows, num_heads, head_size), dtype=q.dtype, device=q.device)
    block_d = triton.next_power_of_2(head_size)
    launch(
        "decode_attention",
        decode_attention_kernel,
        (num_rows, num_heads),
        q.device,
        q,
        k_cache,
        v_cache,
        slot_table,
        seq_ids,
        context_lens,
        out,
        q.stride(0),
        slot_table.stride(0),
        num_heads * head_size,
        scale,
        HEAD_SIZE=head_size,
        BLOCK_S=64 if block_d <= 64 else 32,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out
