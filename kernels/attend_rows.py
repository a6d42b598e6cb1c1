"""Attention of one query a row over cached tokens, its context split among programs as the device sees fit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import Config, get_config, pdl_options
from dynskip.kernels.context_splits import Splits, find_item, find_item_of_fixed_size, plan_splits
from dynskip.kernels.launches import launch
from dynskip.kernels.row_list import RowList, Workspace

# Stands for minus infinity in scores: the difference of two of it is a number.
NO_SCORE = tl.constexpr(-3.0e38)
# A weight is a power of two: e ** x = 2 ** (x * log2(e)).
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["max_rows", "stride_table_row"],
    do_not_specialize_on_alignment=["ids_ptr", "slot_table_ptr", "seq_ids_ptr", "key_limits_ptr"],
)
def attend_rows_kernel(
    q_ptr,
    ids_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_table_ptr,
    seq_ids_ptr,
    key_limits_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    stride_q_row,
    stride_table_row,
    stride_out_row,
    max_rows,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    TARGET_ITEMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program for BLOCK_H heads and one item: some consecutive cached tokens of one row.

    A row that is one item is done with it; otherwise whichever program of the row ends last puts its items together,
    always in their order. Items beyond those needed end at once. Heads vary fastest, so that the programs that read the
    same slots run side by side; all on the one axis of the grid that may be longer than 65,535.
    """
    num_groups: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    num_items = tl.num_programs(0) // num_groups
    group = tl.program_id(0) % num_groups
    item = tl.program_id(0) // num_groups
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if SPLIT_TOKENS:
        index, row, sequence, limit, num_splits, split_tokens, split = find_item_of_fixed_size(
            item, num_items, ids_ptr, seq_ids_ptr, key_limits_ptr, max_rows, HAS_ROWS, SPLIT_TOKENS
        )
    else:
        index, row, sequence, limit, num_splits, split_tokens, split = find_item(
            item, ids_ptr, seq_ids_ptr, key_limits_ptr, max_rows, TARGET_ITEMS, BLOCK_R, BLOCK_S
        )
    if split >= num_splits:
        return

    # A head after the other, as they lie in a slot; [BLOCK_H, BLOCK_D] where heads matter.
    columns = tl.arange(0, BLOCK_H * BLOCK_D)
    heads = group * BLOCK_H + columns // BLOCK_D
    dims = columns % BLOCK_D
    inside = (heads < NUM_HEADS) & (dims < HEAD_SIZE)
    places = group * (BLOCK_H * BLOCK_D) + columns
    if HEAD_SIZE != BLOCK_D:
        places = heads * HEAD_SIZE + dims
    row = row.to(tl.int64)
    start = split * split_tokens
    maximum, total, attended = attend_tokens(
        q_ptr + row * stride_q_row,
        k_cache_ptr,
        v_cache_ptr,
        slot_table_ptr + sequence.to(tl.int64) * stride_table_row,
        start,
        tl.minimum(start + split_tokens, limit),
        places,
        inside,
        scale,
        NUM_HEADS,
        HEAD_SIZE,
        BLOCK_S,
        BLOCK_H,
        BLOCK_D,
        LANES,
    )

    out_ptrs = out_ptr + row * stride_out_row + places
    if num_splits == 1:
        # Without tokens the total is zero and so is the result.
        out = attended / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_ptrs, tl.reshape(out, [BLOCK_H * BLOCK_D]).to(out_ptr.dtype.element_ty), mask=inside)
        return

    # Partials: [items, groups, BLOCK_H, BLOCK_D] sums, then [items, groups, BLOCK_H] maxima, and as many totals.
    num_parts = num_items * num_groups
    maxima_ptr = partials_ptr + num_parts * (BLOCK_H * BLOCK_D)
    totals_ptr = maxima_ptr + num_parts * BLOCK_H
    part = item * num_groups + group
    in_part = tl.arange(0, BLOCK_H)
    sums_ptrs = partials_ptr + part * (BLOCK_H * BLOCK_D) + columns
    tl.store(sums_ptrs, tl.reshape(attended, [BLOCK_H * BLOCK_D]))
    tl.store(maxima_ptr + part * BLOCK_H + in_part, maximum)
    tl.store(totals_ptr + part * BLOCK_H + in_part, total)
    tl.debug_barrier()
    counter_ptr = counters_ptr + index * num_groups + group
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
        first_part = part - split * num_groups
        total, attended = join_parts(
            partials_ptr + first_part * (BLOCK_H * BLOCK_D) + columns,
            maxima_ptr + first_part * BLOCK_H + in_part,
            totals_ptr + first_part * BLOCK_H + in_part,
            num_groups,
            num_splits,
            BLOCK_P,
            BLOCK_H,
            BLOCK_D,
        )
        out = tl.reshape(attended / total[:, None], [BLOCK_H * BLOCK_D])
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(counter_ptr, 0)


@triton.jit
def attend_tokens(
    q_row_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_row_ptr,
    start,
    end,
    places,
    inside,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Largest score, sum of weights and weighted sum of values over the tokens start to end - 1 of a table's row.

    LANES tokens go by side by side, every lane with a softmax of its own: so threads exchange nothing in the loop but
    the parts of a score.
    """
    # Each lane reads the query for itself, and so finds it laid out like the keys.
    q = tl.load(
        q_row_ptr + tl.broadcast_to(places[None, :], [LANES, BLOCK_H * BLOCK_D]), mask=inside[None, :], other=0.0
    )
    q = tl.reshape(q, [1, LANES, BLOCK_H, BLOCK_D]).to(tl.float32) * (scale * LOG2_E)
    in_block = tl.arange(0, BLOCK_S)
    in_lanes = tl.arange(0, BLOCK_S // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    maxima = tl.full([LANES, BLOCK_H], NO_SCORE, tl.float32)
    totals = tl.zeros([LANES, BLOCK_H], tl.float32)
    sums = tl.zeros([LANES, BLOCK_H, BLOCK_D], tl.float32)
    # Behind the end the last token is read again and counts for nothing: so no load of keys needs a mask.
    positions = tl.minimum(start + in_block, end - 1)
    slots = tl.load(table_row_ptr + positions, mask=positions >= 0, other=0)
    for first in range(start, end, BLOCK_S):
        offsets = slots.to(tl.int64)[:, None] * (NUM_HEADS * HEAD_SIZE) + places[None, :]
        if NUM_HEADS % BLOCK_H == 0 and HEAD_SIZE == BLOCK_D:
            k = tl.load(k_cache_ptr + offsets)
            v = tl.load(v_cache_ptr + offsets)
        else:
            k = tl.load(k_cache_ptr + offsets, mask=inside[None, :], other=0.0)
            v = tl.load(v_cache_ptr + offsets, mask=inside[None, :], other=0.0)
        slots = tl.load(table_row_ptr + tl.minimum(first + BLOCK_S + in_block, end - 1))
        k = tl.reshape(k, [BLOCK_S // LANES, LANES, BLOCK_H, BLOCK_D])
        v = tl.reshape(v, [BLOCK_S // LANES, LANES, BLOCK_H, BLOCK_D])
        # One query a head: a matrix product would waste 15 of its 16 rows, so multiply and sum.
        scores = tl.sum(q * k.to(tl.float32), axis=3)
        scores = tl.where((first + in_lanes < end)[:, :, None], scores, NO_SCORE)
        new_maxima = tl.maximum(maxima, tl.max(scores, axis=0))
        rescale = tl.exp2(maxima - new_maxima)
        weights = tl.exp2(scores - new_maxima[None, :, :])
        totals = totals * rescale + tl.sum(weights, axis=0)
        sums = sums * rescale[:, :, None] + tl.sum(weights[:, :, :, None] * v.to(tl.float32), axis=0)
        maxima = new_maxima
    return join_softmaxes(maxima, totals, sums)


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


@triton.jit
def join_softmaxes(maxima, totals, sums):
    """One softmax's largest score, sum of weights and weighted sum out of several: `[n, H]`, `[n, H]`, `[n, H, D]`."""
    maximum = tl.max(maxima, axis=0)
    rescale = tl.exp2(maxima - maximum[None, :])
    return maximum, tl.sum(totals * rescale, axis=0), tl.sum(sums * rescale[:, :, None], axis=0)


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
) -> None:
    """Writes to `out[row]` the attention of `q[row]` over its cached tokens. See `row_reference.attend_rows`.

    Softmax and sums are float32. Cost: reads 2 * H * D values and 4 FLOPs for each of them, for each attended token;
    with many splits of few tokens H * (D + 2) float32 values are written and read again for each split.
    """
    num_heads, head_size = k_cache.shape[1:]
    config = get_config("attend_rows", q.device, q.dtype, rows.max_rows, deterministic=deterministic)
    splits = plan_splits(config, rows.max_rows, num_heads, head_size, slot_table.shape[1], deterministic)
    assert workspace.partials.numel() >= splits.num_partials, (workspace.partials.shape, splits)
    assert workspace.counters.numel() >= rows.max_rows * splits.num_groups, (workspace.counters.shape, splits)
    launch_attention(
        "attend_rows", config, splits, q, rows, k_cache, v_cache, slot_table, seq_ids, key_limits, scale, out, workspace
    )


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
) -> None:
    """Launches `attend_rows_kernel` for the op called `op`. rows: a list of them, or the number of all."""
    ids, max_rows = (None, rows) if isinstance(rows, int) else (rows.ids, rows.max_rows)
    num_heads, head_size = k_cache.shape[1:]
    num_lanes = config["num_warps"] * 32 * (16 // q.itemsize) // (splits.block_h * splits.block_d)
    launch(
        op,
        attend_rows_kernel,
        (splits.num_groups * splits.num_items,),
        q.device,
        q,
        ids,
        k_cache,
        v_cache,
        slot_table,
        seq_ids,
        key_limits,
        out,
        workspace.partials,
        workspace.counters,
        q.stride(0),
        slot_table.stride(0),
        out.stride(0),
        max_rows,
        scale,
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        HAS_ROWS=ids is not None,
        SPLIT_TOKENS=splits.split_tokens,
        TARGET_ITEMS=splits.target_items,
        BLOCK_R=1 if splits.split_tokens else triton.next_power_of_2(max_rows),
        BLOCK_S=config["BLOCK_S"],
        BLOCK_H=splits.block_h,
        BLOCK_D=splits.block_d,
        BLOCK_P=config["BLOCK_P"],
        LANES=min(max(num_lanes, 1), config["BLOCK_S"]),
        num_warps=config["num_warps"],
        # Left to itself ptxas may spill to make room for one program more than these registers do.
        maxnreg=config["maxnreg"],
        **pdl_options(config, q.device),
    )
