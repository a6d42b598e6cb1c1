"""The product of a single listed row with a matrix, from registers: each weight is used once, no cache could help."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.activate import activated
from dynskip.kernels.configs import Config, pdl_options
from dynskip.kernels.launches import cdiv, launch, next_power_of_2
from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.kernels.row_tiles import store_parts

# Of all programs: 16 for each of 132 multiprocessors, which keep 64 KiB of weights on their way to each.
_NUM_WARPS = 16 * 132
# As many as 16 warps of a multiprocessor can have. Left to itself ptxas may spill to make room for one program more.
_MAX_REGISTERS = 128
# What a thread adds up by itself, and more than one of them.
_LEAST_K = 16


@triton.jit(
    do_not_specialize_on_alignment=["ids_ptr", "num_ptr", "num_run_ptr", "slots_ptr"],
)
def one_row_kernel(
    x_ptr,
    ids_ptr,
    num_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_run_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    stride_x_row,
    stride_out_row,
    N,
    K,
    query_size,
    key_size,
    eps,
    RMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    FUSE_NORM: tl.constexpr,
    EVEN_PARTS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Programs share the tiles of BLOCK_N columns of one listed row; while one tile is multiplied the next one arrives.

    The first weights are on their way while earlier kernels end, for none of these writes weights. What `num_ptr` holds
    then is a hint: without rows no weights are read, and where it was out of date they are read behind the wait.
    ONE_TILE: BLOCK_K covers K. GATED: see `linear_rows_kernel`. ADD: results are added to `out`.
    """
    place = tl.program_id(0)
    first_tile = tl.program_id(1)
    num_columns = 2 * N if GATED else N
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Volatile: past L1, where nothing that a kernel still writes may be kept over the wait.
        expected_num = tl.load(num_ptr, volatile=True)
        weights = load_weights(weight_ptr, first_tile, 0, N, K, num_columns, expected_num > 0, GATED, BLOCK_N, BLOCK_K)
        tl.extra.cuda.gdc_wait()
        if (expected_num <= 0) & (tl.load(num_ptr) > 0):
            weights = load_weights(weight_ptr, first_tile, 0, N, K, num_columns, True, GATED, BLOCK_N, BLOCK_K)
    else:
        weights = load_weights(weight_ptr, first_tile, 0, N, K, num_columns, True, GATED, BLOCK_N, BLOCK_K)
    row = tl.load(ids_ptr + place).to(tl.int64)
    if row < 0:
        return
    num_run = 1
    if num_run_ptr is not None:
        num_run = tl.load(num_run_ptr)
    x_ptr += row * stride_x_row
    out_ptr += row * stride_out_row
    offsets = tl.arange(0, BLOCK_K)
    if ONE_TILE:
        x = tl.load(x_ptr + offsets, mask=offsets < K, other=0.0)
        if FUSE_NORM:
            x = normalised(x, norm_weight_ptr, norm_bias_ptr, K, eps, RMS)
    for tile in tl.range(first_tile, tl.cdiv(num_columns, BLOCK_N), tl.num_programs(1)):
        first_column = tile * BLOCK_N
        if GATED:
            columns = first_column // 2 + tl.arange(0, BLOCK_N // 2)
        else:
            columns = first_column + tl.arange(0, BLOCK_N)
        in_out = columns < N
        if ADD:
            residual = tl.load(out_ptr + columns, mask=in_out, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            rows_of_weights, in_matrix = find_columns(tile, N, num_columns, GATED, BLOCK_N)
            bias = tl.load(bias_ptr + rows_of_weights, mask=in_matrix, other=0.0).to(tl.float32)
        next_tile = tile + tl.num_programs(1)
        if ONE_TILE:
            following = load_weights(weight_ptr, next_tile, 0, N, K, num_columns, True, GATED, BLOCK_N, BLOCK_K)
            sums = add_in_threads(x, weights)
            weights = following
        else:
            sums = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
            for k in tl.range(0, K, BLOCK_K):
                is_last = k + BLOCK_K >= K
                following = load_weights(
                    *(weight_ptr, tl.where(is_last, next_tile, tile), tl.where(is_last, 0, k + BLOCK_K)),
                    *(N, K, num_columns, True, GATED, BLOCK_N, BLOCK_K),
                )
                x = tl.load(x_ptr + k + offsets, mask=k + offsets < K, other=0.0)
                sums += add_in_threads(x, weights)
                weights = following
        products = tl.sum(sums, axis=1)
        if bias_ptr is not None:
            products += bias
        if GATED:
            gates, products = tl.split(tl.reshape(products, [BLOCK_N // 2, 2]))
            products *= activated(gates, ACTIVATION)
        else:
            products = activated(products, ACTIVATION)
        if ADD:
            products += residual
        results = products.to(out_ptr.dtype.element_ty)
        if num_run_ptr is None:
            tl.store(out_ptr + columns, results, mask=in_out)
        elif (num_run > 0) | (first_column + BLOCK_N > query_size):
            rows = row + tl.zeros([1], tl.int64)
            store_parts(
                *(results[None, :], rows, rows >= 0, first_column, query_size, key_size, num_run),
                *(out_ptr - row * stride_out_row, k_cache_ptr, v_cache_ptr, slots_ptr, stride_out_row, EVEN_PARTS),
            )


@triton.jit
def find_columns(tile, N, num_columns, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """`[BLOCK_N]`: the rows of weights that make the columns of a tile, and which of them there are."""
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_matrix = columns < num_columns
    if GATED:
        columns = columns // 2 + columns % 2 * N
    return columns.to(tl.int64), in_matrix


@triton.jit
def load_weights(
    weight_ptr,
    tile,
    first_k,
    N,
    K,
    num_columns,
    is_needed,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`[BLOCK_N, BLOCK_K]`: the weights of a tile from first_k on; zeros where there are none, or none are needed."""
    columns, in_matrix = find_columns(tile, N, num_columns, GATED, BLOCK_N)
    offsets = first_k + tl.arange(0, BLOCK_K)
    mask = (in_matrix & is_needed)[:, None] & (offsets < K)[None, :]
    # Past L1, which nothing could be answered from again: so they may be read before the wait.
    return tl.load(weight_ptr + columns[:, None] * K + offsets[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def normalised(x, weight_ptr, bias_ptr, num_columns, eps, RMS: tl.constexpr):
    """The LayerNorm, with RMS the RMSNorm, of the row x, rounded as `norm_rows` rounds it."""
    columns = tl.arange(0, x.shape[0])
    inside = columns < num_columns
    # Read here, not where they are needed: they arrive while the sums are made.
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    centered = x.to(tl.float32)
    if not RMS:
        centered = tl.where(inside, centered - tl.sum(centered, axis=0) / num_columns, 0.0)
    normed = centered / tl.sqrt(tl.sum(centered * centered, axis=0) / num_columns + eps)
    if weight_ptr is not None:
        normed *= weight
    if bias_ptr is not None:
        normed += bias
    return normed.to(x.dtype)


@triton.jit
def add_in_threads(x, weights):
    """`[BLOCK_N, BLOCK_K // 8], float32`: products of weights and x, eight of a thread's added up."""
    products = x.to(tl.float32)[None, :] * weights.to(tl.float32)
    return tl.sum(tl.reshape(products, [weights.shape[0], weights.shape[1] // 8, 8]), axis=2)


def fuses_norm(config: Config, depth: int) -> bool:
    """Whether the kernel can normalise the row, all of which it must hold for that."""
    return bool(config["FUSE_NORM"]) and config["BLOCK_K"] >= depth


def launch_one_row(
    op: str,
    config: Config,
    x: Tensor,
    rows: RowList,
    norm: RowNorm | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    caches: tuple[Any, ...] | None = None,
    activation: str = "none",
    gated: bool = False,
    add: bool = False,
) -> None:
    """Launches the kernel for `op`: `linear_rows`, `qkv_rows` (then with num_run, caches and slots), `linear_add_rows`.

    x: normalised already where norm is None. Sums are float32, in an order of their own.
    """
    num_columns, depth = weight.shape
    block_k = max(min(config["BLOCK_K"], next_power_of_2(depth)), _LEAST_K)
    block_n = max(config["BLOCK_N"], 2) if gated else config["BLOCK_N"]
    norm_weight, norm_bias, eps, rms = norm or RowNorm(None, None, 0.0)
    query_size, key_size = 0, 0
    if caches is not None:
        key_size = caches[1].shape[1] * caches[1].shape[2]
        query_size = num_columns - 2 * key_size
    launch(
        op,
        one_row_kernel,
        (rows.max_rows, min(cdiv(num_columns, block_n), max(_NUM_WARPS // config["num_warps"], 1))),
        (x, rows.ids, rows.num, norm_weight, norm_bias, weight, bias, out, *(caches or [None] * 4)),
        (x.stride(0), out.stride(0), num_columns // 2 if gated else num_columns, depth, query_size, key_size, eps),
        RMS=rms,
        ACTIVATION=activation,
        GATED=gated,
        ADD=add,
        FUSE_NORM=norm is not None,
        EVEN_PARTS=query_size % block_n == 0 and key_size % block_n == 0,
        ONE_TILE=block_k >= depth,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        **pdl_options(config, x.device),
        num_warps=config["num_warps"],
        maxnreg=_MAX_REGISTERS,
    )
