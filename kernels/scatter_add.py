"""Addition of packed rows to the rows they came from."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.launches import cdiv, launch, next_power_of_2


@triton.jit(do_not_specialize_on_alignment=["row_ids_ptr"])
def scatter_add_kernel(x_ptr, row_ids_ptr, y_ptr, stride_x_row, stride_y_row, num_columns, BLOCK_C: tl.constexpr):
    """One program for each row and block of columns. No two programs meet, since the row ids are distinct."""
    y_row = tl.program_id(0).to(tl.int64)
    row = y_row
    if row_ids_ptr is not None:
        row = tl.load(row_ids_ptr + y_row).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < num_columns
    x_ptrs = x_ptr + row * stride_x_row + columns
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + y_row * stride_y_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptrs, (x + y).to(x_ptr.dtype.element_ty), mask=inside)


def scatter_add(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
    """Adds row r of `y` to row `row_ids[r]` of `x`, in place. See `reference.scatter_add`.

    The sum is float32, rounded once. Cost: reads 2 * R * C values, writes R * C.
    """
    num_rows, num_columns = y.shape
    block = min(next_power_of_2(max(num_columns, 1)), 1024)
    launch(
        "scatter_add",
        scatter_add_kernel,
        (num_rows, cdiv(num_columns, block)),
        (x, row_ids, y),
        (x.stride(0), y.stride(0), num_columns),
        BLOCK_C=block,
        num_warps=max(block // 256, 1),
    )
