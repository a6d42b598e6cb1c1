"""A gate over rows of a list: does each of them run the layer, or skip it?"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import launch, next_power_of_2
from dynskip.kernels.row_list import RowList


@triton.jit(do_not_specialize_on_alignment=["ids_ptr", "bias_ptr", "active_ptr"])
def gate_rows_kernel(
    x_ptr,
    ids_ptr,
    weight_ptr,
    bias_ptr,
    active_ptr,
    stride_x_row,
    num_columns,
    BLOCK_C: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program a listed row, its columns taken in blocks of fixed size: no other row can change a bit."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    if row < 0:
        return
    skips = tl.zeros([BLOCK_C], tl.float32)
    runs = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, num_columns, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        inside = columns < num_columns
        x = tl.load(x_ptr + row * stride_x_row + columns, mask=inside, other=0.0).to(tl.float32)
        skips += x * tl.load(weight_ptr + columns, mask=inside, other=0.0)
        runs += x * tl.load(weight_ptr + num_columns + columns, mask=inside, other=0.0)
    skip = tl.sum(skips, axis=0)
    run = tl.sum(runs, axis=0)
    if bias_ptr is not None:
        skip += tl.load(bias_ptr)
        run += tl.load(bias_ptr + 1)
    tl.store(active_ptr + row, run >= skip)


def gate_rows(x: Tensor, rows: RowList, weight: Tensor, bias: Tensor | None, active: Tensor) -> None:
    """Writes to `active[row]` whether the row runs. See `row_reference.gate_rows`.

    Logits are float32, and a row's do not depend on the other rows. Cost: reads C values a row and 2 * C of `weight`.
    """
    config = get_config("gate_rows", x.device, x.dtype, rows.max_rows)
    launch(
        "gate_rows",
        gate_rows_kernel,
        (rows.max_rows,),
        (x, rows.ids, weight, bias, active),
        (x.stride(0), x.shape[1]),
        BLOCK_C=min(next_power_of_2(x.shape[1]), 2048),
        num_warps=config["num_warps"],
        **pdl_options(config, x.device),
    )
