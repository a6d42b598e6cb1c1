"""Every op of a backend against the float64 reference: how far it is off, and how far it may be.

Ops that move rows, or add once, must agree to the bit. The others may be off by twice what the textbook formula in
eager PyTorch is off in the same dtype, or, where that happens to be exact, by the rounding of the result and a few
units in the last place of float32, in which every backend computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from dynskip import ops
from dynskip.ops import reference
from dynskip.ops.backends import resolve_backend
from dynskip.ops.checks import FLOAT_DTYPES, dtype_name
from dynskip.ops.row_ops import ROW_OP_NAMES, get_row_ops
from dynskip.validation.cases import make_cases
from dynskip.validation.errors import (
    Result,
    allowed_error,
    change_one_element,
    eager_activate,
    eager_attention,
    eager_layer_norm,
    eager_rotate,
    max_error,
    poisoned_allocations,
    storage_bytes,
    storage_error,
    to_float64,
)
from dynskip.validation.tensors import Arguments, Case, copy_with_storage
from dynskip.validation.validate_rows import validate_row_case

_MUTATED = {"scatter_add": ("x",), "kv_store": ("k_cache", "v_cache"), "rotate": ("x",)}
_EXACT = ("scatter_add", "kv_store")
_EAGER = {
    "gather_layer_norm": eager_layer_norm,
    "decode_attention": eager_attention,
    "prefill_attention": eager_attention,
    "rotate": eager_rotate,
    "activate": eager_activate,
}


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
    bar. op_names: of the ops, and for "triton" of the row ops, too. Raises: ValueError for an unknown backend, dtype or
    op, or one that `backend` does not have, RuntimeError for a backend that cannot run on `device`.
    """
    if dtype not in FLOAT_DTYPES:
        names = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise ValueError(f"validate: dtype must be one of {names}, got {dtype_name(dtype)}. Choose one of these.")
    chosen = resolve_backend(backend, device).name
    known_names = ops.OP_NAMES + (ROW_OP_NAMES if chosen == "triton" else ())
    for argument, name in (*(("op_names", name) for name in op_names), ("inject_fault", inject_fault)):
        if name is not None and name not in known_names:
            known = ", ".join(known_names)
            raise ValueError(f"validate: {argument} must be among {known}, got {name!r}. Choose one of these.")
    cases = [case for op in op_names for case in make_cases(op, dtype, device)]
    bar = tqdm(cases, desc=f"{chosen} {dtype_name(dtype)}", unit="case", disable=not progress)
    return [validate_case(chosen, dtype, case, falsify=inject_fault == case.op) for case in bar]


def validate_case(backend: str, dtype: torch.dtype, case: Case, falsify: bool = False) -> Result:
    """The result of one case on `backend`; with `falsify` after one element of what the op computed was changed."""
    if case.op in ROW_OP_NAMES:
        return validate_row_case(get_row_ops(backend), dtype, case, falsify)
    arguments = case.copy_arguments()
    with torch.no_grad(), ops.use_backend(backend), poisoned_allocations():
        results = _call(ops, case.op, arguments)
    if falsify:
        for result in results:
            change_one_element(result)
    complaint = _find_complaint(case, arguments, results)
    if case.op in _EXACT:
        expected = _call(reference, case.op, case.copy_arguments())
        error, allowed = max(map(storage_error, results, expected)), 0.0
    else:
        error, allowed = _measure(case, results[0])
        if case.op in _MUTATED:
            complaint = complaint or _find_write_beside(case, arguments)
    return Result(backend, dtype_name(dtype), case.op, case.name, error, allowed, complaint)


def _call(module: object, op: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """Runs `module.op` and hands over its results: the tensor returned, or those mutated."""
    returned = getattr(module, op)(**arguments)
    if op not in _MUTATED:
        return (returned,)
    return tuple(arguments[name] for name in _MUTATED[op])


def _find_complaint(case: Case, arguments: Arguments, results: tuple[Tensor, ...]) -> str | None:
    for name, original in case.arguments.items():
        is_input = isinstance(original, Tensor) and name not in _MUTATED.get(case.op, ())
        if is_input and not torch.equal(storage_bytes(original), storage_bytes(arguments[name])):
            return f"{name} was written to"
    for result in results:
        if case.op not in _MUTATED and not result.is_contiguous():
            return "the result is not contiguous"
    return None


def _find_write_beside(case: Case, arguments: Arguments) -> str | None:
    for name in _MUTATED[case.op]:
        expected = copy_with_storage(case.arguments[name]).copy_(arguments[name])
        if not torch.equal(storage_bytes(expected), storage_bytes(arguments[name])):
            return f"{name} was written to beside its elements"
    return None


def _measure(case: Case, result: Tensor) -> tuple[float, float]:
    """The error of `result` against float64, and the error that it may have."""
    arguments = case.copy_arguments()
    exact = _call(reference, case.op, {name: to_float64(argument) for name, argument in arguments.items()})[0]
    if result.shape != exact.shape:
        return float("inf"), 0.0
    if exact.numel() == 0:
        return 0.0, 0.0
    eager, magnified = _EAGER[case.op](arguments)
    return max_error(result.double(), exact), allowed_error(exact, eager, magnified)
