"""Guesses of drafts against steps without any: what they gain, and whether that is what was predicted."""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.gpu import recorder
from bench.gpu.recorder import Benchmark, Group, Question, Recorder
from bench.speculation.cells import Cell
from bench.speculation.predicted import predicted_gain
from bench.speculation.scaled import Scaled
from dynskip.causal_lm import CausalLM
from dynskip.costs.step_costs import StepCosts
from dynskip.engine.engine import Engine
from dynskip.measure.calibration import measure_step_costs
from dynskip.measure.device import Device
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.timing import Samples
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.speculation.draft import Draft

_NO_LOSS = 0.98


@dataclass(frozen=True)
class Sizes(recorder.Sizes):
    """What is measured. acceptances: that outputs of layers are scaled for."""

    batches: tuple[int, ...] = (1, 4, 8, 64)
    acceptances: tuple[float, ...] = (0.8, 0.0)
    prompt_len: int = 32
    output_len: int = 128
    context_len: int = 512
    num_rounds: int = 5

    @property
    def note(self) -> str:
        """What is timed."""
        return (
            f"Decode steps of closed batches, outputs of {self.output_len} tokens; a quarter of the layers guesses, "
            "spread evenly, with entries of its own; outputs of the other layers are scaled until it is right as often."
        )


TINY = Sizes("tiny", 128, (1, 3), (0.8, 0.0), 6, 12, 8, 2)


class DraftBenchmark(Benchmark):
    """All questions about drafts, on one model."""

    name = "drafts"

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, timed: str) -> None:
        super().__init__(recorder, device, sizes, timed)
        config = hf_config(sizes.shape, sizes.vocab_size)
        hf_model = random_hf_model(config, dtype=recorder.dtype, device=device.device)
        self.model = CausalLM.from_hf(hf_model, backend=timed, pack=False)
        num_layers = self.model.num_layers
        self.draft = Draft(LayerPath.of(num_layers, range(1, num_layers, 4)))
        self.scaled = Scaled(self.model)
        generator = torch.Generator().manual_seed(0)
        shape = (max(sizes.batches), sizes.prompt_len)
        self.prompts: list[list[int]] = torch.randint(3, sizes.vocab_size, shape, generator=generator).tolist()
        self._costs: StepCosts | None = None
        recorder.note(f"backend {self.model.backend.name}")

    @classmethod
    def asked(cls, sizes: Sizes, section: str) -> Iterator[Group]:
        """What drafts gain, by acceptance and batch."""
        for wanted in sizes.acceptances:
            for batch in sizes.batches:
                found = [Question(batch, _gain(wanted), None if wanted else _NO_LOSS)]
                if wanted:
                    found.append(Question(batch, _predicted(wanted)))
                yield found, cls._measure, (wanted, batch)

    def _measure(self, wanted: float, batch: int) -> None:
        prompts = self.prompts[:batch]
        _, rates = self.scaled.seek(self.draft, wanted, prompts, self.sizes.output_len)
        self.recorder.note(f"agreement {statistics.fmean(rates):.2f}, wanted {wanted:g}, batch {batch}")
        wrong = self._complaint(prompts)
        ms: dict[bool, list[float]] = {False: [], True: []}
        learnt = None
        # The first round learns, and makes the graphs.
        for turn in range(1 + self.sizes.num_rounds):
            for with_draft in (False, True) if turn % 2 else (True, False):
                engine, _ = self._run(prompts, with_draft, deterministic=False)
                if turn:
                    ms[with_draft].append(1e3 * engine.tally.decode_s)
                elif with_draft:
                    learnt = copy.deepcopy(engine.execution.drafting.lengths)
        own, plain = (Samples([[sample] for sample in ms[with_draft]]) for with_draft in (True, False))
        self.recorder.speedup(batch, _gain(wanted), own, plain, wrong)
        if wanted:
            gain = plain.over(own)
            cell = Cell("gpu", "none", self.draft, batch, batch, self.sizes.output_len, wanted)
            expected = predicted_gain(self.model, self._known_costs(), cell, rates, self.sizes.prompt_len, learnt)
            self.recorder.answer(batch, _predicted(wanted), expected / gain, own, plain.ms / expected, wrong)

    def _complaint(self, prompts: Sequence[list[int]]) -> str:
        """What is wrong with guesses, in deterministic mode, in which outputs are equal; "" where nothing is."""
        tokens = [self._run(prompts, with_draft, deterministic=True)[1] for with_draft in (True, False)]
        if tokens[0] == tokens[1]:
            return ""
        same = sum(ours == theirs for ours, theirs in zip(*tokens, strict=True))
        return f"deterministic outputs must be the same with a draft, got {same} of {len(prompts)}."

    def _run(
        self, prompts: Sequence[list[int]], with_draft: bool, deterministic: bool
    ) -> tuple[Engine, list[list[int]]]:
        """The engine that has run them, closed, and the tokens of each."""
        sizes = self.sizes
        engine = Engine(
            self.model,
            policy="lockstep",
            deterministic=deterministic,
            costs=self._known_costs(),
            batch=len(prompts),
            max_context_len=sizes.prompt_len + sizes.output_len,
        )
        params = SamplingParams(max_tokens=sizes.output_len, ignore_eos=True)
        draft = self.draft if with_draft else None
        ids = [engine.add_request(prompt, params, draft=draft) for prompt in prompts]
        tokens = {output.request_id: output.token_ids for output in engine.run()}
        engine.close()
        return engine, [tokens[request_id] for request_id in ids]

    def _known_costs(self) -> StepCosts:
        if self._costs is None:
            sizes = self.sizes
            self._costs = measure_step_costs(
                self.model,
                "this device",
                num_rows=3 * max(sizes.batches),  # of a verification
                prompt_len=sizes.prompt_len,
                context_len=sizes.context_len,
                prefill_tokens=max(sizes.batches) * sizes.prompt_len,
                num_rounds=sizes.num_rounds,
            )
        return self._costs


def _gain(wanted: float) -> str:
    return f"acceptance {wanted:g}, speed-up over no draft"


def _predicted(wanted: float) -> str:
    return f"acceptance {wanted:g}, predicted over measured speed-up"


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``drafts`` of `make gpu`."""
    return DraftBenchmark.run(Sizes(), TINY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
