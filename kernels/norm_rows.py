"""LayerNorm or RMSNorm of listed rows, in place of theirs or packed: a row is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import launch, next_power_of_2
from dynskip.kernels.row_list import RowList, RowNorm


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def norm_rows_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_x_row,
    stride_out_row,
    num_columns,
    eps,
    RMS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program a row; those behind the end of the list end at once. PACKED: results stand in the list's order."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    row = place
    if ids_ptr is not None:
        row = tl.load(ids_ptr + place).to(tl.int64)
        if row < 0:
            return
    if PACKED:
        out_ptr += (place - row) * stride_out_row
    # A tile of one row, so that rows have one way to be normalised.
    normalise_rows(
        *(x_ptr, row + tl.zeros([1], tl.int64), tl.full([1], True, tl.int1), stride_x_row),
        *(weight_ptr, bias_ptr, out_ptr, stride_out_row, num_columns, eps),
        *(RMS, BLOCK_C, True),
    )


@triton.jit
def normalise_rows(
    x_ptr,
    rows,
    is_row,
    stride_x_row,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_out_row,
    num_columns,
    eps,
    RMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
):
    """Writes to the `rows` of out the LayerNorm, with RMS the RMSNorm, of the `rows` of x, BLOCK_C columns at a time.

    ONE_CHUNK: BLOCK_C columns are all; they stay in registers, and are read once, before any is written.
    """
    BLOCK_R: tl.constexpr = rows.shape[0]
    columns = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + rows[:, None] * stride_x_row + columns[None, :]
    out_ptrs = out_ptr + rows[:, None] * stride_out_row + columns[None, :]
    if ONE_CHUNK:
        inside = (columns < num_columns)[None, :]
        mask = is_row[:, None] & inside
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        # Read here, not where they are needed: they arrive while the sums are made.
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        if RMS:
            centered = x
        else:
            mean = tl.sum(x, axis=1) / num_columns
            centered = tl.where(inside, x - mean[:, None], 0.0)
        variance = tl.sum(centered * centered, axis=1) / num_columns
        normed = centered / tl.sqrt(variance + eps)[:, None]
        if weight_ptr is not None:
            normed *= weight[None, :]
        if bias_ptr is not None:
            normed += bias[None, :]
        tl.store(out_ptrs, normed.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        # Each chunk has a mean and squares about that mean, put together by the formula of Chan, Golub and LeVeque
        # (1983, "Algorithms for computing the sample variance"): no difference of large squares.
        mean = tl.zeros([BLOCK_R], tl.float32)
        squares = tl.zeros([BLOCK_R], tl.float32)
        seen = 0.0
        for start in range(0, num_columns, BLOCK_C):
            inside = (start + columns < num_columns)[None, :]
            x = tl.load(x_ptrs + start, mask=is_row[:, None] & inside, other=0.0).to(tl.float32)
            if RMS:
                squares += tl.sum(x * x, axis=1)
            else:
                size = tl.minimum(num_columns - start, BLOCK_C).to(tl.float32)
                chunk_mean = tl.sum(x, axis=1) / size
                centered = tl.where(inside, x - chunk_mean[:, None], 0.0)
                difference = chunk_mean - mean
                total = seen + size
                mean += difference * (size / total)
                squares += tl.sum(centered * centered, axis=1) + difference * difference * (seen * size / total)
                seen = total
        deviation = tl.sqrt(squares / num_columns + eps)
        for start in range(0, num_columns, BLOCK_C):
            in_row = start + columns < num_columns
            mask = is_row[:, None] & in_row[None, :]
            x = tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32)
            if RMS:
                normed = x / deviation[:, None]
            else:
                normed = (x - mean[:, None]) / deviation[:, None]
            if weight_ptr is not None:
                normed *= tl.load(weight_ptr + start + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
            if bias_ptr is not None:
                normed += tl.load(bias_ptr + start + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
            tl.store(out_ptrs + start, normed.to(out_ptr.dtype.element_ty), mask=mask)


def norm_rows(x: Tensor, rows: RowList, norm: RowNorm, out: Tensor, deterministic: bool = False) -> None:
    """Writes the norm of `x[row]` to `out[row]`, which may be the same. See `row_reference.norm_rows`.

    Statistics are float32. Cost: reads R * C values and the parameters, writes R * C.
    """
    config = get_config("norm_rows", x.device, x.dtype, rows.max_rows, None, deterministic)
    # A thread holds 32 values at most: more of a long row would leave it without registers.
    num_warps = max(config["num_warps"], min(next_power_of_2(x.shape[1]) // 1024, 16))
    options = pdl_options(config, x.device)
    _launch("norm_rows", x, rows.ids, rows.max_rows, norm, out, PACKED=False, num_warps=num_warps, **options)


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
) -> Tensor:
    """Returns the norm of the chosen rows of `x`: `[R, C]`, dtype of `x`. See `reference.gather_layer_norm`.

    Statistics are float32. Cost: reads R * C values and the parameters, writes R * C.
    """
    num_rows = x.shape[0] if row_ids is None else row_ids.shape[0]
    out = torch.empty((num_rows, x.shape[1]), dtype=x.dtype, device=x.device)
    num_warps = min(max(next_power_of_2(x.shape[1]) // 512, 1), 16)
    norm = RowNorm(weight, bias, eps, rms)
    _launch("gather_layer_norm", x, row_ids, num_rows, norm, out, PACKED=True, num_warps=num_warps, USE_PDL=False)
    return out


def _launch(
    op: str, x: Tensor, ids: Tensor | None, num_programs: int, norm: RowNorm, out: Tensor, **options: bool | int
) -> None:
    launch(
        op,
        norm_rows_kernel,
        (num_programs,),
        (x, ids, norm.weight, norm.bias, out),
        (x.stride(0), out.stride(0), x.shape[1], norm.eps),
        RMS=norm.rms,
        BLOCK_C=next_power_of_2(x.shape[1]),
        **options,
    )
