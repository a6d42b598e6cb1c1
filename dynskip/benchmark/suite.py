"""The benchmark: steps along paths, held against their own products, transformers and CTranslate2."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from dynskip.assets import OPT_MINI, opt_mini_directory
from dynskip.benchmark import ctranslate2_runner
from dynskip.benchmark.parts import measure_parts
from dynskip.benchmark.report import INSIDE, OUTSIDE, REST, SECTIONS, Report, Row
from dynskip.benchmark.targets import SHARE_TARGET, Targets
from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import MachineSpeed, ModelBytes, PathMix, roofline_ms
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.kv_cache import available_bytes
from dynskip.measure import machine
from dynskip.measure.agreement import Agreement, Gate
from dynskip.measure.products import Embedding, Products
from dynskip.measure.random_models import hf_config, random_hf_model, weight_bytes
from dynskip.measure.runners import DynskipRunner, Runner, TransformersRunner
from dynskip.measure.timing import LEAST_ROUNDS, Samples, Task, interleave, interval_over_rounds, progress_bar
from dynskip.models.registry import decoder_config
from dynskip.paths import LayerPath

# Rounds and steps a round with CTranslate2, whose steps take seconds.
_FEW_ROUNDS, _FEW_REPEATS = 3, 3
# Of a sequence's new tokens, those outside the rounds: by prefill, warm-ups and the rounds with CTranslate2.
_OTHER_TOKENS = 3 + _FEW_ROUNDS * _FEW_REPEATS
# Steps at the beginning of a turn that are not counted.
_LEAD_INS = 2
# The largest batch of long prompts.
_LONG_BATCH = 8
# Milliseconds by part.
_Parts = dict[str, float]
# Rounds of decode steps before the prompts are run again.
_MOST_ROUNDS_AT_ONCE = 8
_MOST_PREFILL_ROUNDS = 12


@dataclass(frozen=True)
class Options:
    """What to measure. ``depths`` and ``mix_depth``: shares of the layers that shared and mixed paths run.

    shape: random weights of it; or a model by name whose own weights are run. vocab_size: another than the shape's own.
    long_prompt_len: of the prompts whose prefill is timed a second time; None for none. prefill_s: seconds to time each
    comparison of prefills for, in ``num_prefill_rounds`` at least.
    """

    shape: str = "opt-1.3b"
    batches: tuple[int, ...] = (1, 8, 32)
    sections: tuple[str, ...] = SECTIONS
    prompt_len: int = 64
    long_prompt_len: int | None = 512
    num_rounds: int = 8
    num_repeats: int = 2
    num_prefill_rounds: int = 3
    prefill_s: float = 30.0
    depths: tuple[float, ...] = (0.5, 0.25)
    mix_depth: float = 0.5
    mix_batch: int = 32
    vocab_size: int | None = None
    backend: str = "auto"
    progress: bool = True

    @property
    def max_new_tokens(self) -> int:
        """Tokens that a sequence generates at most: one by the prefill and one by each step of any kind."""
        return self.num_rounds_at_once * (2 * self.num_repeats + _LEAD_INS) + _OTHER_TOKENS

    @property
    def num_rounds_at_once(self) -> int:
        """Rounds of decode steps behind one prefill: more of them would be those of longer contexts."""
        return min(self.num_rounds, _MOST_ROUNDS_AT_ONCE)


@dataclass
class _Batch:
    """The prompts of one batch size, and who runs them along which paths."""

    size: int
    prompts: Tensor
    paths: dict[str, list[LayerPath]]
    runners: dict[str, Runner]


@dataclass(frozen=True)
class _Floor:
    """The fastest that the products of a step were, and the milliseconds of reading its keys and values."""

    products: Samples
    kv_ms: float


class Suite:
    """One run of the benchmark."""

    def __init__(self, options: Options) -> None:
        unknown = [name for name in options.sections if name not in SECTIONS]
        if unknown:
            raise ValueError(f"bench: sections must be among {', '.join(SECTIONS)}, got {unknown[0]!r}.")
        self.options = options
        self.targets = Targets.of(options.shape)
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.conditions: dict[str, Any] = {}
        self.agreements: list[Agreement] = []
        self.speeds: list[MachineSpeed] = []

    def run(self) -> Report:
        """Measure everything asked for."""
        options = self.options
        config = _config(options)
        shape = decoder_config(config)
        # Why CTranslate2 is left out of what was asked for.
        reason = ctranslate2_runner.unavailable_reason(shape.architecture)
        longest = options.prompt_len + options.max_new_tokens
        entry_bytes = shape.kv_entry_size * torch.bfloat16.itemsize
        # Prompts and outputs at full depth, ours and transformers', beside the weights.
        kv_bytes = 2 * max(options.batches) * longest * shape.num_layers * entry_bytes
        _check_memory(weight_bytes(config), kv_bytes, "ctranslate2" in options.sections and reason is None)
        self.conditions = machine.describe()
        with self._bar("weights and correctness", 3) as bar:
            hf_model = random_hf_model(config)
            bar.update()
            model = CausalLM.from_hf(hf_model, backend=options.backend)
            bar.update()
            num_layers = shape.num_layers
            shared = [LayerPath.uniform(num_layers, _budget(num_layers, depth)) for depth in options.depths]
            gate = Gate(hf_model, [LayerPath.full(num_layers), *shared])
            self.agreements = gate.check_model(model)
            bar.update()
        batches = []
        for size in options.batches:
            self.speeds.append(machine.measure_speed())
            batches.append(self._measure_batch(size, model, hf_model))
        # What the machine can do is the most that it showed in the whole run.
        self._describe(model, MachineSpeed.best(self.speeds))
        if "ctranslate2" in options.sections:
            if reason is not None:
                self.skipped["ctranslate2"] = reason
            else:
                with tempfile.TemporaryDirectory(prefix="dynskip-bench-") as directory:
                    ctranslate2_runner.export(hf_model, Path(directory))
                    for batch in batches:
                        batch.runners = {"full": batch.runners["full"]}
                    hf_model = None  # its memory is needed for CTranslate2's float32 weights
                    gc.collect()
                    self._measure_ctranslate2(Path(directory), gate, batches)
        rows = sorted(self.rows, key=lambda row: SECTIONS.index(row.section))
        return Report(self.conditions, tuple(rows), self.skipped)

    def _describe(self, model: CausalLM, speed: MachineSpeed) -> None:
        options = self.options
        shape = ModelBytes.of(model.decoder_config, model.dtype.itemsize)
        floors = {}
        for size in options.batches:
            mix = PathMix.of([LayerPath.full(shape.num_layers)] * size)
            floors[str(size)] = round(roofline_ms(mix, shape, speed, options.prompt_len), 1)
        self.conditions |= {
            "shape": options.shape,
            "dtype": str(model.dtype).removeprefix("torch."),
            "backend": model.backend.name,
            "prompt_len": options.prompt_len,
            "bandwidth_gbps": round(speed.bandwidth_gbps, 1),
            "peak_gflops": round(speed.peak_gflops, 1),
            "weight_gb": round(_bytes_read(model) / 1e9, 2),
            "layer_mb": round(shape.layer_bytes / 1e6, 1),
            "kv_entry_bytes": shape.kv_entry_bytes,
            "roofline_ms": floors,
            "errors": {agreement.what: [agreement.error, agreement.allowed] for agreement in self.agreements},
        }

    def _measure_batch(self, size: int, model: CausalLM, hf_model: Any) -> _Batch:
        options = self.options
        num_layers, new = model.num_layers, options.max_new_tokens
        generator = torch.Generator().manual_seed(size)
        prompts = torch.randint(0, model.decoder_config.vocab_size, (size, options.prompt_len), generator=generator)
        paths = {"full": [LayerPath.full(num_layers)] * size}
        if "paths" in options.sections:
            for depth in options.depths:
                paths[f"{depth:.0%}"] = [LayerPath.uniform(num_layers, _budget(num_layers, depth))] * size
        if self._has_mix(size):
            budget = _budget(num_layers, options.mix_depth)
            paths["mix"] = [LayerPath.random(num_layers, budget, seed=seed) for seed in range(size)]
        runners: dict[str, Runner] = {
            name: DynskipRunner(model, prompts, chosen, new) for name, chosen in paths.items()
        }
        if "decode" in options.sections or "prefill" in options.sections:
            runners["transformers"] = TransformersRunner(hf_model, prompts, new)
        batch = _Batch(size, prompts, paths, runners)
        self._measure_prefill(batch, model)
        self._measure_decode(batch, model)
        if "prefill" in options.sections:
            self._measure_long_prefill(size, model, hf_model)
        if "overhead" in options.sections:
            for name in batch.paths:
                self._measure_overhead(batch, name)
        return batch

    def _has_mix(self, size: int) -> bool:
        return size == self.options.mix_batch and bool({"mix", "overhead"} & set(self.options.sections))

    def _measure_prefill(self, batch: _Batch, model: CausalLM) -> None:
        """Time prefills; leaves every runner ready to decode, whether or not its prefill was timed."""
        options = self.options
        timed = [name for name in batch.runners if self._prefill_matters(name)]
        for name in batch.runners.keys() - set(timed):
            batch.runners[name].prefill()
        if not timed:
            return
        inside = {
            name: _Inside(batch.runners[name], batch.runners[name].prefill) for name in timed if name in batch.paths
        }
        tasks: dict[str, Task] = {name: batch.runners[name].prefill for name in timed}
        tasks |= {name: counted.run for name, counted in inside.items()}
        products = {
            name: Products(model, PathMix.of(batch.paths[name], options.prompt_len))
            for name in timed
            if name in batch.paths
        }
        tasks |= {f"products {name}": work.run for name, work in products.items()}
        num_rows = batch.size * options.prompt_len
        samples = self._interleave_prefills(f"batch {batch.size}: prefill", tasks)
        peak_gflops = products["full"].flops / samples["products full"].range_ms[0] / 1e6
        self.speeds.append(replace(self.speeds[-1], peak_gflops=peak_gflops))
        embed_ms = self._embed_ms(model, num_rows)
        if "prefill" in options.sections:
            size, full = batch.size, samples["full"]
            target = self.targets.prefill
            self._speedup("prefill", size, "speed-up over transformers", full, samples["transformers"], target)
            self._ratio("prefill", size, "full depth / its products as it runs them", full, samples["products full"])
        parts = {name: counted.parts(samples[name]) for name, counted in inside.items() if counted.calls}
        found = self.conditions.setdefault("prefill_parts_ms", {})
        for name, of_prefill in parts.items():
            of_whole = {"prefill": samples[name].ms, **of_prefill}
            found[f"{name} {batch.size}"] = {part: round(ms, 2) for part, ms in of_whole.items()}
        self._path_rows("prefill", batch, samples, embed_ms, parts)

    def _measure_long_prefill(self, size: int, model: CausalLM, hf_model: Any) -> None:
        """Time the prefill of long prompts, of batches that do not take minutes."""
        length = self.options.long_prompt_len
        if length is None or size > _LONG_BATCH or length >= model.decoder_config.max_positions:
            return
        generator = torch.Generator().manual_seed(size)
        prompts = torch.randint(0, model.decoder_config.vocab_size, (size, length), generator=generator)
        ours = DynskipRunner(model, prompts, [LayerPath.full(model.num_layers)] * size, 1)
        tasks: dict[str, Task] = {
            "full": ours.prefill,
            "transformers": TransformersRunner(hf_model, prompts, 1).prefill,
        }
        samples = self._interleave_prefills(f"batch {size}: long prefill", tasks)
        what = f"speed-up over transformers, prompts of {length}"
        self._speedup("prefill", size, what, samples["full"], samples["transformers"], self.targets.prefill)

    def _prefill_matters(self, name: str) -> bool:
        sections = self.options.sections
        if name == "transformers":
            return "prefill" in sections
        if name == "full":
            return "prefill" in sections or "paths" in sections
        return name != "mix" and "paths" in sections

    def _measure_decode(self, batch: _Batch, model: CausalLM) -> None:
        options = self.options
        if not {"decode", "paths", "mix"} & set(options.sections):
            return
        names = [name for name in batch.runners if name != "transformers" or "decode" in options.sections]
        tasks: dict[str, Task] = {name: batch.runners[name].step for name in names}
        inside = {name: _Inside(batch.runners[name], batch.runners[name].step) for name in batch.paths}
        tasks |= {name: counted.run for name, counted in inside.items()}
        for name in batch.paths:
            tasks[f"products {name}"] = Products(model, PathMix.of(batch.paths[name])).run
        held = [name for name in ("full", "mix") if name in batch.paths]  # against their products
        for name in held:
            tasks[f"products onednn {name}"] = Products(model, PathMix.of(batch.paths[name]), onednn=True).run
        if batch.size == 1 and "decode" in options.sections:
            tasks["reading"] = machine.WeightReader(_bytes_read(model)).read
        title = f"batch {batch.size}: decode"
        samples: dict[str, Samples] = {name: Samples() for name in tasks}
        for first in range(0, options.num_rounds, _MOST_ROUNDS_AT_ONCE):
            num_rounds = min(_MOST_ROUNDS_AT_ONCE, options.num_rounds - first)
            if first:
                for runner in batch.runners.values():
                    runner.prefill()
            found = self._interleave(title, tasks, num_rounds, options.num_repeats, int(not first), _LEAD_INS)
            for name, of_rounds in found.items():
                samples[name].rounds += of_rounds.rounds
        if "reading" in samples:
            bandwidth_gbps = _bytes_read(model) / samples["reading"].range_ms[0] / 1e6
            self.speeds.append(replace(self.speeds[-1], bandwidth_gbps=bandwidth_gbps))
        floors = {name: self._floor(model, batch, samples, name, inside[name]) for name in held}
        parts = {name: counted.parts(samples[name], _LEAD_INS) for name, counted in inside.items() if counted.calls}
        if "decode" in options.sections:
            size, full, targets = batch.size, samples["full"], self.targets
            what = "full depth / its products, keys and values"
            self._held("decode", size, what, full, floors["full"], targets.floor.get(size), parts.get("full", {}))
            target = targets.transformers.get(size)
            self._speedup("decode", size, "speed-up over transformers", full, samples["transformers"], target)
            if "reading" in samples:
                what = "full depth / reading the weights once"
                self._ratio("decode", size, what, full, samples["reading"], targets.reading)
            if "full" in parts:
                what = "neither product nor attention inside the call, us"
                rest = inside["full"].samples(full, REST, _LEAD_INS)
                rounds_us = [1e3 * median(each) for each in rest.rounds]
                self._append("decode", size, what, median(rounds_us), targets.rest_us, False, rest, full, rounds_us)
        embed_ms = self._embed_ms(model, batch.size)
        self._path_rows("decode", batch, samples, embed_ms, parts)
        if "mix" in samples and "mix" in options.sections:
            what = f"independent {options.mix_depth:.0%} paths"
            floor = f"{what} / their products, keys and values"
            self._held("mix", batch.size, floor, samples["mix"], floors["mix"], self.targets.mix, parts.get("mix", {}))
            self._path("mix", batch.size, what, samples, "mix", embed_ms, parts)

    def _floor(
        self, model: CausalLM, batch: _Batch, samples: Mapping[str, Samples], name: str, inside: _Inside
    ) -> _Floor:
        """The products of the path called ``name`` by the fastest of who multiplies, and reading its keys and values.

        Products are timed one after the other by the model's own code and by oneDNN, and inside the steps themselves,
        where no interpreter stands between them.
        """
        ways = [samples[f"products {name}"], samples[f"products onednn {name}"]]
        if inside.calls:
            ways.append(inside.samples(samples[name], "products", _LEAD_INS))
        entries = sum(len(path.layers) for path in batch.paths[name])
        # Of the middle of the steps behind one prefill, those that are not counted among them.
        num_steps = self.options.num_rounds_at_once * (_LEAD_INS + self.options.num_repeats)
        context_len = self.options.prompt_len + num_steps / 2
        shape = ModelBytes.of(model.decoder_config, model.dtype.itemsize)
        kv_ms = entries * context_len * shape.kv_entry_bytes / self.speeds[-1].bandwidth_gbps / 1e6
        return _Floor(min(ways, key=lambda way: way.ms), kv_ms)

    def _path_rows(
        self, phase: str, batch: _Batch, samples: Mapping[str, Samples], embed_ms: float, parts: Mapping[str, _Parts]
    ) -> None:
        if "paths" in self.options.sections:
            for depth in self.options.depths:
                name = f"{depth:.0%}"
                self._path("paths", batch.size, f"{phase}, shared {name} path", samples, name, embed_ms, parts)

    def _measure_overhead(self, batch: _Batch, name: str) -> None:
        runner = batch.runners[name]
        assert isinstance(runner, DynskipRunner)
        num_steps = self.options.num_rounds_at_once * self.options.num_repeats
        with self._bar(f"batch {batch.size}: parts of a step", num_steps) as bar:
            parts = measure_parts(runner, num_steps, lambda _: bar.update())
        detail = {part: round(parts.ms(part), 2) for part in parts.parts}
        self.conditions.setdefault("parts_ms", {})[f"{name} {batch.size}"] = detail
        which = {"full": "full depth", "mix": "independent paths"}.get(name, f"shared {name} path")
        what = f"all but products and attention, {which}"
        step = Samples([[one["step"] for one in parts.steps]])
        overhead = Samples([[parts.overhead_ms] * len(parts.steps)])
        self._append("overhead", batch.size, what, parts.overhead_share, None, False, overhead, step)

    def _measure_ctranslate2(self, directory: Path, gate: Gate, batches: list[_Batch]) -> None:
        options = self.options
        process = ctranslate2_runner.CTranslate2Process(directory, torch.get_num_threads())
        try:
            full_depth = gate.prompts[:1]
            self.agreements.append(gate.check("CTranslate2", process.logits(full_depth), gate.truth[:1]))
            for batch in batches:
                process.start(batch.prompts, options.max_new_tokens)
                tasks: dict[str, Task] = {"full": batch.runners["full"].step, "ctranslate2": process.step}
                samples = self._interleave(f"batch {batch.size}: CTranslate2", tasks, _FEW_ROUNDS, _FEW_REPEATS, 1)
                process.finish()
                what = "speed-up over CTranslate2 float32"
                self._speedup("ctranslate2", batch.size, what, samples["full"], samples["ctranslate2"], 1.0)
        finally:
            process.close()

    def _embed_ms(self, model: CausalLM, num_rows: int) -> float:
        task = Embedding(model, num_rows).run
        return interleave({"embedding": task}, 5)["embedding"].ms

    def _ratio(
        self,
        section: str,
        size: int,
        what: str,
        ours: Samples,
        other: Samples,
        target: float | None = None,
        lost_ms: _Parts | None = None,
    ) -> None:
        """A row that says how many times as long as ``other`` ours takes; the target is an upper bound."""
        value, ratios = ours.over(other), ours.ratios(other)
        self._append(section, size, what, value, target, False, ours, other, ratios, median, lost_ms)

    def _speedup(
        self, section: str, size: int, what: str, ours: Samples, other: Samples, target: float | None = None
    ) -> None:
        """A row that says how many times faster than ``other`` ours is; the target is a lower bound."""
        self._append(section, size, what, other.over(ours), target, True, ours, other, other.ratios(ours))

    def _held(
        self, section: str, size: int, what: str, ours: Samples, floor: _Floor, target: float | None, parts: _Parts
    ) -> None:
        """A row that says how many times as long as its floor ours takes, and by which parts."""
        lost_ms = {}
        if parts:
            allowed = {"products": floor.products.ms, "attention": floor.kv_ms}
            lost_ms = {part: ms - allowed.get(part, 0.0) for part, ms in parts.items()}
        self._ratio(section, size, what, ours, floor.products.plus(floor.kv_ms), target, lost_ms)

    def _path(
        self,
        section: str,
        size: int,
        what: str,
        samples: Mapping[str, Samples],
        name: str,
        embed_ms: float,
        parts: Mapping[str, _Parts],
    ) -> None:
        """A path's speed-up over full depth, and its share of what products, embedding and head allow."""
        full, path = samples["full"], samples[name]
        self._speedup(section, size, f"{what}, speed-up over full depth", path, full)
        products, own = (samples[f"products {each}"].plus(embed_ms) for each in ("full", name))
        allowed = products.over(own)
        rounds = [*zip(full.ratios(path), products.ratios(own), strict=True)]

        def share(drawn: Sequence[tuple[float, float]]) -> float:
            reached, possible = zip(*drawn, strict=True)
            return median(reached) / median(possible)

        lost_ms = {}
        if "full" in parts and name in parts:
            lost_ms = {part: ms - parts["full"][part] / allowed for part, ms in parts[name].items()}
        what = f"{what}, share of the allowed speed-up"
        self._append(section, size, what, share(rounds), SHARE_TARGET, True, path, full, rounds, share, lost_ms)

    def _append(
        self,
        section: str,
        size: int,
        what: str,
        value: float,
        target: float | None,
        at_least: bool,
        ours: Samples,
        other: Samples,
        rounds: Sequence[Any] = (),
        statistic: Callable[[Sequence[Any]], float] = median,
        lost_ms: _Parts | None = None,
    ) -> None:
        """A row whose value is ``statistic`` of ``rounds``; where these are many it has an interval."""
        low, high = (None, None) if len(rounds) < LEAST_ROUNDS else interval_over_rounds(statistic, rounds)
        self.rows.append(
            Row(
                section,
                size,
                what,
                round(value, 4),
                target,
                at_least,
                round(ours.ms, 4),
                round(other.ms, 4),
                ours.num_samples,
                low=None if low is None else round(low, 4),
                high=None if high is None else round(high, 4),
                lost_ms={part: round(ms, 4) for part, ms in lost_ms.items()} if lost_ms else None,
            )
        )

    def _interleave(
        self,
        title: str,
        tasks: Mapping[str, Task],
        num_rounds: int,
        num_repeats: int,
        num_warm_ups: int,
        num_lead_ins: int = 0,
    ) -> dict[str, Samples]:
        total = len(tasks) * (num_warm_ups + num_rounds * (num_lead_ins + num_repeats))
        with self._bar(title, total) as bar:

            def on_call(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            return interleave(tasks, num_rounds, num_repeats, num_warm_ups, on_call, num_lead_ins)

    def _interleave_prefills(self, title: str, tasks: Mapping[str, Task]) -> dict[str, Samples]:
        """Prefills that are short are timed more often: their ratios have intervals then."""
        warm_ups = self._interleave(title, tasks, 1, 1, 0)
        round_s = sum(each.ms for each in warm_ups.values()) / 1e3
        least = self.options.num_prefill_rounds
        num_rounds = max(least, min(_MOST_PREFILL_ROUNDS, int(self.options.prefill_s / round_s)))
        return self._interleave(title, tasks, num_rounds, 1, 0)

    def _bar(self, title: str, total: int) -> AbstractContextManager[Any]:
        return progress_bar(title, total, self.options.progress)


class _Inside:
    """A task of a runner, with the milliseconds that each call of it spends in each part of its native calls.

    calls: by part, of each call so far; empty where steps are not one native call.
    """

    def __init__(self, runner: Runner, task: Callable[[], None]) -> None:
        assert isinstance(runner, DynskipRunner), "others are timed from outside"
        executor = runner.model.executor("compact")
        self.calls: list[tuple[float, ...]] = []
        self._task = task
        self._steps = executor.native_steps if isinstance(executor, CompactExecutor) else None

    def run(self) -> None:
        """Run the task and count."""
        if self._steps is None:
            self._task()
            return
        self._steps.is_timed = True
        try:
            before = self._steps.times_s
            self._task()
            spent_ms = [1e3 * (now - then) for now, then in zip(self._steps.times_s, before, strict=True)]
        finally:
            self._steps.is_timed = False
        if sum(spent_ms) > 0:
            self.calls.append(tuple(spent_ms))

    def samples(self, like: Samples, part: str, num_lead_ins: int = 0) -> Samples:
        """Of the calls that ``like`` has samples of what ``part`` took, round by round."""
        place, repeats = INSIDE.index(part), len(like.rounds[0])
        turn = num_lead_ins + repeats
        counted = [call[place] for call in self.calls[-len(like.rounds) * turn :]]
        assert len(counted) == len(like.rounds) * turn, "each call was counted"
        return Samples([counted[i + num_lead_ins : i + turn] for i in range(0, len(counted), turn)])

    def parts(self, whole: Samples, num_lead_ins: int = 0) -> dict[str, float]:
        """The median milliseconds of each part of ``whole``, the samples of its calls; what is in none is outside."""
        inside = {part: self.samples(whole, part, num_lead_ins).ms for part in INSIDE}
        return inside | {OUTSIDE: whole.ms - sum(inside.values())}


def _config(options: Options) -> Any:
    if options.shape == OPT_MINI:
        return AutoConfig.from_pretrained(opt_mini_directory())
    return hf_config(options.shape, options.vocab_size)


def _budget(num_layers: int, depth: float) -> int:
    return max(1, round(num_layers * depth))


def _bytes_read(model: CausalLM) -> int:
    """Bytes of weights that a decode step reads: every matrix once; of the embedding only the rows it looks up."""
    shape = ModelBytes.of(model.decoder_config, model.dtype.itemsize)
    return shape.num_layers * shape.layer_bytes + shape.head_bytes


def _check_memory(num_weight_bytes: int, num_kv_bytes: int, with_ctranslate2: bool) -> None:
    # transformers' copy, ours, caches and temporaries; CTranslate2 holds float32, but transformers' copy is gone then.
    needed = num_weight_bytes * (4 if with_ctranslate2 else 3) + num_kv_bytes
    free = available_bytes(torch.device("cpu"))
    if needed > free:
        raise MemoryError(
            f"bench: the machine must have {needed / 2**30:.1f} GiB of free memory, got {free / 2**30:.1f} GiB. "
            "Choose a smaller --shape or --batch, or leave CTranslate2 out with --only."
        )
