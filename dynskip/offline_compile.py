"""Every Triton kernel compiled for GPUs that need not be there, and whether it fits them.

A kernel must not spill registers, must find its shared memory, must multiply 16-bit matrices on tensor cores, and must
wait for the kernel before it exactly where it is launched to overlap with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from dynskip.ops import OP_NAMES

# Shared memory that a thread block may have: CUDA C++ Programming Guide, technical specifications per capability.
MAX_SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
DEFAULT_CAPABILITIES = (80, 90, 100)
# The configurations for GPUs nobody measured: they must run on every one of MAX_SHARED_BYTES.
GENERIC = "generic"
_FIRST_OVERLAPPING_CAPABILITY = 90


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as compiled for one capability from one table of configurations.

    op: what it was launched for; case: the first of the launches that need it. products: dtypes of the matrices that it
    multiplies. num_waits, num_signals: instructions that wait for the kernel before, and that let the next one begin.
    error: why it does not compile; then the figures are 0.
    """

    op: str
    kernel: str
    config: str
    dtype: str
    capability: int
    case: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_core_instructions: int = 0
    products: tuple[str, ...] = ()
    num_waits: int = 0
    num_signals: int = 0
    overlaps_the_kernel_before: bool = False
    error: str | None = None

    @property
    def max_shared_bytes(self) -> int:
        """What it may have."""
        return min(MAX_SHARED_BYTES.values()) if self.config == GENERIC else MAX_SHARED_BYTES[self.capability]

    @property
    def complaint(self) -> str | None:
        """What is wrong with it; None if nothing is."""
        if self.error is not None:
            return f"does not compile: {self.error}"
        if self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes a thread"
        if self.shared_bytes > self.max_shared_bytes:
            return f"needs {self.shared_bytes} bytes of shared memory, may have {self.max_shared_bytes}"
        if {"bf16", "f16"} & set(self.products) and not self.tensor_core_instructions:
            return "multiplies 16-bit matrices without tensor cores"
        if (self.num_waits or self.num_signals) and self.capability < _FIRST_OVERLAPPING_CAPABILITY:
            return f"waits for the kernel before it, which sm_{self.capability} cannot"
        if self.overlaps_the_kernel_before and not self.num_waits:
            return "overlaps with the kernel before it and never waits for that"
        if self.num_waits and not self.overlaps_the_kernel_before:
            return "waits for the kernel before it, but is launched after its end"
        return None


@dataclass(frozen=True)
class CompileJob:
    """What one process compiles: kernels in some dtypes, from one table of configurations, for one capability."""

    capability: int
    config: str
    dtype_names: tuple[str, ...]
    op_names: tuple[str, ...] = OP_NAMES


def plan_jobs(
    dtype_names: tuple[str, ...],
    capabilities: tuple[int, ...] = DEFAULT_CAPABILITIES,
    op_names: tuple[str, ...] = OP_NAMES,
) -> list[CompileJob]:
    """The generic table for each of `capabilities`, in each dtype.

    Raises: ValueError for a capability whose limits are not known.
    """
    for capability in capabilities:
        if capability not in MAX_SHARED_BYTES:
            known = ", ".join(map(str, MAX_SHARED_BYTES))
            raise ValueError(f"plan_jobs: capabilities must be among {known}, got {capability}. Choose one of these.")
    return [
        CompileJob(capability, GENERIC, (dtype_name,), op_names)
        for dtype_name in dtype_names
        for capability in capabilities
    ]


def compile_offline(jobs: list[CompileJob], progress: bool = True) -> list[CompiledKernel]:
    """The kernels of all `jobs`, in their order; as many processes at a time as there are CPUs.

    Triton keeps what it compiled in its cache (TRITON_CACHE_DIR). progress: shows a bar.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(_run, jobs), total=len(jobs), desc="compiling", unit="job", disable=not progress)
        return [kernel for kernels in bar for kernel in kernels]


def _run(job: CompileJob) -> list[CompiledKernel]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    request = {"capability": job.capability, "dtype_names": job.dtype_names, "op_names": job.op_names}
    command = [sys.executable, "-m", "dynskip.offline_worker", json.dumps(request)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"compile_offline: its process must end well, got status {ended.returncode}. {ended.stderr}")
    return [_kernel_of(job, described) for described in json.loads(ended.stdout)]


def _kernel_of(job: CompileJob, described: dict[str, Any]) -> CompiledKernel:
    described["products"] = tuple(described.get("products", ()))
    return CompiledKernel(config=job.config, capability=job.capability, **described)
