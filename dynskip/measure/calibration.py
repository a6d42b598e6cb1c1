"""The costs that the scheduler and its simulation work with, measured: whole steps in turns, then whole streams."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import Curve, LayerCosts
from dynskip.costs.step_costs import StepCosts
from dynskip.costs.store import cost_keys, load_cached
from dynskip.engine.drafting import DraftWarning, forget_drafts
from dynskip.engine.engine import Engine
from dynskip.measure.products import row_counts_up_to
from dynskip.measure.runners import DynskipRunner
from dynskip.measure.streams import Job, Served
from dynskip.measure.timing import Samples, Task, interleave
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.scheduler.outcome import Outcome
from dynskip.simulation.simulate import EngineOptions, simulate
from dynskip.simulation.workload import Workload
from dynskip.speculation.acceptance import Acceptance, Rate
from dynskip.speculation.draft import Draft

_LEAST_MS = 1e-6  # noise may make a difference negative; time is not
# Steps at the beginning of each turn that do not count: until then the threads of the task before may spin.
_LEAD_INS = 2
# Rows whose longer contexts say what an entry takes to read: on a CPU their prompts take longer than all the steps.
_LONG_ROWS = {"cpu": 16, "cuda": 64}
# Streams: so many requests for each row of a batch, so many rounds, but none that begins after so many seconds.
_REQUESTS_PER_ROW = 8
_STREAM_ROUNDS = 5
_STREAM_S = 20.0
# What is believed of each guess while they are timed, right or wrong: often enough right that guessing seems to pay.
_BELIEVED = 0.9
# Tokens of a request whose guesses are timed: those of wrong guesses are one a step.
_DRAFTED_TOKENS = 56
# Verifications of a sequence that are but looks at a draft which does not seem to pay.
_FEW_LOOKS = 4


def check_context(num_positions: int, prompt_len: int, context_len: int, num_rounds: int) -> None:
    """Raise ValueError where the longest sequence that `measure_step_costs` runs does not fit the positions."""
    num_new = num_new_tokens(num_rounds)
    if prompt_len + context_len + num_new > num_positions:
        raise ValueError(
            f"measure_step_costs: context_len must leave room in {num_positions} positions, got {context_len}, behind "
            f"prompts of {prompt_len} tokens and before {num_new} new ones."
        )


def num_new_tokens(num_rounds: int) -> int:
    """Tokens that each sequence gets: by its prefill, a warm-up, and the steps of all rounds."""
    return 2 + num_rounds * (1 + _LEAD_INS)


def measure_step_costs(
    model: CausalLM,
    device: str,
    num_rows: int = 64,
    prompt_len: int = 32,
    context_len: int = 512,
    prefill_tokens: int = 512,
    num_rounds: int = 5,
    conditions: dict[str, Any] | None = None,
    on_call: Callable[[str], None] | None = None,
) -> StepCosts:
    """What steps of generation with ``model`` take, with all that belongs to them.

    A layer is what a step through all layers takes longer than one through a single layer, by the layers between
    them; what is left of the single layer's step is embedding, head, choice of tokens and bookkeeping. A key-value
    entry is what a step takes longer with ``context_len`` more tokens in the cache.

    device: its name in the result. num_rows: most rows of a decode step. prompt_len: tokens of the prompts.
    prefill_tokens: most tokens of a prefill.
    """
    num_layers = model.num_layers
    if num_layers < 2:
        raise ValueError(f"measure_step_costs: model must have at least 2 layers, got {num_layers}.")
    check_context(model.decoder_config.max_positions, prompt_len, context_len, num_rounds)
    full, shallow = LayerPath.full(num_layers), LayerPath.early_exit(num_layers, 1)
    counts = row_counts_up_to(num_rows)
    decode: dict[str, Task] = {}
    for path in (full, shallow):
        for rows in counts:
            runner = _runner(model, path, rows, prompt_len, num_new_tokens(num_rounds))
            runner.prefill()
            decode[f"decode {path.budget} {rows}"] = _planned(runner)
    num_long = max(rows for rows in counts if rows <= _LONG_ROWS[model.device.type])
    long = _runner(model, full, num_long, prompt_len + context_len, num_new_tokens(num_rounds))
    long.prefill()
    decode["long"] = _planned(long)
    samples = interleave(decode, num_rounds, on_call=on_call, num_lead_ins=_LEAD_INS)
    entries = num_long * num_layers
    base_ms = samples[f"decode {num_layers} {num_long}"].ms
    kv_ms = max(samples["long"].ms - base_ms, 0.0) / (entries * context_len)
    del decode, long
    layers, heads = _split(samples, "decode", counts, num_layers)
    # The cache of the measured steps was not empty.
    layers = _rising(ms - rows * prompt_len * kv_ms for ms, rows in zip(layers, counts, strict=True))

    prompts = sorted({max(1, prefill_tokens // prompt_len >> power) for power in range(5)})
    prefill: dict[str, Task] = {
        f"prefill {path.budget} {count}": _runner(model, path, count, prompt_len, 2).prefill
        for path in (full, shallow)
        for count in prompts
    }
    samples = interleave(prefill, num_rounds, on_call=on_call, num_lead_ins=1)
    prompt_layers, prompt_heads = _split(samples, "prefill", prompts, num_layers)
    prompt_tokens = tuple(count * prompt_len for count in prompts)
    measured = {"prompt_len": prompt_len, "context_len": context_len, "num_rounds": num_rounds}
    return StepCosts(
        num_layers,
        LayerCosts(Curve(counts, layers), Curve(counts, heads), kv_ms),
        LayerCosts(Curve(prompt_tokens, prompt_layers), Curve(tuple(prompts), prompt_heads)),
        device=device,
        conditions={**(conditions or {}), **measured},
    )


def add_stream_costs(
    model: CausalLM,
    costs: StepCosts,
    batches: Sequence[int],
    prompt_len: int = 32,
    prefill_tokens: int = 512,
    on_call: Callable[[str], None] | None = None,
) -> StepCosts:
    """``costs``, which `measure_step_costs` found, with what streams of requests take longer than they predict.

    Sequences that begin and end, sets of rows that change with each step, entries that lie wherever room was, a cache
    that holds several batches: none of it is in a step that repeats. batches: most rows of a step, for each stream.
    """
    if not batches:
        raise ValueError("add_stream_costs: batches must hold at least one size, got none.")
    costs = costs.of_model()
    decode: list[tuple[float, float]] = []
    prefill_ms: list[float] = []
    for batch in batches:
        excess: list[float] = []
        begin_s = time.perf_counter()
        while len(excess) < _STREAM_ROUNDS and (not excess or time.perf_counter() < begin_s + _STREAM_S):
            measured, predicted = _stream(model, costs, batch, prompt_len, prefill_tokens)
            excess.append(1e3 * (measured.decode_s - predicted.decode_s) / measured.num_decode_steps)
            prefill_ms.append(1e3 * (measured.prefill_s - predicted.prefill_s) / measured.num_prefills)
            if on_call is not None:
                on_call(f"stream {batch}")
        decode.append((measured.rows, median(excess)))
    step_ms, row_ms = _rising_line(decode)
    return replace(costs, step_ms=step_ms, step_row_ms=row_ms, prefill_step_ms=max(median(prefill_ms), 0.0))


def add_draft_costs(
    model: CausalLM,
    costs: StepCosts,
    batches: Sequence[int],
    prompt_len: int = 32,
    on_call: Callable[[str], None] | None = None,
) -> StepCosts:
    """``costs`` with what guesses and their verifications take longer than they predict, over steps without any.

    Closed batches of each of ``batches`` sequences along all layers, guessed by a quarter of them with entries of their
    own; of a batch in which guesses cost more than they could gain what the one before takes, at least 1.0. What was
    learnt of the model's drafts before is forgotten.
    """
    draft = LayerPath.uniform(model.num_layers, -(-model.num_layers // 4))
    num_new = min(_DRAFTED_TOKENS, model.decoder_config.max_positions - prompt_len)
    params = SamplingParams(max_tokens=num_new, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    costs = replace(costs, draft_ratios={})
    ratios: dict[int, tuple[float, float]] = {}
    for batch in batches:
        forget_drafts(model)
        engine = Engine(model, costs=costs, batch=batch, max_context_len=prompt_len + num_new)
        engine.execution.drafting.acceptance = _Believed()
        for prompt in torch.randint(0, model.decoder_config.vocab_size, (batch, prompt_len), generator=generator):
            engine.add_request(prompt.tolist(), params, draft=draft)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DraftWarning)  # a draft that fails is none that does not pay
                while engine.has_unfinished:
                    engine.step()
        finally:
            engine.close()
            forget_drafts(model)
        lengths = engine.execution.drafting.lengths
        found = None if lengths is None else lengths.learnt_ratios(batch)
        if found is not None:
            ratios[batch] = (found.guess, found.verify)
        elif engine.tally.num_verifications <= _FEW_LOOKS * batch:
            # Guesses that cost more than they could gain show nothing: they are no cheaper than predicted, or than
            # beside fewer rows.
            guess, verify = ratios[max(ratios)] if ratios else (1.0, 1.0)
            ratios[batch] = (max(guess, 1.0), max(verify, 1.0))
        if on_call is not None:
            on_call(f"drafts {batch}")
    forget_drafts(model)
    return replace(costs, draft_ratios=ratios)


class _Believed(Acceptance):
    """Guesses that count as right as often as `_BELIEVED`, whatever they are."""

    def of(self, path: LayerPath, draft: Draft, own: Rate) -> float:
        return _BELIEVED

    def add(self, path: LayerPath, draft: Draft, own: Rate, accepted: int, drafted: int) -> None:
        pass


def known_step_costs(model: CausalLM, num_rows: int, prompt_len: int) -> StepCosts:
    """What `dynskip calibrate` has left for this device and shape; else measured now: coarsely, and not kept."""
    device, shape = cost_keys(model)
    known = load_cached(device, shape)
    if known is not None:
        return known
    prefill_tokens = num_rows * prompt_len
    return measure_step_costs(model, device, num_rows, prompt_len, prompt_len, prefill_tokens, num_rounds=3)


def _runner(model: CausalLM, path: LayerPath, rows: int, prompt_len: int, num_new: int) -> DynskipRunner:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.decoder_config.vocab_size, (rows, prompt_len), generator=generator)
    return DynskipRunner(model, prompts, [path] * rows, num_new)


def _planned(runner: DynskipRunner) -> Task:
    """A step whose plan is new, as most are in a stream of requests."""

    def step() -> None:
        assert runner.generation is not None, "prefilled"
        runner.generation.engine.runner.forget()
        runner.step()

    return step


def _stream(
    model: CausalLM, costs: StepCosts, batch: int, prompt_len: int, prefill_tokens: int
) -> tuple[Outcome, Outcome]:
    """What a stream of shallow requests and a few deep ones came to in batches of ``batch``, and what was predicted."""
    num_layers = model.num_layers
    mix = ((LayerPath.uniform(num_layers, -(-num_layers // 4)), 7.0), (LayerPath.full(num_layers), 1.0))
    num_requests = _REQUESTS_PER_ROW * batch
    most = model.decoder_config.max_positions - prompt_len
    requests = [
        replace(request, num_output=min(request.num_output, most))
        for request in Workload(num_requests, mix, prompt_len).draw()
    ]
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        0, model.decoder_config.vocab_size, (num_requests, prompt_len), generator=generator
    ).tolist()
    jobs = [Job(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
    served = Served("stream", model, jobs, costs, policy="cohort", batch=batch, max_prefill_tokens=prefill_tokens)
    while served.progress < 1:
        served.advance()
    measured = served.outcome
    served.engine.close()
    return measured, simulate(costs, requests, EngineOptions(batch=batch, max_prefill_tokens=prefill_tokens))


def _rising_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), neither negative: a + b x comes nearest to the values y at x, by least squares."""
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    through_zero = sum(x * y for x, y in points) / sum(x * x for x in xs)
    lines = [(mean_y - slope * mean_x, slope), (mean_y, 0.0), (0.0, through_zero), (0.0, 0.0)]
    allowed = [line for line in lines if min(line) >= 0]
    return min(allowed, key=lambda line: sum((line[0] + line[1] * x - y) ** 2 for x, y in points))


def _split(
    samples: dict[str, Samples], kind: str, counts: Sequence[int], num_layers: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The milliseconds of one layer, and of what belongs to no layer, at each count."""
    full = [samples[f"{kind} {num_layers} {count}"].ms for count in counts]
    one = [samples[f"{kind} 1 {count}"].ms for count in counts]
    layers = _rising((f - o) / (num_layers - 1) for f, o in zip(full, one, strict=True))
    return layers, _rising(o - layer for o, layer in zip(one, layers, strict=True))


def _rising(values: Iterable[float]) -> tuple[float, ...]:
    """The rising sequence nearest to the values by least squares: more rows never take less time, whatever noise says.

    Neighbours that fall are replaced by their mean, until none do (pool adjacent violators).
    """
    pools: list[list[float]] = []  # each a mean and how many it stands for
    for value in values:
        pools.append([max(value, _LEAST_MS), 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            before, size = pools[-1]
            pools[-1] = [(before * size + mean * count) / (size + count), size + count]
    return tuple(mean for mean, count in pools for _ in range(int(count)))
