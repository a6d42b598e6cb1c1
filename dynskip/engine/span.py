"""`Span`: the tokens of a sequence that a step runs, and how small inputs of a step reach the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynskip.engine.request import OutputSequence


class Span(NamedTuple):
    """``num_tokens`` tokens of a sequence from its token ``first`` on, whose predecessors are in the cache."""

    sequence: OutputSequence
    first: int
    num_tokens: int


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, by a copy that is not waited for."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
