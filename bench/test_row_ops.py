"""Microbenchmarks of the row ops at OPT-1.3B's shapes: `pytest bench/test_row_ops.py`.

On a CPU the specification runs, on a card the kernels as well. Each op is validated on the measured arguments before it
is timed, so a wrong result has no time. On a card a round goes over the weights, or the caches, of 24 layers, which
no L2 holds together; the kernels run as one captured graph, so that no Python is timed. Every line carries the bytes
that one call must move, and the bandwidth that this makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dynskip.models.shapes import SHAPES
from dynskip.ops.backends import available_backends
from dynskip.ops.row_ops import get_row_ops, why_not_triton
from dynskip.tuning.tasks import Task
from dynskip.tuning.workload import Workload
from dynskip.validation.op_arguments import MATRIX_OPS, bind, make_workspace, plan_rows
from dynskip.validation.tensors import Arguments, Case, PlainDraw
from dynskip.validation.validate import validate_row_case

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16
NUM_LAYERS, CONTEXT_LEN = 24, 512
# On a CPU one set of weights is too large for its caches as it is.
CONFIG = replace(SHAPES["opt-1.3b"], num_layers=NUM_LAYERS if HAS_GPU else 1)
ROW_COUNTS = (1, 16, 64, 256) if HAS_GPU else (16,)
ROUNDS, ITERATIONS, WARMUP_ROUNDS = (20, 3, 2) if HAS_GPU else (3, 1, 1)
# The part of a decoder that stands behind each name.
PARTS = {
    "embed_rows": "embed_rows",
    "norm_rows": "norm_rows",
    "linear_rows, fc1": "fc1",
    "qkv_rows": "qkv",
    "attend_rows": "attend_rows",
    "linear_add_rows, out_proj": "out_proj",
    "linear_add_rows, fc2": "fc2",
    "gate_rows": "gate_rows",
    "plan_rows": "plan_rows",
}


def make_layers(part: str, num_listed: int) -> list[Arguments]:
    """The arguments of one call for each layer; `plan_rows` is called once for all."""
    if part != "plan_rows":
        task = Task(MATRIX_OPS.get(part, part), part, num_listed, "bfloat16", CONFIG, CONTEXT_LEN)
        return Workload(task, get_row_ops("reference"), DEVICE).layers
    # Contexts grow by one at each call, and have room for it.
    num_rows, draw = num_listed * 3 // 2, PlainDraw(DTYPE, DEVICE)
    active = torch.rand(NUM_LAYERS, num_rows, device=DEVICE) < 0.5
    context_lens = draw.integers(0, 1, NUM_LAYERS, num_rows)
    free_slots = torch.arange(NUM_LAYERS * num_rows * CONFIG.max_positions, dtype=torch.int32, device=DEVICE)
    return [plan_rows(draw, active, context_lens, free_slots, CONFIG.max_positions)]


def moved_bytes(part: str, num_listed: int) -> int:
    """What one call must move."""
    size = CONFIG.hidden_size
    if part == "plan_rows":
        return 25 * NUM_LAYERS * (num_listed * 3 // 2)
    if part == "gate_rows":
        return num_listed * size * DTYPE.itemsize + 2 * size * torch.float32.itemsize
    num_outputs, num_inputs = CONFIG.layer_matrices.get(part, (0, 0))
    # Rows are read, rows are written; those to which a product is added are read as well.
    num_columns = num_inputs + num_outputs * (2 if MATRIX_OPS.get(part) == "linear_add_rows" else 1)
    num_values = {
        "embed_rows": 3 * num_listed * size,
        "norm_rows": 2 * (num_listed + 1) * size,
        "attend_rows": 2 * num_listed * (CONTEXT_LEN + 1) * size,
    }.get(part, num_outputs * num_inputs + num_listed * num_columns)
    return num_values * DTYPE.itemsize


def implementations() -> list[Any]:
    """Who runs the row ops; those that cannot run here with a reason to skip them."""
    reason = available_backends(DEVICE)["triton"] or why_not_triton(DEVICE)
    reason = reason if HAS_GPU else "Triton kernels are timed on a GPU."
    skip = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")
    return ["reference", pytest.param("triton", marks=skip)]


@pytest.mark.parametrize("num_listed", ROW_COUNTS)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("name", PARTS)
def test_row_op(name: str, implementation: str, num_listed: int, benchmark: Any) -> None:
    torch.manual_seed(0)
    op, part, row_ops = name.partition(",")[0], PARTS[name], get_row_ops(implementation)
    layers = make_layers(part, num_listed)
    result = validate_row_case(row_ops, DTYPE, Case(op, "benchmark", layers[0]))
    assert result.passed, result
    workspace = make_workspace(row_ops, layers[0])
    launches = [bind(row_ops, op, arguments, workspace) for arguments in layers]

    def run() -> None:
        for launch in launches:
            launch()
        if HAS_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {num_listed} rows"
    with torch.no_grad():
        measured = captured(launches) if implementation == "triton" else run
        benchmark.pedantic(measured, rounds=ROUNDS, iterations=ITERATIONS, warmup_rounds=WARMUP_ROUNDS)
    if benchmark.stats is not None:
        seconds, num_bytes = benchmark.stats.stats.median / len(launches), moved_bytes(part, num_listed)
        benchmark.extra_info |= {
            "num_calls": len(launches),
            "us_per_call": seconds * 1e6,
            "num_bytes": num_bytes,
            "bandwidth_gbps": num_bytes / seconds / 1e9,
        }


def captured(launches: list[Callable[[], object]]) -> Callable[[], None]:
    """All calls as one graph; the first run, outside of it, compiles."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
