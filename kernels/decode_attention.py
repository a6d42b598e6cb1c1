"""Attention of one query a row over cached tokens, each found through a table of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from dynskip.kernels.attend_rows import Bias, launch_attention
from dynskip.kernels.configs import get_config
from dynskip.kernels.context_splits import plan_splits
from dynskip.kernels.row_list import Workspace


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_table: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
    slopes: Tensor | None = None,
    window: int = 0,
    position_ids: Tensor | None = None,
    slot_positions: Tensor | None = None,
) -> Tensor:
    """Returns the attention of each row over its cached tokens: `[R, H, D]`. See `reference.decode_attention`.

    Contexts are split at fixed lengths, so a row's bits do not depend on the other rows. Softmax and sums are float32.
    Cost: for each attended token reads 2 * G * D values, and has 4 * H * D FLOPs.
    """
    num_rows, num_heads, head_size = q.shape
    out = torch.empty((num_rows, num_heads, head_size), dtype=q.dtype, device=q.device)
    config = get_config("attend_rows", q.device, q.dtype, num_rows, deterministic=True)
    splits = plan_splits(
        config, num_rows, num_heads, k_cache.shape[1], head_size, slot_table.shape[1], deterministic=True
    )
    # Where no row can be longer than one split, no program waits for another.
    needs_workspace = splits.num_items > num_rows
    workspace = Workspace(
        torch.empty(splits.num_partials if needs_workspace else 0, dtype=torch.float32, device=q.device),
        torch.zeros(num_rows * splits.num_groups if needs_workspace else 0, dtype=torch.int32, device=q.device),
    )
    bias = Bias(slopes, window, position_ids, slot_positions)
    context = (k_cache, v_cache, slot_table, seq_ids, context_lens)
    launch_attention("decode_attention", config, splits, q, num_rows, *context, scale, out, workspace, bias)
    return out
