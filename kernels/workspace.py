"""The memory in which programs of one kernel hand partial results to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dynskip.kernels.configs import get_entries
from dynskip.kernels.context_splits import workspace_sizes as attention_workspace
from dynskip.kernels.launches import cdiv
from dynskip.kernels.row_list import Workspace

_DTYPES = (torch.bfloat16, torch.float32)  # one of each size: configs know no other difference


def make_workspace(
    *,
    max_rows: int,
    num_heads: int,
    head_size: int,
    sizes: Sequence[tuple[int, int]],
    max_context_len: int,
    device: torch.device | str,
    num_kv_heads: int | None = None,
) -> Workspace:
    """A workspace on `device` that is large enough for every op, whatever config of the device's table it runs with.

    max_rows: the most rows of a launch. sizes: (N, K) of the matrices of `linear_add_rows`. max_context_len: the most
    cached tokens of a sequence. num_kv_heads: None for as many as there are heads of queries. A table that is put in
    place later may ask for more.
    """
    device = torch.device(device)
    needs = [
        *_linear_add_needs(max_rows, sizes, device),
        attention_workspace(max_rows, num_heads, num_kv_heads or num_heads, head_size, max_context_len, device),
    ]
    return Workspace(
        torch.empty(max(num_floats for num_floats, _ in needs), dtype=torch.float32, device=device),
        torch.zeros(max(num_counters for _, num_counters in needs), dtype=torch.int32, device=device),
    )


def _linear_add_needs(
    max_rows: int, sizes: Sequence[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, int]]:
    """(partial sums, counters) of each config and matrix: one partial tile a program, one counter a tile."""
    for dtype in _DTYPES:
        for deterministic in (False, True):
            for entry in get_entries("linear_add_rows", device, dtype, deterministic):
                config, rows = entry.config, min(max_rows, entry.max_rows or max_rows)
                for num_columns, _ in sizes:
                    num_tiles = cdiv(rows, config["BLOCK_M"]) * cdiv(num_columns, config["BLOCK_N"])
                    yield num_tiles * config["SPLIT_K"] * config["BLOCK_M"] * config["BLOCK_N"], num_tiles
