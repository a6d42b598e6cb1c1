"""Gather and LayerNorm, or RMSNorm, in one kernel: a chosen row is read once and written once, normalised."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.launches import launch


@triton.jit(do_not_specialize_on_alignment=["row_ids_ptr"])
def gather_layer_norm_kernel(
    x_ptr,
    row_ids_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_x_row,
    num_columns,
    eps,
    RMS: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a row; the row stays in registers between the two passes over it."""
    out_row = tl.program_id(0).to(tl.int64)
    row = out_row
    if HAS_ROW_IDS:
        row = tl.load(row_ids_ptr + out_row).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < num_columns
    x = tl.load(x_ptr + row * stride_x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if RMS:
        centered = x
    else:
        mean = tl.sum(x, axis=0) / num_columns
        centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, axis=0) / num_columns
    normed = centered / tl.sqrt(variance + eps)
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_row * num_columns + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


def gather_layer_norm(
    x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
) -> Tensor:
    """Returns the norm of the chosen rows of `x`: `[R, C]`, dtype of `x`. See `reference.gather_layer_norm`.

    Statistics are float32. Cost: reads R * C values and the parameters, writes R * C.
    """
    num_columns = x.shape[1]
    num_rows = x.shape[0] if row_ids is None else row_ids.shape[0]
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(num_columns)
    launch(
        "gather_layer_norm",
        gather_layer_norm_kernel,
        (num_rows,),
        x.device,
        x,
        row_ids,
        weight,
        bias,
        out,
        x.stride(0),
        num_columns,
        eps,
        RMS=rms,
        HAS_ROW_IDS=row_ids is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_C=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out
