"""The Triton kernels on a GPU, or else under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dynskip import ops
from dynskip.kernels.launches import LAUNCHES
from dynskip.kernels.row_list import RowList
from dynskip.ops import reference
from dynskip.ops.backends import available_backends, get_backend
from dynskip.ops.row_ops import ROW_OP_NAMES, get_row_ops, why_not_triton
from dynskip.validation.cases import make_cases
from dynskip.validation.errors import (
    allowed_error,
    eager_attention,
    eager_layer_norm,
    poisoned_allocations,
    to_float64,
)
from dynskip.validation.op_arguments import decode_attention, gather_layer_norm, prefill_attention
from dynskip.validation.tensors import Draw, copy_with_storage
from dynskip.validation.validate import validate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHY_NOT = available_backends(DEVICE)["triton"]
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"triton backend: {WHY_NOT}")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 matrices wrongly")
WHY_NO_PLAN = why_not_triton(torch.device(DEVICE))
has_plan = pytest.mark.skipif(WHY_NO_PLAN is not None, reason=f"plan_rows: {WHY_NO_PLAN}")
ROW_OPS = [pytest.param(name, marks=has_plan) if name == "plan_rows" else name for name in ROW_OP_NAMES]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)]


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def arguments_of(op: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    return next(case for case in make_cases(op, dtype, DEVICE) if name in case.name).copy_arguments()


@runs  # without the mark: `make gpu` has `dynskip validate` for it
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*ops.OP_NAMES, *ROW_OPS])
def test_errors_stay_within_the_budget(op: str, dtype: torch.dtype) -> None:
    results = validate("triton", dtype, progress=False, device=DEVICE, op_names=(op,))
    assert not [result for result in results if not result.passed]


@pytest.mark.gpu
@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    triton = get_backend("triton")
    norm = arguments_of("gather_layer_norm", "strided rows", dtype)
    decode = arguments_of("decode_attention", "ragged contexts", dtype)
    together = triton.gather_layer_norm(*norm.values()), triton.decode_attention(*decode.values())
    for row in range(len(together[0])):
        alone = norm | {"row_ids": norm["row_ids"][row : row + 1]}
        assert torch.equal(triton.gather_layer_norm(*alone.values())[0], together[0][row])
    for row in range(len(together[1])):
        alone = decode | {name: decode[name][row : row + 1] for name in ("q", "seq_ids", "context_lens")}
        assert torch.equal(triton.decode_attention(*alone.values())[0], together[1][row])


@pytest.mark.gpu
@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_the_other_sequences(dtype: torch.dtype) -> None:
    triton = get_backend("triton")
    arguments = arguments_of("prefill_attention", "causal, ragged", dtype)
    together = triton.prefill_attention(*arguments.values())
    starts = arguments["cu_seqlens_q"].tolist()
    for sequence in range(len(starts) - 1):
        rows = slice(starts[sequence], starts[sequence + 1])
        alone = arguments | {name: arguments[name][rows] for name in ("q", "k", "v", "key_limits")}
        alone |= {name: index(0, rows.stop - rows.start) for name in ("cu_seqlens_q", "cu_seqlens_k")}
        assert torch.equal(triton.prefill_attention(*alone.values()), together[rows])


@pytest.mark.gpu
@runs
def test_a_query_does_not_depend_on_the_later_queries_of_its_tile() -> None:
    triton = get_backend("triton")
    arguments = arguments_of("prefill_attention", "causal, ragged", torch.float32)
    last = arguments["cu_seqlens_q"].tolist()[-2:]
    whole = triton.prefill_attention(*arguments.values())[last[0] : last[1]]
    rows = slice(last[0], last[0] + 5)
    part = arguments | {name: arguments[name][rows] for name in ("q", "k", "v", "key_limits")}
    part |= {name: index(0, 5) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    assert torch.equal(triton.prefill_attention(*part.values()), whole[:5])


@pytest.mark.gpu
@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [{}, {"slopes": True}, {"window": 9}, {"slopes": True, "window": 9}], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(4, 2, 16), (3, 1, 40), (2, 2, 64)])
def test_attention_of_other_decoders_stays_within_the_budget(
    num_heads: int, num_kv_heads: int, head_size: int, more: dict[str, Any], dtype: torch.dtype
) -> None:
    """The last query of each op stands so far behind all keys that a window has none for it."""
    draw, seen = Draw(dtype, torch.device(DEVICE)), {"num_kv_heads": num_kv_heads, **more}
    for op, arguments in (
        ("decode_attention", decode_attention(draw, num_heads, head_size, [1, 70, 33], [1, 0, 2, 1], **seen)),
        ("prefill_attention", prefill_attention(draw, num_heads, head_size, [5, 70], strided=True, **seen)),
    ):
        if more:
            arguments["position_ids"][-1] += 1000
        with poisoned_allocations():
            found = getattr(get_backend("triton"), op)(**arguments)
        exact = getattr(reference, op)(**{name: to_float64(argument) for name, argument in arguments.items()})
        allowed = allowed_error(exact, *eager_attention(arguments))
        assert (found.double() - exact).abs().max().item() <= allowed, op
        if "window" in more:
            assert not found[-1].any(), op


@pytest.mark.gpu
@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 97, 768])
def test_rms_norms_of_rows_stay_within_the_budget(num_columns: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype, torch.device(DEVICE))
    for row_ids in (None, draw.row_ids(5, 7), draw.row_ids(0, 7)):
        arguments = gather_layer_norm(draw, draw.strided(7, num_columns), row_ids)
        arguments |= {"rms": True, "bias": arguments["bias"] if row_ids is None else None}
        found = get_backend("triton").gather_layer_norm(**arguments)
        exact = reference.gather_layer_norm(**{name: to_float64(argument) for name, argument in arguments.items()})
        assert found.shape == exact.shape
        if len(exact):
            allowed = allowed_error(exact, *eager_layer_norm(arguments))
            assert (found.double() - exact).abs().max().item() <= allowed


@pytest.mark.gpu
@runs
def test_there_may_be_more_sequences_than_a_program_looks_at_side_by_side() -> None:
    num_sequences = 131
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (num_sequences,), generator=generator)
    starts = [0, *counts.cumsum(0).tolist()]
    q, k, v = torch.randn(3, starts[-1], 1, 16, generator=generator).to(DEVICE).unbind(0)
    ranks = [rank + 1 for count in counts.tolist() for rank in range(count)]
    arguments = (q, k, v, index(*starts), index(*starts), index(*ranks), 0.25)
    attended = get_backend("triton").prefill_attention(*arguments)
    torch.testing.assert_close(attended, reference.prefill_attention(*arguments), rtol=0, atol=1e-5)


@runs
def test_launches_are_counted_and_no_rows_launch_nothing() -> None:
    triton = get_backend("triton")
    LAUNCHES.clear()
    for op, some, none in (
        ("gather_layer_norm", "R=6", "R=0"),
        ("scatter_add", "R=6", "R=0"),
        ("kv_store", "R=6", "R=0"),
        ("decode_attention", "R=6", "R=0"),
        ("prefill_attention", "one sequence", "no sequence"),
    ):
        getattr(triton, op)(*arguments_of(op, none, torch.float32).values())
        assert LAUNCHES[op] == 0
        getattr(triton, op)(*arguments_of(op, some, torch.float32).values())
        getattr(triton, op)(*arguments_of(op, some, torch.float32).values())
        assert LAUNCHES[op] == 2
    assert LAUNCHES.total() == 10


@pytest.mark.gpu
@runs
def test_offsets_beyond_two_to_the_31_elements() -> None:
    """The memory is reserved, not touched: only the few rows used become resident."""
    triton = get_backend("triton")
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided((3, 16), (stride, 1))
    far[2] = torch.arange(16)
    normed = triton.gather_layer_norm(far, index(2), None, None, 1e-5)
    assert torch.equal(normed, triton.gather_layer_norm(far[2:].clone(), None, None, None, 1e-5))
    triton.scatter_add(far, index(2), torch.ones(1, 16, dtype=torch.float16, device=DEVICE))
    assert torch.equal(far[2].cpu(), torch.arange(1, 17).half())

    num_heads, head_size = 128, 128
    slot = 2**31 // (num_heads * head_size) + 3
    cache = torch.empty(slot + 1, num_heads, head_size, dtype=torch.float16, device=DEVICE)
    row = torch.randn(1, num_heads, head_size, dtype=torch.float16, device=DEVICE)
    triton.kv_store(row, row, cache, cache, index(slot))
    assert torch.equal(cache[slot], row[0])
    attended = triton.decode_attention(row, cache, cache, index(slot)[None], index(0), index(1), 1.0)
    assert torch.equal(attended, row)

    keys = far.as_strided((3, 1, 16), (stride, 16, 1))
    keys[:2] = 0
    query = torch.ones(1, 1, 16, dtype=torch.float16, device=DEVICE)
    attended = triton.prefill_attention(query, keys, keys, index(0, 1), index(0, 3), index(3), 1.0)
    assert torch.equal(attended[0, 0].cpu(), torch.arange(1, 17).half())


@pytest.mark.gpu
@runs
def test_slots_beyond_two_to_the_31_elements() -> None:
    """As above: a row is stored behind them, and attended to there."""
    num_heads, head_size = 4, 16
    size = num_heads * head_size
    slot = 2**31 // size + 3
    cache = torch.empty(slot + 1, num_heads, head_size, dtype=torch.float16, device=DEVICE)
    row_ops, rows = get_row_ops("triton"), RowList(index(0), index(1), 1)
    x, q, out, normed = (torch.randn(1, size, device=DEVICE).half() for _ in range(4))
    weight = torch.eye(size, device=DEVICE).half().repeat(3, 1)
    row_ops.qkv_rows(x, rows, index(1), None, weight, None, q, cache, cache, index(slot), normed)
    assert torch.equal(cache[slot].flatten(), x[0]) and torch.equal(q, x)
    sizes: dict[str, Any] = {"max_rows": 1, "num_heads": num_heads, "head_size": head_size, "sizes": [(16, 16)]}
    workspace = row_ops.workspace(**sizes, max_context_len=1, device=DEVICE)
    row_ops.attend_rows(q, rows, cache, cache, index(slot)[None], index(0), index(1), 1.0, out, workspace)
    assert torch.equal(out, x)


@pytest.mark.gpu
@runs
def test_a_view_is_read_in_place() -> None:
    """The interpreter could hide a launcher's copy; the storage of a mutated view could not be."""
    x = arguments_of("scatter_add", "strided x", torch.float32)["x"]
    before = copy_with_storage(x)
    get_backend("triton").scatter_add(x, index(1), torch.ones(1, x.shape[1], device=DEVICE))
    assert torch.equal(x[1], before[1] + 1)
    assert torch.equal(x[2:], before[2:])


@pytest.mark.gpu
@runs
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("prefill_attention", "some queries missing"),
        ("prefill_attention", "queries without keys"),
        ("decode_attention", "no context for one row"),
    ],
)
def test_scores_may_have_any_scale(op: str, case: str, scale: float) -> None:
    """The largest product is then the smallest score, or every key has the same weight."""
    arguments = arguments_of(op, case, torch.float32) | {"scale": scale}
    attended = getattr(get_backend("triton"), op)(*arguments.values())
    exact = getattr(reference, op)(*arguments.values())
    assert torch.allclose(attended, exact, rtol=0, atol=1e-5)
