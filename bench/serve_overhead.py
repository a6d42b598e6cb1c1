"""What serving costs: a server beside `Engine` on the same requests, and how long clients wait under load.

python -m bench.serve_overhead                            every row that is not there yet; says first how long it takes
python -m bench.serve_overhead --only opt-1.3b --part overhead
python -m bench.serve_overhead --only smollm2 --part latency --server cohort
python -m bench.serve_overhead --only smollm2 --mix uniform:5=74,uniform:10=18,uniform:15=6,full=2 --out other
python -m bench.serve_overhead --rehearse --out rehearsal opt-mini for some seconds; its figures mean nothing

Overhead: engine and server are loaded at the same time, one is stopped while the other runs, and they take turns on the
same requests, all there at once. Capacity: bursts of the same requests through each server in turns, the others
stopped. Latency: requests arrive at random (Poisson), at a share of that, and at the greatest share of what slower
servers can. The client is this process. A run that was broken off goes on where it stopped. SmolLM2's depths are the
paths that it was trained along, those of other shapes are uniform.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy
import torch

from bench.peers.plan import vllm_command, vllm_env
from bench.peers.process import PeerProcess
from bench.peers.results import Results, Row, read
from bench.peers.weights import SMOLLM2_PATHS
from bench.peers.workload import MEAN_OUTPUT, STREAM_BATCH, STREAM_PROMPT_LEN, draw_prompts, paper_paths
from bench.serve.folders import REHEARSAL, served_folder
from bench.serve.load import Call, Spent, arrive, burst, waits
from bench.serve.page import page
from bench.serve.process import ServerError, ServerProcess
from dynskip.assets import find_adapter
from dynskip.evaluation.stats.intervals import bootstrap
from dynskip.measure.machine import describe
from dynskip.models.registry import read_decoder_config
from dynskip.paths import LayerPath
from dynskip.simulation.workload import Workload, parse_mix

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("overhead", "latency")
POLICIES, VLLM = ("cohort", "lockstep"), "vLLM"
LOADS = (25, 50, 80)  # percent of capacity
CAPACITY_TURNS = 3  # bursts of each server, in turns
# Of a burst: enough for some seconds.
REQUESTS = {"opt-1.3b": 256, SMOLLM2_PATHS: 1024}
# The paper's shares along the paths that a model was trained for; other shapes run its depths scaled to their layers.
_MIXES = {SMOLLM2_PATHS: "found:15=74,found:20=18,found:25=6,full=2"}
_DEPTHS = ("paper's depths", "full depth")
_MODES = ("whole answers", "streams")
_MAX_LEN = 256
_KV_TOKENS = 64 * 4 * STREAM_BATCH  # at full depth: more than as many as are resident hold in the mean
_WARM_UP = 0.1  # of the requests that arrive, those whose waits do not count
_NAME = "model"
# Roughly, to say how long a run takes: seconds to load, tokens/s at the paper's depths and at full depth.
_LOAD_S = {"opt-1.3b": 25.0, SMOLLM2_PATHS: 12.0}
_SPEEDS = {"opt-1.3b": (300.0, 80.0), SMOLLM2_PATHS: (800.0, 450.0)}
_VLLM_LOAD_S = 90.0
Ask = dict[str, Any]


class Measurement:
    """The rows of one shape. args: of the command line, with ``requests`` of this shape; mix: paths and shares."""

    def __init__(
        self, shape: str, args: argparse.Namespace, mix: tuple[tuple[LayerPath, float], ...], results: Results
    ) -> None:
        self.shape, self.args, self.mix, self.results = shape, args, mix, results
        self.folder = served_folder(args.models, shape)
        self.config = read_decoder_config(str(self.folder))
        self.kv_bytes = _KV_TOKENS * self.config.num_layers * self.config.kv_entry_size * torch.bfloat16.itemsize

    def overhead(self) -> None:
        """The server beside `Engine`, at each depth, whole and streamed."""
        rows = [f"overhead, {depth}, {mode}" for depth in _DEPTHS for mode in _MODES]
        if all(self.results.has(peer="server", what=row) for row in rows):
            return
        command = [sys.executable, "-m", "bench.peers.worker", "bench.serve.engine_peer:EnginePeer"]
        with (
            self._failure("server", rows),
            PeerProcess("engine", command, self._log("engine"), self._env) as engine,
            self._server(POLICIES[0]) as server,
        ):
            options = {"batch": STREAM_BATCH, "max_context_len": _MAX_LEN, "kv_bytes": self.kv_bytes}
            options["prefix_caching"] = False  # the same prompts come each turn
            loaded = engine.ask("load", folder=str(self.folder), **options)
            self.results.add({"peer": "Engine", "what": "load", **loaded})
            for depth in _DEPTHS:
                if not all(self.results.has(peer="server", what=f"overhead, {depth}, {mode}") for mode in _MODES):
                    self._take_turns(depth, engine, server)

    def _take_turns(self, depth: str, engine: PeerProcess, server: ServerProcess) -> None:
        num_requests = self.args.requests if depth == _DEPTHS[0] else max(1, self.args.requests // 4)
        asks = self._draw(num_requests, depth == _DEPTHS[0])
        names = ("engine", *_MODES)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        spent: dict[str, list[dict[str, float]]] = {name: [] for name in _MODES}
        for turn in range(-1, self.args.rounds):  # the first does not count
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                if name == "engine":
                    seconds[name].append(engine.ask("serve", requests=asks))
                    continue
                calls = [self._call(ask, streams=name == "streams") for ask in asks]
                server.resume()
                try:
                    took = burst(server, calls)
                finally:
                    server.pause()
                seconds[name].append(took.seconds)
                spent[name].append(took.line())
        num_tokens = sum(ask["max_tokens"] for ask in asks) * self.args.rounds
        for mode in _MODES:
            pairs = numpy.array([seconds["engine"][1:], seconds[mode][1:]]).T
            ratio = bootstrap(lambda pairs: pairs[:, 0].sum() / pairs[:, 1].sum(), pairs)
            shares = {name: mean(each[name] for each in spent[mode][1:]) for name in ("client_cpu", "server_cpu")}
            speeds = {"ours": num_tokens / pairs[:, 1].sum(), "theirs": num_tokens / pairs[:, 0].sum()}
            rounded = {name: round(float(value), 3) for name, value in {**speeds, **shares}.items()}
            what = f"overhead, {depth}, {mode}"
            self.results.add({"peer": "server", "what": what, **rounded, **ratio.row(), "samples": pairs.tolist()})

    def latency(self, names: Sequence[str]) -> None:
        """What servers can do, in turns, and how long the clients of each wait at shares of that."""
        with ExitStack() as stack:
            servers: dict[str, ServerProcess] = {}
            for name in names:
                rows = ["capacity", *self._rates(name)]
                if not all(self.results.has(peer=name, what=row) for row in rows):
                    with self._failure(name, rows):
                        servers[name] = stack.enter_context(self._server(name))
            unknown = {name: each for name, each in servers.items() if not self.results.has(peer=name, what="capacity")}
            self._capacities(unknown)
            for name, server in servers.items():
                if not self.results.has(peer=name, what="capacity"):  # it has failed
                    continue
                rates = self._rates(name)
                with self._failure(name, list(rates)), _resumed(server):
                    for what, rate in rates.items():
                        if not self.results.has(peer=name, what=what):
                            self._arrive(server, name, what, rate, name == VLLM)

    def _capacities(self, servers: Mapping[str, ServerProcess]) -> None:
        """Bursts through each server in turns, so that a slow minute of the machine is that of all of them."""
        taken: dict[str, list[Spent]] = {name: [] for name in servers}
        asks: list[Ask] = []
        for turn in range(-1, CAPACITY_TURNS):  # the first, of fewer requests, warms up
            num_requests = self.args.requests if turn >= 0 else max(1, self.args.requests // 4)
            for name in [*servers][:: 1 if turn % 2 else -1]:
                if len(taken[name]) <= turn:  # it has failed
                    continue
                with self._failure(name, ["capacity", *self._rates(name)]), _resumed(servers[name]):
                    asks = self._draw(num_requests, name != VLLM)
                    taken[name].append(burst(servers[name], [self._call(ask, True, name == VLLM) for ask in asks]))
        num_tokens = sum(ask["max_tokens"] for ask in asks)  # the same for all
        for name, spent in taken.items():
            if len(spent) == 1 + CAPACITY_TURNS:
                counted = sorted(spent[1:], key=lambda each: each.seconds)
                middle = counted[len(counted) // 2]
                row = {"requests_per_s": round(len(asks) / middle.seconds, 4)}
                row["tokens_per_s"] = round(num_tokens / middle.seconds, 2)
                bursts = [round(num_tokens / each.seconds, 2) for each in spent[1:]]
                self.results.add({"peer": name, "what": "capacity", **row, **middle.line(), "bursts": bursts})

    def _rates(self, name: str) -> dict[str, float]:
        """By row, requests a second: shares of what the server can do, and the greatest share of those that can less.

        0.0 as long as it is not known what it can do.
        """
        can = {
            row["peer"]: row["requests_per_s"]
            for row in self.results.rows
            if row["what"] == "capacity" and "error" not in row
        }
        own = can.get(name, 0.0)
        rates = {f"latency, {load}%": own * load / 100 for load in LOADS}
        return rates | {
            f"latency, {LOADS[-1]}% of {other}": rate * LOADS[-1] / 100 for other, rate in can.items() if rate < own
        }

    def _arrive(self, server: ServerProcess, name: str, what: str, rate: float, is_deep: bool) -> None:
        asks = self._draw(max(10, round(rate * self.args.seconds)), not is_deep, rate)
        calls = [self._call(ask, True, is_deep) for ask in asks]
        took = arrive(server, calls)
        counted = calls[int(_WARM_UP * len(calls)) :]
        num_tokens = sum(call.num_tokens for call in calls)
        row = {"peer": name, "what": what, "rate": round(rate, 4), "requests": len(counted)}
        self.results.add({**row, "tokens_per_s": round(num_tokens / took.seconds, 2), **took.line(), **waits(counted)})

    def _draw(self, num_requests: int, paper_depths: bool, rate: float | None = None) -> list[Ask]:
        """Requests at the paper's depths, or at full depth; the same for all servers."""
        paths = self.mix if paper_depths else ((LayerPath.full(self.config.num_layers), 1.0),)
        drawn = Workload(num_requests, paths, STREAM_PROMPT_LEN, MEAN_OUTPUT, rate=rate).draw()
        prompts = draw_prompts(num_requests, STREAM_PROMPT_LEN, self.config.vocab_size)
        return [
            {
                "prompt": prompt,
                "max_tokens": min(request.num_output, _MAX_LEN - STREAM_PROMPT_LEN),
                "path": f"layers:{','.join(map(str, request.path.layers))}",
                "due_s": request.arrival_s,
            }
            for prompt, request in zip(prompts, drawn, strict=True)
        ]

    def _call(self, ask: Ask, streams: bool, is_deep: bool = False) -> Call:
        body = {name: ask[name] for name in ("prompt", "max_tokens", "path")}
        if is_deep:  # vLLM knows no other
            del body["path"]
        if streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Call({"model": _NAME, "temperature": 0, "ignore_eos": True, **body}, ask["due_s"])

    @contextmanager
    def _server(self, name: str) -> Iterator[ServerProcess]:
        """A server that is ready, stopped."""
        given = {"--host": "127.0.0.1", "--served-model-name": _NAME, "--max-model-len": _MAX_LEN}
        environment = self._env
        program: list[str]
        if name == VLLM:
            program = [*vllm_command(self.args.peers), "serve", str(self.folder), "--no-enable-prefix-caching"]
            given |= {"--dtype": "bfloat16", "--max-num-seqs": STREAM_BATCH, "--max-num-batched-tokens": 2048}
            if not Path(program[0]).exists():
                raise ServerError(f"vLLM: {program[0]} must be there, got none. Run make peers.")
            environment = {**environment, **vllm_env(prefix=str(self.args.peers))}
            del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # its server needs a process for the engine
        else:
            program = [sys.executable, "-m", "dynskip", "serve", str(self.folder), "--no-prefix-caching"]
            given |= {"--policy": name, "--batch": STREAM_BATCH, "--kv-bytes": self.kv_bytes, "--max-queue": 100_000}
            given |= {"--threads": torch.get_num_threads()}
        words = [str(word) for pair in given.items() for word in pair]
        with ServerProcess(
            name, lambda port: [*program, *words, "--port", str(port)], self._log(name), environment
        ) as server:
            server.wait_until_ready()
            if not any((row["peer"], row["what"]) == (name, "load") for row in self.results.rows):
                told = {"version": version_of(server), "settings": settings_of(server)}
                self.results.add({"peer": name, "what": "load", **told})
            server.pause()
            yield server

    @property
    def _env(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def _log(self, name: str) -> Path:
        return self.args.models.parent / "logs" / f"serve {self.shape} {name}.log"

    @contextmanager
    def _failure(self, name: str, rows: Sequence[str]) -> Iterator[None]:
        """Make what a process could not do the row of what is not there."""
        try:
            yield
        except (RuntimeError, ConnectionError) as error:  # a process's, a server's, an answer's that is not whole
            for what in rows:
                if not self.results.has(peer=name, what=what):
                    self.results.add({"peer": name, "what": what, "error": str(error)})


@contextmanager
def _resumed(server: ServerProcess) -> Iterator[None]:
    """The server runs within the block, and not behind it; one that has failed is ended."""
    server.resume()
    try:
        yield
    except BaseException:
        server.kill()
        raise
    server.pause()


def version_of(server: ServerProcess) -> str:
    """What the server says of itself."""
    with urllib.request.urlopen(f"{server.url}/version", timeout=60) as answer:
        return str(json.loads(answer.read())["version"])


def settings_of(server: ServerProcess) -> str:
    """What it was started with, and which costs it schedules by where it says so."""
    if server.name == VLLM:
        return f"bf16, vllm serve, at most {STREAM_BATCH} sequences at once, no prefix caching"
    is_predicted = "UnmeasuredCostsWarning" in server.log.read_text(encoding="utf-8")
    costs = "predicted" if is_predicted else "calibrated"
    return f"policy {server.name}, batch {STREAM_BATCH}, costs {costs}, no prefix caching"


def estimate_s(shape: str, args: argparse.Namespace) -> float:
    """What the parts of one shape take, roughly."""
    total_s = 0.0
    load_s = _LOAD_S.get(shape, 10.0)
    paper, deep = _SPEEDS.get(shape, (1000.0, 500.0))
    num_tokens = args.requests * MEAN_OUTPUT
    if "overhead" in args.part:
        total_s += 2 * load_s + 3 * (args.rounds + 1) * num_tokens * (1 / paper + 1 / deep / 4)
    if "latency" in args.part:
        for name in (*POLICIES, VLLM):
            if args.server.lower() in name.lower():
                speed = deep if name == VLLM else paper
                total_s += (_VLLM_LOAD_S if name == VLLM else load_s) + (CAPACITY_TURNS + 0.25) * num_tokens / speed
                total_s += (len(LOADS) + (name != VLLM) + (name == POLICIES[0])) * (args.seconds + 3)
    return total_s


def mix_of(shape: str, num_layers: int, asked: str | None) -> tuple[str, tuple[tuple[LayerPath, float], ...]]:
    """What the paper's depths are for ``shape``, in words, and paths with their shares; asked: of the command line."""
    named = asked or _MIXES.get(shape)
    if named is None:
        return "uniform paths", paper_paths(num_layers)
    return named, parse_mix(named, num_layers, find_adapter(shape))


def measure_shape(shape: str, args: argparse.Namespace) -> None:
    """Every row of one shape that is asked for and not there yet."""
    machine = describe()
    conditions: Row = {"shape": shape, **machine, "rounds": args.rounds, "budget_s": args.seconds}
    conditions |= {"requests": args.requests, "prompt_len": STREAM_PROMPT_LEN, "mean_output": MEAN_OUTPUT}
    num_layers = read_decoder_config(str(served_folder(args.models, shape))).num_layers
    conditions["mix"], mix = mix_of(shape, num_layers, args.mix)
    conditions |= {"num_layers": num_layers, "depths": [(path.budget, share) for path, share in mix]}
    path = args.out / f"{shape}-{machine['machine']}.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    measurement = Measurement(shape, args, mix, Results(path, conditions))
    try:
        if "overhead" in args.part:
            measurement.overhead()
        if "latency" in args.part:
            measurement.latency([name for name in (*POLICIES, VLLM) if args.server.lower() in name.lower()])
    finally:
        path.with_suffix(".md").write_text(page(*read(path)), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--server", default="", help="of the latencies: servers whose name has this in it")
    parser.add_argument(
        "--mix", metavar="PATH=SHARE,...", help="the paper's depths (default: of SmolLM2 its own paths)"
    )
    parser.add_argument("--rounds", type=int, default=6, help="turns of engine and server")
    parser.add_argument("--seconds", type=float, default=60.0, help="in which requests arrive at one load")
    parser.add_argument("--requests", type=int, help=f"of a burst (default: {REQUESTS})")
    parser.add_argument("--threads", type=int, help="of engine and servers (default: one for each core)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--rehearse", action="store_true", help="opt-mini, some seconds: to see that everything runs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "serve")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "peers" / "models", help="checkpoint folders")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="the environment that vLLM is in")
    args = parser.parse_args(argv)
    args.part = args.part or PARTS
    shapes = [REHEARSAL] if args.rehearse else [shape for shape in REQUESTS if args.only in shape]
    if not shapes:
        parser.error(f"--only must be a part of one of {', '.join(REQUESTS)}, got {args.only!r}")
    if args.rehearse:
        args.rounds, args.seconds, args.requests = 2, 3.0, args.requests or 24
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    # A connection for each request of a burst.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sizes = {shape: args.requests or REQUESTS[shape] for shape in shapes}
    asked = {shape: argparse.Namespace(**{**vars(args), "requests": size}) for shape, size in sizes.items()}
    for shape, own in asked.items():
        print(f"{shape}: about {estimate_s(shape, own) / 60:.0f} minutes for all rows", flush=True)
    for shape, own in asked.items():
        measure_shape(shape, own)
    return 0


if __name__ == "__main__":
    sys.exit(main())
