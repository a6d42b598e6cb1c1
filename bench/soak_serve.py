"""Runs `dynskip serve` under random requests of all kinds for a while: is memory flat, is any request lost?

make soak-serve                                    20 minutes with opt-mini, then bench/results/soak/serve.md and .json
python -m bench.soak_serve --minutes 2 --out /tmp  two minutes, results elsewhere

A fifth of the clients go away at some moment, others send what must be refused; the queue is short, so that many are
told to come again; once the server is stopped for some seconds. Answers are compared with the library's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.serve.asks import MAX_LEN, Asks, library_answer
from bench.serve.client import Client
from bench.serve.process import ServerProcess
from bench.serve.soak_clients import Ledger, SoakClient
from bench.serve.soak_report import LEAST_SAMPLES, Sample, Soaked, page
from bench.soak import show_line
from dynskip.cli.options import in_range
from dynskip.engine.engine import Engine
from dynskip.llm import LLM
from dynskip.measure.machine import describe

ROOT = Path(__file__).resolve().parents[1]
_NAME = "soaked"
_IDLE_S = 60.0  # in which a server without clients must have ended all that they asked for
_CHUNK = 32  # tokens of a prompt that run together: in the deterministic mode whole chunks are shared
_PAUSE_AT, _PAUSE_S = 0.5, 8.0
_NUM_CHECKED = 128
# What a sample has of the server's metrics.
_METRICS = {
    "num_running": "vllm:num_requests_running",
    "num_waiting": "vllm:num_requests_waiting",
    "kv_share": "vllm:kv_cache_usage_perc",
    "num_tokens": "vllm:generation_tokens_total",
    "num_preempted": "vllm:num_preemptions_total",
    "num_aborted": "dynskip_num_aborted_total",
    "num_shared_tokens": "dynskip_num_shared_tokens_total",
}


class Soak:
    """Clients of a server, and somebody who looks at it meanwhile."""

    def __init__(self, server: ServerProcess, asks: Sequence[Asks], seed: int) -> None:
        self.server = server
        self.ledger = Ledger(random.Random(f"{seed} ledger"))
        self.clients = [SoakClient(server.host, server.port, each, self.ledger) for each in asks]
        self.samples: list[Sample] = []
        self.left: dict[str, float] = {}

    async def run(self, seconds: float, interval_s: float) -> None:
        """Serve for so long, then wait until nothing is left."""
        self._begin_s = time.monotonic()
        end_s = self._begin_s + seconds
        watching = asyncio.ensure_future(self._watch(interval_s))
        pausing = asyncio.ensure_future(self._pause(seconds * _PAUSE_AT))
        try:
            await asyncio.gather(*(client.run(end_s) for client in self.clients), pausing)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        if not watching.cancelled():
            watching.result()  # the server no longer told its metrics
        await self._until_idle()

    async def _watch(self, interval_s: float) -> None:
        client = Client(self.server.host, self.server.port)
        while True:
            now_s = time.monotonic() - self._begin_s
            cpu_s, rss_bytes = self.server.cpu_s(), self.server.rss_bytes()
            values = await metrics_of(client)
            told = {name: values.get(metric, 0.0) for name, metric in _METRICS.items()}  # before the first: none
            self.samples.append(Sample(now_s, cpu_s, rss_bytes, **told))
            ended = ", ".join(f"{name} {count}" for name, count in self.ledger.ended.items())
            show_line(f"{now_s:.0f} s, {rss_bytes / 2**20:.0f} MiB, {ended}, lost {len(self.ledger.lost)}")
            await asyncio.sleep(max(0.0, interval_s - (time.monotonic() - self._begin_s - now_s)))

    async def _pause(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.server.pause()
        try:
            await asyncio.sleep(_PAUSE_S)
        finally:
            self.server.resume()

    async def _until_idle(self) -> None:
        client = Client(self.server.host, self.server.port)
        deadline_s = time.monotonic() + _IDLE_S
        names = (*(_METRICS[name] for name in ("num_running", "num_waiting", "kv_share")), "dynskip_num_held")
        while True:
            values = await metrics_of(client)
            self.left = {name: values[name] for name in names}
            if not any(self.left.values()) or time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.5)
        client.close()


async def metrics_of(client: Client) -> dict[str, float]:
    """The server's metrics without labels, those of one name added up."""
    page = (await client.get("/metrics")).body.decode()
    found: dict[str, float] = {}
    for line in page.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def errors_in(log: str) -> list[str]:
    """The lines of the server's log that tell of a fault, and the last one of each traceback."""
    lines = log.splitlines()
    return [line for line in lines if " ERROR " in line or line.startswith("Traceback")][:10]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the results, and return 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=in_range(0.1, 1e5), default=20.0)
    parser.add_argument("--interval", type=in_range(0.1, 1e5), default=3.0, help="seconds between samples (default: 3)")
    parser.add_argument("--model", default="opt-mini", help="whatever dynskip serve takes (default: opt-mini)")
    parser.add_argument("--clients", type=in_range(1, 1000), default=64)
    parser.add_argument("--batch", type=in_range(1, 2**16), default=8)
    parser.add_argument("--max-queue", type=in_range(0, 10**6), default=8)
    parser.add_argument("--kv-tokens", type=in_range(MAX_LEN, 10**9), default=640, help="at full depth (default: 640)")
    parser.add_argument("--threads", type=in_range(1, 1024), default=1, help="of the server (default: 1)")
    parser.add_argument("--seed", type=in_range(0, 2**62), default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "soak")
    options = parser.parse_args(arguments)
    if 60 * options.minutes < LEAST_SAMPLES * options.interval:
        parser.error(
            f"minutes and interval must give at least {LEAST_SAMPLES} samples, got {options.minutes:g} and "
            f"{options.interval:g}"
        )
    torch.set_num_threads(1)
    llm = LLM(options.model, deterministic=True)
    num_layers = llm.model.num_layers
    budgets = tuple(sorted({max(1, num_layers * part // 24) for part in (4, 8, 12)}))
    kv_bytes = options.kv_tokens * num_layers * llm.model.kv_entry_bytes
    described = describe()
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "paths.txt"
        paths.write_text("".join(f"uniform:{budget}\n" for budget in budgets), encoding="utf-8")

        def command(port: int) -> list[str]:
            given = {"--port": port, "--paths": paths, "--threads": options.threads, "--batch": options.batch}
            given |= {"--max-queue": options.max_queue, "--kv-bytes": kv_bytes, "--max-model-len": MAX_LEN}
            given |= {"--served-model-name": _NAME, "--max-prefill-tokens": _CHUNK}
            words = [str(word) for pair in given.items() for word in pair]
            return [sys.executable, "-m", "dynskip", "serve", options.model, "--deterministic", *words]

        vocab_size = llm.model.decoder_config.vocab_size
        seeds = [f"{options.seed} {number}" for number in range(options.clients)]
        asks = [Asks(_NAME, num_layers, vocab_size, budgets, seed) for seed in seeds]
        with ServerProcess("dynskip serve", command, Path(folder) / "log") as server:
            server.wait_until_ready()
            soak = Soak(server, asks, options.seed)
            asyncio.run(soak.run(60 * options.minutes, options.interval))
            status = server.end()
            log = server.log.read_text(encoding="utf-8")
    ledger = soak.ledger
    checked = ledger.draw.sample(ledger.kept, min(_NUM_CHECKED, len(ledger.kept)))
    unequal = []
    engine = Engine(llm.model, policy="lockstep", batch=4, max_prefill_tokens=_CHUNK, tokenizer=llm.tokenizer)
    for ask, told in checked:
        expected = library_answer(llm, engine, ask)
        if told != expected:
            unequal.append(f"{', '.join(ask.kinds)}: {json.dumps(ask.body)} gave {told}, alone {expected}")
    named = ("minutes", "clients", "batch", "max_queue", "threads", "seed", "model")
    run = Soaked(
        conditions={**{name: getattr(options, name) for name in named}, **described, "kv_mib": kv_bytes / 2**20},
        samples=soak.samples,
        outcomes=dict(ledger.ended),
        num_sent=ledger.num_sent,
        num_retries=ledger.num_retries,
        num_tokens=ledger.num_tokens,
        refused=dict(ledger.refused),
        answered_kinds=dict(ledger.seen),
        checked_kinds=dict(Counter(kind for ask, _ in checked for kind in ask.kinds)),
        num_checked=len(checked),
        lost=ledger.lost,
        unequal=unequal,
        left=soak.left,
        paused_s=_PAUSE_S,
        exit_status=status,
        log_errors=errors_in(log),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serve.json").write_text(json.dumps(run.line(), indent=1) + "\n", encoding="utf-8")
    text = page(run)
    (options.out / "serve.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if run.verdict() else 0


if __name__ == "__main__":
    sys.exit(main())
