"""Prompts along paths: which share of the ideal speed-up compact rows reach, and of the matrix peak at full depth."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu import recorder
from bench.gpu.recorder import Benchmark, Group, Question, Recorder
from bench.gpu.transformers_steps import TransformersEager
from bench.gpu.workloads import FULL, POLICIES, Truth, Workload, in_float64, independent, independent_paths
from dynskip.causal_lm import CausalLM
from dynskip.costs.layer_costs import ModelBytes
from dynskip.engine.closed_batch import Generation
from dynskip.engine.request import Span
from dynskip.execution.compact import CompactExecutor
from dynskip.execution.executor import Predictions
from dynskip.execution.step import Step, packed_positions
from dynskip.measure.device import Device, time_in_turns
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.runners import TransformersRunner
from dynskip.models.shapes import get_shape
from dynskip.paths import LayerPath
from dynskip.routing.plan import KVPolicy
from dynskip.sampling import SamplingParams


@dataclass(frozen=True)
class Sizes(recorder.Sizes):
    """What is measured. ``shares``: of the layers that independent random paths run."""

    batch: int = 16
    prompt_len: int = 512
    shares: tuple[float, ...] = (0.25, 0.5)
    num_rounds: int = 9
    num_repeats: int = 3

    @property
    def note(self) -> str:
        """What is timed."""
        return f"{self.batch} prompts of {self.prompt_len} tokens, from ids on the device to the first new token."


TINY = Sizes("tiny", 128, 3, 6, (0.25, 0.5), 2, 1)


def masked(kv_policy: KVPolicy) -> str:
    """The name of per-token masks."""
    return f"per-token 50% masks, {kv_policy.value}"


class PrefillBenchmark(Benchmark):
    """All questions about prefill, on one model."""

    name = "prefill"

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, timed: str) -> None:
        super().__init__(recorder, device, sizes, timed)
        config = replace(get_shape(sizes.shape), vocab_size=sizes.vocab_size)
        self.hf_model = random_hf_model(hf_config(config), dtype=recorder.dtype, device=device.device)
        self.model = CausalLM.from_hf(self.hf_model, backend=timed, pack=False)
        self.truth = Truth(self.hf_model, lambda: in_float64(config, recorder.dtype, device.device))
        self.shape = ModelBytes.of(self.model.decoder_config, self.model.dtype.itemsize)
        executor = self.model.executor("compact")
        assert isinstance(executor, CompactExecutor)
        recorder.note(f"backend {self.model.backend.name}; attention of whole prompts: {executor.prompt_attention()}")

    @classmethod
    def asked(cls, sizes: Sizes, section: str) -> Iterator[Group]:
        """All questions, which are answered together."""
        found = [
            Question(sizes.batch, f"{FULL}, share of the matrix peak", 0.6),
            Question(sizes.batch, f"{FULL}, speed-up over {TransformersEager.name}"),
        ]
        targets = {independent(share): 0.95 for share in sizes.shares} | {masked(policy): None for policy in POLICIES}
        for name, target in targets.items():
            found.append(Question(sizes.batch, f"{name}, share of the ideal speed-up", target))
            found.append(Question(sizes.batch, f"{name}, speed-up over full depth"))
        names = [independent(share) for share in sizes.shares]
        found += [Question(sizes.batch, f"{name}, LLM.generate, speed-up over full depth") for name in names]
        yield found, cls._measure, ()

    def _measure(self) -> None:
        sizes, num_layers = self.sizes, self.model.num_layers
        workloads = {FULL: self._along([LayerPath.full(num_layers)] * sizes.batch)}
        for share in sizes.shares:
            workloads[independent(share)] = self._along(independent_paths(sizes.batch, num_layers, share))
        for kv_policy in POLICIES:
            workloads[masked(kv_policy)] = Workload.per_token(
                sizes.batch, num_layers, 0.5, kv_policy, sizes.prompt_len - 1, 1, sizes.vocab_size, self.device.device
            )
        self.truth.learn(*workloads.values())
        wrong: dict[str, str] = {}
        for name, workload in workloads.items():
            for kind in (PromptStep, Prefill):
                prefill = kind(self.model, workload)
                prefill.run()
                verdict = self.truth.check(name, workload, prefill.logits)
                self.recorder.note(f"{name}, {kind.__name__}: {verdict.share:.0%} of the allowed error")
                wrong[name] = wrong.get(name) or verdict.complaint
        tasks = {name: PromptStep(self.model, workload).run for name, workload in workloads.items()}
        for name in self._generated:
            tasks[f"{name}, generate"] = Prefill(self.model, workloads[name]).run
        theirs = TransformersRunner(self.hf_model, workloads[FULL].prompts, 1)
        theirs.prefill()
        assert theirs.logits is not None
        wrong[TransformersEager.name] = self.truth.check(
            TransformersEager.name, workloads[FULL], theirs.logits
        ).complaint
        tasks[TransformersEager.name] = theirs.prefill
        samples = time_in_turns(self.device, tasks, sizes.num_rounds, sizes.num_repeats)

        recorder, batch, full = self.recorder, sizes.batch, samples[FULL]
        num_tokens = batch * sizes.prompt_len
        flops = num_tokens * num_layers * self.shape.layer_flops_per_row + batch * self.shape.head_flops_per_row
        floor_ms = flops / recorder.speed.peak_gflops / 1e6
        recorder.share(batch, f"{FULL}, share of the matrix peak", full, floor_ms, wrong[FULL])
        either = wrong[FULL] or wrong[TransformersEager.name]
        recorder.speedup(
            batch, f"{FULL}, speed-up over {TransformersEager.name}", full, samples[TransformersEager.name], either
        )
        for name in self._generated[1:]:
            ours, whole = samples[f"{name}, generate"], samples[f"{FULL}, generate"]
            either = wrong[name] or wrong[FULL]
            recorder.speedup(batch, f"{name}, LLM.generate, speed-up over full depth", ours, whole, either)
        for name, workload in workloads.items():
            host_ms = PromptStep(self.model, workload).host_ms(self.device)
            recorder.note(f"{name}: the host is done after {host_ms:.2f} ms of {samples[name].ms:.2f}")
            if name == FULL:
                continue
            mean_layers = float(workload.token_mask(list(range(batch))).sum()) / num_tokens
            speedup = full.over(samples[name])
            either = wrong[name] or wrong[FULL]
            recorder.speedup(batch, f"{name}, speed-up over full depth", samples[name], full, either)
            what = f"{name}, share of the ideal speed-up"
            recorder.answer(batch, what, speedup * mean_layers / num_layers, samples[name], full, either)
            recorder.note(f"{name}: {mean_layers:.2f} of {num_layers} layers, ideal {num_layers / mean_layers:.2f}x")

    @property
    def _generated(self) -> tuple[str, ...]:
        """What is timed from lists of token ids to chosen tokens, too."""
        return (FULL, *(independent(share) for share in self.sizes.shares))

    def _along(self, paths: list[LayerPath]) -> Workload:
        sizes = self.sizes
        return Workload.along(paths, sizes.prompt_len - 1, 1, sizes.vocab_size, self.device.device)


class PromptStep:
    """The prompts of a workload, whose ids are on the device: planning, cache, layers, head and greedy choice."""

    def __init__(self, model: CausalLM, workload: Workload) -> None:
        self.model = model
        self.executor = model.executor("compact")
        self.workload = workload
        self.num_tokens = workload.prompts.shape[1]
        self.num_entries = workload.num_entries()
        self.token_ids = workload.prompts.flatten()
        self.position_ids = packed_positions([self.num_tokens] * workload.batch, model.device)
        self.cache_ids = torch.arange(workload.batch, device=model.device)
        self.logits = self.chosen = torch.empty(0)

    def run(self) -> None:
        """Run the prompts from scratch and choose the first token of each."""
        plan = self.workload.plan(0, self.num_tokens)
        cache = self.executor.new_cache(self.workload.batch, self.num_tokens, self.num_entries)
        step = Step(self.token_ids, self.position_ids, self.cache_ids, plan, fresh=True)
        hidden_states = self.executor.run(step, cache)
        self.logits = self.executor.head(hidden_states[self.num_tokens - 1 :: self.num_tokens])
        self.chosen = self.logits.argmax(-1)

    def host_ms(self, device: Device) -> float:
        """The milliseconds after which the host has launched everything, while the device may still work."""
        device.synchronize()
        start = time.perf_counter()
        self.run()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        device.synchronize()
        return elapsed_ms


class Prefill:
    """The prompts of a workload as ``LLM.generate`` runs them: planning, cache, layers, head and the first choice."""

    def __init__(self, model: CausalLM, workload: Workload) -> None:
        self.model = model
        self.prompts: list[list[int]] = workload.prompts.tolist()
        self.params = [SamplingParams(max_tokens=1, ignore_eos=True)] * workload.batch
        self.paths = list(workload.paths) if workload.paths is not None else workload.mask
        self.kv_policy = None if workload.paths is not None else workload.kv_policy.value
        self.logits = torch.empty(0)

    def run(self) -> None:
        """Run the prompts from scratch and choose the first token of each; their logits are kept."""
        generation = Generation(self.model, self.prompts, self.params, self.paths, self.kv_policy)
        runner = generation.engine.runner
        run = runner.prompt

        def record(spans: Sequence[Span], cache: Any) -> Predictions:
            predictions = run(spans, cache)
            self.logits = predictions.logits
            return predictions

        runner.prompt = record  # type: ignore[method-assign]
        generation.prefill()


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``prefill`` of `make gpu`."""
    return PrefillBenchmark.run(Sizes(), TINY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
