"""What ``dynskip validate --compile`` prints: the kernels as compiled, and which of them do not fit a GPU."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynskip.validation.offline.compile_kernels import CompiledKernel

_MAX_SHOWN = 3


def print_json(kernels: list[CompiledKernel]) -> None:
    """One object with every variant of every kernel."""
    entries = [dataclasses.asdict(kernel) | {"complaint": kernel.complaint} for kernel in kernels]
    print(json.dumps({"passed": not any(kernel.complaint for kernel in kernels), "kernels": entries}))


def print_table(kernels: list[CompiledKernel]) -> None:
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
        figures += [f"{_range([kernel.tensor_core_instructions for kernel in group]):>12}"]
        wrong = [kernel for kernel in group if kernel.complaint]
        verdict = "FAILED" if wrong else "ok"
        head = f"{name:<{width}}{config:<{config_width}}{dtype:<9}sm_{capability:<4}"
        print(f"{head}{''.join(figures)}  {verdict}")
        for kernel in wrong[:_MAX_SHOWN]:
            print(f"{'':<{width}}failed: {kernel.case}: {kernel.complaint}")
    num_passed = sum(kernel.complaint is None for kernel in kernels)
    print(
        f"{num_passed} of {len(kernels)} compiled kernels fit; each figure is the largest of its variants"
        + ("" if num_passed == len(kernels) else " (--json lists all)")
    )


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
