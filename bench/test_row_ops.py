"""Microbenchmarks of the row ops at OPT-1.3B's shapes: `pytest bench/test_row_ops.py`.

On a CPU the specification runs, on a card the kernels as well. Each op is validated on the measured arguments before it
is timed, so a wrong result has no time. On a card a round goes over the weights, or the caches, of 24 layers, which
no L2 holds together; the kernels run as one captured graph, so that nobody times Python. Every line carries the bytes
that one call must move, and the bandwidth that this makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dynskip.kernels.row_list import RowList, RowNorm
from dynskip.ops.backends import available_backends
from dynskip.ops.row_ops import get_row_ops, why_not_triton
from dynskip.ops.row_reference import EVICT
from dynskip.validation.tensors import Case
from dynskip.validation.validate_rows import validate_row_case

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16
NUM_LAYERS, NUM_HEADS, HEAD_SIZE, CONTEXT_LEN, VOCAB_SIZE = 24, 32, 64, 512, 50272
HIDDEN_SIZE = NUM_HEADS * HEAD_SIZE
FFN_SIZE = 4 * HIDDEN_SIZE
# Two rows of three run a layer. On a CPU one set of weights is too large for its caches as it is.
ROW_COUNTS = (1, 16, 64, 256) if HAS_GPU else (16,)
NUM_SETS = NUM_LAYERS if HAS_GPU else 1
ROUNDS, ITERATIONS, WARMUP_ROUNDS = (20, 3, 2) if HAS_GPU else (3, 1, 1)


@dataclass
class Work:
    """The arguments of one call for each layer, and the bytes that one call moves."""

    layers: list[tuple[Any, ...]]
    num_bytes: float


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, device=DEVICE, dtype=DTYPE).normal_(0, scale)


def weights(*shape: int) -> list[Tensor]:
    """Matrices or tables, one a layer, so that products with unit rows are about 1."""
    return [normal(*shape, scale=shape[-1] ** -0.5) for _ in range(NUM_SETS)]


def integers(values: Tensor) -> Tensor:
    return values.to(DEVICE, torch.int32)


def row_list(num_listed: int) -> RowList:
    num_rows = num_listed * 3 // 2
    listed = torch.randperm(num_rows)[:num_listed].sort().values
    ids = torch.full((num_rows,), -1)
    ids[:num_listed] = listed
    return RowList(integers(ids), integers(torch.tensor([num_listed])), num_listed)


def norm() -> RowNorm:
    return RowNorm(normal(HIDDEN_SIZE), normal(HIDDEN_SIZE), 1e-5)


def moved(*num_values: int) -> float:
    return sum(num_values) * DTYPE.itemsize


def embed_rows(num_listed: int) -> Work:
    rows = row_list(num_listed)
    num_rows = rows.ids.shape[0]
    token_ids = torch.randint(VOCAB_SIZE, (num_rows,), device=DEVICE)
    position_ids = torch.randint(2048, (num_rows,), device=DEVICE)
    tables, positions, out = normal(VOCAB_SIZE, HIDDEN_SIZE), normal(2050, HIDDEN_SIZE), normal(num_rows, HIDDEN_SIZE)
    call = (token_ids, position_ids, rows, tables, positions, 2, out)
    return Work([call] * NUM_SETS, moved(3 * num_listed * HIDDEN_SIZE))


def norm_rows(num_listed: int) -> Work:
    rows = row_list(num_listed)
    x, out = (normal(rows.ids.shape[0], HIDDEN_SIZE) for _ in range(2))
    return Work([(x, rows, norm(), out) for _ in range(NUM_SETS)], moved(2 * (num_listed + 1) * HIDDEN_SIZE))


def linear_rows(num_listed: int) -> Work:
    rows = row_list(num_listed)
    num_rows = rows.ids.shape[0]
    x, out, normed = normal(num_rows, HIDDEN_SIZE), normal(num_rows, FFN_SIZE), normal(num_rows, HIDDEN_SIZE)
    calls = [
        (x, rows, norm(), weight, normal(FFN_SIZE), True, out, normed, False)
        for weight in weights(FFN_SIZE, HIDDEN_SIZE)
    ]
    return Work(calls, moved(FFN_SIZE * HIDDEN_SIZE, num_listed * (HIDDEN_SIZE + FFN_SIZE)))


def qkv_rows(num_listed: int) -> Work:
    rows = row_list(num_listed)
    num_rows = rows.ids.shape[0]
    x, q, normed = (normal(num_rows, HIDDEN_SIZE) for _ in range(3))
    caches = [normal(2 * num_rows, NUM_HEADS, HEAD_SIZE) for _ in range(2)]
    slots = integers(torch.randperm(2 * num_rows)[:num_rows])
    calls = [
        (x, rows, rows.num, norm(), weight, normal(3 * HIDDEN_SIZE), q, *caches, slots, normed, False)
        for weight in weights(3 * HIDDEN_SIZE, HIDDEN_SIZE)
    ]
    return Work(calls, moved(3 * HIDDEN_SIZE * HIDDEN_SIZE, 4 * num_listed * HIDDEN_SIZE))


def attend_rows(num_listed: int) -> Work:
    rows = row_list(num_listed)
    num_rows = rows.ids.shape[0]
    num_slots = num_rows * CONTEXT_LEN
    q, out = (normal(num_rows, HIDDEN_SIZE) for _ in range(2))
    lookup = (
        integers(torch.randperm(num_slots).view(num_rows, CONTEXT_LEN)),
        integers(torch.randperm(num_rows)),
        integers(torch.full((num_rows,), CONTEXT_LEN)),
    )
    # What the rows of one layer attend to is larger than an L2 from 64 rows on.
    num_caches = NUM_SETS if num_listed < 64 else min(NUM_SETS, 2)
    caches = [[normal(num_slots, NUM_HEADS, HEAD_SIZE) for _ in range(2)] for _ in range(num_caches)]
    calls = [
        (q, rows, *caches[layer % num_caches], *lookup, HEAD_SIZE**-0.5, out, None, False) for layer in range(NUM_SETS)
    ]
    return Work(calls, moved(2 * num_listed * (CONTEXT_LEN + 1) * HIDDEN_SIZE))


def linear_add_rows(num_listed: int, num_inputs: int = FFN_SIZE) -> Work:
    rows = row_list(num_listed)
    x, residual = normal(rows.ids.shape[0], num_inputs), normal(rows.ids.shape[0], HIDDEN_SIZE)
    calls = [
        (x, rows, weight, normal(HIDDEN_SIZE), residual, None, False) for weight in weights(HIDDEN_SIZE, num_inputs)
    ]
    return Work(calls, moved(HIDDEN_SIZE * num_inputs, num_listed * (num_inputs + 2 * HIDDEN_SIZE)))


def out_projection(num_listed: int) -> Work:
    return linear_add_rows(num_listed, HIDDEN_SIZE)


def gate_rows(num_listed: int) -> Work:
    rows = row_list(num_listed)
    num_rows = rows.ids.shape[0]
    x, active = normal(num_rows, HIDDEN_SIZE), torch.zeros(num_rows, dtype=torch.bool, device=DEVICE)
    # A gate says run or skip by a wide margin, so that no rounding decides.
    calls = []
    for _ in range(NUM_SETS):
        weight = torch.randn(2, HIDDEN_SIZE, device=DEVICE)
        weight[1] = weight[0] + 4 * x[rows.ids[0].long()].float().sign()
        calls.append((x, rows, weight, torch.tensor([0.5, -0.5], device=DEVICE), active))
    return Work(calls, moved(num_listed * HIDDEN_SIZE) + calls[0][2].nbytes)


def plan_rows(num_listed: int) -> Work:
    """All layers in one call; contexts grow by one at each, and have room for it."""
    num_rows, max_context_len = num_listed * 3 // 2, 2048

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=DEVICE)

    active = torch.rand(NUM_LAYERS, num_rows, device=DEVICE) < 0.5
    cache_ids = integers(torch.randperm(num_rows))
    tables = empty(NUM_LAYERS, num_rows, max_context_len)
    free_slots = integers(torch.arange(tables.numel()))
    cache = (empty(NUM_LAYERS, num_rows), tables, free_slots, empty(1), empty(num_rows))
    plan = [(empty(NUM_LAYERS, num_rows), empty(NUM_LAYERS)) for _ in range(2)]
    ends = (empty(NUM_LAYERS, num_rows), empty(NUM_LAYERS, num_rows))
    call = (active, 0, EVICT, cache_ids, *cache, *plan[0], *plan[1], *ends)
    return Work([call], 25 * NUM_LAYERS * num_rows)


MAKERS: dict[str, tuple[str, Callable[[int], Work]]] = {
    "embed_rows": ("embed_rows", embed_rows),
    "norm_rows": ("norm_rows", norm_rows),
    "linear_rows, fc1": ("linear_rows", linear_rows),
    "qkv_rows": ("qkv_rows", qkv_rows),
    "attend_rows": ("attend_rows", attend_rows),
    "linear_add_rows, out_proj": ("linear_add_rows", out_projection),
    "linear_add_rows, fc2": ("linear_add_rows", linear_add_rows),
    "gate_rows": ("gate_rows", gate_rows),
    "plan_rows": ("plan_rows", plan_rows),
}


def implementations() -> list[Any]:
    """Who runs the row ops; those that cannot run here with a reason to skip them."""
    reason = available_backends(DEVICE)["triton"] or why_not_triton(DEVICE)
    reason = reason if HAS_GPU else "Triton kernels are timed on a GPU."
    skip = pytest.mark.skipif(reason is not None, reason=f"triton: {reason}")
    return ["reference", pytest.param("triton", marks=skip)]


@pytest.mark.parametrize("num_listed", ROW_COUNTS)
@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("name", MAKERS)
def test_row_op(name: str, implementation: str, num_listed: int, benchmark: Any) -> None:
    torch.manual_seed(0)
    op, make = MAKERS[name]
    work, row_ops = make(num_listed), get_row_ops(implementation)
    arguments = named(op, work.layers[0])
    result = validate_row_case(row_ops, DTYPE, Case(op, "benchmark", arguments))
    assert result.passed, result

    layers = work.layers
    if "workspace" in arguments:
        place = list(arguments).index("workspace")
        workspace = make_workspace(row_ops, arguments)
        layers = [(*layer[:place], workspace, *layer[place + 1 :]) for layer in layers]
    launcher = getattr(row_ops, op)

    def run() -> None:
        for layer in layers:
            launcher(*layer)
        if HAS_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{name}, {num_listed} rows"
    with torch.no_grad():
        measured = captured(launcher, layers) if implementation == "triton" else run
        benchmark.pedantic(measured, rounds=ROUNDS, iterations=ITERATIONS, warmup_rounds=WARMUP_ROUNDS)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / len(layers)
        benchmark.extra_info |= {
            "num_calls": len(layers),
            "us_per_call": seconds * 1e6,
            "num_bytes": work.num_bytes,
            "bandwidth_gbps": work.num_bytes / seconds / 1e9,
        }


def named(op: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of `op` by the names that the specification gives them."""
    from dynskip.ops import row_reference

    code = getattr(row_reference, op).__code__
    names = code.co_varnames[: code.co_argcount]
    return dict(zip(names, arguments, strict=True))


def make_workspace(row_ops: Any, arguments: dict[str, Any]) -> Any:
    return row_ops.workspace(
        max_rows=arguments["rows"].ids.shape[0],
        num_heads=NUM_HEADS,
        head_size=HEAD_SIZE,
        sizes=[(HIDDEN_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, FFN_SIZE)],
        max_context_len=CONTEXT_LEN,
        device=DEVICE,
    )


def captured(launcher: Callable[..., None], layers: list[tuple[Any, ...]]) -> Callable[[], None]:
    """All calls as one graph; the first run, outside of it, compiles."""
    for layer in layers:
        launcher(*layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            launcher(*layer)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
