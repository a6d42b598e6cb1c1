"""Attention of one query a row over cached tokens, its context split among programs as the device sees fit."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.attend_tokens import NO_SCORE, attend_tokens, attend_tokens_of_group, join_softmaxes
from dynskip.kernels.configs import Config, get_config, pdl_options
from dynskip.kernels.context_splits import LEAST_DOT, Splits, find_item, find_item_of_fixed_size, plan_splits
from dynskip.kernels.launches import launch, next_power_of_2
from dynskip.kernels.row_list import RowList, Workspace


class Bias(NamedTuple):
    """What the scores of `attend_rows` know of positions: see `reference.decode_attention`."""

    slopes: Tensor | None = None
    window: int = 0
    position_ids: Tensor | None = None
    slot_positions: Tensor | None = None


@triton.jit(
    do_not_specialize=["max_rows", "stride_table_row", "window"],
    do_not_specialize_on_alignment=[
        "ids_ptr",
        "slot_table_ptr",
        "seq_ids_ptr",
        "key_limits_ptr",
        "position_ids_ptr",
        "slot_positions_ptr",
    ],
)
def attend_rows_kernel(
    q_ptr,
    ids_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_table_ptr,
    seq_ids_ptr,
    key_limits_ptr,
    slopes_ptr,
    position_ids_ptr,
    slot_positions_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    stride_q_row,
    stride_table_row,
    stride_out_row,
    max_rows,
    scale,
    window,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    TARGET_ITEMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program for BLOCK_H heads and one item: some consecutive cached tokens of one row.

    Each of NUM_HEADS heads of keys and values serves GROUP heads of queries. GROUP > 1: the program's heads are those
    that share one of keys and values, padded to BLOCK_H, and to BLOCK_Q for matrix units.
    A row that is one item is done with it; otherwise whichever program of the row ends last puts its items together,
    always in their order. Items beyond those needed end at once. Heads vary fastest, so that the programs that read the
    same slots run side by side; all on the one axis of the grid that may be longer than 65,535.
    """
    num_groups: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H if GROUP == 1 else NUM_HEADS
    num_items = tl.num_programs(0) // num_groups
    group = tl.program_id(0) % num_groups
    item = tl.program_id(0) // num_groups
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if SPLIT_TOKENS:
        index, row, sequence, limit, num_splits, split_tokens, split = find_item_of_fixed_size(
            item, num_items, ids_ptr, seq_ids_ptr, key_limits_ptr, max_rows, SPLIT_TOKENS
        )
    else:
        index, row, sequence, limit, num_splits, split_tokens, split = find_item(
            item, ids_ptr, seq_ids_ptr, key_limits_ptr, max_rows, TARGET_ITEMS, BLOCK_R, BLOCK_S
        )
    if split >= num_splits:
        return

    row = row.to(tl.int64)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, limit)
    q_row_ptr = q_ptr + row * stride_q_row
    table_row_ptr = slot_table_ptr + sequence.to(tl.int64) * stride_table_row
    position = 0
    if slopes_ptr is not None or HAS_WINDOW:
        position = tl.load(position_ids_ptr + row).to(tl.int32)
    # A head after the other, as they lie in a row; [BLOCK_Q, BLOCK_D] where heads matter.
    columns = tl.arange(0, BLOCK_Q * BLOCK_D)
    if GROUP == 1:
        places, inside = find_places(columns, group * BLOCK_H, NUM_HEADS, HEAD_SIZE, BLOCK_D)
        maximum, total, attended = attend_tokens(
            *(q_row_ptr, k_cache_ptr, v_cache_ptr, table_row_ptr, slopes_ptr, slot_positions_ptr),
            *(start, end, places, inside, group * BLOCK_H, position, window, scale),
            *(NUM_HEADS, HEAD_SIZE, HAS_WINDOW, BLOCK_S, BLOCK_H, BLOCK_D, LANES),
        )
    else:
        places, inside = find_places(columns, group * GROUP, (group + 1) * GROUP, HEAD_SIZE, BLOCK_D)
        maximum, total, attended = attend_tokens_of_group(
            *(q_row_ptr, k_cache_ptr, v_cache_ptr, table_row_ptr, slopes_ptr, slot_positions_ptr),
            *(start, end, group, position, window, scale),
            *(NUM_HEADS, GROUP, HEAD_SIZE, HAS_WINDOW, BLOCK_S, BLOCK_Q, BLOCK_D),
        )

    out_row_ptr = out_ptr + row * stride_out_row
    if num_splits == 1:
        # Without tokens the total is zero and so is the result.
        out = attended / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_row_ptr + places, tl.reshape(out, [BLOCK_Q * BLOCK_D]).to(out_ptr.dtype.element_ty), mask=inside)
        return

    # Partials: [items, groups, BLOCK_H, BLOCK_D] sums, then [items, groups, BLOCK_H] maxima, and as many totals.
    num_parts = num_items * num_groups
    maxima_ptr = partials_ptr + num_parts * (BLOCK_H * BLOCK_D)
    totals_ptr = maxima_ptr + num_parts * BLOCK_H
    part = item * num_groups + group
    maxima_ptr += part * BLOCK_H
    totals_ptr += part * BLOCK_H
    queries = tl.arange(0, BLOCK_Q)
    sums_ptrs = partials_ptr + part * (BLOCK_H * BLOCK_D) + columns
    if BLOCK_Q == BLOCK_H:
        tl.store(sums_ptrs, tl.reshape(attended, [BLOCK_H * BLOCK_D]))
        tl.store(maxima_ptr + queries, maximum)
        tl.store(totals_ptr + queries, total)
    else:
        tl.store(sums_ptrs, tl.reshape(attended, [BLOCK_Q * BLOCK_D]), mask=columns < BLOCK_H * BLOCK_D)
        tl.store(maxima_ptr + queries, maximum, mask=queries < BLOCK_H)
        tl.store(totals_ptr + queries, total, mask=queries < BLOCK_H)
    tl.debug_barrier()
    counter_ptr = counters_ptr + index * num_groups + group
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
        to_first_part = split * num_groups
        in_part = tl.arange(0, BLOCK_H)
        part_columns = tl.arange(0, BLOCK_H * BLOCK_D)
        joined_total, joined = join_parts(
            partials_ptr + (part - to_first_part) * (BLOCK_H * BLOCK_D) + part_columns,
            maxima_ptr - to_first_part * BLOCK_H + in_part,
            totals_ptr - to_first_part * BLOCK_H + in_part,
            *(num_groups, num_splits, BLOCK_P, BLOCK_H, BLOCK_D),
        )
        if GROUP == 1:
            out_places, in_out = find_places(part_columns, group * BLOCK_H, NUM_HEADS, HEAD_SIZE, BLOCK_D)
        else:
            out_places, in_out = find_places(part_columns, group * GROUP, (group + 1) * GROUP, HEAD_SIZE, BLOCK_D)
        joined = tl.reshape(joined / tl.where(joined_total > 0.0, joined_total, 1.0)[:, None], [BLOCK_H * BLOCK_D])
        tl.store(out_row_ptr + out_places, joined.to(out_ptr.dtype.element_ty), mask=in_out)
        tl.store(counter_ptr, 0)


@triton.jit
def find_places(columns, first_head, end_head, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where in a row the columns of heads from first_head on lie, BLOCK_D columns each, and which are of a head."""
    heads = first_head + columns // BLOCK_D
    dims = columns % BLOCK_D
    inside = (heads < end_head) & (dims < HEAD_SIZE)
    if HEAD_SIZE != BLOCK_D:
        places = heads * HEAD_SIZE + dims
    else:
        places = first_head * BLOCK_D + columns
    return places, inside


@triton.jit
def join_parts(
    sums_ptrs,
    maxima_ptrs,
    totals_ptrs,
    stride,
    num_parts,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of weights and weighted sum of values of a row, of which other programs have left parts, `stride` apart."""
    maximum = tl.full([BLOCK_H], NO_SCORE, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    attended = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        in_stats = (parts * stride * BLOCK_H)[:, None]
        is_part = (parts < num_parts)[:, None]
        maxima = tl.load(maxima_ptrs[None, :] + in_stats, mask=is_part, other=NO_SCORE)
        totals = tl.load(totals_ptrs[None, :] + in_stats, mask=is_part, other=0.0)
        sums = tl.load(sums_ptrs[None, :] + in_stats * BLOCK_D, mask=is_part, other=0.0)
        sums = tl.reshape(sums, [BLOCK_P, BLOCK_H, BLOCK_D])
        new_maximum, new_total, new_attended = join_softmaxes(maxima, totals, sums)
        joined = tl.maximum(maximum, new_maximum)
        rescale = tl.exp2(maximum - joined)
        new_rescale = tl.exp2(new_maximum - joined)
        total = total * rescale + new_total * new_rescale
        attended = attended * rescale[:, None] + new_attended * new_rescale[:, None]
        maximum = joined
    return total, attended


def attend_rows(
    q: Tensor,
    rows: RowList,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    key_limits: Tensor,
    scale: float,
    out: Tensor,
    workspace: Workspace,
    deterministic: bool = False,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    slot_positions: Tensor | None = None,
) -> None:
    """Writes to `out[row]` the attention of `q[row]` over its cached tokens. See `row_reference.attend_rows`.

    Softmax and sums are float32. Cost: for each attended token reads 2 * G * D values, and has 4 * H * D FLOPs;
    with many splits of few tokens H * (D + 2) float32 values are written and read again for each split.
    """
    num_kv_heads, head_size = k_cache.shape[1:]
    num_heads = q.shape[1] // head_size
    config = get_config("attend_rows", q.device, q.dtype, rows.max_rows, deterministic=deterministic)
    splits = plan_splits(config, rows.max_rows, num_heads, num_kv_heads, head_size, slot_table.shape[1], deterministic)
    assert workspace.partials.numel() >= splits.num_partials, (workspace.partials.shape, splits)
    assert workspace.counters.numel() >= rows.max_rows * splits.num_groups, (workspace.counters.shape, splits)
    bias = Bias(slopes, window, position_ids, slot_positions)
    context = (k_cache, v_cache, slot_table, seq_ids, key_limits)
    launch_attention("attend_rows", config, splits, q, rows, *context, scale, out, workspace, bias)


def launch_attention(
    op: str,
    config: Config,
    splits: Splits,
    q: Tensor,
    rows: RowList | int,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    key_limits: Tensor,
    scale: float,
    out: Tensor,
    workspace: Workspace,
    bias: Bias,
) -> None:
    """Launches `attend_rows_kernel` for the op called `op`. rows: a list of them, or the number of all."""
    ids, max_rows = (None, rows) if isinstance(rows, int) else (rows.ids, rows.max_rows)
    num_kv_heads, head_size = k_cache.shape[1:]
    group = math.prod(q.shape[1:]) // (num_kv_heads * head_size)
    part_size = splits.block_h * splits.block_d
    block_p = config["BLOCK_P"]
    if group > 1:
        # Of parts wider than BLOCK_C fewer are joined at a time, in as many registers.
        block_p = max(block_p * config["BLOCK_C"] // max(config["BLOCK_C"], part_size), 1)
    positions = (bias.slopes, bias.position_ids, bias.slot_positions)
    num_lanes = config["num_warps"] * 32 * (16 // q.itemsize) // part_size
    launch(
        op,
        attend_rows_kernel,
        (splits.num_groups * splits.num_items,),
        (q, ids, k_cache, v_cache, slot_table, seq_ids, key_limits, *positions, out, *workspace),
        (q.stride(0), slot_table.stride(0), out.stride(0), max_rows, scale, bias.window),
        NUM_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_SIZE=head_size,
        HAS_WINDOW=bias.window > 0,
        SPLIT_TOKENS=splits.split_tokens,
        TARGET_ITEMS=splits.target_items,
        BLOCK_R=1 if splits.split_tokens else next_power_of_2(max_rows),
        BLOCK_S=splits.block_s,
        BLOCK_H=splits.block_h,
        BLOCK_Q=splits.block_h if group == 1 else max(splits.block_h, LEAST_DOT),
        BLOCK_D=splits.block_d,
        BLOCK_P=block_p,
        LANES=min(max(num_lanes, 1), splits.block_s),
        num_warps=config["num_warps"],
        # Left to itself ptxas may spill to make room for one program more than these registers do.
        maxnreg=config["maxnreg"],
        **pdl_options(config, q.device),
    )
