"""A stream of requests of mixed depths: which share of the ideal speed-up the engine reaches, by policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.gpu import recorder
from bench.gpu.recorder import Benchmark, Group, Question, Recorder
from bench.gpu.workloads import FULL
from bench.serving import check, draw_jobs, measure_stream
from dynskip.causal_lm import CausalLM
from dynskip.measure.calibration import add_stream_costs, measure_step_costs
from dynskip.measure.device import Device
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.timing import Samples
from dynskip.simulation.workload import PAPER_MIX, Workload, parse_mix

_LOCKSTEP, _COHORT = "lockstep", "cohort"


@dataclass(frozen=True)
class Sizes(recorder.Sizes):
    """What is measured."""

    num_requests: int = 8192
    batch: int = 128
    prompt_len: int = 32
    mean_output: float = 16.0
    prefill_tokens: int = 4096
    mix: str = PAPER_MIX
    context_len: int = 512
    num_rounds: int = 5

    @property
    def note(self) -> str:
        """The stream in words."""
        return (
            f"{self.num_requests} requests of {self.prompt_len} tokens, outputs geometric with mean "
            f"{self.mean_output:g}, depths {self.mix}, pool {4 * self.batch} for cohort."
        )


TINY = Sizes("tiny", 128, 12, 3, 4, 3.0, 16, "uniform:1=3,uniform:2,full", 8, 2)


class ServingBenchmark(Benchmark):
    """All questions about a stream, on one model."""

    name = "serving"

    def __init__(self, recorder: Recorder, device: Device, sizes: Sizes, timed: str) -> None:
        super().__init__(recorder, device, sizes, timed)
        config = hf_config(sizes.shape, sizes.vocab_size)
        hf_model = random_hf_model(config, dtype=recorder.dtype, device=device.device)
        self.model = CausalLM.from_hf(hf_model, backend=timed, pack=False)
        recorder.note(f"backend {self.model.backend.name}")

    @classmethod
    def asked(cls, sizes: Sizes, section: str) -> Iterator[Group]:
        """All questions, which are answered together."""
        found = []
        for name in (_LOCKSTEP, _COHORT):
            found.append(Question(sizes.batch, f"{name}, decode, speed-up over full depth"))
            found.append(Question(sizes.batch, f"{name}, with prefill, speed-up over full depth"))
        found += [
            Question(sizes.batch, _share("decode"), 0.88),
            Question(sizes.batch, _share("with prefill"), 0.85),
            Question(sizes.batch, f"{_COHORT}, decode, speed-up over lockstep"),
            Question(sizes.batch, f"{_COHORT}, predicted over measured tokens/s"),
        ]
        yield found, cls._measure, ()

    def _measure(self) -> None:
        sizes, model = self.sizes, self.model
        costs = measure_step_costs(
            model,
            "this device",
            num_rows=sizes.batch,
            prompt_len=sizes.prompt_len,
            context_len=sizes.context_len,
            prefill_tokens=sizes.prefill_tokens,
            num_rounds=sizes.num_rounds,
        )
        batches = (sizes.batch // 2, sizes.batch)
        costs = add_stream_costs(model, costs, batches, sizes.prompt_len, sizes.prefill_tokens)
        workload = Workload(
            sizes.num_requests, parse_mix(sizes.mix, model.num_layers), sizes.prompt_len, sizes.mean_output
        )
        generator = torch.Generator().manual_seed(0)
        shape = (sizes.num_requests, sizes.prompt_len)
        prompts: list[list[int]] = torch.randint(3, sizes.vocab_size, shape, generator=generator).tolist()
        jobs = draw_jobs(workload, prompts)
        self.recorder.note(check(model, jobs[:8], costs))
        lines = {line["name"]: line for line in measure_stream(model, jobs, costs, sizes.batch, sizes.prefill_tokens)}
        decode = {name: Samples([[1e3 * line["decode_s"]]]) for name, line in lines.items()}
        busy = {name: Samples([[1e3 * (line["decode_s"] + line["prefill_s"])]]) for name, line in lines.items()}
        answer, batch = self.recorder.answer, sizes.batch
        for name in (_LOCKSTEP, _COHORT):
            line = lines[name]
            answer(batch, f"{name}, decode, speed-up over full depth", line["decode_gain"], decode[name], decode[FULL])
            answer(batch, f"{name}, with prefill, speed-up over full depth", line["gain"], busy[name], busy[FULL])
        line = lines[_COHORT]
        ideal = line["decode_gain"] / line["ideal_decode"]
        answer(batch, _share("decode"), ideal, decode[_COHORT], decode[FULL].ms / line["ideal_decode"])
        ideal = line["gain"] / line["ideal_all"]
        answer(batch, _share("with prefill"), ideal, busy[_COHORT], busy[FULL].ms / line["ideal_all"])
        self.recorder.speedup(batch, f"{_COHORT}, decode, speed-up over lockstep", decode[_COHORT], decode[_LOCKSTEP])
        predicted = line["predicted_tokens_per_s"] / line["tokens_per_s"]
        predicted_ms = busy[_COHORT].ms / predicted
        answer(batch, f"{_COHORT}, predicted over measured tokens/s", predicted, busy[_COHORT], predicted_ms)


def _share(what: str) -> str:
    return f"{_COHORT}, {what}, share of the ideal speed-up"


def main(argv: Sequence[str] | None = None) -> int:
    """The part ``serving`` of `make gpu`."""
    return ServingBenchmark.run(Sizes(), TINY, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
