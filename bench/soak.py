"""Runs a stream of random requests for a while, and looks whether memory grows or throughput drifts.

python bench/soak.py                          20 minutes with opt-mini, then bench/results/soak/soak.md and .jsonl
python bench/soak.py --minutes 1 --out /tmp   a minute, results elsewhere
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import psutil
import torch
from torch import Tensor

from dynskip.assets import opt_mini_directory
from dynskip.causal_lm import CausalLM
from dynskip.cli.options import in_range
from dynskip.controllers import TokenContext
from dynskip.costs.defaults import default_costs
from dynskip.engine.engine import Engine
from dynskip.engine.request import RequestOutput
from dynskip.measure.machine import describe
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.scheduler.policies.make import POLICIES

ROOT = Path(__file__).resolve().parents[1]
# What comes before this share of the time has passed warms caches and fills the pool.
_WARM_UP = 0.15
# Memory may differ by so much from the first quarter after that to the last: an allocator's noise.
_RSS_SHARE = 0.02
# Blocks of neighbouring samples that throughput is averaged over: each is a draw, nearly independent of the next.
_NUM_BLOCKS = 12
_LEAST_SAMPLES = 8
# Tokens that prompts have in common, and of a chunk: in the deterministic mode whole chunks are shared.
_PREFIX = 64
# Of so many requests one is run again alone when the time is up.
_CHECK_EVERY = 97
_MAX_CHECKED = 64


# What a sample has of the engine's stats, by the same names.
_COUNTS = ("kv_bytes", "num_waiting", "num_running", "num_finished", "num_aborted", "num_shared_tokens")


@dataclass(frozen=True)
class Ask:
    """The arguments of one request."""

    prompt: list[int]
    params: SamplingParams
    path: LayerPath | TokenGate
    kv_policy: str | None


class TokenGate:
    """A per-token controller: rows run a layer by the sign of one of their own values."""

    def active(self, layer: int, hidden_states: Tensor, context: TokenContext) -> Tensor:
        """[N], bool: True in the first layer, and where the value is positive."""
        return (hidden_states[:, layer] > 0) | (layer == 0)


@dataclass(frozen=True)
class Sample:
    """What is seen at one time; counts are those since the beginning, tokens_per_s and tokens_per_cpu_s since the last.

    cpu_s: processor time of this process, which other work on the machine takes no part of.
    """

    seconds: float
    cpu_s: float
    rss_bytes: int
    kv_bytes: int
    num_tokens: int
    tokens_per_s: float
    tokens_per_cpu_s: float
    num_waiting: int
    num_running: int
    num_finished: int
    num_aborted: int
    num_preempted: int
    num_shared_tokens: int


@dataclass
class Requests:
    """Random requests for a model: most along one of a few paths, some with a controller; some prompts begin alike."""

    model: CausalLM
    seed: int
    max_context_len: int
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        num_layers = self.model.num_layers
        self.paths = [LayerPath.uniform(num_layers, max(1, num_layers * share // 24)) for share in (4, 8, 12, 24)]
        self.weights = [74, 18, 6, 2]
        self.gates = [TokenGate() for _ in range(2)]
        self.prefixes = [self._tokens(_PREFIX) for _ in range(8)]

    def next(self) -> Ask:
        """Another request."""
        draw = self.draw
        prompt = self._tokens(draw.randint(1, 48))
        if draw.random() < 0.3:
            prompt = draw.choice(self.prefixes) + prompt
        max_tokens = min(1 + int(draw.expovariate(1 / 24)), self.max_context_len - len(prompt))
        temperature = draw.choice([0.0, 0.8])
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            n=draw.choice([1] * 8 + [2, 3]),
            seed=draw.randrange(2**31),
            logprobs=draw.choice([None, None, 2]),
            ignore_eos=draw.random() < 0.5,
        )
        if draw.random() < 0.1:
            return Ask(prompt, params, draw.choice(self.gates), draw.choice(["propagate", "evict", "share"]))
        return Ask(prompt, params, draw.choices(self.paths, self.weights)[0], None)

    def _tokens(self, count: int) -> list[int]:
        return [self.draw.randrange(4, self.model.decoder_config.vocab_size) for _ in range(count)]


class Soak:
    """An engine under a stream that never dries up: requests come in bursts, some are aborted at some time."""

    def __init__(self, model: CausalLM, options: dict[str, Any], max_context_len: int, seed: int) -> None:
        fixed = {"max_context_len": max_context_len, "max_prefill_tokens": _PREFIX, "deterministic": True}
        self.options = {**options, **fixed}
        self.engine = Engine(model, **self.options)
        self.requests = Requests(model, seed, max_context_len)
        self.draw = random.Random(seed + 1)
        self.most = 4 * self.engine.scheduler.policy.pool
        self.present: dict[Hashable, Ask] = {}
        self.checked: list[tuple[Ask, RequestOutput]] = []
        self.samples: list[Sample] = []
        self.num_outputs = 0

    def run(self, seconds: float, interval_s: float, log: Path) -> None:
        """Serve for so long, then let everything end; a line for each sample goes to ``log`` as it is taken."""
        process, begin_s = psutil.Process(), time.monotonic()
        with log.open("w", encoding="utf-8") as lines:
            while (now_s := time.monotonic() - begin_s) < seconds:
                self._turn()
                last = self.samples[-1] if self.samples else None
                if now_s - (last.seconds if last else 0.0) >= interval_s:
                    self.samples.append(self._sample(now_s, last, process))
                    lines.write(json.dumps(asdict(self.samples[-1])) + "\n")
                    lines.flush()
                    show_line(f"{now_s:.0f} s of {seconds:.0f}: {self.engine.stats()}")
        for output in self.engine.run():
            self._ended(output)

    def mismatches(self) -> list[Hashable]:
        """The ids of requests, of those remembered, that become something else alone."""
        alone = Engine(self.engine.model, **{**self.options, "kv_bytes": None})
        wrong = []
        for ask, output in self.checked:
            alone.add_request(ask.prompt, ask.params, ask.path, kv_policy=ask.kv_policy)
            (expected,) = alone.run()
            if output.samples != expected.samples:
                wrong.append(output.request_id)
        alone.close()
        return wrong

    def _turn(self) -> None:
        engine, draw = self.engine, self.draw
        if len(self.present) < self.most and draw.random() < 0.1:
            for _ in range(draw.randint(1, self.most - len(self.present))):
                ask = self.requests.next()
                self.present[engine.add_request(ask.prompt, ask.params, ask.path, kv_policy=ask.kv_policy)] = ask
        if self.present and draw.random() < 0.03:
            # Those that have come first may run, those that have come last wait.
            request_id = list(self.present)[int(len(self.present) * draw.random() ** 2)]
            del self.present[request_id]
            engine.abort(request_id)
        for output in engine.step():
            self._ended(output)

    def _ended(self, output: RequestOutput) -> None:
        if output.error is not None:
            raise output.error
        ask = self.present.pop(output.request_id)
        self.num_outputs += 1
        if self.num_outputs % _CHECK_EVERY == 1 and len(self.checked) < _MAX_CHECKED:
            self.checked.append((ask, output))

    def _sample(self, now_s: float, last: Sample | None, process: psutil.Process) -> Sample:
        stats = self.engine.stats()
        num_tokens = self.engine.tally.num_tokens
        times = process.cpu_times()
        cpu_s = times.user + times.system
        num_new = num_tokens - (last.num_tokens if last else 0)
        return Sample(
            seconds=now_s,
            cpu_s=cpu_s,
            rss_bytes=process.memory_info().rss,
            num_tokens=num_tokens,
            tokens_per_s=num_new / (now_s - (last.seconds if last else 0.0)),
            tokens_per_cpu_s=num_new / (cpu_s - (last.cpu_s if last else 0.0)),
            num_preempted=stats.outcome.num_preempted,
            **{name: getattr(stats, name) for name in _COUNTS},
        )


@dataclass(frozen=True)
class Drift:
    """How a quantity changed from the first third of some samples to the last.

    change: as a share of the mean. noise: what two such thirds differ by without any drift, twice its standard error.
    """

    change: float
    noise: float

    @staticmethod
    def of(values: Sequence[float]) -> Drift:
        """The drift of ``values``, which were taken at regular intervals."""
        size = max(1, len(values) // _NUM_BLOCKS)
        blocks = [mean(values[begin : begin + size]) for begin in range(0, len(values) - size + 1, size)]
        third = max(1, len(blocks) // 3)
        middle = mean(blocks)
        if not middle:
            return Drift(0.0, 0.0)
        # Differences of neighbours know nothing of a slow drift, so that it does not count as noise.
        steps = [later - earlier for earlier, later in pairwise(blocks)]
        spread = stdev(steps) / math.sqrt(2) if len(steps) > 1 else math.inf
        change = (mean(blocks[-third:]) - mean(blocks[:third])) / middle
        return Drift(change, 2 * spread * math.sqrt(2 / third) / middle)

    @property
    def is_noise(self) -> bool:
        """Whether no drift shows."""
        return abs(self.change) <= self.noise


def verdict(samples: Sequence[Sample], left_bytes: int, mismatches: Sequence[Hashable]) -> list[str]:
    """What is wrong, in words; nothing where memory is flat, throughput does not drift, and all outputs are right."""
    wrong = []
    warm = warmed_up(samples)
    rss, speed = rss_growth(warm), Drift.of([sample.tokens_per_cpu_s for sample in warm])
    if rss > _RSS_SHARE:
        wrong.append(f"resident memory grew by {rss:.1%}")
    if left_bytes:
        wrong.append(f"{left_bytes} bytes of keys and values are held by no sequence")
    if speed.change < 0 and not speed.is_noise:
        wrong.append(f"tokens per processor second fell by {-speed.change:.1%}, beyond the noise of {speed.noise:.1%}")
    if not samples or not samples[-1].num_preempted or not samples[-1].num_aborted:
        wrong.append("nothing was preempted, or nothing aborted: the run says little")
    if mismatches:
        wrong.append(f"other tokens than alone: requests {', '.join(map(str, mismatches))}")
    return wrong


def warmed_up(samples: Sequence[Sample]) -> list[Sample]:
    """The samples after the warm-up."""
    end_s = samples[-1].seconds if samples else 0.0
    return [sample for sample in samples if sample.seconds >= _WARM_UP * end_s]


def rss_growth(samples: Sequence[Sample]) -> float:
    """The mean of resident memory in the last quarter over that in the first, less one."""
    quarter = max(1, len(samples) // 4)
    first = mean(sample.rss_bytes for sample in samples[:quarter])
    return mean(sample.rss_bytes for sample in samples[-quarter:]) / first - 1


def page(samples: Sequence[Sample], conditions: dict[str, Any], wrong: Sequence[str], num_checked: int) -> str:
    """The results as Markdown."""
    warm = warmed_up(samples)
    speeds, last = [(s.tokens_per_s, s.tokens_per_cpu_s) for s in warm], samples[-1]
    wall, cpu = (Drift.of(values) for values in zip(*speeds, strict=True))
    rss = [sample.rss_bytes / 2**20 for sample in warm]
    kv = [sample.kv_bytes / 2**20 for sample in warm]
    quarters = [warm[len(warm) * i // 4 : len(warm) * (i + 1) // 4] for i in range(4)]
    rows = [
        ["tokens/s", *(f"{mean(s.tokens_per_s for s in part):.0f}" for part in quarters)],
        ["tokens per processor second", *(f"{mean(s.tokens_per_cpu_s for s in part):.0f}" for part in quarters)],
        ["preemptions", *(f"{part[-1].num_preempted - part[0].num_preempted:,}" for part in quarters)],
        ["resident memory, MiB", *(f"{mean(s.rss_bytes for s in part) / 2**20:.1f}" for part in quarters)],
        ["keys and values in use, MiB", *(f"{mean(s.kv_bytes for s in part) / 2**20:.2f}" for part in quarters)],
        ["running", *(f"{mean(s.num_running for s in part):.1f}" for part in quarters)],
        ["waiting", *(f"{mean(s.num_waiting for s in part):.1f}" for part in quarters)],
    ]
    headings = ["quarter of the time after the warm-up", "1", "2", "3", "4"]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *rows])
    return f"""# A stream of random requests, {conditions["minutes"]:g} minutes

Written by `make soak`. {conditions["cpu"]}, {conditions["num_cores"]} cores, threads: {conditions["num_threads"]}, \
torch {conditions["versions"]["torch"]}, commit {conditions["commit"]}, {conditions["date"]}; {conditions["model"]}, \
policy {conditions["policy"]}, batch {conditions["batch"]}, {conditions["kv_mib"]:.2f} MiB for keys and values, \
deterministic, seed {conditions["seed"]}. \
Requests come in bursts: 1 to 112 prompt tokens, a third of them with a prefix in common, outputs of 25 tokens in the \
mean, one to three for a prompt, 74/18/6/2 % along paths of a sixth, a third, half and all of the layers, a tenth with \
a controller for each token, half of them with a seed. {len(samples)} samples.

{table}

- {last.num_finished:,} sequences ended by themselves and {last.num_aborted:,} were aborted, with {last.num_tokens:,} \
tokens; {last.num_preempted:,} were preempted; {last.num_shared_tokens:,} prompt tokens were another sequence's.
- Resident memory: {min(rss):.1f} to {max(rss):.1f} MiB, {rss_growth(warm):+.2%} from the first quarter to the last \
(allowed: {_RSS_SHARE:.0%}). Keys and values: {min(kv):.2f} to {max(kv):.2f} MiB in use, and none once all had ended.
- Tokens per processor second: {cpu.change:+.1%} from the first third to the last, noise {cpu.noise:.1%}; per second \
of the clock, part of which goes to other work on the machine: {wall.change:+.1%}, noise {wall.noise:.1%}.
- {num_checked} of the requests were run again alone: the same tokens.
- Verdict: {"; ".join(wrong) if wrong else "flat memory, throughput does not fall beyond noise"}.
"""


def show_line(text: str) -> None:
    """Put ``text`` in place of the line before, where somebody looks."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the results, and return 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=in_range(0.01, 1e5), default=20.0)
    parser.add_argument(
        "--interval", type=in_range(0.01, 1e5), default=5.0, help="seconds between samples (default: 5)"
    )
    parser.add_argument("--model", default=None, help="a directory or hub id (default: opt-mini)")
    parser.add_argument("--policy", choices=POLICIES, default="cohort")
    parser.add_argument("--batch", type=in_range(1, 2**16), default=16)
    parser.add_argument(
        "--kv-tokens", type=in_range(1, 10**9), default=700, help="tokens at full depth that keys and values may take"
    )
    parser.add_argument("--max-context-len", type=in_range(1, 10**6), default=160)
    parser.add_argument("--seed", type=in_range(0, 2**62), default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1; others spin while they wait)")
    parser.add_argument("--name", default="soak", help="of the results (default: soak)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "soak")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    if 60 * options.minutes < _LEAST_SAMPLES * options.interval:
        parser.error(
            f"minutes and interval must give at least {_LEAST_SAMPLES} samples, got {options.minutes:g} and "
            f"{options.interval:g}"
        )

    model = CausalLM.from_pretrained(options.model or opt_mini_directory())
    kv_bytes = options.kv_tokens * model.num_layers * model.kv_entry_bytes
    engine_options = {"kv_bytes": kv_bytes, "policy": options.policy, "batch": options.batch}
    if options.policy == "cohort":
        engine_options["costs"] = default_costs(model)
    soak = Soak(model, engine_options, options.max_context_len, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    soak.run(60 * options.minutes, options.interval, options.out / f"{options.name}.jsonl")
    left_bytes = soak.engine.stats().kv_bytes
    if len(soak.samples) < _LEAST_SAMPLES:  # steps took longer than the interval
        parser.error(f"minutes and interval must give at least {_LEAST_SAMPLES} samples, got {len(soak.samples)}")
    wrong = verdict(soak.samples, left_bytes, soak.mismatches())
    conditions = {
        **{name: getattr(options, name) for name in ("minutes", "policy", "batch", "seed")},
        **describe(),
        "model": Path(options.model).name if options.model else "opt-mini",
        "kv_mib": kv_bytes / 2**20,
    }
    text = page(soak.samples, conditions, wrong, len(soak.checked))
    (options.out / f"{options.name}.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
