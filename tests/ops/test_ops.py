"""The checked ops: their results on every backend but Triton (test_kernels.py), their registration, their refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_arguments import arguments_of, index
from torch import Tensor

from dynskip import ops
from dynskip.ops import native, reference, torch_backend
from dynskip.validation.cases import make_cases
from dynskip.validation.validate import validate, validate_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"native backend: {native.unavailable_reason()}"
)
CPU_BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ops.OP_NAMES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_errors_stay_within_the_budget(backend: str, op: str, dtype: torch.dtype) -> None:
    failed = [result for result in validate(backend, dtype, progress=False, op_names=(op,)) if not result.passed]
    assert not failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_that_fill_no_vector_have_the_same_bits_anywhere(dtype: torch.dtype) -> None:
    """Rows of 11 values begin at another place between two vectors each: equal sequences have equal attention."""
    generator = torch.Generator().manual_seed(0)
    num_seqs, num_rows = 4, 9
    q, k, v = (torch.randn(num_rows, 1, 11, dtype=dtype, generator=generator).repeat(num_seqs, 1, 1) for _ in range(3))
    starts, limits = torch.arange(num_seqs + 1) * num_rows, torch.arange(1, num_rows + 1).repeat(num_seqs)
    prompts = torch_backend.prefill_attention(q, k, v, starts, starts, limits, 0.3).chunk(num_seqs)
    slots, lens = torch.arange(num_rows)[None], torch.full((num_seqs,), num_rows)
    steps = torch_backend.decode_attention(q[-1:].repeat(num_seqs, 1, 1), k, v, slots, 0 * lens, lens, 0.3)
    assert all(torch.equal(prompts[0], other) for other in prompts)
    assert all(torch.equal(steps[0], other) for other in steps)
    torch.testing.assert_close(prompts[0][-1].float(), steps[0].float())


ATTENTIONS = ["H=2, D=48", "H=8, G=2, D=64", "H=9, G=3, D=64, slopes", "H=4, G=1, D=128, a window"]


def attention_case(op: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    return next(case for case in make_cases(op, dtype, "cpu") if case.name.startswith(name)).arguments


def slices(arguments: dict[str, Any], names: tuple[str, ...], rows: slice) -> dict[str, Any]:
    return {name: arguments[name][rows] for name in names if arguments[name] is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_of_attention_does_not_depend_on_the_other_rows(backend: str, name: str, dtype: torch.dtype) -> None:
    arguments = attention_case("decode_attention", name, dtype)
    with torch.no_grad(), ops.use_backend(backend):
        together = ops.decode_attention(**arguments)
        for row in torch.randperm(len(together)).tolist():
            alone = slices(arguments, ("q", "seq_ids", "context_lens", "position_ids"), slice(row, row + 1))
            assert torch.equal(ops.decode_attention(**arguments | alone)[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_sequence_of_prefill_does_not_depend_on_the_other_sequences(
    backend: str, name: str, dtype: torch.dtype
) -> None:
    arguments = attention_case("prefill_attention", name, dtype)
    starts = arguments["cu_seqlens_q"].tolist()
    with torch.no_grad(), ops.use_backend(backend):
        together = ops.prefill_attention(**arguments)
        for begin, end in itertools.pairwise(starts):
            names = ("q", "k", "v", "key_limits", "position_ids", "key_positions")
            alone = slices(arguments, names, slice(begin, end))
            lengths = {name: index(0, end - begin) for name in ("cu_seqlens_q", "cu_seqlens_k")}
            assert torch.equal(ops.prefill_attention(**arguments | alone | lengths), together[begin:end])


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_of_a_norm_does_not_depend_on_the_other_rows(backend: str, rms: bool) -> None:
    arguments = next(
        c for c in make_cases("gather_layer_norm", torch.float32, "cpu") if c.name == "strided rows"
    ).arguments | {"rms": rms}
    with torch.no_grad(), ops.use_backend(backend):
        together = ops.gather_layer_norm(**arguments)
        for row, row_id in enumerate(arguments["row_ids"]):
            alone = ops.gather_layer_norm(**arguments | {"row_ids": row_id[None]})
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_is_turned_and_activated_alone_as_among_others(backend: str, dtype: torch.dtype) -> None:
    turned = next(c for c in make_cases("rotate", dtype, "cpu") if c.name == "32 of 128 values, norm, strided rows")
    arguments, x = turned.copy_arguments(), turned.arguments["x"]
    with torch.no_grad(), ops.use_backend(backend):
        ops.rotate(**arguments)
        for row in range(len(x)):
            alone = x[row : row + 1].clone()
            ops.rotate(**arguments | {"x": alone, "position_ids": arguments["position_ids"][row : row + 1]})
            assert torch.equal(alone[0], arguments["x"][row])
        for activation in reference.ACTIVATIONS:
            x = torch.randn(33, 2 * 97).to(dtype)
            for gated in (False, True):
                together = ops.activate(x, activation, gated)
                for row in range(len(x)):
                    assert torch.equal(ops.activate(x[row : row + 1], activation, gated)[0], together[row])


@pytest.mark.parametrize("num_elements", [1, 500])
def test_masks_are_made_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, num_elements: int) -> None:
    monkeypatch.setattr(torch_backend, "_MASK_ELEMENTS", num_elements)
    cases = [case for case in make_cases("prefill_attention", torch.float32, "cpu") if "H=8, G=2" in case.name]
    assert len(cases) == 3 and all(validate_case("torch", torch.float32, case).passed for case in cases)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_activated_rows_have_memory_of_their_own(backend: str) -> None:
    x = torch.ones(2, 8)
    with torch.no_grad(), ops.use_backend(backend):
        for activation in reference.ACTIVATIONS:
            assert ops.activate(x, activation).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_registration(op: str) -> None:
    prefixes = ("all", "strided", "R=1 ", "slopes", "RMS")
    # opcheck itself cannot copy slices of no rows: it takes the size of their storage for negative.
    cases = [case for case in make_cases(op, torch.float32, "cpu") if not case.name.startswith("R=0")]
    chosen = [cases[0], cases[1], cases[-1], *(c for c in cases if c.name.startswith(prefixes))][:8]
    with ops.use_backend("torch"):
        for case in chosen:
            torch.library.opcheck(getattr(torch.ops.dynskip, op).default, tuple(case.copy_arguments().values()))


def test_the_ops_compile_without_graph_breaks() -> None:
    def step(x: Tensor, row_ids: Tensor, weight: Tensor) -> Tensor:
        normed = ops.gather_layer_norm(x, row_ids, weight, None, 1e-5)
        ops.scatter_add(x, row_ids, normed)
        return x * 2

    x, row_ids, weight = torch.randn(5, 8), index(0, 3), torch.randn(8)
    expected_x = x.clone()
    with torch.no_grad(), ops.use_backend("torch"):
        expected = step(expected_x, row_ids, weight)
        assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x, row_ids, weight), expected)
    assert torch.equal(x, expected_x)


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_ops_and_reference_take_the_same_arguments(op: str) -> None:
    with ops.use_backend("torch"):
        arguments = arguments_of(op)
        result = getattr(ops, op)(**arguments)
    expected = arguments_of(op)
    torch.testing.assert_close(result, getattr(reference, op)(**expected))
    for name, argument in expected.items():
        assert not isinstance(argument, Tensor) or torch.equal(argument, arguments[name])


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("gather_layer_norm", "x"),
        ("gather_layer_norm", "weight"),
        ("gather_layer_norm", "bias"),
        ("scatter_add", "x"),
        ("scatter_add", "y"),
        ("kv_store", "k"),
        ("kv_store", "v"),
        ("kv_store", "k_cache"),
        ("kv_store", "v_cache"),
        ("decode_attention", "q"),
        ("decode_attention", "k_cache"),
        ("decode_attention", "v_cache"),
        ("prefill_attention", "q"),
        ("prefill_attention", "k"),
        ("prefill_attention", "v"),
        ("rotate", "x"),
        ("rotate", "cos_sin"),
        ("rotate", "weight"),
        ("activate", "x"),
    ],
)
def test_inputs_that_require_grad_are_refused_with_the_way_out(op: str, name: str) -> None:
    arguments = arguments_of(op)
    arguments[name] = arguments[name].clone().requires_grad_()
    message = rf"{op}: {name} must not require grad, .* under torch\.no_grad\(\), or train through dynskip\.reference"
    with ops.use_backend("torch"):
        with pytest.raises(RuntimeError, match=message):
            getattr(ops, op)(**arguments)
        with torch.no_grad():
            getattr(ops, op)(**arguments)
