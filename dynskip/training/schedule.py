"""How learning rate and depth change over a phase, and how far the phase is."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from dynskip.paths import LayerPath


@dataclass(frozen=True, slots=True)
class PathMenu:
    """Layer paths to draw from, one a batch; the weights move in a straight line from ``start`` to ``end``."""

    paths: tuple[LayerPath, ...]
    start: tuple[float, ...]
    end: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.paths) == len(self.start) == len(self.end) > 0:
            raise ValueError(
                "PathMenu: paths, start and end must have one length, "
                f"got {len(self.paths)}, {len(self.start)} and {len(self.end)}. Give one weight a path."
            )

    def draw(self, seed: int, step: int, progress: float) -> LayerPath:
        """The path of a step: a function of the arguments, so that a resumed run draws the same."""
        weights = [(1 - progress) * a + progress * b for a, b in zip(self.start, self.end, strict=True)]
        return random.Random(f"{seed} path {step}").choices(self.paths, weights)[0]


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Factor on the learning rates: up over ``warmup_steps``, then in a straight line from ``start`` to ``end``."""

    start: float
    end: float
    warmup_steps: int = 0

    def factor(self, step: int, progress: float) -> float:
        """The factor at a step, at ``progress`` between 0 and 1."""
        ramp = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return ramp * (self.start + (self.end - self.start) * min(progress, 1.0))


class Clock:
    """How much of a phase is done: by steps, by minutes, or by whichever of the two is further.

    ``elapsed_s`` is kept in checkpoints, so the minutes count training time and not the pause between two starts.
    """

    def __init__(
        self, max_steps: int | None, max_minutes: float | None, now: Callable[[], float] = time.monotonic
    ) -> None:
        if max_steps is None and max_minutes is None:
            raise ValueError("Clock: max_steps or max_minutes must be given, got neither. Give at least one.")
        self._max_steps = max_steps
        self._max_minutes = max_minutes
        self._now = now
        self._elapsed_s = 0.0
        self._started: float | None = None

    def start(self, elapsed_s: float = 0.0) -> None:
        """Run from now, with ``elapsed_s`` already on the clock."""
        self._elapsed_s = elapsed_s
        self._started = self._now()

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self._elapsed_s + (0.0 if self._started is None else self._now() - self._started)

    def progress(self, step: int) -> float:
        """Share of the phase that is done after ``step`` steps, 0 to 1."""
        by_steps = step / self._max_steps if self._max_steps is not None else 0.0
        by_time = self.elapsed_s / (60 * self._max_minutes) if self._max_minutes is not None else 0.0
        return min(1.0, max(by_steps, by_time))
