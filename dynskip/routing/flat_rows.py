"""The rows of all layers of a step, laid end to end by the device itself: the host only counts them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatRows:
    """The rows that run each layer of a step, layer after layer, each layer's in increasing order.

    row_ids, seq_ids, ranks: [E], int32: the row, its sequence, and how many rows of the same layer and sequence stand
        before it. key_ranks: [E], int32: ranks + 1. layer_ids: [E], int64.
    cu_seqlens: [L, B + 1], int32: where each sequence's rows begin among those of a layer.
    indptr: where each layer's rows begin, and at last E.
    """

    row_ids: Tensor
    seq_ids: Tensor
    ranks: Tensor
    key_ranks: Tensor
    layer_ids: Tensor
    cu_seqlens: Tensor
    indptr: tuple[int, ...]

    @staticmethod
    def of(active: Tensor, seq_ids: Tensor, cu_seqlens: Tensor, device: torch.device) -> FlatRows:
        """The rows with ``active`` ([L, N], bool, on the CPU) on ``device``, which is not waited for.

        seq_ids: [N], int32, and cu_seqlens: [B + 1], int32, of all rows of the step, on the CPU.
        """
        num_layers, num_rows = active.shape
        counts = active.sum(1).tolist()
        indptr = [0]
        for count in counts:
            indptr.append(indptr[-1] + count)
        total = indptr[-1]
        active, seq_ids, cu_seqlens = (tensor.to(device, non_blocking=True) for tensor in (active, seq_ids, cu_seqlens))
        before = torch.zeros((num_layers, num_rows + 1), dtype=torch.int32, device=device)
        torch.cumsum(active, 1, dtype=torch.int32, out=before[:, 1:])
        num_run = before[:, -1].long()
        # Each row that runs has its place; all others share the one behind the last.
        places = before[:, :-1] + (num_run.cumsum(0) - num_run)[:, None]
        places = torch.where(active, places, total).flatten()
        rows = torch.arange(num_rows, dtype=torch.int32, device=device).repeat(num_layers)
        row_ids = torch.empty(total + 1, dtype=torch.int32, device=device).scatter_(0, places, rows)[:total]
        layer_ids = torch.repeat_interleave(num_run, output_size=total)
        starts = before.index_select(1, cu_seqlens)
        chosen_rows = row_ids.long()
        chosen_seqs = seq_ids[chosen_rows]
        ranks = before[layer_ids, chosen_rows] - starts[layer_ids, chosen_seqs.long()]
        return FlatRows(row_ids, chosen_seqs, ranks, ranks + 1, layer_ids, starts, tuple(indptr))
