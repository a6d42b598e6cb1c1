"""compute-sanitizer over a few calls of every op. Without --sanitizer: only the calls, as the sanitizer sees them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from dynskip import ops
from dynskip.ops.row_ops import ROW_OP_NAMES
from dynskip.validation.cases import make_cases
from dynskip.validation.tensors import Case
from dynskip.validation.validate import validate_case

TOOLS = ("memcheck", "racecheck")
FOUND_ERRORS = 99
# What the tool prints where it cannot watch a device or is not allowed to; then nothing was checked.
REFUSALS = ("device not supported", "not supported on this device", "insufficient permission")
# The exit status that stands for a part that was skipped.
SKIPPED = 77


def choose_cases(op: str, dtype: torch.dtype, device: str, num_cases: int) -> list[Case]:
    """``num_cases`` of the cases of ``op``, from the first to the last at equal distances."""
    cases = make_cases(op, dtype, device)
    last = len(cases) - 1
    places = sorted({round(index * last / max(num_cases - 1, 1)) for index in range(num_cases)})
    return [cases[place] for place in places]


def call_ops(
    backend: str, dtype: torch.dtype, device: str, num_cases: int, chosen: Sequence[str] | None = None
) -> list[str]:
    """Call ops and row ops of ``backend``, all or those ``chosen``, each held against float64; returns what failed."""
    failures = []
    op_names = ops.OP_NAMES + (ROW_OP_NAMES if backend == "triton" else ())
    for op in chosen or op_names:
        for case in choose_cases(op, dtype, device, num_cases):
            result = validate_case(backend, dtype, case)
            print(f"{op}: {case.name}: {'ok' if result.passed else 'FAILED'}", flush=True)
            if not result.passed:
                failures.append(f"{op}: {case.name}: {result.complaint or result.max_error}")
    return failures


def sanitize(tool: str, sanitizer: str, command: Sequence[str]) -> int:
    """The exit status of ``command`` under ``tool``: 99 for what the tool found, 77 where it refuses the device."""
    options = ("--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--target-processes", "application-only")
    # Every tensor in an allocation of its own, so that a read behind its end is one behind an allocation's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.run(
        [sanitizer, *options, "--print-limit", "20", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(process.stdout, flush=True)
    refused = [line for line in process.stdout.splitlines() if any(text in line.lower() for text in REFUSALS)]
    if process.returncode != 0 and refused:
        print(f"SKIPPED: {tool} cannot watch this device: {refused[0]}")
        return SKIPPED
    verdict = "ok" if process.returncode == 0 else f"FAILED ({process.returncode})"
    print(f"{tool}: {verdict}")
    return process.returncode


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``sanitizer`` of `make gpu`."""
    parser = argparse.ArgumentParser(prog="bench.gpu.sanitize", description=__doc__)
    parser.add_argument("--tool", choices=TOOLS, default=TOOLS[0])
    parser.add_argument("--sanitizer", metavar="PATH", help="the program compute-sanitizer")
    parser.add_argument("--cases", type=int, default=3, metavar="N", help="calls of each op (default: 3)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try it out")
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--op", action="append", choices=ops.OP_NAMES + ROW_OP_NAMES, help="repeatable (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="make the calls' arguments on the CPU and end")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    if args.dry_run:
        for op in args.op or ops.OP_NAMES + ROW_OP_NAMES:
            print(f"{op}: {', '.join(case.name for case in choose_cases(op, dtype, 'cpu', args.cases))}")
        return 0
    if args.sanitizer is not None:
        again = ("--cases", str(args.cases), "--device", args.device, "--backend", args.backend, "--dtype", args.dtype)
        chosen = (option for op in args.op or () for option in ("--op", op))
        return sanitize(args.tool, args.sanitizer, [sys.executable, "-m", "bench.gpu.sanitize", *again, *chosen])
    failures = call_ops(args.backend, dtype, args.device, args.cases, args.op)
    print("\n".join(failures) or "all results are within their error budgets")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
