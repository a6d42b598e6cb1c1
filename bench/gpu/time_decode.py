"""Decode steps against the roofline of their path mix, and against how others would run them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from bench.gpu import recorder
from bench.gpu.baselines import GatherWithToList, MaskEverything
from bench.gpu.floors import WorkDone, floor_ms
from bench.gpu.fused_steps import FusedSteps, random_gate
from bench.gpu.recorder import Benchmark, Group, OutOfTimeError, Question, Recorder
from bench.gpu.transformers_steps import TransformersCompiled, TransformersEager
from bench.gpu.workloads import (
    FULL,
    POLICIES,
    Truth,
    Verdict,
    Workload,
    in_float64,
    independent,
    independent_paths,
)
from dynskip.causal_lm import CausalLM
from dynskip.measure.device import Device, time_in_turns
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.timing import Samples
from dynskip.models.shapes import get_shape
from dynskip.paths import LayerPath
from dynskip.routing.plan import KVPolicy

_OTHERS = (TransformersEager.name, MaskEverything.name, GatherWithToList.name)


# Steps of others, held against the truth before they are timed.
CheckedSteps: TypeAlias = TransformersEager | TransformersCompiled | MaskEverything | GatherWithToList


@dataclass(frozen=True)
class Sizes(recorder.Sizes):
    """What is measured: batches by question, tokens, rounds. ``shares``: of the layers, of mixed paths."""

    context_len: int = 512
    batches: tuple[int, ...] = (1, 8, 64)
    mix_batches: tuple[int, ...] = (8, 64, 256)
    mask_batches: tuple[int, ...] = (64,)
    shares: tuple[float, ...] = (0.25, 0.5)
    num_rounds: int = 7
    num_repeats: int = 6
    num_proof_steps: int = 4
    compile_options: tuple[tuple[str, Any], ...] = ()

    def of(self, section: str) -> tuple[int, ...]:
        """The batches of a section; what a skipped layer costs is asked of one sequence."""
        others = {"mixes": self.mix_batches, "masks": self.mask_batches, "skipped": (1,)}
        return others.get(section, self.batches)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Of shared paths: a third and a half of the layers."""
        num_layers = get_shape(self.shape).num_layers
        return num_layers // 3, num_layers // 2

    @property
    def num_steps(self) -> int:
        """Decode steps of one workload: the first, which is checked, a proof, and all that is timed and counted."""
        return 1 + self.num_proof_steps + _MOST_TIMINGS * ((self.num_rounds + 1) * self.num_repeats + 4)

    @property
    def lengths(self) -> dict[str, Any]:
        """The contexts of the first step and behind the last."""
        return {"context_len": [self.context_len, self.context_len + self.num_steps]}

    @property
    def note(self) -> str:
        """The same in words."""
        last = self.context_len + self.num_steps
        return f"Context {self.context_len} to {last} tokens; a step includes head and greedy choice."


# Ours is timed in turns with one other after the other.
_MOST_TIMINGS = 3
TINY = Sizes("tiny", 128, 6, (1, 3), (3, 5), (3,), (0.25, 0.5), 2, 2, 1, (("backend", "eager"),))


def shared(budget: int) -> str:
    """The name of a path that all sequences share."""
    return f"shared ULS-{budget}"


def masked(kv_policy: KVPolicy, source: str) -> str:
    """The name of per-token masks."""
    return f"per-token 50% {kv_policy.value}, {source}"


def path_questions(batch: int, budgets: Sequence[int]) -> list[Question]:
    """Full depth and shared paths at one batch size."""
    found = [Question(batch, f"{FULL}, share of its roofline", 0.8)]
    for budget in budgets:
        found.append(Question(batch, f"{shared(budget)}, share of its roofline", 0.8))
        found.append(Question(batch, f"{shared(budget)}, speed-up over full depth"))
    return found


def mix_questions(sizes: Sizes, batch: int) -> list[Question]:
    """Independent paths at one batch size."""
    found = []
    for share in sizes.shares:
        name = independent(share)
        found.append(Question(batch, f"{name}, share of the roofline of the mix", 0.8))
        found.append(Question(batch, f"{name}, speed-up over full depth"))
        found.append(Question(batch, f"{name}, speed-up over {MaskEverything.name}"))
        found.append(Question(batch, f"{name}, speed-up over {GatherWithToList.name}"))
        found.append(Question(batch, f"{name}, chain of layer graphs, share of the roofline of the mix"))
    return found


# What a skipped layer costs.
SKIPPED = (
    Question(1, "a skipped layer, us", 1.0, at_least=False),
    Question(1, "a skipped layer, chain of layer graphs, us"),
)


def mask_questions(batch: int, kv_policy: KVPolicy) -> list[Question]:
    """Masks that the device alone knows, under one policy."""
    sources = ("masks on the device", "hidden-state gate")
    return [Question(batch, f"{masked(kv_policy, source)}, share of its roofline", 0.65) for source in sources]


def provider_questions(batch: int, names: Sequence[str]) -> list[Question]:
    """Full depth against others."""
    return [Question(batch, f"{FULL}, speed-up over {name}", 1.0) for name in names]


class DecodeBenchmark(Benchmark):
    """All questions about decode steps, on one model."""

    name = "decode"
    sections = ("full", "paths", "mixes", "skipped", "masks", "providers", "compiled")
    default_sections = sections[1:]  # "paths" asks what "full" does, and more
    counts, counted = "--batches", ("batches", "mix_batches", "mask_batches")

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, timed: str) -> None:
        super().__init__(recorder, device, sizes, timed)
        self.ops = timed
        self.backend = "triton" if timed == "triton" else "torch"
        self.config = replace(get_shape(sizes.shape), vocab_size=sizes.vocab_size)
        self.hf_model = random_hf_model(hf_config(self.config), dtype=recorder.dtype, device=device.device)
        self.model = CausalLM.from_hf(self.hf_model, backend=self.backend, pack=False)
        self.truth = Truth(self.hf_model, lambda: in_float64(self.config, recorder.dtype, device.device))
        self._complaints: dict[str, str] = {}

    @classmethod
    def asked(cls, sizes: Sizes, section: str) -> Iterator[Group]:
        """The questions of a section, in the order in which they are answered."""
        for batch in sizes.of(section):
            if section in ("full", "paths"):
                budgets = sizes.budgets if section == "paths" else ()
                yield path_questions(batch, budgets), cls._paths, (batch, budgets)
            elif section == "mixes":
                yield mix_questions(sizes, batch), cls._mixes, (batch,)
            elif section == "skipped":
                yield SKIPPED, cls._skipped_layer, ()
            elif section == "masks":
                for kv_policy in POLICIES:
                    yield mask_questions(batch, kv_policy), cls._masks, (batch, kv_policy)
            else:
                names = _OTHERS if section == "providers" else (TransformersCompiled.name,)
                yield provider_questions(batch, names), cls._providers, (batch, names)

    def _paths(self, batch: int, budgets: Sequence[int]) -> None:
        """Full depth, recorded before anything else is tried, and then shared paths of ``budgets`` beside it."""
        paths = {FULL: LayerPath.full(self._num_layers)}
        paths |= {shared(budget): LayerPath.uniform(self._num_layers, budget) for budget in budgets}
        workloads = {name: self._along([path] * batch) for name, path in paths.items()}
        self.truth.learn(*workloads.values())
        steps = {FULL: self._fused(FULL, workloads[FULL])}
        samples, floors = self._time(steps)
        self._share(batch, FULL, "share of its roofline", samples, floors)
        if not budgets:
            return
        steps |= {name: self._fused(name, workload) for name, workload in workloads.items() if name != FULL}
        samples, floors = self._time(steps)
        for name in list(workloads)[1:]:
            self._share(batch, name, "share of its roofline", samples, floors)
            self._speedup(batch, name, "full depth", samples, FULL)

    def _mixes(self, batch: int) -> None:
        """One other beside ours at a time: two caches of a large batch fit beside the weights, three do not."""
        full = self._along([LayerPath.full(self._num_layers)] * batch)
        mixes = {
            independent(share): self._along(independent_paths(batch, self._num_layers, share))
            for share in self.sizes.shares
        }
        self.truth.learn(full, *mixes.values())
        for name, workload in mixes.items():
            ours = self._fused(name, workload)
            samples, floors = self._time({name: ours, FULL: self._fused(FULL, full)})
            self._share(batch, name, "share of the roofline of the mix", samples, floors)
            self._speedup(batch, name, "full depth", samples, FULL)
            chained = f"{name}, chain of layer graphs"
            samples, floors = self._time({chained: self._fused(chained, workload, chained=True)})
            self._share(batch, chained, "share of the roofline of the mix", samples, floors)
            self._against(batch, name, ours, _OTHERS[1:])
            del ours

    def _skipped_layer(self) -> None:
        num_layers = self._num_layers
        half = num_layers // 2
        config = hf_config(replace(self.config, num_layers=half))
        hf_model = random_hf_model(config, 1, self.recorder.dtype, self.device.device)
        shallow = CausalLM.from_hf(hf_model, backend=self.backend, pack=False)
        skipping = self._along([LayerPath.uniform(num_layers, half)])
        plain = self._along([LayerPath.full(half)])
        self.truth.learn(skipping)
        for chained, what in ((False, "a skipped layer, us"), (True, "a skipped layer, chain of layer graphs, us")):
            deep = self._fused("half of the layers", skipping, chained=chained)
            shallow_steps = FusedSteps(self.device, shallow, plain, self.ops, chained=chained)
            samples, _ = self._time({"skipping": deep, "plain": shallow_steps})
            one, other = samples["skipping"], samples["plain"]
            differences = [a[0] - b[0] for a, b in zip(one.rounds, other.rounds, strict=True)]
            cost_ms = Samples([[difference] for difference in differences]).ms / (num_layers - half)
            self.recorder.answer(1, what, cost_ms * 1e3, one, other, self._wrong("half of the layers"))
            del deep, shallow_steps

    def _masks(self, batch: int, kv_policy: KVPolicy) -> None:
        workload = Workload.per_token(batch, self._num_layers, 0.5, kv_policy, *self._room)
        self.truth.learn(workload)
        gate = random_gate(self.model, workload, 0.5)
        masks, gated = (masked(kv_policy, source) for source in ("masks on the device", "hidden-state gate"))
        steps = {masks: self._fused(masks, workload), gated: self._fused(gated, workload, gate=gate)}
        samples, floors = self._time(steps)
        for name in steps:
            self._share(batch, name, "share of its roofline", samples, floors)

    def _providers(self, batch: int, names: Sequence[str]) -> None:
        workload = self._along([LayerPath.full(self._num_layers)] * batch)
        self.truth.learn(workload)
        self._against(batch, FULL, self._fused(FULL, workload), names)

    def _provider(self, name: str, workload: Workload) -> CheckedSteps:
        if name == TransformersEager.name:
            return TransformersEager(self.hf_model, workload)
        if name == TransformersCompiled.name:
            return TransformersCompiled(self.hf_model, workload, **dict(self.sizes.compile_options))
        padded = MaskEverything if name == MaskEverything.name else GatherWithToList
        return padded(self.device, self.model, workload)

    def _against(self, batch: int, name: str, ours: FusedSteps, others: Sequence[str]) -> None:
        """Time ours in turns with one other after the other. One that fails is recorded, and the rest goes on."""
        for other in others:
            try:
                _free_memory()
                provider = self._provider(other, ours.workload)
                self._note_verdict(other, self.truth.check(other, ours.workload, provider.first_step()))
                samples, _ = self._time({name: ours, other: provider})
                self._speedup(batch, name, other, samples, other)
                del provider
            except OutOfTimeError:
                raise
            except Exception as error:
                self.recorder.fail_one(batch, f"{name}, speed-up over {other}", error)

    def _fused(self, name: str, workload: Workload, gate: Any = None, chained: bool = False) -> FusedSteps:
        """Checked steps of dynskip that were seen not to wait for the device."""
        _free_memory()
        steps = FusedSteps(self.device, self.model, workload, self.ops, gate, chained)
        logits, active = steps.first_step()
        verdict = self.truth.check(name, workload, logits, active if gate is not None else None)
        with self.device.no_waiting():
            for _ in range(self.sizes.num_proof_steps):
                steps.step()
        self._note_verdict(name, verdict, f"; batch {workload.batch}, {steps.memory}")
        return steps

    def _note_verdict(self, name: str, verdict: Verdict, more: str = "") -> None:
        """Print it, and remember what is wrong: ``name`` is timed all the same, and its rows say so."""
        self.recorder.note(f"{name}: {verdict.share:.0%} of the allowed error{more}")
        self._complaints[name] = verdict.complaint

    def _wrong(self, *names: str) -> str:
        return " ".join(filter(None, (self._complaints.get(name) for name in names)))

    def _share(self, batch: int, name: str, of: str, samples: dict[str, Samples], floors: dict[str, float]) -> None:
        self.recorder.share(batch, f"{name}, {of}", samples[name], floors[name], self._wrong(name))

    def _speedup(self, batch: int, name: str, over: str, samples: dict[str, Samples], other: str) -> None:
        wrong = self._wrong(name, other)
        self.recorder.speedup(batch, f"{name}, speed-up over {over}", samples[name], samples[other], wrong)

    def _time(self, steps: dict[str, Any]) -> tuple[dict[str, Samples], dict[str, float]]:
        """Samples of all, and for those of dynskip the bound of the work that was seen before and after."""
        fused = {name: one for name, one in steps.items() if isinstance(one, FusedSteps)}
        work: dict[str, list[WorkDone]] = {name: [one.work_done() for _ in range(2)] for name, one in fused.items()}
        tasks = {name: one.step for name, one in steps.items()}
        samples = time_in_turns(self.device, tasks, self.sizes.num_rounds, self.sizes.num_repeats)
        floors = {}
        for name, one in fused.items():
            done = WorkDone.mean([*work[name], *(one.work_done() for _ in range(2))])
            floors[name] = floor_ms(done, self.config, self.recorder.dtype.itemsize, self.recorder.speed)
            self.recorder.note(
                f"{name}: {done.mean_layers:.2f} layers a row, {samples[name].ms * 1e3:.1f} us a step, "
                f"bound {floors[name] * 1e3:.1f} us"
            )
        return samples, floors

    def _along(self, paths: list[LayerPath]) -> Workload:
        return Workload.along(paths, *self._room)

    @property
    def _room(self) -> tuple[int, int, int, torch.device]:
        sizes = self.sizes
        return sizes.context_len, sizes.num_steps, sizes.vocab_size, self.device.device

    @property
    def _num_layers(self) -> int:
        return self.model.num_layers


def _free_memory() -> None:
    """Give memory that is held no more back to the device: caches are made as large as the device says is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``decode`` of `make gpu`."""
    return DecodeBenchmark.run(Sizes(), TINY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
