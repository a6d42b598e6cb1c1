"""The functions of feed-forward layers: of tiles in the kernels that end with one, and of packed rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.launches import cdiv, launch, next_power_of_2

_SQRT_HALF = tl.constexpr(0.7071067811865476)
# tanh-GELU (arXiv 1606.08415): x / 2 * (1 + tanh(u)) with u = sqrt(2 / pi) * (x + 0.044715 * x ** 3), and half of one
# plus tanh(u) is the sigmoid of 2 * u, which needs one exponential and loses nothing where tanh(u) is near -1.
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`x`, float32, through one of `reference.ACTIVATIONS`."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        x = x * sigmoid((x + x * x * x * _CUBIC) * _TWICE_SQRT_2_OVER_PI)
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "none", "activation is one of reference.ACTIVATIONS")
    return x


@triton.jit
def sigmoid(x):
    """1 / (1 + e ** -x), float32, by a power that cannot overflow."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, power, 1.0) / (1.0 + power)


@triton.jit
def activate_kernel(
    x_ptr,
    out_ptr,
    stride_x_row,
    num_columns,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program for each row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < num_columns
    x_ptrs = x_ptr + row * stride_x_row + columns
    x = activated(tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        x *= tl.load(x_ptrs + num_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * num_columns + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """Returns `x` through `activation`, with `gated` its first half so, times its second. See `reference.activate`.

    The function and the product are float32, rounded once. Cost: reads the values of `x` once, writes `[R, F]`.
    """
    num_rows, num_columns = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty((num_rows, num_columns), dtype=x.dtype, device=x.device)
    block = min(next_power_of_2(max(num_columns, 1)), 1024)
    launch(
        "activate",
        activate_kernel,
        (num_rows, cdiv(num_columns, block)),
        (x, out),
        (x.stride(0), num_columns),
        ACTIVATION=activation,
        GATED=gated,
        BLOCK_C=block,
        num_warps=max(block // 256, 1),
    )
    return out
