"""Compiles every kernel for a GPU that need not be there, and prints registers and spills as JSON: see test_kernels.py.

Run as a script, in a process without TRITON_INTERPRET. The launchers themselves are called, on CPU tensors, with each
launch replaced by a compilation: so what is compiled has the constants and the alignment hints of a real run.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dynskip.backends import get_backend


class OfflineDriver:
    """Stands for a GPU of a given compute capability, as far as compiling for it goes."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What `cuobjdump -res-usage` says of each kernel that a launch in `dtype` needs, for OPT's head sizes."""
    compiled: list[Any] = []

    def compile_instead(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    driver.set_active(OfflineDriver(capability))
    JITFunction.__getitem__ = compile_instead
    launch_all(dtype)
    return [resource_usage(kernel) for kernel in compiled]


def launch_all(dtype: torch.dtype) -> None:
    """Calls every launcher with shapes of OPT: 125m's 768 columns, 66b's 9216, heads of 64, 80 and 128."""
    backend = get_backend("triton")
    indices = functools.partial(torch.zeros, dtype=torch.int32)
    for num_columns in (768, 9216):
        x, parameter = torch.zeros(8, num_columns, dtype=dtype), torch.zeros(num_columns, dtype=dtype)
        backend.gather_layer_norm(x, indices(4), parameter, parameter, 1e-5)
        backend.scatter_add(x, indices(4), torch.zeros(4, num_columns, dtype=dtype))
        backend.gather_layer_norm(x, None, None, None, 1e-5)
    for head_size in (64, 80, 128):
        qkv: Tensor = torch.zeros(8, 3, 12, head_size, dtype=dtype)
        q, k, v = qkv.unbind(1)
        cache = torch.zeros(256, 12, head_size, dtype=dtype)
        backend.kv_store(k, v, cache, cache, indices(8))
        backend.decode_attention(q, cache, cache, indices(4, 256), indices(8), indices(8), 0.125)
        backend.prefill_attention(q, k, v, indices(5), indices(5), indices(8), 0.125)


def resource_usage(kernel: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    assert {"REG", "STACK", "LOCAL"} <= set(figures), text
    spilled_bytes = int(figures["STACK"]) + int(figures["LOCAL"])
    return {
        "kernel": kernel.metadata.name,
        "registers": int(figures["REG"]),
        "spilled_bytes": spilled_bytes,
        "shared_bytes": kernel.metadata.shared,
    }


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), getattr(torch, sys.argv[2]))))
