"""One batch at several depths: what counting layers promises, what the cost model allows, what was measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import PathMix
from dynskip.execution.kv_cache import available_bytes
from dynskip.measure import machine
from dynskip.measure.agreement import Gate
from dynskip.measure.products import measure_layer_costs, row_counts_up_to
from dynskip.measure.random_models import hf_config, random_hf_model, weight_bytes
from dynskip.measure.runners import DynskipRunner, Runner, TransformersRunner
from dynskip.measure.timing import Task, interleave, progress_bar
from dynskip.models.shapes import SHAPES, get_shape
from dynskip.paths import LayerPath

# transformers' copy of the weights, ours, and then caches and temporaries.
_COPIES = 3


@dataclass(frozen=True)
class Depth:
    """One way to run the batch.

    prefill_s: the seconds of the prompts. step_ms: a decode step, the median. num_steps: how many were timed.
    by_layers, by_cost, measured: the speed-up of a decode step over dynskip at full depth; None: does not apply.
    """

    name: str
    mean_layers: float
    union: int
    prefill_s: float
    step_ms: float
    by_layers: float | None
    by_cost: float | None
    measured: float


@dataclass(frozen=True)
class Comparison:
    """The depths of one batch, and the conditions. ``smaller_than``: the shape that memory did not allow, or None.

    head_share: the part of a full step that the head takes by the cost model; no path saves it.
    """

    shape: str
    smaller_than: str | None
    batch: int
    prompt_len: int
    num_layers: int
    conditions: dict[str, Any]
    head_share: float
    depths: tuple[Depth, ...]

    def saved_s(self, depth: Depth, num_tokens: int) -> float:
        """Seconds that ``depth`` saves over full depth in ``num_tokens`` decode steps, as measured."""
        return num_tokens * self.depths[0].step_ms * (1 - 1 / depth.measured) / 1e3

    def should_save_s(self, depth: Depth, num_tokens: int) -> float | None:
        """The same by the cost model."""
        if depth.by_cost is None:
            return None
        return num_tokens * self.depths[0].step_ms * (1 - 1 / depth.by_cost) / 1e3

    def explanation(self) -> str:
        """One sentence on why layers, cost model and measurement differ."""
        mix = next(depth for depth in self.depths if depth.name == MIX)
        shared = min(
            (depth for depth in self.depths[1:] if depth.by_cost is not None and depth is not mix),
            key=lambda depth: abs(depth.mean_layers - mix.mean_layers),
        )
        assert mix.by_layers and mix.by_cost and shared.by_layers and shared.by_cost, "paths have all three"
        arithmetic, reading = 1 - mix.mean_layers / self.num_layers, 1 - mix.union / self.num_layers
        return (
            f"Why they differ: no path saves the head, {self.head_share:.0%} of a full step, so that the shared path "
            f"of {shared.mean_layers:g} layers is allowed {shared.by_cost:.2f}x instead of {shared.by_layers:.2f}x and "
            f"reaches {shared.measured:.2f}x; and the batch of {self.batch} along independent paths of "
            f"{mix.mean_layers:g} layers needs the weights of {mix.union} of {self.num_layers} layers in every step, "
            f"so that it saves {arithmetic:.0%} of the arithmetic but {reading:.0%} of the reading, is allowed "
            f"{mix.by_cost:.2f}x and reaches {mix.measured:.2f}x."
        )


MIX = "independent random paths"
FULL = "full depth"
TRANSFORMERS = "transformers, full depth"


def compare_depths(
    shape: str = "opt-1.3b",
    batch: int = 32,
    prompt_len: int = 64,
    budgets: Sequence[float] = (1 / 2, 1 / 3, 1 / 6),
    num_rounds: int = 8,
    backend: str = "auto",
    progress: bool = True,
    vocab_size: int | None = None,
) -> Comparison:
    """Times a batch at the shapes of ``shape``, or smaller ones where memory is short.

    budgets: the shares of the layers that the shared paths run; the independent paths take the first. vocab_size:
    another than the shape's own.
    Raises MemoryError where even the smallest shapes do not fit, RuntimeError where logits are wrong.
    """
    chosen, config = _largest_that_fits(shape, vocab_size)
    num_layers = config.num_hidden_layers
    with _stage("random weights", progress):
        hf_model = random_hf_model(config)
    with _stage("packing", progress):
        model = CausalLM.from_hf(hf_model, backend=backend)
    counts = [max(1, round(num_layers * share)) for share in budgets]
    paths = {FULL: [LayerPath.full(num_layers)] * batch}
    for count in counts:
        paths[f"all uniform:{count}"] = [LayerPath.uniform(num_layers, count)] * batch
    paths[MIX] = [LayerPath.random(num_layers, counts[0], seed) for seed in range(batch)]
    with _stage("correctness", progress):
        Gate(hf_model, [chosen_paths[0] for chosen_paths in paths.values()]).check_model(model)
    with _stage("bandwidth", progress):
        speed = machine.measure_speed(num_samples=3)

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, config.vocab_size, (batch, prompt_len), generator=generator)
    new = num_rounds + 2
    runners: dict[str, Runner] = {name: DynskipRunner(model, prompts, p, new) for name, p in paths.items()}
    runners[TRANSFORMERS] = TransformersRunner(hf_model, prompts, new)
    conditions = machine.describe() | {
        "backend": model.backend.name,
        "bandwidth_gbps": round(speed.bandwidth_gbps, 1),
        "peak_gflops": round(speed.peak_gflops, 1),
    }
    prefill_s = {}
    for name, runner in runners.items():
        with _stage(f"prompts, {name}", progress):
            start = time.perf_counter()
            runner.prefill()
            prefill_s[name] = time.perf_counter() - start
    tasks: dict[str, Task] = {name: runner.step for name, runner in runners.items()}
    with progress_bar("decode", len(tasks) * (num_rounds + 1), progress) as bar:
        samples = interleave(tasks, num_rounds, on_call=lambda _: bar.update())
    row_counts = row_counts_up_to(batch)
    with progress_bar("cost model", 2 * len(row_counts) * 4, progress) as bar:
        costs = measure_layer_costs(model, row_counts, speed.bandwidth_gbps, 3, lambda _: bar.update())

    depths = []
    for name in runners:
        mix = PathMix.of(paths.get(name, paths[FULL]))
        by_layers, by_cost = (mix.ideal_speedup, costs.speedup(mix, prompt_len)) if name in paths else (None, None)
        step_ms, measured = samples[name].ms, samples[FULL].over(samples[name])
        depths.append(Depth(name, mix.mean_layers, mix.union, prefill_s[name], step_ms, by_layers, by_cost, measured))
    full = PathMix.of(paths[FULL])
    head_share = costs.head.at(full.num_head_rows) / costs.step_ms(full, prompt_len)
    smaller_than = None if chosen == shape else shape
    return Comparison(chosen, smaller_than, batch, prompt_len, num_layers, conditions, head_share, tuple(depths))


def _largest_that_fits(shape: str, vocab_size: int | None) -> tuple[str, Any]:
    """The first of ``shape`` and the smaller ones of its architecture and depth whose weights fit into memory, and its
    config."""
    asked = get_shape(shape)
    smaller = [
        name
        for name, sizes in SHAPES.items()
        if sizes.architecture == asked.architecture
        and sizes.num_layers == asked.num_layers
        and sizes.hidden_size < asked.hidden_size
    ]
    free = available_bytes(torch.device("cpu"))
    for name in (shape, *sorted(smaller, key=lambda name: SHAPES[name].hidden_size, reverse=True)):
        config = hf_config(name, vocab_size)
        needed = _COPIES * weight_bytes(config)
        if needed <= free:
            return name, config
    raise MemoryError(
        f"compare_depths: the machine must have {needed / 2**30:.1f} GiB of free memory, got {free / 2**30:.1f} GiB. "
        "Close something."
    )


@contextmanager
def _stage(title: str, progress: bool) -> Iterator[None]:
    """Say what runs while something runs that cannot tell how far it is."""
    with progress_bar(title, 1, progress) as bar:
        yield
        bar.update()
