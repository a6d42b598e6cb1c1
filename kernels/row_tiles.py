"""What the kernels that multiply listed rows by a matrix have in common: finding rows, reading ahead, the product."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import Config
from dynskip.kernels.launches import cdiv, next_power_of_2

_LEAST_PREFETCH = 64  # of 16-bit weights a line of L2


@triton.jit
def wait_for_earlier_kernels(
    num_ptr, tile, weight_ptr, columns, in_matrix, K, first_k, last_k, PREFETCH_K: tl.constexpr
):
    """Lets the next kernel start, asks L2 for the first PREFETCH_K of the k that this program multiplies, and waits.

    No kernel that still runs writes weights, so they may come before the wait; what `num_ptr` holds then is a hint, and
    read for nothing else: a kernel that has no rows should not read weights in vain. Needs sm_90.
    """
    tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH_K > 0:
        # Volatile: past L1, where nothing that a kernel still writes may be kept over the wait.
        expected_num = tl.load(num_ptr, volatile=True)
        if (tile == 0) & (expected_num > 0):
            per_line: tl.constexpr = 128 * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
            offsets = first_k + tl.arange(0, PREFETCH_K // per_line) * per_line
            addresses = (weight_ptr + columns[:, None] * K + offsets[None, :]).to(tl.int64)
            is_needed = in_matrix[:, None] & (offsets < last_k)[None, :]
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l,r",
                [addresses, is_needed.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    tl.extra.cuda.gdc_wait()


@triton.jit
def find_rows(ids_ptr, max_rows, tile, BLOCK_M: tl.constexpr):
    """The rows of a tile, `[BLOCK_M], int64`, -1 where a place has none; which places have one; whether the tile has.

    Plain loads, which L1 may answer: each thread needs the ids of many rows, in the layouts of inputs and results, and
    all of them lie in one or two lines. They are up to date because they come after the wait for earlier kernels,
    which makes all that those wrote visible to every load behind it, as it does for the rows themselves; `ptx` looks
    for loads in front of it. The list ends with -1, so its length is not asked for.
    """
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(ids_ptr + places, mask=places < max_rows, other=-1)
    return rows.to(tl.int64), rows >= 0, tl.load(ids_ptr + tile * BLOCK_M) >= 0


@triton.jit
def multiply_rows(
    x_ptr,
    rows,
    is_row,
    stride_x_row,
    weight_ptr,
    columns,
    in_matrix,
    K,
    first_k,
    last_k,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`[BLOCK_M, BLOCK_N], float32`: the products of rows of x with rows of the weights, from first_k to last_k - 1.

    first_k is a multiple of BLOCK_K. Less than 16 rows are multiplied without matrix units, which would idle, and in
    that way a row's bits do not depend on its place even where a processor's BLAS stands in for them. WEIGHTS_LEFT:
    multiplies the other way round, so that the weights are the operand of which a warp group of sm_90 takes 64 rows at
    once, straight from shared memory, and x that of which 16 do. A single row has a kernel of its own: `one_row`.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_N: tl.constexpr = columns.shape[0]
    offsets = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_x_row + offsets[None, :]
    weight_ptrs = weight_ptr + columns[:, None] * K + offsets[None, :]
    USE_DOT: tl.constexpr = BLOCK_M >= 16
    if not USE_DOT:
        products = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    elif WEIGHTS_LEFT:
        products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(first_k, last_k, BLOCK_K, num_stages=NUM_STAGES):
        x_mask = is_row[:, None]
        if EVEN_K:
            if EVEN_N:
                weights = tl.load(weight_ptrs + k, eviction_policy="evict_first")
            else:
                weights = tl.load(weight_ptrs + k, mask=in_matrix[:, None], other=0.0, eviction_policy="evict_first")
        else:
            in_row = (k + offsets < last_k)[None, :]
            x_mask = x_mask & in_row
            weights = tl.load(
                weight_ptrs + k, mask=in_matrix[:, None] & in_row, other=0.0, eviction_policy="evict_first"
            )
        x = tl.load(x_ptrs + k, mask=x_mask, other=0.0)
        if not USE_DOT:
            products += x.to(tl.float32)[:, None, :] * weights.to(tl.float32)[None, :, :]
        elif WEIGHTS_LEFT:
            products = tl.dot(weights, tl.trans(x), products, input_precision="ieee")
        else:
            products = tl.dot(x, tl.trans(weights), products, input_precision="ieee")
    if not USE_DOT:
        products = tl.sum(products, axis=2)
    elif WEIGHTS_LEFT:
        products = tl.trans(products)
    return products


@triton.jit
def store_parts(
    results,
    rows,
    is_row,
    first_column,
    query_size,
    key_size,
    num_run,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    stride_q_row,
    EVEN_PARTS: tl.constexpr,
):
    """Stores a tile of queries, keys and values: queries to rows, the others, key_size columns each, to slots.

    EVEN_PARTS: no tile of columns has two of the three.
    """
    BLOCK_N: tl.constexpr = results.shape[1]
    columns = first_column + tl.arange(0, BLOCK_N)
    slots = tl.load(slots_ptr + rows, mask=is_row, other=-1).to(tl.int64)
    if EVEN_PARTS:
        if first_column < query_size:
            tl.store(q_ptr + rows[:, None] * stride_q_row + columns[None, :], results, mask=is_row[:, None])
        else:
            cache_ptr = k_cache_ptr
            first_of_part = query_size
            if first_column >= query_size + key_size:
                cache_ptr = v_cache_ptr
                first_of_part = query_size + key_size
            in_cache = slots[:, None] * key_size + (columns - first_of_part)[None, :]
            tl.store(cache_ptr + in_cache, results, mask=(slots >= 0)[:, None])
    else:
        first_value = query_size + key_size
        is_query = (columns < tl.where(num_run > 0, query_size, 0))[None, :]
        is_key = ((columns >= query_size) & (columns < first_value))[None, :]
        is_value = ((columns >= first_value) & (columns < first_value + key_size))[None, :]
        in_cache = slots[:, None] * key_size + columns[None, :]
        is_stored = (slots >= 0)[:, None]
        tl.store(q_ptr + rows[:, None] * stride_q_row + columns[None, :], results, mask=is_row[:, None] & is_query)
        tl.store(k_cache_ptr + in_cache - query_size, results, mask=is_stored & is_key)
        tl.store(v_cache_ptr + in_cache - first_value, results, mask=is_stored & is_value)


def tile_constants(config: Config, weight: Tensor, num_parts: int = 1) -> dict[str, Any]:
    """The constants of a kernel that multiplies by `weight`: tiles from `config`, and which masks it can do without.

    num_parts: into how many parts K is split.
    """
    num_columns, depth = weight.shape
    return {
        "EVEN_N": num_columns % config["BLOCK_N"] == 0,
        "EVEN_K": depth % config["BLOCK_K"] == 0,
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_N": config["BLOCK_N"],
        "BLOCK_K": config["BLOCK_K"],
        "NUM_STAGES": config["num_stages"],
        "WEIGHTS_LEFT": bool(config["WEIGHTS_LEFT"]),
        "PREFETCH_K": prefetch_depth(config, weight, num_parts),
    }


def prefetch_depth(config: Config, weight: Tensor, num_parts: int) -> int:
    """How many k each program asks L2 for: 0, or 64 * 2**n, as `wait_for_earlier_kernels` takes it.

    At most PREFETCH_K; no more than cover the program's part of K; and of all programs together PREFETCH_MIB, since L2
    is shared with the kernel that still runs.
    """
    num_columns, depth = weight.shape
    part = cdiv(cdiv(depth, config["BLOCK_K"]), num_parts) * config["BLOCK_K"]
    most = (config["PREFETCH_MIB"] << 20) // (num_columns * num_parts * weight.itemsize)
    if min(config["PREFETCH_K"], most) < _LEAST_PREFETCH:
        return 0
    return max(min(config["PREFETCH_K"], next_power_of_2(part), 1 << (most.bit_length() - 1)), _LEAST_PREFETCH)
