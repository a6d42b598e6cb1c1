"""Every op of a backend against the float64 reference: how far it is off, and how far it may be.

Ops that move rows, or add once, must agree to the bit. The others may be off by twice what the textbook formula in
eager PyTorch is off in the same dtype, or, where that happens to be exact, by the rounding of the result and a few
units in the last place of float32, in which every backend computes.
"""

from __future__ import annotations

from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dynskip import ops
from dynskip.kernels.row_list import RowNorm
from dynskip.ops import reference, row_reference
from dynskip.ops.backends import resolve_backend
from dynskip.ops.checks import FLOAT_DTYPES, dtype_name
from dynskip.ops.row_ops import ROW_OP_NAMES, RowOps, get_row_ops
from dynskip.validation import errors
from dynskip.validation.cases import make_cases
from dynskip.validation.errors import Result, max_error, storage_bytes
from dynskip.validation.native_ops import NATIVE_OP_NAMES, validate_native_op
from dynskip.validation.op_arguments import make_workspace
from dynskip.validation.tensors import Arguments, Case, copy_with_storage, map_tensors, tensors_in

# Ops that move rows, add once, or decide: every bit is told by the specification in the working dtype.
_EXACT = ("scatter_add", "kv_store", "embed_rows", "place_rows", "gate_rows", "plan_rows")
# The arguments that ops write, where these are not "out" of a row op, or "result", which an op returns.
_MUTATED = {
    "scatter_add": ("x",),
    "kv_store": ("k_cache", "v_cache"),
    "rotate": ("x",),
    "qkv_rows": ("q", "k_cache", "v_cache"),
    "rotate_rows": ("q", "k_cache"),
    "place_rows": ("slot_positions",),
    "linear_add_rows": ("residual",),
    "gate_rows": ("active",),
    "plan_rows": (
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
    ),
}
_BY_SLOT = ("k_cache", "v_cache", "slot_positions")
_SCRATCH = ("normed", "workspace")
_EAGER = {
    "gather_layer_norm": errors.eager_layer_norm,
    "decode_attention": errors.eager_attention,
    "prefill_attention": errors.eager_attention,
    "rotate": errors.eager_rotate,
    "activate": errors.eager_activate,
}

Places = dict[str, Tensor | EllipsisType]
"""The rows of each argument that an op writes; ... for all."""


def validate(
    backend: str,
    dtype: torch.dtype,
    inject_fault: str | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
    op_names: tuple[str, ...] = ops.OP_NAMES,
) -> list[Result]:
    """The results of every case of every op on `backend` in `dtype`.

    inject_fault: an op whose results are falsified after it ran, to prove that this would be noticed. progress: shows a
    bar. op_names: of the ops, for "triton" of the row ops, too, for "native" of `NATIVE_OP_NAMES`.
    Raises: ValueError for an unknown backend, dtype or op, or one that `backend` does not have, RuntimeError for a
    backend that cannot run on `device`.
    """
    if dtype not in FLOAT_DTYPES:
        names = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise ValueError(f"validate: dtype must be one of {names}, got {dtype_name(dtype)}. Choose one of these.")
    chosen = resolve_backend(backend, device).name
    own_names = {"triton": ROW_OP_NAMES, "native": NATIVE_OP_NAMES}.get(chosen, ())
    known_names = ops.OP_NAMES + own_names
    for argument, name in (*(("op_names", name) for name in op_names), ("inject_fault", inject_fault)):
        if name is not None and name not in known_names:
            known = ", ".join(known_names)
            raise ValueError(f"validate: {argument} must be among {known}, got {name!r}. Choose one of these.")
    cases = [case for op in op_names if op not in NATIVE_OP_NAMES for case in make_cases(op, dtype, device)]
    bar = tqdm(cases, desc=f"{chosen} {dtype_name(dtype)}", unit="case", disable=not progress)
    results = [validate_case(chosen, dtype, case, falsify=inject_fault == case.op) for case in bar]
    for op in (name for name in op_names if name in NATIVE_OP_NAMES):
        results += validate_native_op(op, dtype, falsify=inject_fault == op)
    return results


def validate_case(backend: str, dtype: torch.dtype, case: Case, falsify: bool = False) -> Result:
    """The result of one case on `backend`; with `falsify` after one element of what the op computed was changed."""
    if case.op in ROW_OP_NAMES:
        return validate_row_case(get_row_ops(backend), dtype, case, falsify)
    arguments = case.copy_arguments()
    with torch.no_grad(), ops.use_backend(backend), errors.poisoned_allocations():
        _run(ops, case, arguments)
    is_strided = "result" in arguments and not arguments["result"].is_contiguous()
    return _judge(backend, dtype, case, arguments, falsify, "the result is not contiguous" if is_strided else None)


def validate_row_case(row_ops: RowOps, dtype: torch.dtype, case: Case, falsify: bool = False) -> Result:
    """The same for one case of `row_ops`."""
    arguments = case.copy_arguments()
    with torch.no_grad(), errors.poisoned_allocations():
        workspace = make_workspace(row_ops, arguments)
        if workspace is not None:
            workspace.partials.fill_(float("nan"))
            arguments["workspace"] = workspace
        _run(row_ops, case, arguments)
    is_dirty = workspace is not None and bool(workspace.counters.any())
    complaint = "the counters of the workspace are not zero" if is_dirty else None
    return _judge(row_ops.name, dtype, case, arguments, falsify, complaint)


def _run(launchers: object, case: Case, arguments: Arguments) -> None:
    """Runs the op; what it returns becomes the argument "result"."""
    returned = getattr(launchers, case.op)(*arguments.values())
    if returned is not None:
        arguments["result"] = returned


def _judge(
    backend: str, dtype: torch.dtype, case: Case, arguments: Arguments, falsify: bool, complaint: str | None
) -> Result:
    """The result of a case whose op has run on `arguments`. complaint: what is known to be wrong already."""
    written = _places(case)
    if falsify:
        for name, places in written.items():
            changed = arguments[name][places]
            errors.change_one_element(changed)
            arguments[name][places] = changed
    complaint = complaint or _find_complaint(case, arguments, written)
    error, allowed = _measure(case, arguments, written)
    return Result(backend, dtype_name(dtype), case.op, case.name, error, allowed, complaint)


def _places(case: Case) -> Places:
    arguments = case.arguments
    if "rows" not in arguments:
        return dict.fromkeys(_MUTATED.get(case.op, ("result",)), ...)
    ids = row_reference.listed(arguments["rows"])
    written: Places = dict.fromkeys(_MUTATED.get(case.op, ("out",)), ids)
    if "slots" in arguments:
        slots = arguments["slots"][ids].long()
        written |= {name: slots[slots >= 0] for name in written if name in _BY_SLOT}
    if case.op == "qkv_rows" and not int(arguments["num_run"]):
        written["q"] = ids[:0]
    return written


def _find_complaint(case: Case, arguments: Arguments, written: Places) -> str | None:
    for name, argument in case.arguments.items():
        if name in _SCRATCH:
            continue
        beside = ""
        for (full_name, original), (_, after) in zip(
            tensors_in(name, argument), tensors_in(name, arguments[name]), strict=True
        ):
            expected = copy_with_storage(original)
            if name in written:
                places = written[name]
                expected[places] = after[places]
                beside = " beside its elements" if places is ... else " where no row is listed"
            if not torch.equal(storage_bytes(expected), storage_bytes(after)):
                return f"{full_name} was written to{beside}"
    return None


def _measure(case: Case, results: Arguments, written: Places) -> tuple[float, float]:
    """The error of the results and the error that they may have: of the output nearest to failure.

    The error of an op that must agree to the bit is the number of bytes that differ.
    """
    expected = case.copy_arguments()
    specification = row_reference if case.op in ROW_OP_NAMES else reference
    if case.op in _EXACT:
        _run(specification, case, expected)
        differing = (storage_bytes(expected[name]) != storage_bytes(results[name]) for name in written)
        return float(sum(int(differs.sum()) for differs in differing)), 0.0
    exact = {name: map_tensors(errors.to_float64, argument) for name, argument in expected.items()}
    _run(specification, case, exact)
    pairs = {name: (results[name][places], exact[name][places]) for name, places in written.items()}
    if any(result.shape != wanted.shape for result, wanted in pairs.values()):
        return float("inf"), 0.0
    pairs = {name: pair for name, pair in pairs.items() if pair[1].numel()}
    eager = _eager(case) if pairs else {}
    worst = (0.0, 0.0)
    for name, (result, wanted) in pairs.items():
        measured, allowed = max_error(result.double(), wanted), errors.allowed_error(wanted, *eager[name])
        if worst[1] == 0 or measured / allowed > worst[0] / worst[1]:
            worst = measured, allowed
    return worst


def _eager(case: Case) -> dict[str, tuple[Tensor, float]]:
    """What the textbook formula in eager PyTorch gives for each output, and the values whose float32 rounding stays.

    Those are the terms of a product, and the uncentered values of a LayerNorm before it: taken as independent, their
    roundings add up like the sides of a right-angled triangle.
    """
    arguments = case.copy_arguments()
    if case.op in _EAGER:
        return dict.fromkeys(_MUTATED.get(case.op, ("result",)), _EAGER[case.op](arguments))
    ids = row_reference.listed(arguments["rows"])
    if case.op == "norm_rows":
        return {"out": errors.eager_layer_norm(_norm_arguments(arguments["x"][ids], arguments["norm"]))}
    if case.op == "attend_rows":
        decode = arguments | {
            "q": arguments["q"][ids].unflatten(1, (-1, arguments["k_cache"].shape[2])),
            "seq_ids": arguments["seq_ids"][ids],
            "context_lens": arguments["key_limits"][ids],
        }
        if arguments["position_ids"] is not None:
            decode["position_ids"] = arguments["position_ids"][ids]
        attended, magnified = errors.eager_attention(decode)
        return {"out": (attended.flatten(1), magnified)}
    if case.op == "rotate_rows":
        stored = ids[arguments["slots"][ids] >= 0]
        q = arguments["q"].unflatten(1, (-1, arguments["k_cache"].shape[2]))[ids]
        k = arguments["k_cache"][arguments["slots"][stored].long()]
        turned: dict[str, tuple[Tensor, float]] = {}
        for name, heads, rows in (("q", q, ids), ("k_cache", k, stored)):
            position_ids, weight = arguments["position_ids"][rows], arguments[f"{name[0]}_weight"]
            turned[name] = errors.eager_rotate(arguments | {"x": heads, "position_ids": position_ids, "weight": weight})
        return turned | {"q": (turned["q"][0].flatten(1), turned["q"][1])}
    x, norm, weight, bias = arguments["x"][ids], arguments.get("norm"), arguments["weight"], arguments["bias"]
    magnified = 0.0
    if norm is not None:
        x, uncentered = errors.eager_layer_norm(_norm_arguments(x, norm))
        magnified = uncentered * weight.double().norm(dim=1).max().item()
    product = F.linear(x, weight, bias)
    magnified += (x.double().square() @ weight.double().square().T).sqrt().max().item()
    if case.op == "linear_rows":
        return {"out": errors.eager_activation(product, arguments["activation"], arguments["gated"], magnified)}
    if case.op == "linear_add_rows":
        return {"residual": (arguments["residual"][ids] + product, magnified)}
    key_heads = arguments["k_cache"].shape[1:]
    key_size = key_heads.numel()
    q, k, v = torch.split(product, [product.shape[1] - 2 * key_size, key_size, key_size], dim=1)
    is_stored = arguments["slots"][ids] >= 0
    keys, values = (part[is_stored].view(-1, *key_heads) for part in (k, v))
    return {"q": (q, magnified), "k_cache": (keys, magnified), "v_cache": (values, magnified)}


def _norm_arguments(x: Tensor, norm: RowNorm) -> Arguments:
    return {"x": x, "row_ids": None, **norm._asdict()}
