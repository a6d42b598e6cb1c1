"""Products of listed rows with a matrix, added to those rows of the residual stream."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import cdiv, launch
from dynskip.kernels.one_row import launch_one_row
from dynskip.kernels.row_list import RowList, Workspace
from dynskip.kernels.row_tiles import find_rows, multiply_rows, tile_constants, wait_for_earlier_kernels


@triton.jit(do_not_specialize=["max_rows"], do_not_specialize_on_alignment=["ids_ptr", "num_ptr"])
def linear_add_rows_kernel(
    x_ptr,
    ids_ptr,
    num_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    stride_x_row,
    stride_residual_row,
    N,
    K,
    max_rows,
    SPLIT_K: tl.constexpr,
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
    """One program for BLOCK_M listed rows, BLOCK_N columns and one of SPLIT_K parts of K.

    Whichever program of a tile ends last adds up all parts, always in their order, and adds them to the rows. Tiles of
    rows vary fastest, so that the second one finds the weights of the first in L2.
    """
    tile = tl.program_id(0)
    column_tile = tl.program_id(1)
    split = tl.program_id(2)
    columns = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_matrix = columns < N
    split_k = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first_k = split * split_k
    last_k = tl.minimum(first_k + split_k, K)
    if USE_PDL:
        wait_for_earlier_kernels(num_ptr, tile, weight_ptr, columns, in_matrix, K, first_k, last_k, PREFETCH_K)
    rows, is_row, has_rows = find_rows(ids_ptr, max_rows, tile, BLOCK_M)
    if not has_rows:
        return
    if bias_ptr is not None:
        # Read before the products, not after them, when there is nothing else to do meanwhile.
        bias = tl.load(bias_ptr + columns, mask=in_matrix, other=0.0).to(tl.float32)
    products = multiply_rows(
        *(x_ptr, rows, is_row, stride_x_row, weight_ptr, columns, in_matrix, K, first_k, last_k),
        *(BLOCK_K, EVEN_N, EVEN_K, WEIGHTS_LEFT, NUM_STAGES),
    )
    mask = is_row[:, None]
    if not EVEN_N:
        mask = mask & in_matrix[None, :]
    residual_ptrs = residual_ptr + rows[:, None] * stride_residual_row + columns[None, :]
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    if SPLIT_K > 1:
        # Partials: [tiles of rows, tiles of columns, SPLIT_K, BLOCK_M, BLOCK_N]. Counters: one a tile.
        part_size: tl.constexpr = BLOCK_M * BLOCK_N
        index = tile * tl.num_programs(1) + column_tile
        in_part = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        parts_ptr = partials_ptr + index.to(tl.int64) * (SPLIT_K * part_size) + in_part
        tl.store(parts_ptr + split * part_size, products)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + index, 1, sem="acq_rel", scope="gpu") != SPLIT_K - 1:
            return
        products = tl.load(parts_ptr, cache_modifier=".cg")
        for part in tl.static_range(1, SPLIT_K):
            products += tl.load(parts_ptr + part * part_size, cache_modifier=".cg")
        tl.store(counters_ptr + index, 0)
    if bias_ptr is not None:
        products += bias[None, :]
    tl.store(residual_ptrs, (residual + products).to(residual_ptr.dtype.element_ty), mask=mask)


def linear_add_rows(
    x: Tensor,
    rows: RowList,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    workspace: Workspace,
    deterministic: bool = False,
) -> None:
    """Adds to `residual[row]` the product of `x[row]` with `weight`, in place. See `row_reference.linear_add_rows`.

    Sums are float32, rounded once; those of split K are added in a fixed order. Cost: reads `weight` once, 2 * N * K
    FLOPs a row.
    """
    num_columns, depth = weight.shape
    config = get_config("linear_add_rows", x.device, x.dtype, rows.max_rows, (num_columns, depth), deterministic)
    if config["BLOCK_M"] == 1:
        launch_one_row("linear_add_rows", config, x, rows, None, weight, bias, residual, add=True)
        return
    grid = cdiv(rows.max_rows, config["BLOCK_M"]), cdiv(num_columns, config["BLOCK_N"]), config["SPLIT_K"]
    num_tiles = grid[0] * grid[1]
    if config["SPLIT_K"] > 1:
        num_floats = num_tiles * config["SPLIT_K"] * config["BLOCK_M"] * config["BLOCK_N"]
        assert workspace.partials.numel() >= num_floats and workspace.counters.numel() >= num_tiles, (
            "make_workspace was told of this matrix, of as many rows, and had the table that is in place now"
        )
    launch(
        "linear_add_rows",
        linear_add_rows_kernel,
        grid,
        (x, rows.ids, rows.num, weight, bias, residual, *workspace),
        (x.stride(0), residual.stride(0), num_columns, depth, rows.max_rows),
        SPLIT_K=config["SPLIT_K"],
        **tile_constants(config, weight, config["SPLIT_K"]),
        **pdl_options(config, x.device),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
