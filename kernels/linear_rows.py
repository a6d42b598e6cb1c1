"""Products of listed rows with a matrix, and what goes before and after them: a norm, bias, activation, a cache."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.activate import activated
from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import cdiv, launch, next_power_of_2
from dynskip.kernels.norm_rows import norm_rows, normalise_rows
from dynskip.kernels.one_row import fuses_norm, launch_one_row
from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.kernels.row_tiles import (
    find_rows,
    multiply_rows,
    store_parts,
    tile_constants,
    wait_for_earlier_kernels,
)

# The values that a program holds while it normalises rows: 64 a thread of 4 warps. With more, registers would run out;
# in chunks, whose sums need registers as well, with half as many.
MAX_NORM_TILE = 8192


@triton.jit(
    do_not_specialize=["max_rows"],
    do_not_specialize_on_alignment=["ids_ptr", "num_ptr", "num_run_ptr", "slots_ptr"],
)
def linear_rows_kernel(
    x_ptr,
    ids_ptr,
    num_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    normed_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_run_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    stride_x_row,
    stride_normed_row,
    stride_out_row,
    N,
    K,
    query_size,
    key_size,
    eps,
    max_rows,
    RMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    FUSE_NORM: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    NORM_CHUNK: tl.constexpr,
    ONE_NORM_CHUNK: tl.constexpr,
    EVEN_PARTS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCH_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program for BLOCK_M listed rows and BLOCK_N columns; those beyond the number of rows end at once.

    Tiles of rows vary fastest, so that the second one finds the weights of the first in L2. GATED: of 2 * N rows of
    weights the program has those of BLOCK_N / 2 gates and of what they gate, each pair side by side: so a thread finds
    both in its registers, and the product is made as any other.
    """
    IS_QKV: tl.constexpr = num_run_ptr is not None
    tile = tl.program_id(0)
    first_column = tl.program_id(1) * BLOCK_N
    columns = (first_column + tl.arange(0, BLOCK_N)).to(tl.int64)
    if GATED:
        in_matrix = columns < 2 * N
        columns = columns // 2 + columns % 2 * N
    else:
        in_matrix = columns < N
    if USE_PDL:
        wait_for_earlier_kernels(num_ptr, tile, weight_ptr, columns, in_matrix, K, 0, K, PREFETCH_K)
    rows, is_row, has_rows = find_rows(ids_ptr, max_rows, tile, BLOCK_M)
    if FUSE_NORM:
        if NORM_ROWS == BLOCK_M:
            norm_rows, is_norm_row = rows, is_row
        else:
            norm_rows, is_norm_row, has_rows = find_rows(ids_ptr, max_rows, tile, NORM_ROWS)
    if IS_QKV:
        num_run = tl.load(num_run_ptr)
        if (num_run == 0) & (first_column + BLOCK_N <= query_size):
            return
    if not has_rows:
        return
    if bias_ptr is not None:
        # Read before the products, not after them, when there is nothing else to do meanwhile.
        bias = tl.load(bias_ptr + columns, mask=in_matrix, other=0.0).to(tl.float32)
    if FUSE_NORM:
        # Each program normalises the rows that it multiplies, and all write the same bits to the same place: cheaper
        # than a kernel of its own as long as they are few.
        normalise_rows(
            *(x_ptr, norm_rows, is_norm_row, stride_x_row),
            *(norm_weight_ptr, norm_bias_ptr, normed_ptr, stride_normed_row, K, eps),
            *(RMS, NORM_CHUNK, ONE_NORM_CHUNK),
        )
        tl.debug_barrier()
        x_ptr = normed_ptr
        stride_x_row = stride_normed_row
    products = multiply_rows(
        *(x_ptr, rows, is_row, stride_x_row, weight_ptr, columns, in_matrix, K, 0, K),
        *(BLOCK_K, EVEN_N, EVEN_K, WEIGHTS_LEFT, NUM_STAGES),
    )
    if bias_ptr is not None:
        products += bias[None, :]
    if GATED:
        gates, products = tl.split(tl.reshape(products, [BLOCK_M, BLOCK_N // 2, 2]))
        products *= activated(gates, ACTIVATION)
        columns = first_column // 2 + tl.arange(0, BLOCK_N // 2)
        in_matrix = columns < N
    else:
        products = activated(products, ACTIVATION)
    results = products.to(out_ptr.dtype.element_ty)
    if IS_QKV:
        store_parts(
            *(results, rows, is_row, first_column, query_size, key_size, num_run),
            *(out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, stride_out_row, EVEN_PARTS),
        )
    else:
        mask = is_row[:, None]
        if not EVEN_N:
            mask = mask & in_matrix[None, :]
        tl.store(out_ptr + rows[:, None] * stride_out_row + columns[None, :], results, mask=mask)


def linear_rows(
    x: Tensor,
    rows: RowList,
    norm: RowNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    out: Tensor,
    normed: Tensor,
    deterministic: bool = False,
) -> None:
    """Writes to `out[row]` the activated product of `x[row]` with `weight`. See `row_reference.linear_rows`.

    Sums are float32, and so are activation and gate: one rounding. Cost: reads `weight` once, 2 * N * K FLOPs a row.
    """
    _launch("linear_rows", x, rows, norm, weight, bias, out, normed, deterministic, activation, gated)


def qkv_rows(
    x: Tensor,
    rows: RowList,
    num_run: Tensor,
    norm: RowNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    normed: Tensor,
    deterministic: bool = False,
) -> None:
    """Writes queries to `q[row]`, keys and values to slot `slots[row]` of the caches. See `row_reference.qkv_rows`.

    Sums are float32. Cost: reads `weight` once, if no row attends without its queries; 2 * N * K FLOPs a row.
    """
    caches = _Caches(num_run, k_cache, v_cache, slots)
    _launch("qkv_rows", x, rows, norm, weight, bias, q, normed, deterministic, caches=caches)


class _Caches(NamedTuple):
    """What the epilogue of `qkv_rows` needs besides the queries."""

    num_run: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor


def _launch(
    op: str,
    x: Tensor,
    rows: RowList,
    norm: RowNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    normed: Tensor,
    deterministic: bool,
    activation: str = "none",
    gated: bool = False,
    caches: _Caches | None = None,
) -> None:
    num_columns, depth = weight.shape
    config = get_config(op, x.device, x.dtype, rows.max_rows, (num_columns, depth), deterministic)
    is_one_row = config["BLOCK_M"] == 1
    if norm is not None and not (fuses_norm(config, depth) if is_one_row else config["FUSE_NORM"]):
        norm_rows(x, rows, norm, normed, deterministic)
        x, norm = normed, None
    if is_one_row:
        launch_one_row(op, config, x, rows, norm, weight, bias, out, caches, activation, gated)
        return
    norm_weight, norm_bias, eps, rms = norm or RowNorm(None, None, 0.0)
    strides = (x.stride(0), normed.stride(0), out.stride(0))
    query_size, key_size = 0, 0
    if caches is not None:
        key_size = caches.k_cache.shape[1] * caches.k_cache.shape[2]
        query_size = num_columns - 2 * key_size
    norm_tile_rows = min(config["BLOCK_M"], next_power_of_2(rows.max_rows))
    norm_chunk = next_power_of_2(depth)
    if norm_chunk * norm_tile_rows > MAX_NORM_TILE:
        norm_chunk = max(MAX_NORM_TILE // 2 // norm_tile_rows, 16)
    launch(
        op,
        linear_rows_kernel,
        (cdiv(rows.max_rows, config["BLOCK_M"]), cdiv(num_columns, config["BLOCK_N"])),
        (x, rows.ids, rows.num, norm_weight, norm_bias, normed, weight, bias, out, *(caches or [None] * 4)),
        (*strides, num_columns // 2 if gated else num_columns, depth, query_size, key_size, eps, rows.max_rows),
        RMS=rms,
        ACTIVATION=activation,
        GATED=gated,
        EVEN_PARTS=query_size % config["BLOCK_N"] == 0 and key_size % config["BLOCK_N"] == 0,
        FUSE_NORM=norm is not None,
        NORM_ROWS=norm_tile_rows if norm is not None else 1,
        NORM_CHUNK=norm_chunk if norm is not None else 1,
        ONE_NORM_CHUNK=norm is not None and norm_chunk >= depth,
        **tile_constants(config, weight),
        **pdl_options(config, x.device),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
