"""What scheduling by path gains, measured: streams of requests of mixed depths through the engine, in turns.

python bench/serving.py                        OPT-1.3B's shapes, random weights: a quarter of an hour on two cores
python bench/serving.py --model runs/base --data alpaca_data.json.xz     prompts as they come
python bench/serving.py --only overhead --requests 300                   a part of it
python bench/serving.py --model smollm2-135m-paths --mix found:15=74,found:20=18,found:25=6,full=2    other depths

`dynskip calibrate` comes first: the schedule, the ideal and the prediction stand on what it has measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynskip.causal_lm import CausalLM
from dynskip.cli.options import in_range
from dynskip.costs.defaults import predicted_costs
from dynskip.costs.step_costs import StepCosts
from dynskip.costs.store import cached_path, cost_keys, load_cached
from dynskip.engine.closed_batch import Generation
from dynskip.engine.engine import Engine
from dynskip.evaluation.stats.intervals import bootstrap
from dynskip.llm import LLM
from dynskip.measure.machine import describe
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.streams import Competitor, Job, Served, take_turns
from dynskip.models.shapes import SHAPES
from dynskip.paths import LayerPath
from dynskip.scheduler.kv_budget import KVBudget
from dynskip.scheduler.policies.make import POLICIES, make_policy
from dynskip.scheduler.scheduler import Scheduler
from dynskip.scheduler.sequence import SequenceState
from dynskip.simulation.ideal import Ideal
from dynskip.simulation.simulate import EngineOptions, simulate
from dynskip.simulation.workload import PAPER_MIX, Workload, at_full_depth, parse_mix

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("stream", "closed", "static", "overhead", "queues")
QUEUES = (32, 64, 128, 256)


class Batches:
    """Batches of requests as they come, each until its longest output is there."""

    def __init__(self, name: str, jobs: Sequence[Job], batch: int, run: Callable[[Sequence[Job]], None]) -> None:
        self.name = name
        self.batches = [jobs[first : first + batch] for first in range(0, len(jobs), batch)]
        self.run = run
        self.num_done = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """Which share of the batches is done."""
        return self.num_done / len(self.batches)

    def advance(self) -> None:
        """A batch."""
        begin_s = time.perf_counter()
        self.run(self.batches[self.num_done])
        self.seconds += time.perf_counter() - begin_s
        self.num_done += 1


def race(competitors: Sequence[Competitor]) -> None:
    """Let them take turns, and show on stderr how far each is."""

    def show() -> None:
        state = ", ".join(f"{each.name} {each.progress:.0%}" for each in competitors)
        print(f"\r{state}   ", end="", file=sys.stderr, flush=True)

    take_turns(competitors, show)
    print(file=sys.stderr)


def draw_jobs(workload: Workload, prompts: Sequence[list[int]], seed: int = 0) -> list[Job]:
    """The requests of ``workload``, the i-th with the i-th of ``prompts``."""
    requests = workload.draw(seed)
    return [
        Job(prompt, replace(request, num_prompt=len(prompt))) for prompt, request in zip(prompts, requests, strict=True)
    ]


def full_depth(jobs: Sequence[Job]) -> list[Job]:
    """The same, each through all layers."""
    deep = at_full_depth([job.request for job in jobs])
    return [Job(job.prompt_ids, request) for job, request in zip(jobs, deep, strict=True)]


def check(model: CausalLM, jobs: Sequence[Job], costs: StepCosts) -> str:
    """That a stream through the engine gets the tokens that each request gets alone, in the deterministic mode."""
    jobs = [Job(job.prompt_ids, replace(job.request, num_output=min(job.request.num_output, 6))) for job in jobs]
    engine = Engine(model, costs=costs, batch=4, deterministic=True)
    ids = [engine.add_request(job.prompt_ids, job.params, job.request.path) for job in jobs]
    outputs = {output.request_id: output.token_ids for output in engine.run()}
    engine.close()
    for request_id, job in zip(ids, jobs, strict=True):
        alone = Engine(model, costs=costs, batch=1, pool=1, deterministic=True)
        alone.add_request(job.prompt_ids, job.params, job.request.path)
        (output,) = alone.run()
        alone.close()
        if output.token_ids != outputs[request_id]:
            raise RuntimeError(
                f"bench: request {request_id} must get the tokens that it gets alone, got {outputs[request_id]}, alone "
                f"{output.token_ids}. Nothing was timed."
            )
    return f"{len(jobs)} requests of all depths, served together, got the tokens that each gets alone"


def measure_stream(
    model: CausalLM,
    jobs: Sequence[Job],
    costs: StepCosts,
    batch: int,
    prefill_tokens: int,
    policies: Sequence[str] = ("lockstep", "cohort"),
) -> list[dict[str, Any]]:
    """Full depth under `cohort`, and the mix under each policy, in turns; each beside the simulation's prediction."""
    deep = full_depth(jobs)
    entries = {"full depth": ("cohort", deep), **{policy: (policy, jobs) for policy in policies}}
    competitors = [
        Served(name, model, own, costs, times_calls=True, policy=policy, batch=batch, max_prefill_tokens=prefill_tokens)
        for name, (policy, own) in entries.items()
    ]
    race(competitors)
    requests = [job.request for job in jobs]
    ideal_decode, ideal_all = Ideal.speedups(costs, requests, batch, prefill_tokens)
    full = competitors[0].outcome
    lines = []
    for competitor in competitors:
        outcome = competitor.outcome
        policy, own = entries[competitor.name]
        options = EngineOptions(policy=policy, batch=batch, max_prefill_tokens=prefill_tokens)
        predicted = simulate(costs, [job.request for job in own], options)
        stats = competitor.engine.stats()
        gain = (full.decode_s + full.prefill_s) / (outcome.decode_s + outcome.prefill_s)
        lines.append(
            {
                "part": "stream",
                "batch": batch,
                "name": competitor.name,
                "max_wait": getattr(competitor.engine.scheduler.policy, "max_wait", None),
                "decode_gain": full.decode_s / outcome.decode_s,
                "gain": gain,
                "ideal_decode": ideal_decode,
                "ideal_all": ideal_all,
                "bookkeeping_share": stats.bookkeeping_share,
                "parts_s": competitor.parts_s,
                "peak_kv_bytes": stats.peak_kv_bytes,
                "predicted_decode_s": predicted.decode_s,
                "predicted_prefill_s": predicted.prefill_s,
                "predicted_tokens_per_s": predicted.tokens_per_s,
                "predicted_mean_tpot_ms": predicted.mean_tpot_ms,
                **outcome.line(),
            }
        )
        competitor.engine.close()
    return lines


def measure_closed(
    model: CausalLM, jobs: Sequence[Job], costs: StepCosts, num_rounds: int = 5, least_s: float = 3.0
) -> list[dict[str, Any]]:
    """A closed batch of 16: no request comes after them. At least so many rounds, and seconds of each policy."""
    lines = []
    jobs = jobs[:16]
    seconds: dict[str, list[float]] = {"lockstep": [], "cohort": []}
    unions: dict[str, float] = {}
    while min(map(len, seconds.values())) < num_rounds or min(map(sum, seconds.values())) < least_s:
        # The first in one round is the last in the next.
        order = [*seconds] if len(seconds["lockstep"]) % 2 else [*seconds][::-1]
        for policy in order:
            times = seconds[policy]
            served = Served(policy, model, jobs, costs, policy=policy, batch=16)
            while served.progress < 1:
                served.advance()
            outcome = served.outcome
            times.append(outcome.decode_s)
            unions[policy] = outcome.union
            served.engine.close()
    for policy, times in seconds.items():
        ratios = sorted(lockstep / own for lockstep, own in zip(seconds["lockstep"], times, strict=True))
        lines.append(
            {
                "part": "closed",
                "batch": 16,
                "name": policy,
                "decode_s": sorted(times)[len(times) // 2],
                "over_lockstep": ratios[len(ratios) // 2],
                "lowest": ratios[0],
                "union": unions[policy],
            }
        )
    return lines


def measure_queues(
    model: CausalLM, jobs: Sequence[Job], calibrated: StepCosts, batch: int, num_rounds: int = 3, least_s: float = 2.0
) -> list[dict[str, Any]]:
    """Queues that run empty, from as many requests as a batch has to many more: how much sooner `cohort` ends them.

    Under calibrated costs, and under those that are taken where nothing was calibrated. At least so many rounds, and
    seconds of each policy.
    """
    lines = []
    for kind, costs in (("calibrated", calibrated), ("predicted", predicted_costs(model))):
        for queue in QUEUES:
            seconds: dict[str, list[float]] = {"lockstep": [], "cohort": []}
            while min(map(len, seconds.values())) < num_rounds or min(map(sum, seconds.values())) < least_s:
                for policy in [*seconds] if len(seconds["cohort"]) % 2 else [*seconds][::-1]:
                    served = Served(policy, model, jobs[:queue], costs, policy=policy, batch=batch)
                    while served.progress < 1:
                        served.advance()
                    seconds[policy].append(served.outcome.decode_s + served.outcome.prefill_s)
                    served.engine.close()
            ratios = np.divide(seconds["lockstep"], seconds["cohort"])
            interval = bootstrap(np.median, ratios)
            lines.append(
                {
                    "part": "queues",
                    "batch": batch,
                    "name": f"{queue}, {kind}",
                    "requests": queue,
                    "costs": kind,
                    "rounds": len(ratios),
                    "cohort_s": float(np.median(seconds["cohort"])),
                    "lockstep_s": float(np.median(seconds["lockstep"])),
                    "over_lockstep": float(interval.value),
                    "lowest": float(ratios.min()),
                    "low": float(interval.low),
                    "high": float(interval.high),
                }
            )
            print(lines[-1], file=sys.stderr)
    return lines


def measure_static(
    model: CausalLM, hf_model: Any, jobs: Sequence[Job], costs: StepCosts, batch: int = 16
) -> list[dict[str, Any]]:
    """Full depth: the engine, static batches of the same requests, and transformers' generate in such batches."""
    jobs = full_depth(jobs)

    def static(own: Sequence[Job]) -> None:
        Generation(model, [job.prompt_ids for job in own], [job.params for job in own]).run()

    def transformers(own: Sequence[Job]) -> None:
        longest = max(len(job.prompt_ids) for job in own)
        tokens = torch.zeros((len(own), longest), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, job in enumerate(own):
            tokens[row, longest - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
            mask[row, longest - len(job.prompt_ids) :] = 1
        most = max(job.request.num_output for job in own)
        hf_model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=most,
            min_new_tokens=most,
            do_sample=False,
            pad_token_id=1,
        )

    served = [
        Served(f"engine, {policy}", model, jobs, costs, policy=policy, batch=batch) for policy in ("lockstep", "cohort")
    ]
    batches = [
        Batches("static batches", jobs, batch, static),
        Batches("transformers generate", jobs, batch, transformers),
    ]
    race([*served, *batches])
    seconds = {each.name: each.outcome.decode_s + each.outcome.prefill_s for each in served}
    seconds |= {each.name: each.seconds for each in batches}
    for each in served:
        each.engine.close()
    num_tokens = sum(job.request.num_output for job in jobs)
    return [
        {
            "part": "static",
            "batch": batch,
            "name": name,
            "requests": len(jobs),
            "seconds": own_s,
            "tokens_per_s": num_tokens / own_s,
            "over_static": seconds["static batches"] / own_s,
            "over_transformers": seconds["transformers generate"] / own_s,
        }
        for name, own_s in seconds.items()
    ]


def measure_overhead(model: CausalLM, jobs: Sequence[Job], costs: StepCosts) -> list[dict[str, Any]]:
    """What a step takes besides the model, with 256 resident sequences; and the scheduler alone, by how many wait."""
    lines = []
    served = Served("cohort", model, jobs, costs, policy="cohort", batch=64, pool=256)
    engine = served.engine
    # The pool fills first; then steps count while it is as good as full: places are filled several at a time.
    while engine.has_unfinished and engine.scheduler.groups.num_resident < 225:
        engine.step()
    before = (engine.tally.bookkeeping_s, engine.tally.decode_s + engine.tally.prefill_s, engine.tally.num_steps)
    residents = []
    while engine.has_unfinished and (groups := engine.scheduler.groups).num_resident >= 225:
        residents.append(groups.num_resident)
        engine.step()
    if not residents:
        raise RuntimeError(f"bench: the pool of 256 must fill, got {len(jobs)} requests in all. Use --requests 1024.")
    num_steps = engine.tally.num_steps - before[2]
    own_s = engine.tally.bookkeeping_s - before[0]
    step_s = engine.tally.decode_s + engine.tally.prefill_s - before[1]
    lines.append(
        {
            "part": "overhead",
            "name": "engine",
            "batch": 64,
            "resident": sum(residents) / len(residents),
            "steps": num_steps,
            "us_per_step": 1e6 * own_s / num_steps,
            "share": own_s / step_s,
        }
    )
    engine.close()
    for pool in (64, 128, 256):
        for waiting in (1_000, 10_000, 100_000):
            us = _scheduler_us(costs, pool, waiting)
            lines.append(
                {"part": "overhead", "name": "scheduler", "resident": pool, "waiting": waiting, "us_per_step": us}
            )
    return lines


def _scheduler_us(costs: StepCosts, pool: int, waiting: int, num_steps: int = 400) -> float:
    """Microseconds of a decision with ``pool`` resident and about ``waiting`` waiting requests of the paper's mix."""
    draw = random.Random(0)
    scheduler = Scheduler(make_policy("cohort", costs, 16, pool), KVBudget(2**62))
    mix = parse_mix(PAPER_MIX, costs.num_layers)
    paths = draw.choices([path for path, _ in mix], [share for _, share in mix], k=pool + waiting)
    for index, path in enumerate(paths):
        scheduler.add(SequenceState(index, path, 32, 1 + int(draw.expovariate(1 / 16))))

    def step() -> float:
        begin_s = time.perf_counter()
        decision = scheduler.schedule()
        elapsed_s = time.perf_counter() - begin_s
        for sequence in [*(chunk.sequence for chunk in decision.prefill if chunk.is_last), *decision.decode]:
            if sequence.num_generated >= sequence.max_tokens:
                scheduler.finished(sequence.owner)
        return elapsed_s

    for _ in range(100):
        step()
    times = sorted(step() for _ in range(num_steps))
    return 1e6 * sum(times) / len(times)


_HEAD = """\
# Serving mixed depths: measured

Written by `python bench/serving.py`. {model}, {dtype}, {cpu}, {num_cores} cores, {num_threads} threads, backend \
{backend}, commit {commit}, {date}, {shown_versions}.
{requests} requests, all there at the beginning, {prompts}, output lengths geometric with mean {mean_output:g}, \
greedy. Depths: {mix} (mean {mean_layers:.2f} of {num_layers} layers).
Checked before anything was timed: {gate}. Competitors take turns of a quarter of a second, whoever is furthest behind \
first.{memory}
"""
_STREAM = """\
## A stream of requests, batch {batch}, pool {pool} for cohort

Gains are over full depth under the same engine and policy `cohort`. Ideal: {ideal_decode:.2f}x for decode steps, \
{ideal_all:.2f}x with prefill.
"""
_STREAM_TABLE = (
    "policy | decode s | gain | of ideal | over lockstep | prefill s | decode + prefill gain | of ideal | tokens/s | "
    "rows | paths | layers | union | longest wait, steps (W) | TTFT s p50/90/99 | KV peak MiB | bookkeeping",
    "{name} | {decode_s:.1f} | {decode_gain:.2f}x | {decode_share} | {over_lockstep:.2f}x | {prefill_s:.1f} | "
    "{gain:.2f}x | {share} | {tokens_per_s:.0f} | {rows:.1f} | {paths:.2f} | {layers:.2f} | {union:.1f} | "
    "{longest_wait}{bound} | {ttft_s[0]:.1f}/{ttft_s[1]:.1f}/{ttft_s[2]:.1f} | {peak_kv_mib:.0f} | "
    "{bookkeeping_share:.1%}",
)
_PREDICTED = "Waits count own turns only. The simulation, with costs that an earlier run calibrated, beside it:\n"
_PREDICTED_TABLE = (
    "policy | tokens/s | predicted | off by | mean ms per token | predicted | off by",
    "{name} | {tokens_per_s:.0f} | {predicted_tokens_per_s:.0f} | {tokens_per_s_off:+.0%} | {mean_tpot_ms:.0f} | "
    "{predicted_mean_tpot_ms:.0f} | {mean_tpot_ms_off:+.0%}",
)
_PARTS = """\
Seconds by part: in the native calls of steps (products, attention, the rest of them) and outside of them; in brackets \
milliseconds a decode step.
"""
_PARTS_TABLE = (
    "policy | phase | seconds | products | attention | rest of the calls | outside",
    "{name} | {phase} | {whole:.2f} | {products} | {attention} | {rest} | {outside}",
)
_CLOSED = """\
## A closed batch of 16

Nobody comes after them, so each layer is read least often if all step together: `cohort` does what `lockstep` does. \
The union of the paths bounds both, and towards the end the longest outputs alone.
"""
_CLOSED_TABLE = (
    "policy | decode s | over lockstep, median (lowest) | union",
    "{name} | {decode_s:.2f} | {over_lockstep:.2f}x ({lowest:.2f}x) | {union:.1f}",
)
_STATIC = "## Full depth: {requests} requests in batches of {batch}\n"
_STATIC_TABLE = (
    "who | seconds | tokens/s | over static batches | over transformers",
    "{name} | {seconds:.1f} | {tokens_per_s:.1f} | {over_static:.2f}x | {over_transformers:.2f}x",
)
_QUEUES = """\
## Queues that run empty

As many requests at once, and nobody after them: lock-step over cohort, with prefill.
"""
_QUEUES_TABLE = (
    "batch | requests | costs | cohort s | lockstep s | over lockstep, median (lowest)",
    "{batch} | {requests} | {costs} | {cohort_s:.2f} | {lockstep_s:.2f} | {over_lockstep:.2f}x ({lowest:.2f}x)",
)
_OVERHEAD = """\
## Scheduler and bookkeeping

With {resident:.0f} resident sequences and batches of {batch}: {us_per_step:.0f} us of a step, {share:.2%}, over \
{steps} steps. The scheduler alone, batches of 16:
"""
_OVERHEAD_TABLE = ("resident | waiting | us per step", "{resident} | {waiting} | {us_per_step:.0f}")


def page(conditions: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items() if version)
    # Runs before 2026-11-28 timed the first writing of each page of memory too.
    memory = f" Memory of keys and values: {conditions['kv_memory']}." if "kv_memory" in conditions else ""
    text = [_HEAD.format(**conditions, shown_versions=versions, memory=memory)]
    stream, closed, static, overhead, queues = ([line for line in lines if line["part"] == part] for part in PARTS)
    for batch in sorted({line["batch"] for line in stream}):
        own = _with_ratios([line for line in stream if line["batch"] == batch])
        text += [_STREAM.format(**own[0], pool=4 * batch), _table(_STREAM_TABLE, own)]
        text += [_PREDICTED, _table(_PREDICTED_TABLE, own)]
        if parts := [cells for line in own for cells in _parts_of(line)]:
            text += [_PARTS, _table(_PARTS_TABLE, parts)]
    if closed:
        text += [_CLOSED, _table(_CLOSED_TABLE, closed)]
    if static:
        text += [_STATIC.format(**static[0]), _table(_STATIC_TABLE, static)]
    if queues:
        text += [_QUEUES, _table(_QUEUES_TABLE, queues)]
    if overhead:
        engine = next(line for line in overhead if line["name"] == "engine")
        text += [_OVERHEAD.format(**engine), _table(_OVERHEAD_TABLE, [line for line in overhead if line is not engine])]
    return "\n".join(text)


def _table(form: tuple[str, str], lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the headings and the row that ``form`` gives; cells stand between bars already."""
    headings, row = form
    rows = [f"| {row.format(**line)} |\n" for line in lines]
    return "".join([f"| {headings} |\n|{'---|' * (headings.count('|') + 1)}\n", *rows])


def _parts_of(line: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a stream whose calls were timed."""
    for phase, parts in line.get("parts_s", {}).items():
        per_step = line["num_decode_steps"] if phase == "decode" else None
        cells = {
            part.removesuffix("_s"): f"{own_s:.2f}" + (f" ({1e3 * own_s / per_step:.2f})" if per_step else "")
            for part, own_s in parts.items()
        }
        yield {"name": line["name"], "phase": phase, "whole": sum(parts.values()), **cells}


def _with_ratios(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of one batch with what the page says of them besides."""
    lockstep = next(line for line in lines if line["name"] == "lockstep")
    return [
        {
            **line,
            "decode_share": "" if line["name"] == "full depth" else f"{line['decode_gain'] / line['ideal_decode']:.0%}",
            "share": "" if line["name"] == "full depth" else f"{line['gain'] / line['ideal_all']:.0%}",
            "over_lockstep": lockstep["decode_s"] / line["decode_s"],
            "bound": f" ({line['max_wait']})" if line["max_wait"] else "",
            "peak_kv_mib": line["peak_kv_bytes"] / 2**20,
            **{f"{name}_off": line[f"predicted_{name}"] / line[name] - 1 for name in ("tokens_per_s", "mean_tpot_ms")},
        }
        for line in lines
    ]


def _alpaca(path: Path, llm: LLM, count: int, max_tokens: int) -> list[list[int]]:
    from dynskip.data.corpus import read_instructions
    from dynskip.data.templates import prompt_text

    assert llm.tokenizer is not None, "a checkpoint with a tokenizer"
    prompts = []
    for row in read_instructions(path):
        ids = list(llm.tokenizer(prompt_text(row.instruction, row.input))["input_ids"])
        if len(ids) <= max_tokens:
            prompts.append(ids)
        if len(prompts) == count:
            return prompts
    raise ValueError(f"bench: data must hold {count} prompts, got {len(prompts)}.")


def main() -> int:
    """Measure, and write JSON lines and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="opt-1.3b", help="random weights of that shape")
    parser.add_argument("--model", help="a checkpoint instead: folder, hub id, or opt-mini, shipped with dynskip")
    parser.add_argument("--data", type=Path, help="Alpaca, whose prompts are served as they come")
    parser.add_argument("--mix", default=PAPER_MIX, metavar="PATH=SHARE,...", help="depths (default: the paper's)")
    parser.add_argument("--requests", type=in_range(1, 10**5), default=1024)
    parser.add_argument("--batch", type=in_range(1, 1024), action="append", help="repeatable (default: 16 and 32)")
    parser.add_argument("--prompt-len", type=in_range(1, 2048), default=32)
    parser.add_argument("--mean-output", type=in_range(1.0, 2048.0), default=16.0)
    parser.add_argument("--prefill", type=in_range(1, 2**16), default=512, help="most prompt tokens of a step")
    parser.add_argument("--static-requests", type=in_range(1, 10**5), default=64)
    parser.add_argument("--policy", action="append", choices=POLICIES, help="repeatable (default: lockstep and cohort)")
    parser.add_argument("--only", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument("--name", default="serving", help="of the files (default: serving)")
    args = parser.parse_args()
    parts = args.only or PARTS

    hf_model: Any = None
    if args.model is not None:
        llm = LLM(args.model)
        model = llm.model
    else:
        hf_model = random_hf_model(hf_config(args.shape))
        model = CausalLM.from_hf(hf_model)
        llm = LLM(model)
    device, shape = cost_keys(model)
    costs = load_cached(device, shape)
    if costs is None:
        raise SystemExit(f"bench: {cached_path(device, shape)} must hold costs, got nothing. Run dynskip calibrate.")
    mix = parse_mix(args.mix, model.num_layers, model)
    workload = Workload(args.requests, mix, args.prompt_len, args.mean_output)
    if args.data is not None:
        prompts = _alpaca(args.data, llm, args.requests, 256)
    else:
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(
            3, model.decoder_config.vocab_size, (args.requests, args.prompt_len), generator=generator
        ).tolist()
    # As `dynskip serve` does: one collection of what libraries have made takes 0.27 s, a hundred steps of opt-mini.
    gc.collect()
    gc.freeze()
    jobs = draw_jobs(workload, prompts)
    by_depth: dict[LayerPath, Job] = {}
    for job in jobs:
        by_depth.setdefault(job.request.path, job)
    conditions = {
        **describe(),
        "model": args.model or f"{args.shape} shapes with random weights",
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": model.backend.name,
        "requests": args.requests,
        "prompts": "Alpaca prompts as they come" if args.data else f"prompts of {args.prompt_len} tokens",
        "mean_output": args.mean_output,
        "mix": args.mix,
        "mean_layers": sum(job.request.path.budget for job in jobs) / len(jobs),
        "num_layers": model.num_layers,
        "calibrated": costs.conditions,
        "kv_memory": "written once before anything is timed",
        "gate": check(model, [*by_depth.values(), *jobs[:4]], costs),
    }
    lines: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(more: list[dict[str, Any]]) -> None:
        """Write what there is: it is kept where the rest is stopped."""
        lines.extend(more)
        (args.out / f"{args.name}.md").write_text(page(conditions, lines), encoding="utf-8")
        with (args.out / f"{args.name}.jsonl").open("w", encoding="utf-8") as file:
            for line in [{"part": "conditions", **conditions}, *lines]:
                file.write(json.dumps(line) + "\n")

    if "stream" in parts:
        for batch in args.batch or (16, 32):
            keep(measure_stream(model, jobs, costs, batch, args.prefill, args.policy or ("lockstep", "cohort")))
    if "closed" in parts:
        keep(measure_closed(model, jobs, costs))
    if "queues" in parts:
        for batch in args.batch or (16, 32):
            keep(measure_queues(model, jobs, costs, batch))
    if "overhead" in parts:
        keep(measure_overhead(model, jobs[:768], costs))
    if "static" in parts and hf_model is not None:
        keep(measure_static(model, hf_model, jobs[: args.static_requests], costs))
    print(page(conditions, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
