"""Microbenchmarks of every op on every backend, at OPT-1.3B's shapes: `pytest bench/test_ops.py`.

Each op is validated on the measured arguments before it is timed, so a wrong result has no time. Every line carries the
bytes that the op must move and the bandwidth that this makes; no op here computes enough to be bound by anything else,
but for prefill attention, which carries its FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynskip import ops
from dynskip.ops.backends import BACKEND_NAMES, available_backends, get_backend
from dynskip.validation.tensors import Case
from dynskip.validation.validate import validate_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
NUM_SEQUENCES, NUM_ACTIVE, CONTEXT_LEN, PROMPT_LEN = 32, 16, 512, 64
NUM_HEADS, HEAD_SIZE = 32, 64
HIDDEN_SIZE = NUM_HEADS * HEAD_SIZE


def backend_parameters() -> list[Any]:
    """The backends, those that cannot run here with a reason to skip them."""
    reasons = available_backends(DEVICE)
    if DEVICE == "cpu":
        reasons["triton"] = "Triton kernels are timed on a GPU."
    return [
        pytest.param(name, marks=pytest.mark.skipif(reasons[name] is not None, reason=f"{name}: {reasons[name]}"))
        for name in BACKEND_NAMES
    ]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def index(values: Tensor) -> Tensor:
    return values.to(DEVICE, torch.int32)


def active_rows() -> Tensor:
    return index(torch.randperm(NUM_SEQUENCES)[:NUM_ACTIVE].sort().values)


def gather_layer_norm() -> tuple[dict[str, Any], dict[str, float]]:
    parameters = {"weight": normal(HIDDEN_SIZE), "bias": normal(HIDDEN_SIZE), "eps": 1e-5}
    arguments = {"x": normal(NUM_SEQUENCES, HIDDEN_SIZE), "row_ids": active_rows(), **parameters}
    return arguments, {"values": 2 * (NUM_ACTIVE + 1) * HIDDEN_SIZE}


def scatter_add() -> tuple[dict[str, Any], dict[str, float]]:
    y = normal(NUM_ACTIVE, HIDDEN_SIZE)
    return {"x": normal(NUM_SEQUENCES, HIDDEN_SIZE), "row_ids": active_rows(), "y": y}, {"values": 3 * y.numel()}


def kv_store() -> tuple[dict[str, Any], dict[str, float]]:
    qkv = normal(NUM_ACTIVE, 3, NUM_HEADS, HEAD_SIZE)
    k_cache, v_cache = (normal(4096, NUM_HEADS, HEAD_SIZE) for _ in range(2))
    slots = index(torch.randperm(4096)[:NUM_ACTIVE])
    arguments = {"k": qkv[:, 1], "v": qkv[:, 2], "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots}
    return arguments, {"values": 4 * NUM_ACTIVE * HIDDEN_SIZE}


def decode_attention() -> tuple[dict[str, Any], dict[str, float]]:
    num_slots = NUM_ACTIVE * CONTEXT_LEN
    arguments = {
        "q": normal(NUM_ACTIVE, NUM_HEADS, HEAD_SIZE),
        "k_cache": normal(num_slots, NUM_HEADS, HEAD_SIZE),
        "v_cache": normal(num_slots, NUM_HEADS, HEAD_SIZE),
        "slot_table": index(torch.randperm(num_slots).view(NUM_ACTIVE, CONTEXT_LEN)),
        "seq_ids": index(torch.arange(NUM_ACTIVE)),
        "context_lens": index(torch.full((NUM_ACTIVE,), CONTEXT_LEN)),
        "scale": HEAD_SIZE**-0.5,
    }
    return arguments, {"values": 2 * (num_slots + NUM_ACTIVE) * HIDDEN_SIZE}


def prefill_attention() -> tuple[dict[str, Any], dict[str, float]]:
    num_rows = NUM_ACTIVE * PROMPT_LEN
    q, k, v = normal(num_rows, 3, NUM_HEADS, HEAD_SIZE).unbind(1)
    starts = index(torch.arange(0, num_rows + 1, PROMPT_LEN))
    limits = index(torch.arange(1, PROMPT_LEN + 1).repeat(NUM_ACTIVE))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "key_limits": limits}
    num_pairs = NUM_ACTIVE * PROMPT_LEN * (PROMPT_LEN + 1) // 2
    costs = {"values": 4 * num_rows * HIDDEN_SIZE, "flops": 4 * num_pairs * HIDDEN_SIZE}
    return arguments | {"scale": HEAD_SIZE**-0.5}, costs


MAKERS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, float]]]] = {
    "gather_layer_norm": gather_layer_norm,
    "scatter_add": scatter_add,
    "kv_store": kv_store,
    "decode_attention": decode_attention,
    "prefill_attention": prefill_attention,
}


@pytest.mark.parametrize("backend", backend_parameters())
@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_op(op: str, backend: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    arguments, costs = MAKERS[op]()
    result = validate_case(backend, DTYPE, Case(op, "benchmark", arguments))
    assert result.passed, result
    launcher = getattr(get_backend(backend), op)

    def run() -> None:
        launcher(*arguments.values())
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op
    with torch.no_grad():
        benchmark.pedantic(run, rounds=20, iterations=3, warmup_rounds=2)
    num_bytes = costs["values"] * DTYPE.itemsize
    if benchmark.stats is not None:
        median_s = benchmark.stats.stats.median
        benchmark.extra_info |= {"num_bytes": num_bytes, "bandwidth_gbps": num_bytes / median_s / 1e9}
        if "flops" in costs:
            benchmark.extra_info["gflops"] = costs["flops"] / median_s / 1e9
