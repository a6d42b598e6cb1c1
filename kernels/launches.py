"""How Triton kernels are launched, how often each op launched its kernel, and how they are compiled instead."""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dynskip.kernels import switches

LAUNCHES: Counter[str] = Counter()
"""Launches by op name, since the process began or the last `LAUNCHES.clear()`. An op without work launches nothing."""


# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of cuda.h.
_CARVEOUT = 9


def cdiv(numerator: int, denominator: int) -> int:
    """How many times `denominator` covers `numerator`. Not `triton.cdiv`, which takes 5 us, several times a launch."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`; of 0 it is 0."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


class _Offline(NamedTuple):
    capability: int
    receive: Callable[[str, Any], None]


_offline: _Offline | None = None


def launch(
    op: str,
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    numbers: tuple[object, ...],
    **options: object,
) -> None:
    """Launches `kernel` where its tensors are and counts it for `op`; an empty grid launches nothing.

    tensors: what the kernel's pointers point at; None where it needs nothing, never the first. numbers: its strides and
    sizes, behind the pointers. options: its constants, and Triton's own. Multiply-adds are fused, said explicitly
    because Triton's default is about to change.
    """
    if 0 in grid:
        return
    device, args = tensors[0].device, (*tensors, *numbers)
    if _offline is not None:
        _offline.receive(op, kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options))
        return
    LAUNCHES[op] += 1
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
    else:
        compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
    percent = switches.carveout()
    if percent is not None and device.type == "cuda":
        # From its second launch on: a graph captures a kernel after it was warmed up.
        _prefer_shared_memory(compiled.function, percent)


@functools.cache
def _prefer_shared_memory(function: int, percent: int) -> None:
    """Has the kernel at the handle `function` ask for `percent` of L1 as shared memory, once."""
    error = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT, percent)
    if error:
        raise RuntimeError(
            f"launch: {switches.CARVEOUT} must be taken by the driver, got CUDA error {error} for {percent}. Unset it."
        )


def compute_capability(device: torch.device) -> int:
    """Which instructions the kernels on `device` may use: 80 for sm_80; 0 on a CPU, where they are interpreted."""
    if _offline is not None:
        return _offline.capability
    return _capability_of_gpu(device.index) if device.type == "cuda" else 0


@functools.cache
def _capability_of_gpu(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@contextmanager
def compile_only(capability: int, receive: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside the block a launch compiles its kernel for GPUs of `capability` and hands op and result to `receive`.

    The tensors may lie on any device. Triton's active driver must be one that compiles for `capability`.
    """
    global _offline
    before, _offline = _offline, _Offline(capability, receive)
    try:
        yield
    finally:
        _offline = before
