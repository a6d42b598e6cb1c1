"""The positions of new tokens, written beside the slots that hold their keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.configs import get_config, pdl_options
from dynskip.kernels.launches import cdiv, launch
from dynskip.kernels.row_list import RowList

_BLOCK_R = 128


@triton.jit(
    do_not_specialize=["max_rows"],
    do_not_specialize_on_alignment=["ids_ptr", "slots_ptr", "position_ids_ptr", "slot_positions_ptr"],
)
def place_rows_kernel(
    ids_ptr, slots_ptr, position_ids_ptr, slot_positions_ptr, max_rows, BLOCK_R: tl.constexpr, USE_PDL: tl.constexpr
):
    """One program for BLOCK_R places of the list."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    places = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.load(ids_ptr + places, mask=places < max_rows, other=-1)
    slots = tl.load(slots_ptr + rows, mask=rows >= 0, other=-1)
    positions = tl.load(position_ids_ptr + rows, mask=rows >= 0, other=0)
    tl.store(slot_positions_ptr + slots, positions.to(tl.int32), mask=slots >= 0)


def place_rows(rows: RowList, slots: Tensor, position_ids: Tensor, slot_positions: Tensor) -> None:
    """Writes `position_ids[row]` to `slot_positions[slots[row]]`. See `row_reference.place_rows`.

    Cost: reads 16 bytes a row, writes 4.
    """
    config = get_config("place_rows", slots.device, slot_positions.dtype, rows.max_rows)
    launch(
        "place_rows",
        place_rows_kernel,
        (cdiv(rows.max_rows, _BLOCK_R),),
        (rows.ids, slots, position_ids, slot_positions),
        (rows.max_rows,),
        BLOCK_R=_BLOCK_R,
        num_warps=config["num_warps"],
        **pdl_options(config, slots.device),
    )
