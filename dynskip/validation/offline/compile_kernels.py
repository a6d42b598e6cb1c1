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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynskip.kernels import switches
from dynskip.kernels.configs import DEFAULT, FOLDER, config_names, read_table
from dynskip.ops.backends import OP_NAMES
from dynskip.ops.row_ops import ROW_OP_NAMES
from dynskip.validation.offline.resources import complaint

# Shared memory that a thread block may have: CUDA C++ Programming Guide, technical specifications per capability.
MAX_SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
DEFAULT_CAPABILITIES = (80, 90, 100)
# Those with a kernel of Triton's.
TRITON_OP_NAMES = (*OP_NAMES, *(name for name in ROW_OP_NAMES if name != "plan_rows"), "choose_tokens")
# How the case of a launch ends whose lists of rows stand where those of most layers do: not at a multiple of 16 bytes.
MISALIGNED = ", misaligned lists"
# Bounds of rows for shapes that are compiled by name.
FEW_ROWS = (1, 8, 32)
_FIRST_OVERLAPPING_CAPABILITY = 90
_MAX_WARPS = 32


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as compiled for one capability from one table of configurations.

    op: what it was launched for; case: the first of the launches that need it. products: dtypes of the matrices that it
    multiplies. num_waits, num_signals: instructions that wait for the kernel before, and that let the next one begin.
    acts_before_wait: what it does without having waited, if it should wait: see `ptx`. error: why it does not compile;
    then the figures are 0.
    """

    op: str
    kernel: str
    config: str
    dtype: str
    capability: int
    case: str
    num_warps: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_core_instructions: int = 0
    products: tuple[str, ...] = ()
    num_waits: int = 0
    num_signals: int = 0
    overlaps_the_kernel_before: bool = False
    acts_before_wait: tuple[str, ...] = ()
    error: str | None = None

    @property
    def max_shared_bytes(self) -> int:
        """What it may have; with the configurations for GPUs that nobody measured, what every GPU has."""
        return min(MAX_SHARED_BYTES.values()) if self.config == DEFAULT else MAX_SHARED_BYTES[self.capability]

    @property
    def complaint(self) -> str | None:
        """What is wrong with it; None if nothing is."""
        if self.num_warps > _MAX_WARPS:
            return f"has {self.num_warps} warps, may have {_MAX_WARPS}"
        too_much = complaint(self.error, self.spilled_bytes, self.shared_bytes, self.max_shared_bytes)
        if too_much is not None:
            return too_much
        if {"bf16", "f16"} & set(self.products) and not self.tensor_core_instructions:
            return "multiplies 16-bit matrices without tensor cores"
        if (self.num_waits or self.num_signals) and self.capability < _FIRST_OVERLAPPING_CAPABILITY:
            return f"waits for the kernel before it, which sm_{self.capability} cannot"
        if self.overlaps_the_kernel_before and not self.num_waits:
            return "overlaps with the kernel before it and never waits for that"
        if self.acts_before_wait:
            return f"{' and '.join(self.acts_before_wait)} on a way that has not waited for the kernel before it"
        if self.num_waits and not self.overlaps_the_kernel_before:
            return "waits for the kernel before it, but is launched after its end"
        return None


@dataclass(frozen=True)
class CompileJob:
    """What is compiled together: kernels in one dtype, from one table of configurations, for one capability.

    everywhere: for five shapes of OPT and every bound of rows; otherwise OPT-1.3B with every entry of the table, and
    a shape with narrower and one with wider heads at few rows. shapes: names of `models.shapes`, which are
    compiled instead of these, for each of the bounds `rows`.
    """

    capability: int
    config_path: Path
    dtype_name: str
    op_names: tuple[str, ...]
    everywhere: bool
    shapes: tuple[str, ...] = ()
    rows: tuple[int, ...] = FEW_ROWS


def plan_jobs(
    dtype_names: tuple[str, ...],
    capabilities: tuple[int, ...] = DEFAULT_CAPABILITIES,
    op_names: tuple[str, ...] = TRITON_OP_NAMES,
    config_paths: tuple[Path, ...] | None = None,
    everywhere: bool = True,
    shapes: tuple[str, ...] = (),
    rows: tuple[int, ...] = FEW_ROWS,
) -> list[CompileJob]:
    """The generic table for each of `capabilities`, and each tuned table for the one that it was tuned on.

    config_paths: other tables than those of dynskip and that of DYNSKIP_CONFIGS. A tuned one for a capability that is
    not asked for is left out.
    Raises: ValueError for a capability whose limits are not known, or a table that is not well-formed.
    """
    jobs = []
    if config_paths is None:
        switched = switches.configs()
        config_paths = tuple(FOLDER / f"{name}.json" for name in config_names())
        config_paths += () if switched is None else (switched,)
    for path in config_paths:
        read_table(path)
        tuned_for = json.loads(path.read_text(encoding="utf-8"))["capability"]
        for capability in capabilities:
            if capability not in MAX_SHARED_BYTES:
                known = ", ".join(map(str, MAX_SHARED_BYTES))
                raise ValueError(
                    f"plan_jobs: capabilities must be among {known}, got {capability}. Choose one of these."
                )
            if tuned_for in (None, capability):
                how = (everywhere, shapes, rows)
                jobs += [CompileJob(capability, path, name, op_names, *how) for name in dtype_names]
    return jobs


def compile_offline(jobs: list[CompileJob], progress: bool = True) -> list[CompiledKernel]:
    """The kernels of all `jobs`, in their order; as many processes at a time as there are CPUs.

    A process compiles some ops of all the jobs for one capability: hardly a kernel is needed by two at the same time.
    Triton keeps what it compiled in its cache (TRITON_CACHE_DIR). progress: shows a bar.
    """
    num_cpus = os.cpu_count() or 1
    shares = [
        share
        for capability in dict.fromkeys(job.capability for job in jobs)
        for i in range(num_cpus)
        if (share := [(place, part) for place, job in enumerate(jobs) if (part := _part(job, capability, i, num_cpus))])
    ]
    found: list[dict[str, CompiledKernel]] = [{} for _ in jobs]
    with (
        ThreadPoolExecutor(num_cpus) as pool,
        tqdm(total=len(shares), desc="compiling", unit="process", disable=not progress) as bar,
    ):
        for share, kernels in zip(shares, pool.map(lambda share: _run([job for _, job in share]), shares), strict=True):
            for (place, _), of_job in zip(share, kernels, strict=True):
                found[place] = of_job | found[place]
            bar.update()
    return [kernel for of_job in found for kernel in of_job.values()]


def _part(job: CompileJob, capability: int, i: int, num_parts: int) -> CompileJob | None:
    """The i-th of `num_parts` parts of a job for `capability`, by ops; None where it has no op."""
    op_names = job.op_names[i::num_parts]
    return replace(job, op_names=op_names) if job.capability == capability and op_names else None


def _run(jobs: list[CompileJob]) -> list[dict[str, CompiledKernel]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    requests = [asdict(job) | {"config_path": str(job.config_path)} for job in jobs]
    command = [sys.executable, "-m", "dynskip.validation.offline.worker", json.dumps(requests)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"compile_offline: its process must end well, got status {ended.returncode}. {ended.stderr}")
    answers = json.loads(ended.stdout)
    return [
        {key: _kernel_of(job, described) for key, described in answer.items()}
        for job, answer in zip(jobs, answers, strict=True)
    ]


def _kernel_of(job: CompileJob, described: dict[str, Any]) -> CompiledKernel:
    for name in ("products", "acts_before_wait"):
        described[name] = tuple(described.get(name, ()))
    return CompiledKernel(config=job.config_path.stem, capability=job.capability, **described)
