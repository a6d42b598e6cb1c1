"""The launchers of the C++ extension, for tensors on a CPU. They check what memory safety needs; `ops` checks the rest.

`decode_attention` is native: it reads the cache through the slot table, without a copy, at the speed of memory. The
other four are the torch backend's own functions.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from dynskip.torch_backend import gather_layer_norm, kv_store, prefill_attention, scatter_add

__all__ = [
    "decode_attention",
    "gather_layer_norm",
    "kv_store",
    "prefill_attention",
    "scatter_add",
    "unavailable_reason",
]


@functools.cache
def unavailable_reason() -> str | None:
    """Why the extension cannot be used, and how to get it; None when it is loaded."""
    try:
        importlib.import_module("dynskip._C")  # which registers the ops
    except ImportError as error:
        return (
            f"The C++ extension cannot be loaded ({error}). "
            "Build it: DYNSKIP_BUILD_EXT=1 pip install -v --no-build-isolation -e ."
        )
    return None


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot_table: Tensor, seq_ids: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """See `reference.decode_attention`. Needs D to be a multiple of 16 and `slot_table` to be contiguous.

    Cost: reads 2 * sum(context_lens) * H * D elements once. The bits of one head of one row depend on nothing else.
    """
    return _op()(q, k_cache, v_cache, slot_table, seq_ids, context_lens, scale)


@functools.cache
def _op() -> torch._ops.OpOverload:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"native.decode_attention: the C++ extension must be loaded, got none. {reason}")
    return torch.ops.dynskip_native.decode_attention.default
