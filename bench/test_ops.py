"""Microbenchmarks of every op on every backend, at OPT-1.3B's shapes: `pytest bench/test_ops.py`.

Each op is validated on the measured arguments before it is timed, so a wrong result has no time. Every line carries the
bytes that the op must move and the bandwidth that this makes; no op here computes enough to be bound by anything else,
but for prefill attention, which carries its FLOPs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dynskip import ops
from dynskip.ops.backends import BACKEND_NAMES, available_backends, get_backend
from dynskip.validation.op_arguments import decode_attention, gather_layer_norm, kv_store, prefill_attention, rotate
from dynskip.validation.tensors import Arguments, Case, PlainDraw
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


def make_arguments(op: str) -> Arguments:
    """Half of the sequences run the layer."""
    draw = PlainDraw(DTYPE, torch.device(DEVICE))
    heads, row_ids = (NUM_HEADS, HEAD_SIZE), draw.row_ids(NUM_ACTIVE, NUM_SEQUENCES)
    if op == "gather_layer_norm":
        return gather_layer_norm(draw, draw.normal(NUM_SEQUENCES, HIDDEN_SIZE), row_ids)
    if op == "scatter_add":
        return {
            "x": draw.normal(NUM_SEQUENCES, HIDDEN_SIZE),
            "row_ids": row_ids,
            "y": draw.normal(NUM_ACTIVE, HIDDEN_SIZE),
        }
    if op == "kv_store":
        return kv_store(draw, *heads, draw.permutation(4096)[:NUM_ACTIVE], num_slots=4096)
    if op == "decode_attention":
        return decode_attention(draw, *heads, [CONTEXT_LEN] * NUM_ACTIVE, list(range(NUM_ACTIVE)))
    if op == "rotate":
        return rotate(draw, draw.normal(NUM_ACTIVE, *heads), num_positions=CONTEXT_LEN, weight=True)
    if op == "activate":
        return {"x": draw.normal(NUM_ACTIVE, 8 * HIDDEN_SIZE), "activation": "silu", "gated": True}
    return prefill_attention(draw, *heads, [PROMPT_LEN] * NUM_ACTIVE, strided=True)


# Values that an op must move.
NUM_VALUES = {
    "gather_layer_norm": 2 * (NUM_ACTIVE + 1) * HIDDEN_SIZE,
    "scatter_add": 3 * NUM_ACTIVE * HIDDEN_SIZE,
    "kv_store": 4 * NUM_ACTIVE * HIDDEN_SIZE,
    "decode_attention": 2 * NUM_ACTIVE * (CONTEXT_LEN + 1) * HIDDEN_SIZE,
    "prefill_attention": 4 * NUM_ACTIVE * PROMPT_LEN * HIDDEN_SIZE,
    "rotate": 2 * NUM_ACTIVE * HIDDEN_SIZE,
    "activate": 12 * NUM_ACTIVE * HIDDEN_SIZE,
}
PREFILL_FLOPS = 4 * (NUM_ACTIVE * PROMPT_LEN * (PROMPT_LEN + 1) // 2) * HIDDEN_SIZE


@pytest.mark.parametrize("backend", backend_parameters())
@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_op(op: str, backend: str, benchmark: Any) -> None:
    torch.manual_seed(0)
    arguments = make_arguments(op)
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
    num_bytes = NUM_VALUES[op] * DTYPE.itemsize
    if benchmark.stats is not None:
        median_s = benchmark.stats.stats.median
        benchmark.extra_info |= {"num_bytes": num_bytes, "bandwidth_gbps": num_bytes / median_s / 1e9}
        if op == "prefill_attention":
            benchmark.extra_info["gflops"] = PREFILL_FLOPS / median_s / 1e9
