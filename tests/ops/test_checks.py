"""What the ops refuse, and what they say then."""

from __future__ import annotations

import re

import pytest
import torch
from op_arguments import arguments_of, index

from dynskip import ops

WRONG: dict[str, list[tuple[str, object, type[Exception], str]]] = {
    "gather_layer_norm": [
        ("x", torch.ones(8), ValueError, "must have shape [N, C], got [8]. Reshape"),
        ("x", [1.0], TypeError, "must be a tensor, got list. Pass a torch.Tensor"),
        ("x", torch.ones(4, 8).double(), TypeError, "must be one of float32, bfloat16, float16, got float64"),
        ("x", torch.ones(8, 4).t(), ValueError, "must be contiguous in its last 1 dimension(s), got strides (1, 4)"),
        ("x", torch.ones(4, 0), ValueError, "must have at least one column, got shape [4, 0]"),
        ("row_ids", torch.tensor([0, 2]), TypeError, "must be int32, got int64. Use row_ids.int()"),
        ("row_ids", index(0, 2)[None], ValueError, "must have shape [R], got [1, 2]"),
        ("row_ids", index(0, 1, 2, 3)[::2], ValueError, "must be contiguous, got strides (2,)"),
        ("row_ids", index(0).to("meta"), ValueError, "must be on cpu like the first argument, got meta"),
        ("weight", torch.ones(7), ValueError, "must have shape [8], got [7]"),
        (
            "bias",
            torch.ones(8).half(),
            TypeError,
            "must be float32 like the first argument, got float16. Use bias.to(torch.float32)",
        ),
        (
            "bias",
            torch.ones(8).to("meta"),
            ValueError,
            "must be on cpu like the first argument, got meta. Use bias.to('cpu')",
        ),
        ("eps", -1.0, ValueError, "must be at least 0, got -1.0"),
    ],
    "scatter_add": [
        ("x", torch.ones(4, 8).int(), TypeError, "must be one of float32, bfloat16, float16, got int32"),
        ("y", torch.ones(3, 8), ValueError, "must have shape [2, 8], got [3, 8]"),
        ("y", torch.ones(2, 8).bfloat16(), TypeError, "must be float32 like the first argument, got bfloat16"),
        ("y", torch.ones(8, 2).t(), ValueError, "must be contiguous in its last 1"),
        ("row_ids", torch.ones(2), TypeError, "must be int32, got float32"),
    ],
    "kv_store": [
        ("k", torch.ones(3, 32), ValueError, "must have shape [R, H, D], got [3, 32]"),
        ("k", torch.ones(3, 16, 2).mT, ValueError, "must be contiguous in its last 2 dimension(s)"),
        ("v", torch.ones(4, 2, 16), ValueError, "must have shape [3, 2, 16], got [4, 2, 16]"),
        ("k_cache", torch.ones(5, 3, 16), ValueError, "must have shape [num_slots, 2, 16], got [5, 3, 16]"),
        ("k_cache", torch.ones(2, 5, 16).transpose(0, 1), ValueError, "must be contiguous, got strides"),
        ("v_cache", torch.ones(4, 2, 16), ValueError, "must have shape [5, 2, 16], got [4, 2, 16]"),
        ("v_cache", torch.ones(5, 2, 16).half(), TypeError, "must be float32 like the first argument"),
        ("slot_mapping", index(1, 2), ValueError, "must have shape [3], got [2]"),
    ],
    "decode_attention": [
        ("slot_table", index(0, 1), ValueError, "must have shape [B, S_max], got [2]"),
        ("slot_table", index(*range(8)).view(2, 4)[:, :2], ValueError, "must be contiguous, got strides (4, 1)"),
        ("seq_ids", index(0), ValueError, "must have shape [3], got [1]"),
        ("context_lens", torch.ones(3).long(), TypeError, "must be int32, got int64"),
        ("k_cache", torch.ones(5, 2, 8), ValueError, "must have shape [num_slots, G, 16], got [5, 2, 8]"),
        (
            "k_cache",
            torch.ones(5, 3, 16),
            ValueError,
            "must have a number of heads that divides the 2 of q, got 3. Each",
        ),
        ("k_cache", torch.ones(5, 0, 16), ValueError, "must have a number of heads that divides the 2 of q, got 0"),
        ("v_cache", torch.ones(5, 1, 16), ValueError, "must have shape [5, 2, 16], got [5, 1, 16]"),
        ("slopes", torch.ones(2).half(), TypeError, "must be float32, got float16. Use slopes.float()"),
        ("slopes", torch.ones(3), ValueError, "must have shape [2], got [3]"),
        ("window", -1, ValueError, "must be at least 0, got -1. Pass 0 for attention without a window"),
        ("position_ids", index(0, 1, 2), TypeError, "must be int64, got int32. Use position_ids.long()"),
        ("position_ids", torch.arange(2), ValueError, "must have shape [3], got [2]"),
        ("slot_positions", torch.arange(5), TypeError, "must be int32, got int64. Use slot_positions.int()"),
        ("slot_positions", index(0), ValueError, "must have shape [5], got [1]"),
    ],
    "prefill_attention": [
        ("k", torch.ones(3, 3, 16), ValueError, "must have a number of heads that divides the 2 of q, got 3. Each"),
        ("k", torch.ones(3, 2, 8), ValueError, "must have shape [S, G, 16], got [3, 2, 8]"),
        ("k", torch.ones(3, 1, 16).half(), TypeError, "must be float32 like the first argument, got float16"),
        ("v", torch.ones(2, 2, 16), ValueError, "must have shape [3, 2, 16], got [2, 2, 16]"),
        ("cu_seqlens_q", index(), ValueError, "must have B + 1 entries, got none. For an empty batch pass [0]"),
        ("cu_seqlens_k", index(0, 3), ValueError, "must have shape [3], got [2]"),
        ("key_limits", index(1, 2), ValueError, "must have shape [3], got [2]"),
        ("slopes", torch.ones(2).to("meta"), ValueError, "must be on cpu like the first argument, got meta"),
        ("window", -3, ValueError, "must be at least 0, got -3"),
        ("position_ids", torch.arange(6)[::2], ValueError, "must be contiguous, got strides (2,)"),
        ("key_positions", torch.ones(3), TypeError, "must be int32, got float32. Use key_positions.int()"),
        ("key_positions", torch.arange(4), ValueError, "must have shape [3], got [4]"),
    ],
    "rotate": [
        ("x", torch.ones(3, 32), ValueError, "must have shape [R, H, D], got [3, 32]"),
        ("x", torch.ones(3, 16, 2).mT, ValueError, "must be contiguous in its last 2 dimension(s)"),
        ("x", torch.ones(3, 2, 16).double(), TypeError, "must be one of float32, bfloat16, float16, got float64"),
        ("position_ids", index(0, 1, 2), TypeError, "must be int64, got int32. Use position_ids.long()"),
        ("position_ids", torch.arange(4), ValueError, "must have shape [3], got [4]"),
        ("cos_sin", torch.ones(5, 16).half(), TypeError, "must be float32, got float16. Use cos_sin.float()"),
        ("cos_sin", torch.ones(16, 5).t(), ValueError, "must be contiguous in its last 1 dimension(s), got strides"),
        ("cos_sin", torch.ones(5, 32)[:, :16], ValueError, "must be contiguous, got strides (32, 1)"),
        (
            "cos_sin",
            torch.ones(5, 7),
            ValueError,
            "must have an even number of columns from 2 to 16, got 7. Pass a cosine",
        ),
        ("cos_sin", torch.ones(5, 18), ValueError, "must have an even number of columns from 2 to 16, got 18"),
        ("cos_sin", torch.ones(5, 0), ValueError, "must have an even number of columns from 2 to 16, got 0"),
        ("weight", torch.ones(8), ValueError, "must have shape [16], got [8]"),
        ("weight", torch.ones(16).half(), TypeError, "must be float32 like the first argument, got float16"),
        ("eps", -1.0, ValueError, "must be at least 0, got -1.0"),
    ],
    "activate": [
        ("x", torch.ones(8), ValueError, "must have shape [R, 2 * F], got [8]"),
        ("x", torch.ones(4, 7), ValueError, "must have an even number of columns with a gate, got 7. Pass the values"),
        ("x", torch.ones(8, 4).t(), ValueError, "must be contiguous in its last 1 dimension(s)"),
        ("x", torch.ones(4, 8).int(), TypeError, "must be one of float32, bfloat16, float16, got int32"),
        (
            "activation",
            "swish",
            ValueError,
            "must be one of none, relu, gelu, gelu_tanh, silu, got 'swish'. Choose one",
        ),
    ],
}


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "message"),
    [
        pytest.param(op, *wrong, id=f"{op}-{wrong[0]}-{number}")
        for op in WRONG
        for number, wrong in enumerate(WRONG[op])
    ],
)
def test_wrong_arguments_are_refused(op: str, name: str, value: object, error: type[Exception], message: str) -> None:
    with ops.use_backend("torch"), pytest.raises(error, match="^" + re.escape(f"{op}: {name} {message}")):
        getattr(ops, op)(**arguments_of(op) | {name: value})


@pytest.mark.parametrize("needs", [{"slopes": torch.ones(2)}, {"window": 4}])
@pytest.mark.parametrize(
    ("op", "keys_name", "num_keys"),
    [("decode_attention", "slot_positions", 5), ("prefill_attention", "key_positions", 3)],
)
def test_slopes_and_windows_need_positions(op: str, keys_name: str, num_keys: int, needs: dict[str, object]) -> None:
    arguments = arguments_of(op) | needs
    with pytest.raises(ValueError, match=f"^{op}: position_ids must be given with slopes or a window, got None. Pass"):
        getattr(ops, op)(**arguments | {keys_name: index(*range(num_keys))})
    with pytest.raises(ValueError, match=f"^{op}: {keys_name} must be given with slopes or a window, got None. Pass"):
        getattr(ops, op)(**arguments | {"position_ids": torch.arange(3)})
    arguments |= {"position_ids": torch.arange(3), keys_name: index(*range(num_keys))}
    with ops.use_backend("torch"):
        assert getattr(ops, op)(**arguments).shape == (3, 2, 16)
