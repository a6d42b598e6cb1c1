"""Where measured costs are kept: one file per device and model shape in the user's cache."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from dynskip.engine.costs import StepCosts


def cache_folder() -> Path:
    """``$DYNSKIP_CACHE``, or ``dynskip`` in the user's folder for caches."""
    if folder := os.environ.get("DYNSKIP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynskip"


def device_key(device: str = "cpu", num_threads: int | None = None) -> str:
    """The name of a device as a file name: a GPU's own, or the CPU's and the number of threads that torch uses."""
    import torch

    if torch.device(device).type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"{_cpu_name()} {torch.get_num_threads() if num_threads is None else num_threads} threads")


def shape_key(config: Any, dtype: str) -> str:
    """What of a model decides its costs, from transformers' ``OPTConfig``: layers, sizes, vocabulary, dtype."""
    sizes = (config.num_hidden_layers, config.hidden_size, config.ffn_dim, config.vocab_size)
    return "-".join(f"{letter}{size}" for letter, size in zip("lcfv", sizes, strict=True)) + f"-{dtype}"


def cached_path(device: str, shape: str) -> Path:
    """Where the costs of a device and a shape, each by its key, are kept."""
    return cache_folder() / "costs" / device / f"{shape}.json"


def load_cached(device: str, shape: str) -> StepCosts | None:
    """The costs that `dynskip calibrate` has left for a device and a shape; None where it has not run."""
    path = cached_path(device, shape)
    return StepCosts.read(path) if path.is_file() else None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
