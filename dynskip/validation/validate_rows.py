"""Row ops against the float64 reference: how far they are off, how far they may be, and what they must leave alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynskip.kernels.row_list import RowNorm
from dynskip.ops import row_reference
from dynskip.ops.checks import dtype_name
from dynskip.ops.row_ops import RowOps
from dynskip.validation.errors import (
    Result,
    allowed_error,
    change_one_element,
    eager_activation,
    eager_attention,
    eager_layer_norm,
    max_error,
    poisoned_allocations,
    storage_bytes,
    to_float64,
)
from dynskip.validation.op_arguments import make_workspace
from dynskip.validation.tensors import Arguments, Case, copy_with_storage, map_tensors, tensors_in

# Ops that move rows, add once, or decide: every bit is told by the specification in the working dtype.
_EXACT_OPS = ("embed_rows", "place_rows", "gate_rows", "plan_rows")
_SCRATCH = ("normed", "workspace")
_PLAN = (
    "context_lens",
    "slot_tables",
    "slot_cursor",
    "row_slots",
    "num_run",
    "num_kv",
    "slots",
    "key_limits",
    "run_ids",
    "kv_ids",
)


def validate_row_case(row_ops: RowOps, dtype: torch.dtype, case: Case, falsify: bool = False) -> Result:
    """The result of one case of `row_ops`; with `falsify` after one element of what the op computed was changed."""
    arguments = case.copy_arguments()
    with torch.no_grad(), poisoned_allocations():
        workspace = make_workspace(row_ops, arguments)
        if workspace is not None:
            workspace.partials.fill_(float("nan"))
            arguments["workspace"] = workspace
        getattr(row_ops, case.op)(*arguments.values())
    written = _places(case)
    if falsify:
        for name, places in written.items():
            _change_one_of(arguments[name], places)
    complaint = _find_complaint(case, arguments, written)
    if workspace is not None and bool(workspace.counters.any()):
        complaint = "the counters of the workspace are not zero"
    error, allowed = _measure(case, arguments, written)
    return Result(row_ops.name, dtype_name(dtype), case.op, case.name, error, allowed, complaint)


def _places(case: Case) -> dict[str, Tensor | None]:
    """Which rows of which arguments the op writes; None: those of the specification, whatever they are."""
    arguments = case.arguments
    if case.op == "plan_rows":
        return dict.fromkeys(_PLAN)
    ids = row_reference.listed(arguments["rows"])
    if case.op == "linear_add_rows":
        return {"residual": ids}
    if case.op == "gate_rows":
        return {"active": ids}
    if case.op not in ("qkv_rows", "rotate_rows", "place_rows"):
        return {"out": ids}
    slots = arguments["slots"][ids].long()
    targets = slots[slots >= 0]
    if case.op == "place_rows":
        return {"slot_positions": targets}
    if case.op == "rotate_rows":
        return {"q": ids, "k_cache": targets}
    return {"q": ids if int(arguments["num_run"]) else ids[:0], "k_cache": targets, "v_cache": targets}


def _change_one_of(tensor: Tensor, places: Tensor | None) -> None:
    """Changes one element of the rows `places` of `tensor`, if there is one."""
    if places is None:
        change_one_element(tensor)
    elif len(places):
        changed = tensor[places]
        change_one_element(changed)
        tensor[places] = changed


def _find_complaint(case: Case, arguments: Arguments, written: dict[str, Tensor | None]) -> str | None:
    for name, argument in case.arguments.items():
        if name in _SCRATCH or (name in written and written[name] is None):
            continue
        for (full_name, original), (_, after) in zip(
            tensors_in(name, argument), tensors_in(name, arguments[name]), strict=True
        ):
            expected = copy_with_storage(original)
            if name in written:
                places = written[name]
                expected[places] = after[places]
            if not torch.equal(storage_bytes(expected), storage_bytes(after)):
                return f"{full_name} was written to" + (" where no row is listed" if name in written else "")
    return None


def _measure(case: Case, results: Arguments, written: dict[str, Tensor | None]) -> tuple[float, float]:
    """The error of the results and the error that they may have: of the output nearest to failure."""
    if case.op in _EXACT_OPS:
        return _count_wrong_bits(case, results, written), 0.0
    if int(case.arguments["rows"].num) == 0:
        return 0.0, 0.0
    exact = {name: map_tensors(to_float64, argument) for name, argument in case.copy_arguments().items()}
    getattr(row_reference, case.op)(*exact.values())
    eager = _eager(case)
    worst = (0.0, 0.0)
    for name, places in written.items():
        assert places is not None, "only plan_rows writes where the specification says"
        if not len(places):
            continue
        wanted, (textbook, magnified) = exact[name][places], eager[name]
        measured = max_error(results[name][places].double(), wanted)
        allowed = allowed_error(wanted, textbook, magnified)
        if worst[1] == 0 or measured / allowed > worst[0] / worst[1]:
            worst = measured, allowed
    return worst


def _count_wrong_bits(case: Case, results: Arguments, written: dict[str, Tensor | None]) -> float:
    """How many elements differ from what the specification gives in the working dtype."""
    expected = case.copy_arguments()
    getattr(row_reference, case.op)(*expected.values())
    differing = 0
    for name in written:
        wanted, got = storage_bytes(expected[name]), storage_bytes(results[name])
        differing += int((wanted != got).sum())
    return float(differing)


def _eager(case: Case) -> dict[str, tuple[Tensor, float]]:
    """What the textbook formula in eager PyTorch gives for each output, and the values whose float32 rounding stays.

    Those are the terms of a product, and the uncentered values of a LayerNorm before it: taken as independent, their
    roundings add up like the sides of a right-angled triangle.
    """
    arguments = case.copy_arguments()
    ids = row_reference.listed(arguments["rows"])
    if case.op == "norm_rows":
        return {"out": eager_layer_norm(_norm_arguments(arguments["x"][ids], arguments["norm"]))}
    if case.op == "attend_rows":
        decode = arguments | {
            "q": arguments["q"][ids].unflatten(1, (-1, arguments["k_cache"].shape[2])),
            "seq_ids": arguments["seq_ids"][ids],
            "context_lens": arguments["key_limits"][ids],
        }
        if arguments["position_ids"] is not None:
            decode["position_ids"] = arguments["position_ids"][ids]
        attended, magnified = eager_attention(decode)
        return {"out": (attended.flatten(1), magnified)}
    if case.op == "rotate_rows":
        return _eager_rotation(arguments, ids)
    x, norm, weight, bias = arguments["x"][ids], arguments.get("norm"), arguments["weight"], arguments["bias"]
    magnified = 0.0
    if norm is not None:
        x, uncentered = eager_layer_norm(_norm_arguments(x, norm))
        magnified = uncentered * weight.double().norm(dim=1).max().item()
    product = F.linear(x, weight, bias)
    magnified += (x.double().square() @ weight.double().square().T).sqrt().max().item()
    if case.op == "linear_rows":
        return {"out": eager_activation(product, arguments["activation"], arguments["gated"], magnified)}
    if case.op == "linear_add_rows":
        return {"residual": (arguments["residual"][ids] + product, magnified)}
    heads = arguments["k_cache"].shape[1:]
    key_size = heads.numel()
    q, k, v = torch.split(product, [product.shape[1] - 2 * key_size, key_size, key_size], dim=1)
    is_stored = arguments["slots"][ids] >= 0
    stored = {name: (rows[is_stored].view(-1, *heads), magnified) for name, rows in (("k_cache", k), ("v_cache", v))}
    return {"q": (q, magnified), **stored}


def _eager_rotation(arguments: Arguments, ids: Tensor) -> dict[str, tuple[Tensor, float]]:
    """The queries and keys of `rotate_rows`. With a norm, what float32 rounds there stays."""
    stored = ids[arguments["slots"][ids] >= 0]
    q = arguments["q"].unflatten(1, (-1, arguments["k_cache"].shape[2]))[ids]
    found: dict[str, tuple[Tensor, float]] = {}
    for name, heads, rows, weight in (
        ("q", q, ids, arguments["q_weight"]),
        ("k_cache", arguments["k_cache"][arguments["slots"][stored].long()], stored, arguments["k_weight"]),
    ):
        if weight is not None:
            heads = F.rms_norm(heads, heads.shape[-1:], weight, arguments["eps"])
        cos, sin = arguments["cos_sin"][arguments["position_ids"][rows]].to(heads.dtype)[:, None].chunk(2, dim=-1)
        one, other, rest = heads.split([cos.shape[-1], cos.shape[-1], heads.shape[-1] - 2 * cos.shape[-1]], dim=-1)
        turned = torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1)
        magnified = heads.abs().max().item() if len(rows) else 0.0
        found[name] = (turned.flatten(1) if name == "q" else turned), magnified
    return found


def _norm_arguments(x: Tensor, norm: RowNorm) -> Arguments:
    return {"x": x, "row_ids": None, **norm._asdict()}
