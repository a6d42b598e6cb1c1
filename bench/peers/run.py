"""dynskip beside other engines: decode steps, prefills, streams, memory; a process each, one of them running at a time.

make peers                                      all that there is, in the environment that it makes
make peers ARGS="--only smollm2 --rounds 3"     a part of it

A run that was broken off goes on where it stopped. `python -m bench.table` writes the tables of the docs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy

from bench.peers.plan import DYNSKIP, PEERS, STEPS, Peer, estimate_s, peer_file, prefill_rounds
from bench.peers.process import PeerError, PeerProcess
from bench.peers.results import Results, Row
from bench.peers.weights import PROMPTS_FILE, smollm2_gguf
from bench.peers.workload import NUM_REQUESTS, PROMPT_LEN
from dynskip.evaluation.stats.intervals import bootstrap
from dynskip.measure.machine import describe
from dynskip.measure.timing import Samples, interleave
from dynskip.models.shapes import get_shape

ROOT = Path(__file__).resolve().parents[2]
_SHORT_MS = 2000.0  # a shorter prefill is run once more in each turn, uncounted, before the one that counts
_PARTS = 8  # of a stream, each a turn
_CHECKED_TOKENS = 32  # of each real prompt


class Pair:
    """dynskip and one peer, both loaded."""

    def __init__(self, ours: PeerProcess, theirs: PeerProcess, peer: Peer, results: Results, args: Any) -> None:
        self.ours, self.theirs, self.peer, self.results, self.args = ours, theirs, peer, results, args

    def measure_batch(self, batch: int, prompt_len: int) -> None:
        """Prefills in turns; behind the last of short prompts decode steps in turns."""
        about = {"peer": self.peer.name, "batch": batch, "prompt_len": prompt_len}
        wanted = ["prefill", "decode"] if prompt_len == PROMPT_LEN else ["prefill"]
        if all(self.results.has(what=what, **about) for what in wanted):
            return
        rounds = self.args.rounds
        num_new = rounds * (STEPS + 1) + 2
        asked = {"batch": batch, "prompt_len": prompt_len, "num_new": num_new}
        try:
            pair_ms = sum(side.ask("prefill", **{**asked, "batch": 1, "prompt_len": 64}) for side in self._sides)
            pair_ms *= batch * prompt_len / 64
            tasks = [lambda side=side: side.ask("prefill", **asked) for side in self._sides]
            num_repeats = 2 if pair_ms < _SHORT_MS else 1
            self._time("prefill", about, tasks, prefill_rounds(pair_ms, rounds, self.args.budget), num_repeats)
            if "decode" in wanted:
                steps = [lambda side=side: median(side.ask("decode", num_steps=STEPS + 1)[1:]) for side in self._sides]
                self._time("decode", about, steps, rounds, 1)
        except PeerError as error:
            for what in wanted:
                if not self.results.has(what=what, **about):
                    self.results.add({"what": what, **about, "error": str(error)})

    def _time(self, what: str, about: Row, tasks: Sequence[Any], num_rounds: int, num_repeats: int) -> None:
        samples = interleave(dict(zip(("ours", "theirs"), tasks, strict=True)), num_rounds, num_repeats, 0)
        ours, theirs = (Samples([each[-1:] for each in samples[name].rounds]) for name in ("ours", "theirs"))
        pairs = numpy.array([[a[0], b[0]] for a, b in zip(ours.rounds, theirs.rounds, strict=True)])
        ratio = bootstrap(lambda pairs: numpy.median(pairs[:, 1] / pairs[:, 0]), pairs)
        times = {"ours": round(ours.ms, 3), "theirs": round(theirs.ms, 3)}
        row = {"what": what, **about, **times, **ratio.row(), "samples": pairs.round(3).tolist()}
        self.results.add(row)

    def measure_streams(self) -> None:
        """dynskip at full and at the paper's depths, the peer at full depth: an eighth of each stream at a time."""
        if all(self.results.has(peer=self.peer.name, what=what) for what in ("stream", "stream, paper's depths")):
            return
        names = {"full": "full", "paper": "paper", "theirs": "full"}
        sides = {"full": self.ours, "paper": self.ours, "theirs": self.theirs}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        try:
            for _ in range(self.peer.streams):
                begun = {
                    name: side.ask("begin_stream", name=names[name], num_requests=self.args.requests)
                    for name, side in sides.items()
                }
                parts = dict.fromkeys(sides, 0.0)
                for part in range(_PARTS):
                    order = list(sides)
                    for name in order[part % 3 :] + order[: part % 3]:
                        parts[name] += sides[name].ask("stream", name=names[name], share=(part + 1) / _PARTS)
                for name, each in parts.items():
                    seconds[name].append(each)
        except PeerError as error:
            for what in ("stream", "stream, paper's depths"):
                self.results.add({"peer": self.peer.name, "what": what, "error": str(error)})
            return
        for what, name in (("stream", "full"), ("stream, paper's depths", "paper")):
            pairs = numpy.array([seconds[name], seconds["theirs"]]).T
            ratio = bootstrap(lambda pairs: pairs[:, 1].sum() / pairs[:, 0].sum(), pairs)
            speeds = {
                side: round(begun[each]["tokens"] / (sum(seconds[each]) / len(pairs)), 2)
                for side, each in (("ours", name), ("theirs", "theirs"))
            }
            row = {"peer": self.peer.name, "what": what, **speeds, "layers": begun[name]["layers"], **ratio.row()}
            self.results.add({**row, "repeats": len(pairs), "samples": pairs.round(3).tolist()})

    @property
    def _sides(self) -> tuple[PeerProcess, PeerProcess]:
        return self.ours, self.theirs


def start(shape: str, peer: Peer, args: Any, results: Results) -> PeerProcess:
    """The process of ``peer``, loaded. Raises PeerError where that fails."""
    kind, path = peer_file(args.models, shape, peer)
    if kind != "shipped" and not path.exists():
        command = [sys.executable, "-m", "bench.peers.weights", kind, shape, str(path)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            raise PeerError(f"{peer.name}: its file could not be written: {made.stderr.strip().splitlines()[-1]}")
    folder = smollm2_gguf() if kind == "shipped" else str(path)
    sizes = get_shape(shape)
    options = {"vocab_size": sizes.vocab_size, "num_layers": sizes.num_layers} if peer.kind == "ctranslate2" else {}
    log = args.models.parent / "logs" / f"{shape} {peer.name}.log"
    process = PeerProcess(peer.name, [sys.executable, "-m", "bench.peers.worker", peer.kind], log, peer.env)
    try:
        loaded = process.ask("load", folder=folder, **peer.options, **options)
    except PeerError:
        process.close()
        raise
    # Files by their names alone: folders are those of one machine.
    env = {name: re.sub("[^:]*/", "", value) for name, value in peer.env.items()}
    results.add({"peer": peer.name, "what": "load", **loaded, "env": env, "tried": peer.tried})
    return process


def measure_shape(shape: str, args: Any) -> None:
    """Every row of one shape that is not there yet."""
    machine = describe()
    conditions = {"shape": shape, **machine, "rounds": args.rounds, "budget_s": args.budget, "requests": args.requests}
    path = args.out / f"{shape}-{machine['machine']}.jsonl"
    if args.fresh:
        path.unlink(missing_ok=True)
    results = Results(path, conditions)
    prompts_path = args.models / shape / PROMPTS_FILE
    with ExitStack() as stack:
        ours: PeerProcess | None = None
        ours_bytes = 0
        for peer in PEERS[shape]:
            if args.peer.lower() not in peer.name.lower() or results.has(peer=peer.name, what="done"):
                continue
            with attempt(results, peer, "load"):
                ours = ours or stack.enter_context(start(shape, DYNSKIP, args, results))
                with start(shape, peer, args, results) as theirs:
                    pair = Pair(ours, theirs, peer, results, args)
                    for batch, prompt_len in peer.cells:
                        pair.measure_batch(batch, prompt_len)
                    with attempt(results, peer, "memory"):
                        ours_bytes = ours_bytes or ours.peak_bytes()  # before any stream
                        memory = {"ours": ours_bytes / 1e9, "theirs": theirs.peak_bytes() / 1e9}
                        results.add({"peer": peer.name, "what": "memory", **memory})
                    if prompts_path.exists():
                        generate(ours, DYNSKIP, prompts_path, results)
                        generate(theirs, peer, prompts_path, results)
                    if peer.streams:
                        pair.measure_streams()
            if not results.failed(peer.name):
                results.add({"peer": peer.name, "what": "done"})
    if prompts_path.exists():
        judge(shape, prompts_path, args, results)


@contextmanager
def attempt(results: Results, peer: Peer, what: str) -> Iterator[None]:
    """Make a PeerError the row of ``what``."""
    try:
        yield
    except PeerError as error:
        results.add({"peer": peer.name, "what": what, "error": str(error)})


def generate(process: PeerProcess, peer: Peer, prompts_path: Path, results: Results) -> None:
    """The greedy tokens of the real prompts, as a row that `judge` reads."""
    if not results.has(peer=peer.name, what="outputs"):
        prompts = json.loads(prompts_path.read_text(encoding="utf-8"))
        with attempt(results, peer, "outputs"):
            outputs = process.ask("generate", prompts=prompts, num_new=_CHECKED_TOKENS)
            results.add({"peer": peer.name, "what": "outputs", "token_ids": outputs})


def judge(shape: str, prompts_path: Path, args: Any, results: Results) -> None:
    """Rows that say how many tokens are dynskip's, and how many the best of float32 up to bf16's rounding."""
    outputs = {row["peer"]: row["token_ids"] for row in results.rows if "token_ids" in row}
    if DYNSKIP.name not in outputs or all(results.has(peer=name, what="tokens") for name in outputs):
        return
    prompts = json.loads(prompts_path.read_text(encoding="utf-8"))
    transformers = next(peer for peer in PEERS[shape] if peer.kind == "transformers")
    try:
        with start(shape, transformers, args, results) as process:
            shares = {name: process.ask("judge", prompts=prompts, outputs=ids) for name, ids in outputs.items()}
    except PeerError as error:
        for name in outputs:
            results.add({"peer": name, "what": "tokens", "error": str(error)})
        return
    for name, ids in outputs.items():
        flat = [share for each in shares[name] for share in each]
        same = sum(map(_common_prefix, ids, outputs[DYNSKIP.name]))
        near = sum(share <= 1 for share in flat)
        counts = {"same": same, "near": near, "of": len(flat), "worst": round(max(flat), 3)}
        results.add({"peer": name, "what": "tokens", **counts})


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two outputs have in common before they part."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose name has this in it")
    parser.add_argument("--peer", default="", help="peers whose name has this in it")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each comparison at most")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds that the prefills of one batch may take")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="of each stream")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "peers")
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "peers" / "models", help="files that peers load")
    args = parser.parse_args(argv)
    shapes = [shape for shape in PEERS if args.only in shape]
    if not shapes:
        parser.error(f"--only must be a part of one of {', '.join(PEERS)}, got {args.only!r}")
    total_s = 0.0
    for shape in shapes:
        peers = [peer for peer in PEERS[shape] if args.peer.lower() in peer.name.lower()]
        seconds = sum(estimate_s(shape, peer, args.rounds, args.budget, args.requests) for peer in peers)
        print(f"{shape}: about {seconds / 60:.0f} minutes beside {', '.join(peer.name for peer in peers)}", flush=True)
        total_s += seconds
    print(f"together about {total_s / 60:.0f} minutes, and more to write files that are not there yet", flush=True)
    for shape in shapes:
        measure_shape(shape, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
