"""`vllm bench serve` and `guidellm`, load generators that know nothing of dynskip, against `dynskip serve`.

make load                                              both, in the environments that it makes; a minute each
python -m bench.peers.load_generators --only guidellm  one of them

Their own reports go to bench/results/serve/vllm-bench.txt and guidellm.txt. Exit status 1 where a request has failed:
that is what is asked here, the figures are of whatever else the machine did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.plan import vllm_command
from bench.serve.process import ServerProcess
from bench.soak_serve import errors_in
from dynskip.llm import LLM
from dynskip.measure.machine import describe

ROOT = Path(__file__).resolve().parents[2]
_PROMPT_LEN, _OUTPUT_LEN = 32, 16
_RATE = 4  # requests a second
_TIMEOUT_S = 900
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Run:
    """One call of a load generator: what it does, its command, and where its results will be."""

    title: str
    command: list[str]
    results: Path


@dataclass(frozen=True)
class Target:
    """A server, the folder with its tokenizer, a folder for results, and for how many seconds it is loaded."""

    url: str
    name: str
    tokenizer: Path
    folder: Path
    seconds: int


def vllm_runs(environment: Path, target: Target) -> list[Run]:
    """Completions at full depth, and chats whose depth stands behind the model's name where the server has a table."""
    names = model_names(target.url)
    runs = []
    for kind, route, name in (
        ("openai", "/v1/completions", names[0]),
        ("openai-chat", "/v1/chat/completions", names[len(names) // 2]),
    ):
        results = target.folder / f"{kind}.json"
        given = {
            "--backend": kind,
            "--base-url": target.url,
            "--endpoint": route,
            "--model": name,
            "--tokenizer": target.tokenizer,
            "--dataset-name": "random",
            "--random-input-len": _PROMPT_LEN,
            "--random-output-len": _OUTPUT_LEN,
            "--num-prompts": _RATE * target.seconds,
            "--request-rate": _RATE,
            "--percentile-metrics": "ttft,tpot,itl,e2el",
            "--metric-percentiles": "50,90,99",
            "--result-dir": results.parent,
            "--result-filename": results.name,
        }
        words = [str(word) for pair in given.items() for word in pair]
        flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
        runs.append(Run(f"{route}, {name}", [*vllm_command(environment), "bench", "serve", *words, *flags], results))
    return runs


def guidellm_runs(environment: Path, target: Target) -> list[Run]:
    """Completions and chats that arrive at random."""
    runs, program = [], environment / "bin" / "guidellm"
    for route in ("/v1/completions", "/v1/chat/completions"):
        results = target.folder / f"guidellm{route.replace('/', '-')}.json"
        given = {
            "--backend": f"kind=openai_http,target={target.url},model={target.name},request_format={route}",
            "--tokenizer": f"kind=huggingface_auto,model={target.tokenizer}",
            "--profile": f"kind=poisson,rate={_RATE}",
            "--data": f"kind=synthetic_text,prompt_tokens={_PROMPT_LEN},output_tokens={_OUTPUT_LEN}",
            "--constraint": f"kind=max_requests,count={_RATE * target.seconds}",
            "--output": f"kind=json,path={results}",
        }
        words = [str(word) for pair in given.items() for word in pair]
        runs.append(Run(f"{route}, {target.name}", [str(program), "run", *words, "--output", "kind=console"], results))
    return runs


def counts_of(results: dict[str, Any]) -> tuple[int, int]:
    """How many requests were answered, and how many failed, by the results of either."""
    if "benchmarks" in results:
        totals = [benchmark["metrics"]["request_totals"] for benchmark in results["benchmarks"]]
        return sum(each["successful"] for each in totals), sum(each["errored"] for each in totals)
    return results["completed"], results["failed"]


def model_names(url: str) -> list[str]:
    """The names of /v1/models: the plain one first."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        return [each["id"] for each in json.loads(answer.read())["data"]]


def cleaned(text: str, places: dict[str, str]) -> str:
    """``text`` without escape sequences, lines that were written over, and the places of this machine."""
    text = _ESCAPES.sub("", text)
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").splitlines()]
    text = "\n".join(lines)
    for place, name in places.items():
        text = text.replace(place, name)
    return text.strip() + "\n"


def head(title: str, model: str, threads: int) -> str:
    """The conditions."""
    told = describe()
    return (
        f"{title} against `dynskip serve {model} --threads {threads}` on loopback, both on the same "
        f"{told['num_cores']} cores\n{told['cpu']}, torch {told['versions']['torch']}, commit {told['commit']}, "
        f"{told['date']}, load {told['load'][0]} before. Figures are of a machine that other work may have used, too.\n"
    )


TOOLS = {
    "vllm-bench": ("vllm bench serve", Path(".venv-peers"), vllm_runs),
    "guidellm": ("guidellm", Path(".venv-load"), guidellm_runs),
}


def measure(name: str, args: argparse.Namespace, target: Target) -> list[str]:
    """Run one tool and write its file; what is wrong, in words."""
    title, place, make_runs = TOOLS[name]
    environment = args.environments / place
    if not (environment / "bin" / "python").exists():
        return [f"{name}: {place} must be there, got none. Run make load."]
    places = {target.url: "http://SERVER", str(target.tokenizer): "TOKENIZER", str(target.folder): "RESULTS"}
    places |= {str(args.environments): ".", str(ROOT): ".", str(Path.home()): "~"}
    parts, wrong = [head(title, args.model, args.threads)], []
    for run in make_runs(environment, target):
        done = subprocess.run(
            run.command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            cwd=target.folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        parts.append(f"=== {run.title}\n$ {cleaned(' '.join(run.command), places)}\n{cleaned(done.stdout, places)}")
        if done.returncode or not run.results.exists():
            wrong.append(f"{name}, {run.title}: exit status {done.returncode}: {done.stderr[-2000:]}")
            continue
        num_answered, num_failed = counts_of(json.loads(run.results.read_text(encoding="utf-8")))
        parts.append(f"{num_answered} requests answered, {num_failed} failed\n")
        if num_failed or not num_answered:
            wrong.append(f"{name}, {run.title}: {num_answered} requests answered, {num_failed} failed")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.txt").write_text("\n".join(parts), encoding="utf-8")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, load, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TOOLS, help="one of them")
    parser.add_argument("--model", default="smollm2-135m-paths", help="whatever dynskip serve takes")
    parser.add_argument("--seconds", type=int, default=30, help="of each of the two runs of each tool")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--environments", type=Path, default=ROOT, help="the folder with .venv-peers and .venv-load")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "serve")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = LLM(args.model).tokenizer
        assert tokenizer is not None, "a model that is served with text"
        tokenizer.save_pretrained(folder / "tokenizer")

        def command(port: int) -> list[str]:
            words = ["--port", str(port), "--threads", str(args.threads)]
            return [sys.executable, "-m", "dynskip", "serve", args.model, *words]

        wrong = []
        with ServerProcess("dynskip serve", command, folder / "log") as server:
            server.wait_until_ready()
            target = Target(server.url, args.model, folder / "tokenizer", folder, args.seconds)
            for name in [args.only] if args.only else TOOLS:
                wrong += measure(name, args, target)
            if server.end():
                wrong.append("the server must end with status 0")
            wrong += errors_in(server.log.read_text(encoding="utf-8"))
    for each in wrong:
        print(each, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
