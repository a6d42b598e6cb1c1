"""The machine that a result was measured on, and what it can do at most."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import psutil
import torch

from dynskip import host
from dynskip.costs.layer_costs import MachineSpeed
from dynskip.kernels.configs import device_slug
from dynskip.measure.timing import timed
from dynskip.version import __version__

_PACKAGES = ("torch", "transformers", "ctranslate2")
_READ_BYTES = 2**30  # far more than any cache holds
_GEMM_SIZE = 2048


def describe() -> dict[str, Any]:
    """What stands in every line of a result: machine, versions, commit, date, load."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    model = host.cpu_model()
    return {
        "machine": device_slug(f"{model} {cores} cores"),
        "cpu": model,
        "num_cores": cores,
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "versions": {"dynskip": __version__, **{name: host.package_version(name) for name in _PACKAGES}},
        "commit": host.commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


class WeightReader:
    """Reads as many bytes as a model's weights take: what a step that multiplies by each weight cannot go below.

    The bytes read are a buffer of 1 GiB, summed as 64-bit integers by all threads, the fastest way to read memory
    that torch has; the time is scaled to the bytes of the weights.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._buffer = torch.ones(_READ_BYTES // 8, dtype=torch.int64)

    def read(self) -> float:
        """The milliseconds to read ``num_bytes``."""
        start = time.perf_counter()
        total = self._buffer.sum()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        assert int(total) == self._buffer.numel(), "every number was read"
        return elapsed_ms * self.num_bytes / _READ_BYTES


def measure_speed(dtype: torch.dtype = torch.bfloat16, num_samples: int = 5) -> MachineSpeed:
    """The bandwidth of reading memory and the peak of a large matrix product, each the best of ``num_samples``."""
    reader = WeightReader(_READ_BYTES)
    read_ms = min(timed(reader.read) for _ in range(num_samples))
    del reader
    weight = torch.randn(4 * _GEMM_SIZE, _GEMM_SIZE).to(dtype)
    rows = torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype)

    def multiply() -> None:
        torch.nn.functional.linear(rows, weight)

    multiply()
    gemm_ms = min(timed(multiply) for _ in range(num_samples))
    flops = 2 * 4 * _GEMM_SIZE**3
    return MachineSpeed(bandwidth_gbps=_READ_BYTES / read_ms / 1e6, peak_gflops=flops / gemm_ms / 1e6)
