"""One row's query heads over consecutive cached tokens: largest scores, sums of weights, weighted sums of values."""

from __future__ import annotations

import triton
import triton.language as tl

# Stands for minus infinity in scores: the difference of two of it is a number.
NO_SCORE = tl.constexpr(-3.0e38)
# A weight is a power of two: e ** x = 2 ** (x * log2(e)).
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_tokens(
    q_row_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_row_ptr,
    slopes_ptr,
    slot_positions_ptr,
    start,
    end,
    places,
    inside,
    first_head,
    position,
    window,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of BLOCK_H heads, each with keys and values of its own, over the tokens start to end - 1 of a table's row.

    LANES tokens go by side by side, every lane with a softmax of its own: so threads exchange nothing in the loop but
    the parts of a score. position: of the query, which slopes and a window need. Returns the largest score of each
    head, the sum of its weights, and the weighted sum of values.
    """
    # Each lane reads the query for itself, and so finds it laid out like the keys.
    q = tl.load(
        q_row_ptr + tl.broadcast_to(places[None, :], [LANES, BLOCK_H * BLOCK_D]), mask=inside[None, :], other=0.0
    )
    q = tl.reshape(q, [1, LANES, BLOCK_H, BLOCK_D]).to(tl.float32) * (scale * LOG2_E)
    if slopes_ptr is not None:
        heads = first_head + tl.arange(0, BLOCK_H)
        slopes = tl.load(slopes_ptr + heads, mask=heads < NUM_HEADS, other=0.0) * LOG2_E
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
        if slopes_ptr is not None or HAS_WINDOW:
            in_order = position - tl.load(slot_positions_ptr + slots)
            distances = tl.reshape(in_order, [BLOCK_S // LANES, LANES])
        if HAS_WINDOW:
            # What stands outside of the window is not read.
            wanted = inside[None, :] & (in_order < window)[:, None]
            k = tl.load(k_cache_ptr + offsets, mask=wanted, other=0.0)
            v = tl.load(v_cache_ptr + offsets, mask=wanted, other=0.0)
        elif NUM_HEADS % BLOCK_H == 0 and HEAD_SIZE == BLOCK_D:
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
        if slopes_ptr is not None:
            scores -= slopes[None, None, :] * distances.to(tl.float32)[:, :, None]
        is_seen = first + in_lanes < end
        if HAS_WINDOW:
            is_seen = is_seen & (distances < window)
        scores = tl.where(is_seen[:, :, None], scores, NO_SCORE)
        new_maxima = tl.maximum(maxima, tl.max(scores, axis=0))
        rescale = tl.exp2(maxima - new_maxima)
        weights = tl.exp2(scores - new_maxima[None, :, :])
        if HAS_WINDOW:
            # A lane that has seen no token yet has the difference of two NO_SCORE.
            weights = tl.where(is_seen[:, :, None], weights, 0.0)
        totals = totals * rescale + tl.sum(weights, axis=0)
        sums = sums * rescale[:, :, None] + tl.sum(weights[:, :, :, None] * v.to(tl.float32), axis=0)
        maxima = new_maxima
    return join_softmaxes(maxima, totals, sums)


@triton.jit
def attend_tokens_of_group(
    q_row_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_row_ptr,
    slopes_ptr,
    slot_positions_ptr,
    start,
    end,
    kv_head,
    position,
    window,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of the GROUP query heads of a head of keys and values, as the rows of a matrix, over the tokens start to end - 1.

    Keys and values are read once for all of them. Rows from GROUP on are zero, and their results go nowhere. Returns
    what `attend_tokens` does.
    """
    members = tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, BLOCK_D)
    is_member = members < GROUP
    in_head = dims < HEAD_SIZE
    heads = kv_head * GROUP + members
    q_ptrs = q_row_ptr + heads[:, None] * HEAD_SIZE + dims[None, :]
    q = tl.load(q_ptrs, mask=is_member[:, None] & in_head[None, :], other=0.0)
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=is_member, other=0.0) * LOG2_E
    maxima = tl.full([BLOCK_Q], NO_SCORE, tl.float32)
    totals = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    in_block = tl.arange(0, BLOCK_S)
    k_cache_ptr += kv_head * HEAD_SIZE
    v_cache_ptr += kv_head * HEAD_SIZE
    for first in range(start, end, BLOCK_S):
        # Behind the end the last token is read again and counts for nothing: so no load of keys needs a mask.
        slots = tl.load(table_row_ptr + tl.minimum(first + in_block, end - 1))
        offsets = slots.to(tl.int64) * (NUM_HEADS * HEAD_SIZE)
        k_ptrs = k_cache_ptr + offsets[None, :] + dims[:, None]
        v_ptrs = v_cache_ptr + offsets[:, None] + dims[None, :]
        if slopes_ptr is not None or HAS_WINDOW:
            distances = position - tl.load(slot_positions_ptr + slots)
        if HAS_WINDOW:
            is_near = distances < window
            k = tl.load(k_ptrs, mask=in_head[:, None] & is_near[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=in_head[None, :] & is_near[:, None], other=0.0)
        elif HEAD_SIZE == BLOCK_D:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=in_head[:, None], other=0.0)
            v = tl.load(v_ptrs, mask=in_head[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        is_seen = first + in_block < end
        if slopes_ptr is not None:
            scores -= slopes[:, None] * distances.to(tl.float32)[None, :]
        if HAS_WINDOW:
            is_seen = is_seen & is_near
        scores = tl.where(is_seen[None, :], scores, NO_SCORE)
        new_maxima = tl.maximum(maxima, tl.max(scores, axis=1))
        rescale = tl.exp2(maxima - new_maxima)
        weights = tl.exp2(scores - new_maxima[:, None])
        if HAS_WINDOW:
            # Where no token was seen yet, this is the difference of two NO_SCORE.
            weights = tl.where(is_seen[None, :], weights, 0.0)
        totals = totals * rescale + tl.sum(weights, axis=1)
        sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maxima = new_maxima
    return maxima, totals, sums


@triton.jit
def join_softmaxes(maxima, totals, sums):
    """One softmax's largest score, sum of weights and weighted sum out of several: `[n, H]`, `[n, H]`, `[n, H, D]`."""
    maximum = tl.max(maxima, axis=0)
    rescale = tl.exp2(maxima - maximum[None, :])
    return maximum, tl.sum(totals * rescale, axis=0), tl.sum(sums * rescale[:, :, None], axis=0)
