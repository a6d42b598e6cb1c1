"""The validation itself: that it passes what is right and notices each way of being wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dynskip import cli, ops
from dynskip.cli.options import DTYPES
from dynskip.kernels.row_list import RowList, RowNorm, Workspace
from dynskip.ops import checked, row_reference
from dynskip.ops.backends import Backend, available_backends, get_backend
from dynskip.ops.row_ops import ROW_OP_NAMES, get_row_ops
from dynskip.validation.cases import make_cases
from dynskip.validation.errors import Result, poisoned_allocations
from dynskip.validation.native_ops import NATIVE_OP_NAMES
from dynskip.validation.tensors import tensors_in
from dynskip.validation.validate import validate, validate_row_case

WHY_NO_EXTENSION = available_backends("cpu")["native"]
WHY_NO_INTERPRETER = "there is a GPU" if torch.cuda.is_available() else available_backends("cpu")["triton"]
needs_interpreter = pytest.mark.skipif(WHY_NO_INTERPRETER is not None, reason=f"interpreter: {WHY_NO_INTERPRETER}")


def validate_broken(
    monkeypatch: pytest.MonkeyPatch, op: str, broken: Callable[..., Any], dtype: torch.dtype
) -> list[Result]:
    """The results of `op` when a backend runs it as `broken`."""
    backend: Backend = dataclasses.replace(get_backend("torch"), **{op: broken})
    monkeypatch.setattr(checked, "current_backend", lambda device: backend)
    return validate("torch", dtype, progress=False, op_names=(op,))


def failures(results: list[Result]) -> list[Result]:
    return [result for result in results if not result.passed]


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_an_injected_fault_is_noticed(op: str) -> None:
    others = tuple(other for other in ops.OP_NAMES if other != op)
    results = validate("torch", torch.bfloat16, inject_fault=op, progress=False, op_names=(op, others[0]))
    failed = failures(results)
    assert {result.op for result in failed} == {op}
    # Every case but those without results to falsify.
    num_empty = {
        "gather_layer_norm": 6,
        "decode_attention": 1,
        "prefill_attention": 1,
        "rotate": 5,
        "activate": 10,
    }
    assert len(failed) == sum(result.op == op for result in results) - num_empty.get(op, 0)


@pytest.mark.skipif(bool(WHY_NO_EXTENSION), reason=WHY_NO_EXTENSION or "")
@pytest.mark.parametrize("op", NATIVE_OP_NAMES)
def test_of_the_calls_of_the_extension_too(op: str) -> None:
    right = validate("native", torch.bfloat16, progress=False, op_names=(op,))
    assert right and not failures(right)
    wrong = validate("native", torch.bfloat16, inject_fault=op, progress=False, op_names=(op,))
    assert {result.case for result in failures(wrong)} == {result.case for result in right}


def test_an_unwritten_element_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").decode_attention

    def forgetful(q: Tensor, *others: Any) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        out[:, :, 1:] = right(q, *others)[:, :, 1:]
        return out

    results = validate_broken(monkeypatch, "decode_attention", forgetful, torch.float32)
    assert all(result.max_error == float("inf") for result in results if "R=0" not in result.case)
    assert len(failures(results)) == len(results) - 1


def test_a_changed_input_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").prefill_attention

    def scaling_in_place(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
        out = right(q, k, v, *others)
        q.mul_(2)
        return out

    results = validate_broken(monkeypatch, "prefill_attention", scaling_in_place, torch.float32)
    assert {result.complaint for result in failures(results)} == {"q was written to"}


def test_a_write_beside_a_rotated_tensor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").rotate

    def careless(x: Tensor, *others: Any) -> None:
        right(x, *others)
        if not x.is_contiguous():
            x.as_strided((1,), (1,), 0).zero_()

    results = failures(validate_broken(monkeypatch, "rotate", careless, torch.float32))
    assert {result.complaint for result in results} == {"x was written to beside its elements"}
    assert all("strided" in result.case or result.case.endswith("norm") for result in results)


@pytest.mark.parametrize("name", ["slopes", "window"])
@pytest.mark.parametrize("op", ["decode_attention", "prefill_attention"])
def test_forgotten_positions_are_noticed(monkeypatch: pytest.MonkeyPatch, op: str, name: str) -> None:
    right, forgotten = getattr(get_backend("torch"), op), {"slopes": (7, None), "window": (8, 0)}[name]

    def forgetful(*arguments: Any) -> Tensor:
        changed = list(arguments)
        if len(changed) > forgotten[0]:  # what stands at its default is not passed on
            changed[forgotten[0]] = forgotten[1]
        return right(*changed)

    failed = {result.case for result in failures(validate_broken(monkeypatch, op, forgetful, torch.bfloat16))}
    expected = f"H=8, G=2, D=64, {'slopes' if name == 'slopes' else 'a window'}"
    assert expected in failed and "H=8, G=2, D=64" not in failed


def test_a_rotation_the_other_way_and_a_forgotten_norm_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").rotate

    def backwards(x: Tensor, position_ids: Tensor, cos_sin: Tensor, *others: Any) -> None:
        cos, sin = cos_sin.chunk(2, dim=1)
        right(x, position_ids, torch.cat([cos, -sin], dim=1), *others)

    results = validate_broken(monkeypatch, "rotate", backwards, torch.bfloat16)
    assert {result.case for result in results if result.passed} == {
        result.case for result in results if result.case.startswith("R=0")
    }

    def without_norm(x: Tensor, position_ids: Tensor, cos_sin: Tensor, weight: Tensor | None, eps: float) -> None:
        right(x, position_ids, cos_sin, None, eps)

    results = validate_broken(monkeypatch, "rotate", without_norm, torch.bfloat16)
    assert {result.case for result in failures(results)} == {r.case for r in results if "norm" in r.case}


def test_another_activation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").activate

    def by_tanh(x: Tensor, activation: str, gated: bool = False) -> Tensor:
        return right(x, "gelu_tanh" if activation == "gelu" else activation, gated)

    failed = failures(validate_broken(monkeypatch, "activate", by_tanh, torch.float32))
    assert failed and all("gelu" in result.case and "tanh" not in result.case for result in failed)


def test_a_write_beside_a_strided_tensor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").scatter_add

    def careless(x: Tensor, row_ids: Tensor | None, y: Tensor) -> None:
        right(x, row_ids, y)
        x.as_strided((1,), (1,), 0).zero_()  # the first element of the storage, which a strided x does not own

    results = validate_broken(monkeypatch, "scatter_add", careless, torch.float32)
    assert {"strided x", "strided, all rows"} <= {result.case for result in failures(results)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lost_precision_is_noticed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def one_pass_in_working_dtype(
        x: Tensor, row_ids: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool = False
    ) -> Tensor:
        rows = x if row_ids is None else x[row_ids.long()]
        mean = rows.mean(1, keepdim=True)
        normed = (rows - mean) / torch.sqrt((rows * rows).mean(1, keepdim=True) - mean * mean + eps)
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias

    failed = failures(validate_broken(monkeypatch, "gather_layer_norm", one_pass_in_working_dtype, dtype))
    assert "mean far from zero" in {result.case for result in failed}


def test_a_key_too_many_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = get_backend("torch").prefill_attention

    def off_by_one(*arguments: Any) -> Tensor:
        cu_seqlens_q, limits = arguments[3], arguments[5].clone()
        rows = slice(cu_seqlens_q[-2], cu_seqlens_q[-1]) if len(cu_seqlens_q) > 1 else slice(0)
        limits[rows][:-1] += 1
        return right(*arguments[:5], limits, *arguments[6:])

    failed = failures(validate_broken(monkeypatch, "prefill_attention", off_by_one, torch.float16))
    assert "tile edges" in {result.case for result in failed}


def validate_row_op(
    op: str, dtype: torch.dtype, falsify: bool = False, **launchers: Callable[..., Any]
) -> list[Result]:
    """The results of `op` with the launchers of the specification, or with others in their place."""
    row_ops = dataclasses.replace(get_row_ops("reference"), **launchers)
    return [validate_row_case(row_ops, dtype, case, falsify) for case in make_cases(op, dtype, "cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ROW_OP_NAMES)
def test_the_specification_of_row_ops_passes_and_a_fault_is_noticed(op: str, dtype: torch.dtype) -> None:
    assert failures(validate_row_op(op, dtype)) == []
    passed = {result.case for result in validate_row_op(op, dtype, falsify=True) if result.passed}
    # Without rows nothing is written, so there is nothing to falsify.
    num_modes = 2 if "deterministic" in make_cases(op, dtype, "cpu")[0].arguments else 1
    assert len(passed) == (0 if op == "plan_rows" else num_modes)
    assert all(name.startswith("R=0 of 7") for name in passed)


def test_a_row_too_many_is_noticed() -> None:
    right = get_row_ops("reference").linear_add_rows

    def one_too_many(x: Tensor, rows: RowList, *others: Any) -> None:
        ids = row_reference.listed(rows).tolist()
        ids += [row for row in range(len(rows.ids)) if row not in ids][:1]
        longer = RowList(torch.tensor(ids, dtype=torch.int32), torch.tensor([len(ids)]), len(ids))
        right(x.nan_to_num(1.0), longer, *others)

    results = validate_row_op("linear_add_rows", torch.float32, linear_add_rows=one_too_many)
    complaints = {result.complaint for result in failures(results)}
    assert complaints == {"residual was written to where no row is listed"}
    assert {result.case for result in results if result.passed} == {
        f"R=7 of 7, N, K = 96, 192{mode}" for mode in ("", ", deterministic")
    }


def test_a_write_outside_of_a_buffer_is_noticed() -> None:
    right = get_row_ops("reference").norm_rows

    def careless(x: Tensor, rows: RowList, norm: RowNorm, out: Tensor) -> None:
        right(x, rows, norm, out)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()

    results = validate_row_op("norm_rows", torch.float16, norm_rows=careless)
    assert {result.complaint for result in results} == {"out was written to where no row is listed"}


def test_a_changed_input_of_a_row_op_is_noticed() -> None:
    right = get_row_ops("reference").attend_rows

    def sorting(q: Tensor, rows: RowList, *others: Any) -> None:
        right(q, rows, *others)
        rows.ids.copy_(rows.ids.sort().values)

    results = validate_row_op("attend_rows", torch.float32, attend_rows=sorting)
    assert {result.complaint for result in failures(results)} == {"rows.ids was written to"}


def test_a_key_too_many_of_a_row_is_noticed() -> None:
    right = get_row_ops("reference").attend_rows

    def off_by_one(*arguments: Any) -> None:
        right(*arguments[:6], arguments[6] + 1, *arguments[7:])

    results = validate_row_op("attend_rows", torch.float32, attend_rows=off_by_one)
    assert all(result.max_error == float("inf") for result in results if "R=0" not in result.case)


def test_counters_left_behind_are_noticed() -> None:
    right = get_row_ops("reference").attend_rows

    def untidy(*arguments: Any) -> None:
        right(*arguments)
        arguments[9].counters[-1] = 1

    def workspace(**sizes: Any) -> Workspace:
        return Workspace(torch.empty(1), torch.zeros(1, dtype=torch.int32))

    results = validate_row_op("attend_rows", torch.float32, attend_rows=untidy, workspace=workspace)
    assert {result.complaint for result in results} == {"the counters of the workspace are not zero"}


@pytest.mark.parametrize("name", ["slots", "key_limits", "num_kv", "kv_ids", "row_slots", "slot_cursor", "slot_tables"])
def test_a_wrong_plan_is_noticed(name: str) -> None:
    names = list(make_cases("plan_rows", torch.float32, "cpu")[0].arguments)

    def off_by_one(*arguments: Any) -> None:
        get_row_ops("reference").plan_rows(*arguments)
        arguments[names.index(name)].flatten()[0] += 1

    results = validate_row_op("plan_rows", torch.float32, plan_rows=off_by_one)
    # Ids behind their number are nobody's business, nor are those of a layer that is not planned.
    assert len(failures(results)) > (len(results) // 2 if name != "kv_ids" else 5)


def test_a_plan_that_counts_slots_instead_of_reading_the_list_is_noticed() -> None:
    names = list(make_cases("plan_rows", torch.float32, "cpu")[0].arguments)

    def counting(*arguments: Any) -> None:
        place = names.index("free_slots")
        in_order = torch.arange(len(arguments[place]), dtype=torch.int32)
        get_row_ops("reference").plan_rows(*arguments[:place], in_order, *arguments[place + 1 :])

    results = validate_row_op("plan_rows", torch.float32, plan_rows=counting)
    assert len(failures(results)) > len(results) // 2


def test_lost_precision_of_a_row_op_is_noticed() -> None:
    def in_working_dtype(
        x: Tensor, rows: RowList, weight: Tensor, bias: Tensor | None, residual: Tensor, *others: Any
    ) -> None:
        ids = rows.ids[: int(rows.num)].long()
        sums = residual[ids].clone()
        for column in range(x.shape[1]):
            sums += x[ids, column, None] * weight[None, :, column]
        residual[ids] = sums if bias is None else sums + bias

    for dtype in (torch.float16, torch.bfloat16):
        failed = failures(validate_row_op("linear_add_rows", dtype, linear_add_rows=in_working_dtype))
        assert "N, K = 16, 600" in {result.case for result in failed}


def test_both_modes_reach_the_row_ops() -> None:
    right = get_row_ops("reference").linear_rows
    seen = []

    def listening(*arguments: Any) -> None:
        seen.append(arguments[-1])
        right(*arguments)

    validate_row_op("linear_rows", torch.float32, linear_rows=listening)
    assert sorted(set(seen)) == [False, True]


@pytest.mark.parametrize("op", ops.OP_NAMES + ROW_OP_NAMES)
def test_cases_repeat(op: str) -> None:
    first, again = (make_cases(op, torch.float16, "cpu") for _ in range(2))
    assert [case.name for case in first] == [case.name for case in again]
    for case, twin in zip(first, again, strict=True):
        copies = twin.copy_arguments()
        for name, argument in case.arguments.items():
            for (_, tensor), (_, other) in zip(tensors_in(name, argument), tensors_in(name, copies[name]), strict=True):
                assert tensor.stride() == other.stride()
                assert torch.equal(tensor.nan_to_num(), other.nan_to_num())
    assert len({case.name for case in first}) == len(first)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match=r"validate: inject_fault must be among gather_layer_norm, .*, got 'softmax'"):
        validate("torch", torch.float32, inject_fault="softmax")
    with pytest.raises(ValueError, match=r"validate: op_names must be among gather_layer_norm, .*, got 'relu'"):
        validate("torch", torch.float32, op_names=("relu",))
    with pytest.raises(ValueError, match="validate: dtype must be one of float32, bfloat16, float16, got float64"):
        validate("torch", torch.float64)
    with pytest.raises(
        ValueError, match="resolve_backend: name must be one of auto, torch, triton, native, got 'cuda'"
    ):
        validate("cuda", torch.float32)


def test_the_state_of_torch_is_restored() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    validate("torch", torch.float32, progress=False, op_names=("kv_store",))
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert checked._backend_name.get() == "auto"


def test_products_are_allowed_where_deterministic_algorithms_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card torch refuses cuBLAS then, unless this says how large its workspace is."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with poisoned_allocations():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with poisoned_allocations():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the caller's own stays"


def test_the_command_line_knows_the_dtypes() -> None:
    assert {getattr(torch, name) for name in DTYPES} == {torch.float32, torch.bfloat16, torch.float16}


def test_command_passes_with_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--backend", "torch", "--dtype", "float32", "--op", "scatter_add"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match("backend +dtype +op +cases +max error +allowed +verdict +worst case$", lines[0])
    assert lines[1].split()[:7] == ["torch", "float32", "scatter_add", "29", "0.0e+00", "0.0e+00", "ok"]
    assert lines[2] == "29 of 29 cases passed"


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_command_fails_with_an_injected_fault(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--backend", "torch", "--dtype", "float16", "--inject-fault", op]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1 and op in failed[0]


@needs_interpreter
def test_command_validates_row_ops(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", "--backend", "triton", "--dtype", "float16", "--op", "gate_rows", "--op", "embed_rows"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert re.search(r"triton +float16 +embed_rows +10 .* ok ", out)
    assert re.search(r"triton +float16 +gate_rows +10 .* ok ", out)
    assert cli.main([*command, "--inject-fault", "gate_rows"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 1 and "gate_rows" in failed[0]


def test_a_fault_where_nobody_looks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--backend", "torch", "--inject-fault", "gate_rows"]) == 2
    assert "--inject-fault gate_rows: it must be among the ops that are validated" in capsys.readouterr().err
    assert cli.main(["validate", "--backend", "torch", "--op", "gate_rows"]) == 2
    assert "nothing to validate: no backend has these ops" in capsys.readouterr().err


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", "--backend", "torch", "--dtype", "float16", "--op", "kv_store", "--inject-fault", "kv_store"]
    assert cli.main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False and report["not_run"] == {}
    assert {case["op"] for case in report["cases"]} == {"kv_store"}
    assert not any(case["passed"] for case in report["cases"])


@needs_interpreter
def test_command_says_what_the_interpreter_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", "--backend", "triton", "--op", "kv_store"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "not run: triton bfloat16: Triton's interpreter multiplies bfloat16 matrices wrongly." in out
    assert "48 of 48 cases passed" in out
    assert cli.main([*command, "--dtype", "bfloat16"]) == 2
    assert "error: nothing to validate: triton bfloat16" in capsys.readouterr().err


def test_command_refuses_unknown_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--inject-fault", "softmax"]) == 2
    assert "invalid choice: 'softmax'" in capsys.readouterr().err
