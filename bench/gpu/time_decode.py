"""Decode steps against the roofline of their path mix, and against how others would run them."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.gpu.baselines import GatherWithToList, MaskEverything
from bench.gpu.floors import WorkDone, floor_ms
from bench.gpu.fused_steps import FusedSteps, random_gate
from bench.gpu.recorder import Question, Recorder, run_part
from bench.gpu.transformers_steps import TransformersCompiled, TransformersEager
from bench.gpu.workloads import Truth, Workload
from dynskip.benchmark.device import Device, time_in_turns
from dynskip.benchmark.models import opt_config, random_hf_model
from dynskip.benchmark.products import model_shape
from dynskip.benchmark.timing import Samples
from dynskip.model import OPTForCausalLM
from dynskip.paths import LayerPath
from dynskip.plan import KVPolicy

SECTIONS = ("paths", "mixes", "skipped", "masks", "providers", "compiled")
_POLICIES = (KVPolicy.EVICT, KVPolicy.PROPAGATE)
_FULL = "full depth"
_OTHERS = (TransformersEager.name, MaskEverything.name, GatherWithToList.name)


class Steps(Protocol):
    """Anything that decodes a workload."""

    def step(self) -> None:
        """Run the last token of each sequence and choose the next one."""
        ...


class CheckedSteps(Steps, Protocol):
    """Steps of others, held against the truth before they are timed."""

    def first_step(self) -> Tensor:
        """Run one step: its logits [B, V]."""
        ...


Maker = Callable[[Workload], CheckedSteps]


@dataclass(frozen=True)
class Sizes:
    """What is measured: batches by question, tokens, rounds. ``budgets``: of shared paths. ``shares``: of mixes."""

    shape: str = "opt-1.3b"
    vocab_size: int = 50272
    context_len: int = 512
    batches: tuple[int, ...] = (1, 8, 64)
    mix_batches: tuple[int, ...] = (8, 64, 256)
    mask_batch: int = 64
    budgets: tuple[int, ...] = (8, 12)
    shares: tuple[float, ...] = (0.25, 0.5)
    num_rounds: int = 7
    num_repeats: int = 8
    num_proof_steps: int = 4
    compile_options: tuple[tuple[str, Any], ...] = ()

    @property
    def num_steps(self) -> int:
        """Decode steps of one workload: the first, which is checked, a proof, and all that is timed and counted."""
        return 1 + self.num_proof_steps + 2 * ((self.num_rounds + 1) * self.num_repeats + 4)


TINY = Sizes("tiny", 128, 6, (1, 3), (3, 5), 3, (2, 3), (0.25, 0.5), 2, 2, 1, (("backend", "eager"),))


def shared(budget: int) -> str:
    """The name of a path that all sequences share."""
    return f"shared ULS-{budget}"


def independent(share: float) -> str:
    """The name of a mix of random paths."""
    return f"independent {share:.0%} paths"


def masked(kv_policy: KVPolicy, source: str) -> str:
    """The name of per-token masks."""
    return f"per-token 50% {kv_policy.value}, {source}"


def path_questions(sizes: Sizes, batch: int) -> list[Question]:
    """Full depth and shared paths at one batch size."""
    found = [Question(batch, f"{_FULL}, share of its roofline", 0.8)]
    for budget in sizes.budgets:
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


def skipped_questions(sizes: Sizes) -> list[Question]:
    """What a skipped layer costs."""
    return [
        Question(1, "a skipped layer, us", 1.0, at_least=False),
        Question(1, "a skipped layer, chain of layer graphs, us"),
    ]


def mask_questions(sizes: Sizes, kv_policy: KVPolicy) -> list[Question]:
    """Masks that the device alone knows, under one policy."""
    sources = ("masks on the device", "hidden-state gate")
    return [
        Question(sizes.mask_batch, f"{masked(kv_policy, source)}, share of its roofline", 0.65) for source in sources
    ]


def provider_questions(batch: int, names: Sequence[str]) -> list[Question]:
    """Full depth against others."""
    return [Question(batch, f"{_FULL}, speed-up over {name}", 1.0) for name in names]


class DecodeBenchmark:
    """All questions about decode steps, on one model."""

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, ops: str, backend: str) -> None:
        self.recorder = recorder
        self.device = device
        self.sizes = sizes
        self.ops = ops
        self.backend = backend
        self.config = opt_config(sizes.shape, sizes.vocab_size)
        self.hf_model = random_hf_model(self.config, dtype=recorder.dtype, device=device.device)
        self.model = OPTForCausalLM.from_hf(self.hf_model, backend=backend, pack=False)
        self.shape = model_shape(self.model)
        self.truth = Truth(self.model, in_float64(self.config, recorder.dtype, device))

    def run(self, sections: Sequence[str]) -> None:
        """Answer the questions of ``sections``, the most important first."""
        sizes, attempt = self.sizes, self.recorder.attempt
        if "paths" in sections:
            for batch in sizes.batches:
                attempt(path_questions(sizes, batch), partial(self._paths, batch))
        if "mixes" in sections:
            for batch in sizes.mix_batches:
                attempt(mix_questions(sizes, batch), partial(self._mixes, batch))
        if "skipped" in sections:
            attempt(skipped_questions(sizes), self._skipped_layer)
        if "masks" in sections:
            for kv_policy in _POLICIES:
                attempt(mask_questions(sizes, kv_policy), partial(self._masks, kv_policy))
        if "providers" in sections:
            for batch in sizes.batches:
                attempt(provider_questions(batch, _OTHERS), partial(self._providers, batch))
        if "compiled" in sections:
            for batch in sizes.batches:
                attempt(provider_questions(batch, (TransformersCompiled.name,)), partial(self._compiled, batch))

    def _paths(self, batch: int) -> None:
        names = {_FULL: self._along([LayerPath.full(self._num_layers)] * batch)}
        for budget in self.sizes.budgets:
            names[shared(budget)] = self._along([LayerPath.uniform(self._num_layers, budget)] * batch)
        steps = {name: self._fused(name, workload) for name, workload in names.items()}
        samples, floors = self._time(steps)
        for name in names:
            self.recorder.share(batch, f"{name}, share of its roofline", samples[name], floors[name])
            if name != _FULL:
                self.recorder.speedup(batch, f"{name}, speed-up over full depth", samples[name], samples[_FULL])

    def _mixes(self, batch: int) -> None:
        full = self._along([LayerPath.full(self._num_layers)] * batch)
        for share in self.sizes.shares:
            name, budget = independent(share), max(1, round(self._num_layers * share))
            workload = self._along([LayerPath.random(self._num_layers, budget, seed) for seed in range(batch)])
            ours = self._fused(name, workload)
            steps: dict[str, Steps] = {name: ours, _FULL: self._fused(_FULL, full)}
            steps["chained"] = self._fused(f"{name}, chained", workload, chained=True)
            samples, floors = self._time(steps)
            what = f"{name}, share of the roofline of the mix"
            self.recorder.share(batch, what, samples[name], floors[name])
            what = f"{name}, chain of layer graphs, share of the roofline of the mix"
            self.recorder.share(batch, what, samples["chained"], floors["chained"])
            self.recorder.speedup(batch, f"{name}, speed-up over full depth", samples[name], samples[_FULL])
            del steps  # three padded caches of a large batch do not fit beside the others
            makers = self._mask_and_gather()
            self._against(batch, name, ours, makers)

    def _skipped_layer(self) -> None:
        num_layers = self._num_layers
        half = num_layers // 2
        config = opt_config(self.sizes.shape, self.sizes.vocab_size)
        config.num_hidden_layers = half
        hf_model = random_hf_model(config, 1, self.recorder.dtype, self.device.device)
        shallow = OPTForCausalLM.from_hf(hf_model, backend=self.backend, pack=False)
        skipping = self._along([LayerPath.uniform(num_layers, half)])
        plain = self._along([LayerPath.full(half)])
        for chained, what in ((False, "a skipped layer, us"), (True, "a skipped layer, chain of layer graphs, us")):
            deep = self._fused("half of the layers", skipping, chained=chained)
            shallow_steps = FusedSteps(self.device, shallow, plain, self.ops, chained=chained)
            samples, _ = self._time({"skipping": deep, "plain": shallow_steps})
            one, other = samples["skipping"], samples["plain"]
            differences = [a[0] - b[0] for a, b in zip(one.rounds, other.rounds, strict=True)]
            cost_ms = Samples([[difference] for difference in differences]).ms / (num_layers - half)
            self.recorder.answer(1, what, cost_ms * 1e3, one, other)

    def _masks(self, kv_policy: KVPolicy) -> None:
        sizes = self.sizes
        workload = Workload.per_token(
            sizes.mask_batch,
            self._num_layers,
            0.5,
            kv_policy,
            sizes.context_len,
            sizes.num_steps,
            sizes.vocab_size,
            self.device.device,
        )
        gate = random_gate(self.model, workload, 0.5)
        steps: dict[str, Steps] = {
            "masks on the device": self._fused(masked(kv_policy, "masks"), workload),
            "hidden-state gate": self._fused(masked(kv_policy, "gate"), workload, gate=gate),
        }
        samples, floors = self._time(steps)
        for source in steps:
            what = f"{masked(kv_policy, source)}, share of its roofline"
            self.recorder.share(sizes.mask_batch, what, samples[source], floors[source])

    def _providers(self, batch: int) -> None:
        workload = self._along([LayerPath.full(self._num_layers)] * batch)
        makers: dict[str, Maker] = {TransformersEager.name: lambda w: TransformersEager(self.hf_model, w)}
        self._against(batch, _FULL, self._fused(_FULL, workload), makers | self._mask_and_gather())

    def _compiled(self, batch: int) -> None:
        workload = self._along([LayerPath.full(self._num_layers)] * batch)
        options = dict(self.sizes.compile_options)
        makers: dict[str, Maker] = {
            TransformersCompiled.name: lambda w: TransformersCompiled(self.hf_model, w, **options)
        }
        self._against(batch, _FULL, self._fused(_FULL, workload), makers)

    def _mask_and_gather(self) -> dict[str, Maker]:
        return {
            MaskEverything.name: lambda w: MaskEverything(self.device, self.model, w),
            GatherWithToList.name: lambda w: GatherWithToList(self.device, self.model, w),
        }

    def _against(self, batch: int, name: str, ours: FusedSteps, makers: dict[str, Maker]) -> None:
        """Time ours in turns with others, each checked first. One that fails is recorded, and the rest goes on."""
        steps: dict[str, Steps] = {name: ours}
        for other, make in makers.items():
            try:
                _free_memory()
                steps[other] = provider = make(ours.workload)
                error = self.truth.check(other, ours.workload, provider.first_step())
                self.recorder.note(f"{other}: {error:.0%} of the allowed error")
            except Exception as error:
                steps.pop(other, None)
                self.recorder.fail_one(batch, f"{name}, speed-up over {other}", error)
        if len(steps) == 1:
            return
        samples, _ = self._time(steps)
        for other in [other for other in steps if other != name]:
            self.recorder.speedup(batch, f"{name}, speed-up over {other}", samples[name], samples[other])

    def _fused(self, name: str, workload: Workload, gate: Any = None, chained: bool = False) -> FusedSteps:
        """Checked steps of dynskip that were seen not to wait for the device."""
        _free_memory()
        steps = FusedSteps(self.device, self.model, workload, self.ops, gate, chained)
        logits, active = steps.first_step()
        error = self.truth.check(name, workload, logits, active if gate is not None else None)
        with self.device.no_waiting():
            for _ in range(self.sizes.num_proof_steps):
                steps.step()
        self.recorder.note(f"{name}, batch {workload.batch}: {error:.0%} of the allowed error; {steps.memory}")
        return steps

    def _time(self, steps: dict[str, Any]) -> tuple[dict[str, Samples], dict[str, float]]:
        """Samples of all, and for those of dynskip the bound of the work that was seen before and after."""
        fused = {name: one for name, one in steps.items() if isinstance(one, FusedSteps)}
        work: dict[str, list[WorkDone]] = {name: [one.work_done() for _ in range(2)] for name, one in fused.items()}
        tasks = {name: one.step for name, one in steps.items()}
        samples = time_in_turns(self.device, tasks, self.sizes.num_rounds, self.sizes.num_repeats)
        floors = {}
        for name, one in fused.items():
            done = WorkDone.mean([*work[name], *(one.work_done() for _ in range(2))])
            floors[name] = floor_ms(done, self.shape, self.recorder.speed)
            self.recorder.note(
                f"{name}: {done.mean_layers:.2f} layers a row, {samples[name].ms * 1e3:.1f} us a step, "
                f"bound {floors[name] * 1e3:.1f} us"
            )
        return samples, floors

    def _along(self, paths: list[LayerPath]) -> Workload:
        sizes = self.sizes
        return Workload.along(paths, sizes.context_len, sizes.num_steps, sizes.vocab_size, self.device.device)

    @property
    def _num_layers(self) -> int:
        return self.model.num_layers


def in_float64(config: Any, dtype: torch.dtype, device: Device) -> OPTForCausalLM:
    """The model with the weights that `random_hf_model` makes in ``dtype``, in float64."""
    hf_model = random_hf_model(config, dtype=dtype, device=device.device).double()
    return OPTForCausalLM.from_hf(hf_model, backend="torch", pack=False)


def _free_memory() -> None:
    """Give what nobody holds any more back to the device: caches are made as large as the device says is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def questions(args: argparse.Namespace) -> list[Question]:
    """Every question that the part answers."""
    sizes = TINY if args.tiny else Sizes()
    asked: dict[str, list[Question]] = {
        "paths": [question for batch in sizes.batches for question in path_questions(sizes, batch)],
        "mixes": [question for batch in sizes.mix_batches for question in mix_questions(sizes, batch)],
        "skipped": skipped_questions(sizes),
        "masks": [question for policy in _POLICIES for question in mask_questions(sizes, policy)],
        "providers": [question for batch in sizes.batches for question in provider_questions(batch, _OTHERS)],
        "compiled": [
            question for batch in sizes.batches for question in provider_questions(batch, (TransformersCompiled.name,))
        ],
    }
    return [question for section in _sections(args) for question in asked[section]]


def measure(args: argparse.Namespace, device: Device) -> int:
    """Answer them."""
    sizes = TINY if args.tiny else Sizes()
    described = {
        "shape": sizes.shape,
        "context_len": [sizes.context_len, sizes.context_len + sizes.num_steps],
        "row_ops": args.ops,
        "notes": [
            f"Context {sizes.context_len} to {sizes.context_len + sizes.num_steps} tokens; a step includes head and "
            "greedy choice."
        ],
    }
    recorder = Recorder("decode", device, args, described)
    try:
        backend = "triton" if args.ops == "triton" else "torch"
        DecodeBenchmark(recorder, device, sizes, args.ops, backend).run(_sections(args))
    finally:
        status = recorder.close()
    return status


def _sections(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(args.sections.split(",")) if args.sections else SECTIONS


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", choices=("triton", "reference"), default="triton", help="row ops (default: triton)")
    parser.add_argument("--sections", metavar="A,B", help=f"of {','.join(SECTIONS)} (default: all)")


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``decode`` of `make gpu`."""
    return run_part("decode", __doc__ or "", questions, measure, argv, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
