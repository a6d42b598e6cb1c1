"""Two replicas of one thread each behind one address: requests placed by path and prefix, and one after the other.

python -m bench.serving_ray                      OPT-1.3B's shapes, random weights: some minutes on two cores
python -m bench.serving_ray --shape opt-125m --rounds 1 --requests 32 --out /tmp

Writes bench/results/ray/serving.md and .jsonl. `dynskip calibrate --threads 1` comes first: the schedule stands on what
it has measured. Answers are streamed. The clients run on the same cores; what they took is said.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.serve.load import Call, Spent, arrive, burst, waits
from dynskip.async_llm import AsyncLLM
from dynskip.causal_lm import CausalLM
from dynskip.llm import LLM
from dynskip.measure.machine import describe
from dynskip.measure.random_models import hf_config, random_hf_model
from dynskip.paths import LayerPath
from dynskip.scheduler.placement import Choose, place
from dynskip.serving.depths import DepthTable
from dynskip.serving.replicas.cluster import deployed
from dynskip.serving.replicas.options import FrontOptions, ReplicaOptions
from dynskip.serving.server import bind
from dynskip.serving.service import Service
from dynskip.simulation.workload import PAPER_MIX, Request, Workload, parse_mix

ROOT = Path(__file__).resolve().parents[1]
NUM_REPLICAS, BATCH, NUM_PREFIXES = 2, 16, 8
LOAD = 0.8  # of a Poisson stream: of the requests/s at which the slower rule served the first queue
HEADINGS = (
    "rule",
    "arrival",
    "tokens/s",
    "ms to the first token p50/p90/p99",
    "ms a token p50/p90/p99",
    "rows",
    "paths",
    "union",
    "full, by replica",
)


def open_random(shape: str, num_threads: int) -> Service:
    """What a replica begins with: a model of that shape with random weights."""
    import torch

    torch.set_num_threads(num_threads)
    llm = LLM(CausalLM.from_hf(random_hf_model(hf_config(shape))), None)
    return Service(AsyncLLM(llm, batch=BATCH), DepthTable(llm.model, shape), 10_000)


class RoundRobin:
    """Replica after replica, as `place` is called."""

    def __init__(self) -> None:
        self._num_placed = 0

    def __call__(self, held: Mapping[str, Mapping[LayerPath, int]], path: LayerPath, prefix: str, batch: int) -> str:
        """The next."""
        self._num_placed += 1
        return sorted(held)[self._num_placed % len(held)]


RULES: dict[str, Choose] = {"round robin": RoundRobin(), "path and prefix": place}


@dataclass(frozen=True)
class Replicas:
    """Two replicas behind an address, and the processes of Ray that this one has started."""

    port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """The address."""
        return f"http://{self.host}:{self.port}"

    def cpu_s(self) -> float:
        """Processor time of those processes."""
        times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
        return sum(each.user + each.system for each in times)


def calls_of(requests: Sequence[Request], vocab_size: int) -> list[Call]:
    """The requests as they are sent: each prompt with one of a few beginnings."""
    draw = random.Random(0)
    beginnings = [[draw.randrange(5, vocab_size) for _ in range(16)] for _ in range(NUM_PREFIXES)]
    return [
        Call(
            {
                "prompt": [
                    *draw.choice(beginnings),
                    *(draw.randrange(5, vocab_size) for _ in range(request.num_prompt - 16)),
                ],
                "max_tokens": request.num_output,
                "temperature": 0,
                "ignore_eos": True,
                "path": f"layers:{','.join(map(str, request.path.layers))}",
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            request.arrival_s,
        )
        for request in requests
    ]


def values(url: str, name: str, **labels: str) -> dict[str, float]:
    """A metric by replica."""
    page = httpx2.get(f"{url}/metrics", timeout=60).text
    samples = [sample for each in text_string_to_metric_families(page) for sample in each.samples]
    return {
        each.labels["replica"]: each.value
        for each in samples
        if each.name == name and labels.items() <= each.labels.items()
    }


def measure(shape: str, rule: str, requests: Sequence[Request], vocab_size: int) -> dict[str, Any]:
    """One stream under one rule, by replicas that have just begun and are warm."""
    with bind("127.0.0.1", 0) as bound:
        served = Replicas(bound.getsockname()[1])
    replicas, front = ReplicaOptions(NUM_REPLICAS, 1), FrontOptions(BATCH, choose=RULES[rule])
    with deployed(partial(open_random, shape), replicas, front, port=served.port) as handle:
        handle.ready.remote().result()
        warm = [Request(0.0, path, 32, 2) for path in Counter(each.path for each in requests) for _ in range(4)]
        burst(served, calls_of(warm, vocab_size))
        calls = calls_of(requests, vocab_size)
        spent: Spent = (arrive if requests[-1].arrival_s else burst)(served, calls)
        of = {name: values(served.url, f"dynskip_{name}") for name in ("rows", "paths", "union")}
        num_steps = values(served.url, "dynskip_num_decode_steps_total")
        full = str(requests[0].path.num_layers)
        return {
            "rule": rule,
            "tokens_per_s": sum(each.num_output for each in requests) / spent.seconds,
            **spent.line(),
            **waits(calls),
            "num_decode_steps": num_steps,
            **{name: sum(each[r] * num_steps[r] for r in each) / sum(num_steps.values()) for name, each in of.items()},
            "full_by_replica": values(served.url, "dynskip_depth_requests_total", layers=full),
        }


def row(lines: Sequence[dict[str, Any]]) -> str:
    """The rounds of one rule and arrival, by their medians."""
    first = lines[0]
    tokens = [line["tokens_per_s"] for line in lines]
    latency = [
        "/".join(f"{median(values):.0f}" for values in zip(*(line[name] for line in lines), strict=True))
        for name in ("ttft_ms", "tpot_ms")
    ]
    means = [f"{mean(line[name] for line in lines):.2f}" for name in ("rows", "paths", "union")]
    full = ", ".join("/".join(f"{n:.0f}" for n in sorted(line["full_by_replica"].values())) for line in lines)
    shown = f"{median(tokens):.1f} ({min(tokens):.1f} to {max(tokens):.1f})"
    return f"| {' | '.join((first['rule'], first['arrival'], shown, *latency, *means, full))} |"


def page(shape: str, lines: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> str:
    """All of it, as one table and its conditions."""
    kinds = dict.fromkeys((line["arrival"], line["rule"]) for line in lines)
    rows = [row([line for line in lines if (line["arrival"], line["rule"]) == kind]) for kind in kinds]
    cpu = mean(line["client_cpu"] for line in lines)
    num_rounds = len(lines) // len(kinds)
    text = f"""# Two replicas on Ray Serve: measured

Written by `python -m bench.serving_ray {facts["arguments"]}`.
{shape} with random weights in bfloat16, {NUM_REPLICAS} replicas of one thread, batch {BATCH}, policy `cohort`.
{lines[0]["num_requests"]} requests a stream, 74/18/6/2 % of them along uniform:4, 8, 12 and all layers,
prompts of 32 tokens with one of {NUM_PREFIXES} beginnings of 16, outputs geometric with a mean of 16, streamed.
`queue`: all are there at the beginning; else a Poisson stream, at {LOAD:.0%} of what the slower rule served
of the first queue unless the rate was given. Rules take turns, {num_rounds} rounds, medians (lowest to highest).
Means of rows, paths and union are over decode steps, with those of the warm-up.
*Full, by replica*: where the requests of all layers went in each round, with those of the warm-up.

Ray's proxy, front and daemons and the clients run on the same {facts["num_cores"]} cores; the clients took {cpu:.0%} of
one. {facts["cpu"]}, dynskip {facts["versions"]["dynskip"]}, torch {facts["versions"]["torch"]}, {facts["date"]}, commit
{facts["commit"]}, load before {facts["load"][0]}.

| {" | ".join(HEADINGS)} |
{"|---" * len(HEADINGS)}|
"""
    return text + "\n".join(rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="opt-1.3b", help="as in dynskip calibrate (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=192)
    parser.add_argument("--rate", type=float, help=f"requests/s of the Poisson stream (default: a load of {LOAD:g})")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ray")
    args = parser.parse_args(argv)
    asked = [f"--shape {args.shape} --rounds {args.rounds} --requests {args.requests}"]
    asked += [] if args.rate is None else [f"--rate {args.rate:g}"]
    facts = {**describe(), "arguments": " ".join(asked)}
    config = hf_config(args.shape)
    mix = parse_mix(PAPER_MIX, config.num_hidden_layers)
    lines = []
    rate = args.rate
    for turn in range(args.rounds):
        for is_queue in (True, False):
            if rate is None and not is_queue:  # the first queue has been served
                rate = LOAD * min(args.requests / line["seconds"] for line in lines)
            requests = Workload(args.requests, mix, rate=None if is_queue else rate).draw(turn)
            arrival = "queue" if is_queue else f"{rate:.1f}/s"
            for rule in list(RULES)[:: 1 if turn % 2 else -1]:
                found = measure(args.shape, rule, requests, config.vocab_size)
                lines.append({"arrival": arrival, "round": turn, "num_requests": args.requests, **found, **facts})
                print(json.dumps(lines[-1]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "serving.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    (args.out / "serving.md").write_text(page(args.shape, lines, facts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
