"""Right arguments of every op, for tests that make one of them wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments_of(op: str) -> dict[str, Any]:
    """Right arguments of every op, to make one of them wrong."""
    rows = torch.ones(3, 2, 16)
    cache = torch.ones(5, 2, 16)
    return {
        "gather_layer_norm": {
            "x": torch.ones(4, 8),
            "row_ids": index(0, 2),
            "weight": torch.ones(8),
            "bias": torch.ones(8),
            "eps": 1e-5,
        },
        "scatter_add": {"x": torch.ones(4, 8), "row_ids": index(0, 2), "y": torch.ones(2, 8)},
        "kv_store": {"k": rows, "v": rows, "k_cache": cache, "v_cache": cache.clone(), "slot_mapping": index(0, 1, 2)},
        "decode_attention": {
            "q": rows,
            "k_cache": cache,
            "v_cache": cache,
            "slot_table": index(0, 1, 2, 3).view(2, 2),
            "seq_ids": index(0, 1, 1),
            "context_lens": index(1, 2, 1),
            "scale": 0.25,
        },
        "prefill_attention": {
            "q": rows,
            "k": rows,
            "v": rows,
            "cu_seqlens_q": index(0, 1, 3),
            "cu_seqlens_k": index(0, 1, 3),
            "key_limits": index(1, 1, 2),
            "scale": 0.25,
        },
        "rotate": {
            "x": rows.clone(),
            "position_ids": torch.tensor([0, 4, 2]),
            "cos_sin": torch.ones(5, 16),
            "weight": torch.ones(16),
            "eps": 1e-6,
        },
        "activate": {"x": torch.ones(4, 8), "activation": "silu", "gated": True},
    }[op]
