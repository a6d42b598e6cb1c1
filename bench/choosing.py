"""What drawing tokens costs a step of an engine, over greedy ones: by vocabulary and by what is asked of a draw.

python -m bench.choosing                                   some minutes; to bench/results/choosing/<machine>.jsonl
python -m bench.choosing --shapes opt-mini --rounds 3 --out rehearsal

Closed batches of one prompt each run in turns; a sample is the median time of a run's decode steps. Random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dynskip import CausalLM, SamplingParams
from dynskip.engine.engine import Engine
from dynskip.evaluation.stats.intervals import bootstrap
from dynskip.measure.machine import describe
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.measure.timing import interleave
from dynskip.models.registry import read_decoder_config

OUT = Path(__file__).resolve().parent / "results" / "choosing"
# 4,096, 49,152, 50,272 and 128,256 words.
SHAPES = ("opt-mini", "smollm2-135m", "opt-1.3b", "llama-3.2-1b")
GREEDY = "greedy"
DRAWS: dict[str, dict[str, Any]] = {
    GREEDY: {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_p 0.9, repetition penalty": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1},
}
TARGET = 0.05
_PROMPT_LEN = 16


def step_ms(model: CausalLM, params: SamplingParams, prompts: list[list[int]]) -> float:
    """The median milliseconds of a decode step of all ``prompts`` together."""
    engine = Engine(model, policy="lockstep", batch=len(prompts), max_context_len=_PROMPT_LEN + params.max_tokens + 1)
    for prompt in prompts:
        engine.add_request(prompt, params)
    engine.step()
    samples = []
    for _ in range(params.max_tokens - 2):
        before = engine.tally.decode_s
        engine.step()
        samples.append(1e3 * (engine.tally.decode_s - before))
    engine.close()
    return median(samples)


def measure(shape: str, batch: int, num_tokens: int, num_rounds: int) -> list[dict[str, Any]]:
    """A row for each of `DRAWS` but the greedy one: milliseconds of both, and the cost with its 95 % interval."""
    config = read_decoder_config(shape)
    model = CausalLM.from_hf(random_hf_model(hf_config(config), dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(3, config.vocab_size, (batch, _PROMPT_LEN), generator=generator).tolist()
    found: dict[str, list[float]] = {name: [] for name in DRAWS}

    def run(name: str) -> None:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=1, **DRAWS[name])
        found[name].append(step_ms(model, params, prompts))

    # The first call of each is no sample: it warms up.
    interleave({name: lambda name=name: run(name) for name in DRAWS}, num_rounds)
    rows = []
    for name in (name for name in DRAWS if name != GREEDY):
        ours, greedy = found[name][1:], found[GREEDY][1:]
        costs = [mine / other - 1 for mine, other in zip(ours, greedy, strict=True)]
        interval = bootstrap(np.median, np.array(costs))
        rows.append(
            {
                "shape": shape,
                "vocab_size": config.vocab_size,
                "batch": batch,
                "draw": name,
                "ms": round(median(ours), 3),
                "greedy_ms": round(median(greedy), 3),
                "cost": round(median(costs), 4),
                "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
                "rounds": num_rounds,
                "target": TARGET,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, append and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24, help="of each output (default: 24)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    args = parser.parse_args(argv)
    described = describe()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{described['machine']}.jsonl"
    print(f"{'shape':<16}{'words':>8}  {'draw':<30}{'ms':>8}{'greedy':>8}  cost")
    for shape in args.shapes:
        for row in measure(shape, args.batch, args.tokens, args.rounds):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "conditions": described}) + "\n")
            low, high = row["interval"]
            cost = f"{row['cost']:+.1%} [{low:+.1%}, {high:+.1%}]"
            times = f"{row['ms']:>8.2f}{row['greedy_ms']:>8.2f}"
            met = "met" if row["cost"] <= TARGET else "MISSED"
            print(f"{shape:<16}{row['vocab_size']:>8}  {row['draw']:<30}{times}  {cost} {met}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
