"""Embeddings of the rows of a list: where a decode step begins."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import cdiv, launch, next_power_of_2
from dynskip.kernels.row_list import RowList


@triton.jit(
    do_not_specialize=["position_offset"],
    do_not_specialize_on_alignment=["token_ids_ptr", "position_ids_ptr", "ids_ptr"],
)
def embed_rows_kernel(
    token_ids_ptr,
    position_ids_ptr,
    ids_ptr,
    token_table_ptr,
    position_table_ptr,
    out_ptr,
    position_offset,
    stride_token,
    stride_position,
    stride_out_row,
    num_columns,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program for each listed row and block of columns."""
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < num_columns
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    token = tl.load(token_ids_ptr + row) * stride_token
    if position_table_ptr is not None:
        position = (tl.load(position_ids_ptr + row) + position_offset) * stride_position
    embedded = tl.load(token_table_ptr + token + columns, mask=inside, other=0.0).to(tl.float32)
    if position_table_ptr is not None:
        embedded += tl.load(position_table_ptr + position + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out_row + columns, embedded.to(out_ptr.dtype.element_ty), mask=inside)


def embed_rows(
    token_ids: Tensor,
    position_ids: Tensor,
    rows: RowList,
    token_table: Tensor,
    position_table: Tensor | None,
    position_offset: int,
    out: Tensor,
) -> None:
    """Writes to `out[row]` the row's embedding, or the sum of its two. See `row_reference.embed_rows`.

    The sum is float32, rounded once. Cost: reads C values a row, or 2 * C, and writes C.
    """
    num_columns = out.shape[1]
    stride_position = 0 if position_table is None else position_table.stride(0)
    config = get_config("embed_rows", out.device, out.dtype, rows.max_rows)
    block = min(next_power_of_2(num_columns), 1024)
    launch(
        "embed_rows",
        embed_rows_kernel,
        (rows.max_rows, cdiv(num_columns, block)),
        (token_ids, position_ids, rows.ids, token_table, position_table, out),
        (position_offset, token_table.stride(0), stride_position, out.stride(0), num_columns),
        BLOCK_C=block,
        num_warps=config["num_warps"],
        **pdl_options(config, out.device),
    )
