"""Storing new keys and values in the slots of the cache that were given to them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dynskip.kernels.launches import cdiv, launch, next_power_of_2


@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr"])
def kv_store_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    stride_k_row,
    stride_v_row,
    row_size,
    BLOCK_C: tl.constexpr,
):
    """One program for each row and block of its H * D values; a row whose slot is -1 writes nothing."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + row).to(tl.int64)
    if slot < 0:
        return
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < row_size
    k = tl.load(k_ptr + row * stride_k_row + columns, mask=inside)
    v = tl.load(v_ptr + row * stride_v_row + columns, mask=inside)
    tl.store(k_cache_ptr + slot * row_size + columns, k, mask=inside)
    tl.store(v_cache_ptr + slot * row_size + columns, v, mask=inside)


def kv_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row r of `k` and `v` to slot `slot_mapping[r]` of the caches, in place. See `reference.kv_store`.

    Cost: reads and writes 2 * H * D values for each stored row.
    """
    num_rows, num_heads, head_size = k.shape
    row_size = num_heads * head_size
    block = min(next_power_of_2(max(row_size, 1)), 1024)
    launch(
        "kv_store",
        kv_store_kernel,
        (num_rows, cdiv(row_size, block)),
        (k, v, k_cache, v_cache, slot_mapping),
        (k.stride(0), v.stride(0), row_size),
        BLOCK_C=block,
        num_warps=max(block // 256, 1),
    )
