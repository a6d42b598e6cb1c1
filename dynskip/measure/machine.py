"""The machine that a result was measured on, and what it can do at most."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from dynskip.costs.layer_costs import MachineSpeed
from dynskip.measure.timing import timed
from dynskip.version import __version__

_PACKAGES = ("torch", "transformers", "ctranslate2")
_READ_BYTES = 2**30  # far more than any cache holds
_GEMM_SIZE = 2048


def describe() -> dict[str, Any]:
    """What stands in every line of a result: machine, versions, commit, date, load."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    model = cpu_model()
    return {
        "machine": re.sub(r"[^a-z0-9]+", "-", f"{model} {cores} cores".lower()).strip("-"),
        "cpu": model,
        "num_cores": cores,
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "versions": {"dynskip": __version__, **{name: _version(name) for name in _PACKAGES}},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that runs, with ``+`` where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + (
            "+" if _git(root, "status", "--porcelain", "--untracked-files=no", "--", "dynskip", "csrc") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or a .git that git refuses: the result is without a commit, and shows it


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
    torch.nn.functional.linear(rows, weight)

    def multiply() -> None:
        torch.nn.functional.linear(rows, weight)

    gemm_ms = min(timed(multiply) for _ in range(num_samples))
    flops = 2 * 4 * _GEMM_SIZE**3
    return MachineSpeed(bandwidth_gbps=_READ_BYTES / read_ms / 1e6, peak_gflops=flops / gemm_ms / 1e6)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
