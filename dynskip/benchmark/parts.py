"""Where the time of a decode step goes, part by part."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import Tensor

from dynskip.benchmark.report import REST
from dynskip.engine import step as engine_step
from dynskip.engine.choosing import choose
from dynskip.engine.model_runner import ModelRunner
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.kv_cache import KVCache
from dynskip.execution.native_steps import NativeSteps
from dynskip.measure.runners import DynskipRunner
from dynskip.models.linear import Linear
from dynskip.ops.backends import Backend
from dynskip.scheduler.scheduler import Scheduler

# The parts that only choosing and compacting rows costs, and choosing tokens; of a step in one call more than these:
# what is neither product nor attention there is planning, norms, rotation, sums, the most likely tokens.
OVERHEAD = ("planning", "gather", "scatter", "sampling", REST)

# What is timed, with the class or module whose attribute it is. A hook in the step itself would cost every step.
_HOOKS: tuple[tuple[Any, Any, str], ...] = (
    (ModelRunner, ModelRunner.decode_step, "planning"),
    (Scheduler, Scheduler.schedule, "planning"),
    (KVCache, KVCache.index, "planning"),
    (KVCache, KVCache.allocate, "planning"),
    (KVCache, KVCache.append, "planning"),
    (engine_step, choose, "sampling"),
    (Linear, Linear.forward, "products"),
)


class StepParts:
    """Milliseconds of each part of each step that was timed; the time of a part excludes parts that run inside it.

    "gather" is what a gathering LayerNorm takes longer than one of the same rows laid side by side, "scatter" the whole
    addition to the residual stream. What no part claims is "other": the Python between them.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def ms(self, part: str) -> float:
        """The median milliseconds of ``part``."""
        return median(step.get(part, 0.0) for step in self.steps)

    @property
    def parts(self) -> list[str]:
        """All parts, the longest first; "step" is their sum."""
        names = {name for step in self.steps for name in step}
        return sorted(names, key=self.ms, reverse=True)

    @property
    def overhead_share(self) -> float:
        """The median over the steps of the share of ``OVERHEAD`` in the step."""
        return median(sum(step.get(part, 0.0) for part in OVERHEAD) / step["step"] for step in self.steps)

    @property
    def overhead_ms(self) -> float:
        """The median over the steps of the milliseconds of ``OVERHEAD``."""
        return median(sum(step.get(part, 0.0) for part in OVERHEAD) for step in self.steps)


def measure_parts(runner: DynskipRunner, num_steps: int, on_call: Callable[[str], None] | None = None) -> StepParts:
    """The parts of ``num_steps`` further decode steps of a prefilled ``runner``."""
    assert runner.generation is not None, "prefilled"
    found = StepParts()
    clock = _Clock()
    with _hooked(clock, runner) as whole_steps:
        for _ in range(num_steps):
            if on_call is not None:
                on_call("parts of a step")
            clock.parts.clear()
            before = () if whole_steps is None else whole_steps.times_s
            start = time.perf_counter()
            runner.step()
            total_ms = (time.perf_counter() - start) * 1e3 - clock.parts.pop("uncounted", 0.0)
            parts = dict(clock.parts)
            if whole_steps is not None:
                spent_ms = [(after - earlier) * 1e3 for after, earlier in zip(whole_steps.times_s, before, strict=True)]
                parts |= zip(("products", "attention", REST), spent_ms, strict=True)
            found.steps.append({**parts, "other": total_ms - sum(parts.values()), "step": total_ms})
    return found


class _Clock:
    """Adds up exclusive times: what runs inside another timed call is taken off the outer one."""

    def __init__(self) -> None:
        self.parts: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def time(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inner.append(0.0)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        self.parts[part] += elapsed_ms - self._inner.pop()
        self._inner[-1] += elapsed_ms
        return result

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            return self.time(part, function, *args, **kwargs)

        return timed


@contextmanager
def _hooked(clock: _Clock, runner: DynskipRunner) -> Iterator[NativeSteps | None]:
    """Let ``clock`` see the parts of every step while the context lasts; yields what times those in one call."""
    assert runner.generation is not None
    executor = runner.generation.executor
    assert isinstance(executor, CompactExecutor), "the specification is not timed"
    backend = executor.backend
    for owner, function, part in _HOOKS:
        assert getattr(owner, function.__name__) is function, f"{owner.__name__} must call {function.__name__}"
        setattr(owner, function.__name__, clock.wrap(part, function))
    executor.backend = _timed_backend(clock, backend)
    if executor.native_steps is not None:
        executor.native_steps.is_timed = True
    try:
        yield executor.native_steps
    finally:
        if executor.native_steps is not None:
            executor.native_steps.is_timed = False
        executor.backend = backend
        for owner, function, _ in _HOOKS:
            setattr(owner, function.__name__, function)


def _timed_backend(clock: _Clock, backend: Backend) -> Backend:
    def gather_layer_norm(x: Tensor, row_ids: Tensor | None, *args: Any) -> Tensor:
        before = clock.parts["layer norm"]
        normed: Tensor = clock.time("layer norm", backend.gather_layer_norm, x, row_ids, *args)
        if row_ids is not None:
            fused_ms = clock.parts["layer norm"] - before
            compact = clock.time("uncounted", x.index_select, 0, row_ids)
            uncounted = clock.parts["uncounted"]
            clock.time("uncounted", backend.gather_layer_norm, compact, None, *args)
            norm_ms = min(clock.parts["uncounted"] - uncounted, fused_ms)
            clock.parts["layer norm"] = before + norm_ms
            clock.parts["gather"] += fused_ms - norm_ms
        return normed

    return dataclasses.replace(
        backend,
        gather_layer_norm=gather_layer_norm,
        scatter_add=clock.wrap("scatter", backend.scatter_add),
        kv_store=clock.wrap("kv store", backend.kv_store),
        decode_attention=clock.wrap("attention", backend.decode_attention),
        rotate=clock.wrap("rotary", backend.rotate),
        activate=clock.wrap("activation", backend.activate),
    )
