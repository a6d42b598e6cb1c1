"""The ops of a step. Public are the checked ops and `use_backend`; `dynskip.ops.reference` specifies them."""

from dynskip.ops.backends import OP_NAMES
from dynskip.ops.checked import (
    activate,
    current_backend,
    decode_attention,
    gather_layer_norm,
    kv_store,
    prefill_attention,
    rotate,
    scatter_add,
    use_backend,
)

__all__ = [
    "OP_NAMES",
    "activate",
    "current_backend",
    "decode_attention",
    "gather_layer_norm",
    "kv_store",
    "prefill_attention",
    "rotate",
    "scatter_add",
    "use_backend",
]
