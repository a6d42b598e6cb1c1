"""Shapes of models by name, so that what costs or tunes a model need not load one."""

from __future__ import annotations

from dynskip.models.config import DecoderConfig
from dynskip.models.opt import opt_shape

# The published models whose layers all have one size (350m's embedding has another), and two that were not published:
# they have opt-1.3b's depth, so that the same paths apply, and fit into less memory.
DEFAULT_SHAPE = "opt-1.3b"
SHAPES = {
    "opt-1.3b": opt_shape(24, 2048, 32),
    "opt-125m": opt_shape(12, 768, 12),
    "opt-0.4b-24": opt_shape(24, 1024, 16),
    "opt-0.2b-24": opt_shape(24, 768, 12),
    "opt-2.7b": opt_shape(32, 2560, 32),
    "opt-6.7b": opt_shape(32, 4096, 32),
    "opt-13b": opt_shape(40, 5120, 40),
    "opt-30b": opt_shape(48, 7168, 56),
    "opt-66b": opt_shape(64, 9216, 72),
}


def get_shape(name: str) -> DecoderConfig:
    """The shape of that name. Raises ValueError for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"get_shape: name must be one of {', '.join(SHAPES)}, got {name!r}.")
    return SHAPES[name]
