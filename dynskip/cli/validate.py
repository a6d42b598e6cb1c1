"""``dynskip validate``: whether this machine computes what the specification says."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynskip.cli.options import DTYPES, LazyChoices, UserError, show_progress
from dynskip.models.shapes import SHAPES

if TYPE_CHECKING:
    from dynskip.validation.errors import Result
    from dynskip.validation.offline.compile_kernels import CompiledKernel

_BACKENDS = ("torch", "native", "triton")
_MAX_SHOWN = 3
HELP = "compare every op with float64 over all its shapes"
DESCRIPTION = "Compare every op of a backend with a float64 reference. Exit status 1 if any error is too large."
EXAMPLES = """examples:
  dynskip validate                                   every backend that this machine has, every dtype
  dynskip validate --backend triton                  the Triton kernels; without a GPU under Triton's interpreter
  dynskip validate --dtype bfloat16 --op kv_store    one op in one dtype
  dynskip validate --inject-fault decode_attention   falsifies its results: must fail with exit status 1
  dynskip validate --compile                         do all kernels fit sm_80, sm_90 and sm_100? needs no GPU
  dynskip validate --compile --shape llama-3.2-1b    those that this model launches
"""
# As in dynskip.validation.offline.compile_kernels.MAX_SHARED_BYTES and DEFAULT_CAPABILITIES, which a test compares.
CAPABILITIES = (80, 86, 89, 90, 100, 120)
DEFAULT_CAPABILITIES = (80, 90, 100)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``validate``."""
    parser.add_argument("--backend", action="append", choices=_BACKENDS, help="repeatable (default: all that run here)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: all)")
    names = LazyChoices(lambda: tuple(dict.fromkeys(_ops_of("triton", None) + _ops_of("native", None))))
    parser.add_argument("--op", action="append", choices=names, metavar="OP", help="repeatable (default: all)")
    parser.add_argument("--inject-fault", choices=names, metavar="OP", help="falsify the results of this op")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the Triton kernels instead, and read registers, spills, shared memory and tensor-core "
        "instructions from machine code and PTX; exit status 1 if one does not fit its GPU",
    )
    parser.add_argument(
        "--capability",
        action="append",
        type=int,
        choices=CAPABILITIES,
        help=f"with --compile; repeatable (default: {', '.join(map(str, DEFAULT_CAPABILITIES))})",
    )
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="with --compile: this table, not dynskip's own; repeatable"
    )
    parser.add_argument(
        "--shape",
        action="append",
        choices=tuple(SHAPES),
        metavar="SHAPE",
        help="with --compile: the kernels of this decoder, at 1, 8 and 32 rows; repeatable (default: OPT's)",
    )
    parser.add_argument(
        "--fewer", action="store_true", help="with --compile: shapes other than OPT-1.3B with few rows only"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object with every case")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Print errors and verdicts; exit status 1 on any failure."""
    if args.compile:
        return _compile(args)
    for option in ("capability", "config", "shape", "fewer"):
        if getattr(args, option):
            raise UserError(f"--{option} says what to compile: it needs --compile")

    import torch

    has_gpu = torch.cuda.is_available()
    interpreted = not has_gpu and "triton" in (args.backend or ())
    if interpreted:
        # Triton reads it when it is imported; nothing has imported it yet, or resolve_backend says so.
        os.environ["TRITON_INTERPRET"] = "1"

    from dynskip.ops.backends import available_backends
    from dynskip.ops.row_ops import why_not_triton
    from dynskip.validation.validate import validate

    devices = {"torch": "cuda" if has_gpu else "cpu", "native": "cpu", "triton": "cuda" if has_gpu else "cpu"}
    reasons = {name: available_backends(devices[name])[name] for name in _BACKENDS}
    not_run: dict[str, str] = {}
    if args.backend is None:
        if not has_gpu:
            reasons["triton"] = "There is no GPU. Use --backend triton to run its kernels under Triton's interpreter."
        not_run |= {name: reason for name, reason in reasons.items() if reason is not None}
    backends = [name for name in args.backend or _BACKENDS if name not in not_run]

    op_names = {backend: _ops_of(backend, args.op) for backend in backends}
    plan_reason = why_not_triton(torch.device(devices["triton"]))
    if plan_reason is not None and "plan_rows" in op_names.get("triton", ()):
        not_run["triton plan_rows"] = plan_reason
        op_names["triton"] = tuple(name for name in op_names["triton"] if name != "plan_rows")

    if args.inject_fault is not None and not any(args.inject_fault in names for names in op_names.values()):
        raise UserError(f"--inject-fault {args.inject_fault}: it must be among the ops that are validated")

    results: list[Result] = []
    for backend in backends:
        for dtype in args.dtype or DTYPES:
            if interpreted and backend == "triton" and dtype == "bfloat16":
                not_run["triton bfloat16"] = "Triton's interpreter multiplies bfloat16 matrices wrongly."
                continue
            results += validate(
                backend,
                getattr(torch, dtype),
                inject_fault=args.inject_fault if args.inject_fault in op_names[backend] else None,
                progress=show_progress(args.quiet or args.json),
                device=devices[backend],
                op_names=op_names[backend],
            )
    if not results:
        reasons_shown = " ".join(f"{what}: {reason}" for what, reason in not_run.items())
        raise UserError(f"nothing to validate: {reasons_shown or 'no backend has these ops'}")
    passed = all(result.passed for result in results)
    if args.json:
        cases = [dataclasses.asdict(result) | {"passed": result.passed} for result in results]
        print(json.dumps({"passed": passed, "not_run": not_run, "cases": cases}))
    else:
        _print_table(results, not_run)
    return 0 if passed else 1


def _ops_of(backend: str, chosen: list[str] | None) -> tuple[str, ...]:
    """The ops to validate on `backend`: those chosen that it has; triton has the parts of a decode step, native all."""
    from dynskip.ops.backends import OP_NAMES
    from dynskip.ops.row_ops import ROW_OP_NAMES
    from dynskip.validation.native_ops import NATIVE_OP_NAMES

    names = OP_NAMES + {"triton": ROW_OP_NAMES, "native": NATIVE_OP_NAMES}.get(backend, ())
    return tuple(name for name in names if chosen is None or name in chosen)


def _compile(args: argparse.Namespace) -> int:
    """Print what the kernels take of GPUs that need not be there; exit status 1 if one does not fit."""
    for option in ("backend", "inject_fault"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is about running kernels: it has no meaning with --compile")
    if args.op is not None and "plan_rows" in args.op:
        raise UserError("plan_rows is compiled with the C++ extension: it has no meaning with --compile")
    try:
        import triton  # noqa: F401  # what is missing is said before processes are started
    except ImportError as error:
        raise UserError(f"Triton cannot be imported ({error}). Install it: pip install 'triton>=3.6'") from error
    from dynskip.validation.offline.compile_kernels import TRITON_OP_NAMES, compile_offline, plan_jobs

    jobs = plan_jobs(
        tuple(args.dtype or DTYPES),
        tuple(args.capability or DEFAULT_CAPABILITIES),
        tuple(args.op or TRITON_OP_NAMES),
        tuple(map(Path, args.config)) if args.config else None,
        everywhere=not args.fewer,
        shapes=tuple(args.shape or ()),
    )
    if not jobs:
        raise UserError("nothing to compile: no table is for a capability that was asked for")
    kernels = compile_offline(jobs, progress=show_progress(args.quiet or args.json))
    (_print_kernels_json if args.json else _print_kernels)(kernels)
    return 0 if all(kernel.complaint is None for kernel in kernels) else 1


def _print_table(results: list[Result], not_run: dict[str, str]) -> None:
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.backend, result.dtype, result.op), []).append(result)
    print(f"{'backend':<8}{'dtype':<10}{'op':<19}{'cases':>5}{'max error':>11}{'allowed':>10}  verdict  worst case")
    for (backend, dtype, op), group in groups.items():
        worst = max(group, key=_severity)
        verdict = "ok" if all(result.passed for result in group) else "FAILED"
        figures = f"{len(group):>5}{worst.max_error:>11.1e}{worst.allowed_error:>10.1e}"
        print(f"{backend:<8}{dtype:<10}{op:<19}{figures}  {verdict:<7}  {worst.case}")
        for result in [result for result in group if not result.passed][:_MAX_SHOWN]:
            why = result.complaint or f"error {result.max_error:.1e}, allowed {result.allowed_error:.1e}"
            print(f"{'':<18}failed: {result.case}: {why}")
    for what, reason in not_run.items():
        print(f"not run: {what}: {reason}")
    num_passed = sum(result.passed for result in results)
    _print_passed(num_passed, len(results), "cases passed")


def _severity(result: Result) -> tuple[bool, float]:
    """Orders results by how near to failure they are."""
    return not result.passed, result.max_error / result.allowed_error if result.allowed_error else result.max_error


def _print_passed(num_passed: int, num: int, what: str) -> None:
    print(f"{num_passed} of {num} {what}{'' if num_passed == num else ' (--json lists all)'}")


def _print_kernels_json(kernels: list[CompiledKernel]) -> None:
    """One object with every variant of every kernel."""
    entries = [dataclasses.asdict(kernel) | {"complaint": kernel.complaint} for kernel in kernels]
    print(json.dumps({"passed": not any(kernel.complaint for kernel in kernels), "kernels": entries}))


def _print_kernels(kernels: list[CompiledKernel]) -> None:
    """One line for all variants of a kernel: the most of what each takes, and the verdict over all."""
    groups: dict[tuple[str, str, str, int], list[CompiledKernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.kernel, kernel.config, kernel.dtype, kernel.capability), []).append(kernel)
    names = [len(name) for key in groups for name in key[:1]]
    width, config_width = max([20, *names]) + 1, max([7, *(len(key[1]) for key in groups)]) + 1
    head = f"{'kernel':<{width}}{'config':<{config_width}}{'dtype':<9}{'GPU':<7}"
    print(f"{head}{'variants':>8}{'registers':>10}{'spilled':>8}{'shared':>8}{'of':>7}{'tensor core':>12}  verdict")
    for (name, config, dtype, capability), group in groups.items():
        figures = [f"{len(group):>8}", f"{max(kernel.registers for kernel in group):>10}"]
        figures += [f"{max(kernel.spilled_bytes for kernel in group):>8}"]
        figures += [f"{max(kernel.shared_bytes for kernel in group):>8}", f"{group[0].max_shared_bytes:>7}"]
        instructions = sorted({kernel.tensor_core_instructions for kernel in group})
        figures += [f"{'-'.join(map(str, dict.fromkeys((instructions[0], instructions[-1])))):>12}"]
        wrong = [kernel for kernel in group if kernel.complaint]
        verdict = "FAILED" if wrong else "ok"
        head = f"{name:<{width}}{config:<{config_width}}{dtype:<9}sm_{capability:<4}"
        print(f"{head}{''.join(figures)}  {verdict}")
        for kernel in wrong[:_MAX_SHOWN]:
            print(f"{'':<{width}}failed: {kernel.case}: {kernel.complaint}")
    num_passed = sum(kernel.complaint is None for kernel in kernels)
    _print_passed(num_passed, len(kernels), "compiled kernels fit; each figure is the largest of its variants")
