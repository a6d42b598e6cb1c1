"""How Triton kernels are launched, and how often each op launched its kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

LAUNCHES: Counter[str] = Counter()
"""Launches by op name, since the process began or the last `LAUNCHES.clear()`. An op without work launches nothing."""


def launch(op: str, kernel: Any, grid: tuple[int, ...], device: torch.device, *args: object, **options: object) -> None:
    """Launches `kernel` on `device` and counts it for `op`; an empty grid launches nothing.

    Multiply-adds are fused, said explicitly because Triton's default is about to change.
    """
    if 0 in grid:
        return
    LAUNCHES[op] += 1
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*args, enable_fp_fusion=True, **options)
