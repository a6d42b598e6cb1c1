"""Numbers that are no longer finite: they end a training before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn


class NotFiniteError(ArithmeticError):
    """A training has diverged."""


def check_numbers(numbers: Mapping[str, float], step: int, directory: Path) -> None:
    """Raise NotFiniteError where one of the named numbers of a step, counted from 1, is infinite or NaN."""
    if all(math.isfinite(number) for number in numbers.values()):
        return
    shown = ", ".join(f"{name} {number:.6g}" for name, number in numbers.items())
    raise _error(f"loss must be finite, got {shown} at step {step}", directory)


def check_weights(model: nn.Module, step: int, directory: Path) -> None:
    """Raise NotFiniteError where a weight is infinite or NaN after ``step`` steps. Cost: reads all weights once."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise _error(f"weights must be finite, got {name} with infinities or NaN after step {step}", directory)


def _error(fault: str, directory: Path) -> NotFiniteError:
    return NotFiniteError(
        f"train: {fault} in {directory}. Nothing was exported. Start again in another folder with a lower learning "
        "rate, more warm-up steps, or in float32."
    )
