"""Draws who steps when, and which layers that reads: one stream, in lock-step and by cohorts, from a real run.

python bench/timeline.py               docs/serving-timeline.svg, from opt-mini on this machine; seconds
python bench/timeline.py --out file.svg --batch 4
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from dynskip.causal_lm import CausalLM
from dynskip.cli.demo_serving import draw_jobs
from dynskip.cli.options import in_range
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.engine import Engine
from dynskip.evaluation.report.drawing import svg
from dynskip.llm import LLM
from dynskip.measure import machine
from dynskip.measure.calibration import known_step_costs
from dynskip.measure.streams import Job
from dynskip.paths import LayerPath

ROOT = Path(__file__).resolve().parents[1]
POLICIES = {"lockstep": "lock-step", "cohort": "cohort"}
# What is shown lies between these shares of a run: the pool is full, and the queue not empty.
_FROM, _TO = 0.15, 0.75
# Bars of prompts are hollow.
_PROMPT = "white"


@dataclass(frozen=True)
class Step:
    """A step from ``begin_ms`` on: first prompts, then decode rows, each by the numbers of their requests."""

    begin_ms: float
    prefill_ms: float
    decode_ms: float
    prefilled: tuple[int, ...]
    decoded: tuple[int, ...]

    @property
    def end_ms(self) -> float:
        """When the next step begins."""
        return self.begin_ms + self.prefill_ms + self.decode_ms


@dataclass
class Timeline:
    """What an engine did under one policy.

    paths: of the requests, by number. ends: for each request the step in which it ended.
    """

    policy: str
    batch: int
    pool: int
    paths: list[LayerPath]
    steps: list[Step] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)

    def places(self) -> dict[int, int]:
        """For each request a place that no other has while it is resident: the lowest that is free."""
        free = list(range(self.pool))
        places: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for request in step.prefilled:
                places[request] = free.pop(0)
            free += [places[request] for request, end in self.ends.items() if end == number]
            free.sort()
        return places

    def usual_begin_ms(self, length_ms: float) -> float:
        """Where a stretch of ``length_ms`` begins that makes about as many tokens as the run does in that time."""
        first_ms, last_ms = _FROM * self.steps[-1].end_ms, _TO * self.steps[-1].end_ms
        usual = self.num_tokens(first_ms, last_ms) / (last_ms - first_ms) * length_ms
        begins = [step.begin_ms for step in self.steps if first_ms <= step.begin_ms <= last_ms - length_ms]
        if not begins:
            raise ValueError(
                f"timeline: the run must be longer than {length_ms:.0f} ms, got {last_ms:.0f}. Ask for less."
            )
        return min(begins, key=lambda begin_ms: abs(self.num_tokens(begin_ms, begin_ms + length_ms) - usual))

    def steps_in(self, begin_ms: float, length_ms: float) -> list[Step]:
        """The steps that begin within ``length_ms`` of ``begin_ms``."""
        return [step for step in self.steps if 0 <= step.begin_ms - begin_ms < length_ms]

    def num_tokens(self, begin_ms: float, end_ms: float) -> int:
        """How many tokens were there by ``end_ms`` that were not by ``begin_ms``; they come at the ends of steps."""
        return sum(len(step.prefilled) + len(step.decoded) for step in self.steps if begin_ms < step.end_ms <= end_ms)


def record(model: CausalLM, jobs: Sequence[Job], costs: StepCosts, policy: str, batch: int) -> Timeline:
    """Serve ``jobs``, all there at the beginning, and write down each step."""
    longest = max(len(job.prompt_ids) + job.request.num_output for job in jobs)
    engine = Engine(model, policy=policy, batch=batch, costs=costs, max_context_len=longest)
    timeline = Timeline(policy, batch, engine.scheduler.policy.pool, [job.request.path for job in jobs])
    known: set[Hashable] = set()
    prefilled: list[int] = []
    decoded: list[int] = []

    def on_token(request_id: Hashable, _index: int, _token: int) -> None:
        # The first token of a request comes from its prompt.
        assert isinstance(request_id, int), "ids are numbers unless given"
        (decoded if request_id in known else prefilled).append(request_id)
        known.add(request_id)

    for job in jobs:
        engine.add_request(job.prompt_ids, job.params, job.request.path, on_token=on_token)
    now_ms = 0.0
    while engine.has_unfinished:
        before = (engine.tally.prefill_s, engine.tally.decode_s)
        outputs = engine.step()
        prefill_ms, decode_ms = (
            1e3 * (after - earlier)
            for after, earlier in zip((engine.tally.prefill_s, engine.tally.decode_s), before, strict=True)
        )
        step = Step(now_ms, prefill_ms, decode_ms, tuple(prefilled), tuple(decoded))
        timeline.ends |= {output.request_id: len(timeline.steps) for output in outputs}  # type: ignore[misc]  # numbers
        timeline.steps.append(step)
        now_ms = step.end_ms
        prefilled.clear()
        decoded.clear()
    engine.close()
    return timeline


def median_run(runs: Sequence[Timeline]) -> Timeline:
    """A run each of whose steps took the median of what it took in ``runs``, which decided alike."""
    steps: list[Step] = []
    for same in zip(*(run.steps for run in runs), strict=True):
        if len({(step.prefilled, step.decoded) for step in same}) > 1:
            raise RuntimeError(f"timeline: runs must decide alike, got others in step {len(steps)}. Calibrate once.")
        prefill_ms, decode_ms = median(step.prefill_ms for step in same), median(step.decode_ms for step in same)
        begin_ms = steps[-1].end_ms if steps else 0.0
        steps.append(replace(same[0], begin_ms=begin_ms, prefill_ms=prefill_ms, decode_ms=decode_ms))
    return replace(runs[0], steps=steps)


def shades(paths: Sequence[LayerPath]) -> dict[int, str]:
    """A grey for each depth, the deepest black."""
    depths = sorted({path.budget for path in paths})
    levels = [0.78 - 0.78 * index / max(len(depths) - 1, 1) for index in range(len(depths))]
    return {depth: f"{level:.2f}" for depth, level in zip(depths, levels, strict=True)}


def draw(figure: Any, timelines: Sequence[Timeline], title: str, length_ms: float) -> None:
    """Fill ``figure``: for each policy the places of the pool over time, and under it the layers."""
    num_layers = timelines[0].paths[0].num_layers
    heights = [rows for timeline in timelines for rows in (timeline.pool, num_layers)]
    axes = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    figure.suptitle(title, x=0.01, ha="left", fontsize=8.5)
    for index, timeline in enumerate(timelines):
        begin_ms = timeline.usual_begin_ms(length_ms)
        above, below = axes[2 * index], axes[2 * index + 1]
        count = timeline.num_tokens(begin_ms, begin_ms + length_ms)
        above.set_title(f"{POLICIES[timeline.policy]}: {count} tokens in {length_ms:.0f} ms", fontsize=10)
        _draw_places(above, timeline, begin_ms, length_ms)
        _draw_layers(below, timeline, begin_ms, length_ms, num_layers)
        for axis, rows, name in ((above, timeline.pool, "sequences"), (below, num_layers, "layers")):
            axis.set_ylim(rows, 0)
            axis.set_xlim(0, length_ms)
            axis.set_ylabel(name)
            axis.set_yticks([])
            axis.grid(visible=False)
            axis.spines["left"].set_visible(False)
        below.set_yticks([0.5, num_layers - 0.5], ["0", f"{num_layers - 1}"])
        below.tick_params(axis="y", length=0, labelsize=8)
    axes[-1].set_xlabel("ms")
    _legend(figure, timelines[0])


def _draw_places(axis: Any, timeline: Timeline, begin_ms: float, length_ms: float) -> None:
    """A bar for each token, a line while a sequence waits."""
    grey, places = shades(timeline.paths), timeline.places()
    bars: dict[str, list[tuple[float, float, float]]] = {}
    starts = {request: step.end_ms for step in timeline.steps for request in step.prefilled}
    for request, end in timeline.ends.items():
        first, final = starts[request] - begin_ms, timeline.steps[end].end_ms - begin_ms
        if final > 0 and first < length_ms:
            line = places[request] + 0.5
            axis.plot([max(first, 0), min(final, length_ms)], [line, line], color="0.6", linewidth=0.5, zorder=1)
    for step in timeline.steps_in(begin_ms, length_ms):
        begin = step.begin_ms - begin_ms
        for request in step.prefilled:
            bars.setdefault(_PROMPT, []).append((places[request], begin, step.prefill_ms))
        for request in step.decoded:
            shade = grey[timeline.paths[request].budget]
            bars.setdefault(shade, []).append((places[request], begin + step.prefill_ms, step.decode_ms))
    _bars(axis, bars)


def _draw_layers(axis: Any, timeline: Timeline, begin_ms: float, length_ms: float, num_layers: int) -> None:
    """A bar for each layer that a step reads, the darker the more rows run it."""
    bars: dict[str, list[tuple[float, float, float]]] = {}
    for step in timeline.steps_in(begin_ms, length_ms):
        begin = step.begin_ms - begin_ms
        for layer in range(num_layers):
            if any(layer in timeline.paths[request].layers for request in step.prefilled):
                bars.setdefault(_PROMPT, []).append((layer, begin, step.prefill_ms))
            rows = sum(layer in timeline.paths[request].layers for request in step.decoded)
            if rows:
                shade = _row_shade(rows, timeline.batch)
                bars.setdefault(shade, []).append((layer, begin + step.prefill_ms, step.decode_ms))
    _bars(axis, bars)


def _row_shade(rows: int, batch: int) -> str:
    """Three greys: up to a quarter of a batch, up to three quarters, more."""
    return "0.78" if rows <= batch / 4 else "0.45" if rows <= 3 * batch / 4 else "0.00"


def _bars(axis: Any, bars: dict[str, list[tuple[float, float, float]]]) -> None:
    """Bars of (row, begin, width) by their shade; one path for each shade keeps the file small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    for shade, own in sorted(bars.items()):
        vertices: list[tuple[float, float]] = []
        for row, begin, width in own:
            top, bottom = row + 0.08, row + 0.92
            vertices += [(begin, top), (begin + width, top), (begin + width, bottom), (begin, bottom), (begin, top)]
        codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY] * len(own)
        edge = "0.3" if shade == _PROMPT else "white"
        outline = Outline(vertices, codes)
        axis.add_patch(PathPatch(outline, facecolor=shade, edgecolor=edge, linewidth=0.4, zorder=2))


def _legend(figure: Any, timeline: Timeline) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grey = shades(timeline.paths)
    entries: list[Any] = [
        Patch(facecolor=shade, edgecolor="0.4", linewidth=0.3, label=f"a token through {depth} layers")
        for depth, shade in grey.items()
    ]
    entries += [
        Patch(facecolor=_PROMPT, edgecolor="0.3", linewidth=0.4, label="a prompt"),
        Line2D([], [], color="0.6", linewidth=0.5, label="waits, resident"),
    ]
    batch = timeline.batch
    entries += [
        Patch(facecolor=_row_shade(rows, batch), edgecolor="0.4", linewidth=0.3, label=f"a layer read for {name}")
        for rows, name in (
            (1, f"1 to {batch // 4} rows"),
            (batch // 2, f"{batch // 4 + 1} to {3 * batch // 4} rows"),
            (batch, f"{3 * batch // 4 + 1} to {batch} rows"),
        )
    ]
    figure.legend(handles=entries, loc="outside lower left", ncols=3, fontsize=8)


def main(argv: list[str] | None = None) -> int:
    """Serve, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "serving-timeline.svg")
    parser.add_argument("--batch", type=in_range(1, 1024), default=16, help="most rows of a step (default: 16)")
    parser.add_argument("--requests", type=in_range(1, 10**5), default=256, help="of the stream (default: 256)")
    parser.add_argument(
        "--runs", type=in_range(1, 1000), default=9, help="a step shows its median time over them (default: 9)"
    )
    parser.add_argument("--ms", type=in_range(1.0, 1e6), default=100.0, help="how much of it is shown (default: 100)")
    args = parser.parse_args(argv)
    llm = LLM()
    jobs, _ = draw_jobs(llm, args.requests)
    costs = known_step_costs(llm.model, num_rows=args.batch, prompt_len=16)
    runs: dict[str, list[Timeline]] = {policy: [] for policy in POLICIES}
    for _ in range(args.runs):
        for policy, own in runs.items():
            own.append(record(llm.model, jobs, costs, policy, args.batch))
    timelines = [median_run(own) for own in runs.values()]
    found = machine.describe()
    title = (
        f"opt-mini, {args.requests} requests of a mean of "
        f"{sum(job.request.path.budget for job in jobs) / len(jobs):.1f} of {llm.model.num_layers} layers; steps of at "
        f"most {args.batch} rows, medians of {args.runs} runs; {found['cpu']}, "
        f"{found['num_threads']} thread{'s' if found['num_threads'] > 1 else ''}"
    )
    picture = svg("timeline", lambda figure: draw(figure, timelines, title, args.ms), 9.0, 8.6)
    # A hundredth of a point is finer than any screen, and makes half the file.
    picture = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", picture)
    args.out.write_text(picture + "\n", encoding="utf-8")
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
