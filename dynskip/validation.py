"""Every op of a backend against the float64 reference: how far it is off, and how far it may be.

Ops that move rows, or add once, must agree to the bit. The others may be off by twice what the textbook formula in
eager PyTorch is off in the same dtype, or, where that happens to be exact, by the rounding of the result and a few
units in the last place of float32, in which every backend computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dynskip import ops, reference
from dynskip.backends import resolve_backend
from dynskip.checks import FLOAT_DTYPES, dtype_name
from dynskip.validation_cases import Arguments, Case, make_cases

_MUTATED = {"scatter_add": ("x",), "kv_store": ("k_cache", "v_cache")}


@dataclass(frozen=True)
class Result:
    """One case of one op: the largest error, what was allowed, and what else went wrong (None: nothing)."""

    backend: str
    dtype: str
    op: str
    case: str
    max_error: float
    allowed_error: float
    complaint: str | None = None

    @property
    def passed(self) -> bool:
        return self.complaint is None and self.max_error <= self.allowed_error


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
    bar. Raises: ValueError for an unknown backend, dtype or op, RuntimeError for a backend that cannot run on `device`.
    """
    if dtype not in FLOAT_DTYPES:
        names = ", ".join(map(dtype_name, FLOAT_DTYPES))
        raise ValueError(f"validate: dtype must be one of {names}, got {dtype_name(dtype)}. Choose one of these.")
    for argument, name in (*(("op_names", name) for name in op_names), ("inject_fault", inject_fault)):
        if name is not None and name not in ops.OP_NAMES:
            known = ", ".join(ops.OP_NAMES)
            raise ValueError(f"validate: {argument} must be among {known}, got {name!r}. Choose one of these.")
    chosen = resolve_backend(backend, device).name
    cases = [case for op in op_names for case in make_cases(op, dtype, device)]
    bar = tqdm(cases, desc=f"{chosen} {dtype_name(dtype)}", unit="case", disable=not progress)
    return [validate_case(chosen, dtype, case, falsify=inject_fault == case.op) for case in bar]


def validate_case(backend: str, dtype: torch.dtype, case: Case, falsify: bool = False) -> Result:
    """The result of one case on `backend`; with `falsify` after one element of what the op computed was changed."""
    arguments = case.copy_arguments()
    with torch.no_grad(), ops.use_backend(backend), _poisoned_allocations():
        results = _call(ops, case.op, arguments)
    if falsify:
        for result in results:
            _falsify(result)
    complaint = _find_complaint(case, arguments, results)
    if case.op in _MUTATED:
        expected = _call(reference, case.op, case.copy_arguments())
        error, allowed = max(map(_storage_error, results, expected)), 0.0
    else:
        error, allowed = _measure(case, results[0])
    return Result(backend, dtype_name(dtype), case.op, case.name, error, allowed, complaint)


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Makes torch.empty give NaN inside the block, so that an element that an op leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filling


def _call(module: object, op: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """Runs `module.op` and hands over its results: the tensor returned, or those mutated."""
    returned = getattr(module, op)(**arguments)
    if op not in _MUTATED:
        return (returned,)
    return tuple(arguments[name] for name in _MUTATED[op])


def _falsify(result: Tensor) -> None:
    """Changes one element of `result`, if it has any."""
    if result.numel():
        last = tuple(size - 1 for size in result.shape)
        result[last] = 2.0 if result[last] == 1.0 else 1.0


def _find_complaint(case: Case, arguments: Arguments, results: tuple[Tensor, ...]) -> str | None:
    for name, original in case.arguments.items():
        is_input = isinstance(original, Tensor) and name not in _MUTATED.get(case.op, ())
        if is_input and not torch.equal(_storage_bytes(original), _storage_bytes(arguments[name])):
            return f"{name} was written to"
    for result in results:
        if case.op not in _MUTATED and not result.is_contiguous():
            return "the result is not contiguous"
    return None


def _measure(case: Case, result: Tensor) -> tuple[float, float]:
    """The error of `result` against float64, and the error that it may have."""
    arguments = case.copy_arguments()
    exact = _call(reference, case.op, {name: _to_float64(argument) for name, argument in arguments.items()})[0]
    if result.shape != exact.shape:
        return float("inf"), 0.0
    if exact.numel() == 0:
        return 0.0, 0.0
    eager, magnified = (_eager_layer_norm if case.op == "gather_layer_norm" else _eager_attention)(case.op, arguments)
    largest = exact.abs().max().item()
    rounding = torch.finfo(result.dtype).eps / 2 * largest
    floor = rounding + torch.finfo(torch.float32).eps * (4 * largest + 2 * magnified)
    return _max_error(result.double(), exact), max(2 * _max_error(eager.double(), exact), floor)


def _to_float64(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _max_error(result: Tensor, exact: Tensor) -> float:
    error = (result - exact).abs()
    return float("inf") if error.isnan().any() else error.max().item()


def _storage_bytes(tensor: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _storage_error(result: Tensor, expected: Tensor) -> float:
    """0 if both storages hold the same bits; else the largest difference, infinite where NaN meets a number."""
    if torch.equal(_storage_bytes(result), _storage_bytes(expected)):
        return 0.0
    error = (result.double() - expected.double()).abs().nan_to_num(nan=0.0)
    numbers_meet_nan = bool((result.isnan() != expected.isnan()).any())
    largest = float("inf") if numbers_meet_nan else error.max().item()
    return largest if largest > 0 else float("inf")


def _eager_layer_norm(op: str, arguments: Arguments) -> tuple[Tensor, float]:
    """PyTorch's LayerNorm, and how large its result would be without centering: what float32 rounds there stays."""
    row_ids, weight = arguments["row_ids"], arguments["weight"]
    rows = arguments["x"] if row_ids is None else arguments["x"][row_ids.long()]
    exact = rows.double()
    uncentered = (exact.abs().amax(1) / torch.sqrt(exact.var(1, correction=0) + arguments["eps"])).max().item()
    magnified = uncentered if weight is None else uncentered * weight.abs().max().item()
    return F.layer_norm(rows, rows.shape[1:], weight, arguments["bias"], arguments["eps"]), magnified


def _eager_attention(op: str, arguments: Arguments) -> tuple[Tensor, float]:
    """softmax(q k^T scale) v, row by row, each step rounded to the working dtype, and its largest score times value.

    The absolute error of a score becomes a relative error of its weight.
    """
    is_decode = op == "decode_attention"
    k_name, v_name = ("k_cache", "v_cache") if is_decode else ("k", "v")
    q = arguments["q"]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    magnified = 0.0
    for row, keys in enumerate((_decode_key_ids if is_decode else _prefill_key_ids)(arguments)):
        if len(keys):
            k, v = (arguments[name][keys].transpose(0, 1) for name in (k_name, v_name))
            scores = q[row, :, None] @ k.transpose(1, 2) * arguments["scale"]
            out[row] = (scores.softmax(dim=-1) @ v)[:, 0]
            magnified = max(magnified, scores.abs().max().item() * out[row].abs().max().item())
    return out, magnified


def _decode_key_ids(arguments: Arguments) -> Iterator[Tensor]:
    """The cache slots that each row attends to."""
    for sequence, length in zip(arguments["seq_ids"].tolist(), arguments["context_lens"].tolist(), strict=True):
        yield arguments["slot_table"][sequence, :length].long()


def _prefill_key_ids(arguments: Arguments) -> Iterator[Tensor]:
    """The packed keys that each row attends to."""
    device, limits = arguments["q"].device, arguments["key_limits"].tolist()
    starts_q, starts_k = arguments["cu_seqlens_q"].tolist(), arguments["cu_seqlens_k"].tolist()
    for sequence, first_key in enumerate(starts_k[:-1]):
        for row in range(starts_q[sequence], starts_q[sequence + 1]):
            yield torch.arange(first_key, first_key + limits[row], device=device)
