"""Heads turned to the positions of their rows, in place: of listed rows and their cache slots, and of packed rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import cdiv, launch, next_power_of_2
from dynskip.kernels.row_list import RowList

# The values that a program turns: heads are taken together up to as many.
_BLOCK_C = 1024


@triton.jit(do_not_specialize_on_alignment=["ids_ptr", "slots_ptr", "position_ids_ptr"])
def rotate_rows_kernel(
    q_ptr,
    ids_ptr,
    k_cache_ptr,
    slots_ptr,
    position_ids_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    stride_q_row,
    stride_angles,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program for each listed row and BLOCK_H of its heads: first those of its query, then those of its key."""
    num_query_blocks: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    block = tl.program_id(1)
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    angles_ptr = cos_sin_ptr + tl.load(position_ids_ptr + row) * stride_angles
    if block < num_query_blocks:
        rotate_heads(
            *(q_ptr + row * stride_q_row, block * BLOCK_H, angles_ptr, q_weight_ptr, eps),
            *(NUM_HEADS, HEAD_SIZE, ROTARY_SIZE, BLOCK_H, BLOCK_E, BLOCK_D),
        )
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        if slot >= 0:
            key_ptr = k_cache_ptr + slot * (NUM_KV_HEADS * HEAD_SIZE)
            rotate_heads(
                *(key_ptr, (block - num_query_blocks) * BLOCK_H, angles_ptr, k_weight_ptr, eps),
                *(NUM_KV_HEADS, HEAD_SIZE, ROTARY_SIZE, BLOCK_H, BLOCK_E, BLOCK_D),
            )


@triton.jit(do_not_specialize_on_alignment=["position_ids_ptr"])
def rotate_kernel(
    x_ptr,
    position_ids_ptr,
    cos_sin_ptr,
    weight_ptr,
    stride_x_row,
    stride_angles,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for each row and BLOCK_H of its heads."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, first_head = x_ptr + row * stride_x_row, tl.program_id(1) * BLOCK_H
    angles_ptr = cos_sin_ptr + tl.load(position_ids_ptr + row) * stride_angles
    rotate_heads(
        *(row_ptr, first_head, angles_ptr, weight_ptr, eps),
        *(NUM_HEADS, HEAD_SIZE, ROTARY_SIZE, BLOCK_H, BLOCK_E, BLOCK_D),
    )


@triton.jit
def rotate_heads(
    row_ptr,
    first_head,
    angles_ptr,
    weight_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROTARY_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turns BLOCK_H heads of a row of NUM_HEADS, in place: see `reference.rotated`.

    BLOCK_E: for the ROTARY_SIZE // 2 pairs of a head. BLOCK_D: for its other values; 0 where there are none.
    """
    half: tl.constexpr = ROTARY_SIZE // 2
    heads = first_head + tl.arange(0, BLOCK_H)
    is_head = (heads < NUM_HEADS)[:, None]
    heads_ptrs = row_ptr + heads[:, None] * HEAD_SIZE
    pairs = tl.arange(0, BLOCK_E)
    is_pair = pairs < half
    mask = is_head & is_pair[None, :]
    one_ptrs = heads_ptrs + pairs[None, :]
    one = tl.load(one_ptrs, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(one_ptrs + half, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(angles_ptr + pairs, mask=is_pair, other=0.0)[None, :]
    sin = tl.load(angles_ptr + half + pairs, mask=is_pair, other=0.0)[None, :]
    if weight_ptr is not None:
        squares = tl.sum(one * one + other * other, axis=1)
        if BLOCK_D:
            places = ROTARY_SIZE + tl.arange(0, BLOCK_D)
            in_head = places < HEAD_SIZE
            rest_ptrs = heads_ptrs + places[None, :]
            rest = tl.load(rest_ptrs, mask=is_head & in_head[None, :], other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=1)
        deviation = tl.sqrt(squares / HEAD_SIZE + eps)[:, None]
        one = one / deviation * tl.load(weight_ptr + pairs, mask=is_pair, other=0.0).to(tl.float32)[None, :]
        other = other / deviation * tl.load(weight_ptr + half + pairs, mask=is_pair, other=0.0).to(tl.float32)[None, :]
    # No warp may store what another one, which holds the same values in a layout with room to spare, has yet to read.
    tl.debug_barrier()
    dtype = row_ptr.dtype.element_ty
    tl.store(one_ptrs, (one * cos - other * sin).to(dtype), mask=mask)
    tl.store(one_ptrs + half, (other * cos + one * sin).to(dtype), mask=mask)
    if weight_ptr is not None and BLOCK_D:
        weight = tl.load(weight_ptr + places, mask=in_head, other=0.0).to(tl.float32)
        tl.store(rest_ptrs, (rest / deviation * weight[None, :]).to(dtype), mask=is_head & in_head[None, :])


def rotate_rows(
    q: Tensor,
    rows: RowList,
    k_cache: Tensor,
    slots: Tensor,
    position_ids: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turns `q[row]`, and the key in slot `slots[row]`, to the row's position. See `row_reference.rotate_rows`.

    Norms and products are float32, rounded once. Cost: reads and writes (H + G) * D values a row; of heads that are not
    normalised only the E that turn.
    """
    num_kv_heads, head_size = k_cache.shape[1:]
    num_heads = q.shape[1] // head_size
    config = get_config("rotate_rows", q.device, q.dtype, rows.max_rows)
    tiles = _tiles(max(num_heads, num_kv_heads), head_size, cos_sin.shape[1])
    block = tiles["BLOCK_H"]
    launch(
        "rotate_rows",
        rotate_rows_kernel,
        (rows.max_rows, cdiv(num_heads, block) + cdiv(num_kv_heads, block)),
        (q, rows.ids, k_cache, slots, position_ids, cos_sin, q_weight, k_weight),
        (q.stride(0), cos_sin.stride(0), eps),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        ROTARY_SIZE=cos_sin.shape[1],
        **tiles,
        num_warps=config["num_warps"],
        **pdl_options(config, q.device),
    )


def rotate(x: Tensor, position_ids: Tensor, cos_sin: Tensor, weight: Tensor | None = None, eps: float = 0.0) -> None:
    """Turns the heads of each row of `x` to its position, in place. See `reference.rotate`.

    Norms and products are float32, rounded once. Cost: reads and writes R * H * D values; of heads that are not
    normalised only the E that turn.
    """
    num_rows, num_heads, head_size = x.shape
    tiles = _tiles(num_heads, head_size, cos_sin.shape[1])
    launch(
        "rotate",
        rotate_kernel,
        (num_rows, cdiv(num_heads, tiles["BLOCK_H"])),
        (x, position_ids, cos_sin, weight),
        (x.stride(0), cos_sin.stride(0), eps),
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        ROTARY_SIZE=cos_sin.shape[1],
        **tiles,
        num_warps=4,
    )


def _tiles(num_heads: int, head_size: int, rotary_size: int) -> dict[str, int]:
    most = max(_BLOCK_C // next_power_of_2(head_size), 1)
    num_others = head_size - rotary_size
    return {
        "BLOCK_H": min(most, next_power_of_2(num_heads)),
        "BLOCK_E": next_power_of_2(rotary_size // 2),
        "BLOCK_D": next_power_of_2(num_others) if num_others else 0,
    }
