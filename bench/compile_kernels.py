"""The kernels of published decoders compiled for GPUs that need not be there: registers, spills, shared memory.

Run by ``make compile``; writes one table. Exit status 1 where a kernel does not fit its GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynskip import host
from dynskip.files import write_text
from dynskip.models import shapes
from dynskip.validation.offline.compile_kernels import (
    FEW_ROWS,
    TRITON_OP_NAMES,
    CompiledKernel,
    compile_offline,
    plan_jobs,
)

OUT = Path(__file__).parent / "results" / "compiled-kernels.md"
SHAPES = (shapes.DEFAULT_SHAPE, *(name for name in shapes.SHAPES if not name.startswith("opt-")))
# Every shape for the GPU that the kernels were written for; one of them for the generations before and after.
COMPILED = {90: SHAPES, 80: ("llama-3.2-1b",), 100: ("llama-3.2-1b",)}
_DTYPE = "bfloat16"

Found = dict[tuple[int, str], list[CompiledKernel]]


def compile_shapes(progress: bool = True) -> Found:
    """The kernels of each GPU and shape."""
    jobs = {
        (capability, name): plan_jobs((_DTYPE,), (capability,), shapes=(name,))
        for capability, names in COMPILED.items()
        for name in names
    }
    kernels = iter(compile_offline([job for planned in jobs.values() for job in planned], progress))
    found: Found = {key: [] for key in jobs}
    for kernel in kernels:
        found[kernel.capability, kernel.case.partition(",")[0]].append(kernel)
    return found


def page(found: Found, commit: str | None) -> str:
    """The tables of all GPUs. commit: that was compiled, where it is known."""
    rows = ", ".join(map(str, FEW_ROWS))
    num_kernels = sum(map(len, found.values()))
    wrong = [
        f"- {kernel.op}, {kernel.case}, sm_{kernel.capability}: {kernel.complaint}"
        for kernels in found.values()
        for kernel in kernels
        if kernel.complaint
    ]
    lines = [
        "# Kernels as compiled",
        "",
        "Written by `make compile`. Nothing ran: each kernel was compiled offline, with the constants for GPUs that",
        f"were not tuned, in {_DTYPE}, for at most {rows} rows, and for {FEW_ROWS[-1]} in deterministic mode, and its",
        "machine code was read. A figure is the largest of these.",
        "",
        f"{num_kernels - len(wrong)} of {num_kernels} kernels fit, commit {commit or 'unknown'}.",
        *wrong,
    ]
    for capability, names in COMPILED.items():
        by_op = {
            name: {op: [kernel for kernel in found[capability, name] if kernel.op == op] for op in TRITON_OP_NAMES}
            for name in names
        }
        for title, cell in (
            ("registers a thread, and bytes spilled", _registers),
            ("KiB of shared memory", _shared),
        ):
            lines += ["", f"## sm_{capability}: {title}", "", f"| op | {' | '.join(names)} |"]
            lines += ["| --- |" + " ---: |" * len(names)]
            for op in TRITON_OP_NAMES:
                lines += [f"| {op} | {' | '.join(cell(by_op[name][op]) for name in names)} |"]
    return "\n".join(lines) + "\n"


def _registers(kernels: list[CompiledKernel]) -> str:
    if not kernels:
        return "-"
    spilled = max(kernel.spilled_bytes for kernel in kernels)
    return f"{max(kernel.registers for kernel in kernels)}" + (f", spills {spilled}" if spilled else "")


def _shared(kernels: list[CompiledKernel]) -> str:
    return f"{max(kernel.shared_bytes for kernel in kernels) / 1024:.0f}" if kernels else "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, write the page, print it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the page (default: bench/results/...)")
    args = parser.parse_args(argv)
    found = compile_shapes()
    text = page(found, host.commit())
    write_text(args.out, text)
    print(text, end="")
    return 1 if any(kernel.complaint for kernels in found.values() for kernel in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
