"""Learned controllers with random weights."""

from __future__ import annotations

from typing import Any

import torch
from models import NUM_LAYERS

from dynskip.controllers import (
    ModelSizes,
    make_controller,
)

SIZES = ModelSizes(NUM_LAYERS, 32, 32)


SEQUENCE_NAMES = ["window:3", "attention-pool"]


def random_controller(name: str, sizes: ModelSizes = SIZES, seed: int = 0) -> Any:
    """A controller whose decisions differ between layers and rows."""
    controller: Any = make_controller(name, sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return controller.eval()
