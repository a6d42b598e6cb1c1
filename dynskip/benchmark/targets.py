"""What the rows of the benchmark are held against, by model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The share of the speed-up that products, embedding and head allow which a path must reach.
SHARE_TARGET = 0.95


@dataclass(frozen=True)
class Targets:
    """Targets of one model; those by batch have none for other batches.

    transformers: how many times faster than transformers a decode step must be.
    floor: a decode step as a multiple of its products and of reading its keys and values, at most.
    mix: the same for independent paths.
    reading: a step of one row as a multiple of reading the weights once, at most.
    rest_us: what of a decode step in one call is neither product nor attention, at most.
    prefill: how many times faster than transformers a prefill must be.
    """

    transformers: Mapping[int, float] = field(default_factory=lambda: {1: 1.4, 8: 1.6, 32: 1.9})
    floor: Mapping[int, float] = field(default_factory=lambda: {1: 1.05, 8: 1.06, 32: 1.07})
    mix: float = 1.10
    reading: float | None = None
    rest_us: float | None = None
    prefill: float = 1.1

    @staticmethod
    def of(model: str) -> Targets:
        """Those of a shape or of a model by name."""
        return _TARGETS.get(model, Targets())


_SMALL_FLOOR = {1: 1.2, 8: 1.2, 32: 1.2}
_TARGETS = {
    "llama-3.2-1b": Targets({1: 2.0, 8: 2.2, 32: 2.1}, prefill=1.25),
    "smollm2-135m": Targets({}, floor=_SMALL_FLOOR, reading=1.6, prefill=1.25),
    "opt-mini": Targets({1: 7.0, 8: 6.0, 16: 5.0}, floor={}, rest_us=200.0),
}
