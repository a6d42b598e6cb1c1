"""How well a model speaks along its paths, untuned and tuned: nats of reference answers, agreement, milliseconds.

python bench/paths.py --data alpaca_data.json.xz          48 rows, agreement, and a token's time: two minutes
python bench/paths.py --data alpaca_data.json.xz --all    all test rows of the paper's split, too: 50 minutes of a core

The paths are those that the tuned model was trained along. Untuned they are beside the paper's uniform rule. What was
measured of these weights is not measured again; `--fresh` forgets it. Afterwards the table and the figure are written
anew; the exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynskip.benchmark.report import markdown_table
from dynskip.causal_lm import CausalLM
from dynskip.data.conversations import MAX_ANSWER_TOKENS, draw_conversations, encode_prompt, read_rows
from dynskip.data.corpus import Instruction, split_instructions
from dynskip.data.examples import Example
from dynskip.evaluation.report.drawing import svg
from dynskip.evaluation.stats.intervals import bootstrap_mean
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.files import file_hash, write_text
from dynskip.llm import LLM
from dynskip.measure.machine import describe
from dynskip.measure.passes import Measured
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams
from dynskip.search.gauge import Bar, Gauge, Kind

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench/results/paths"
BASE, TUNED = "smollm2-135m-instruct", "smollm2-135m-paths"
# Nats a response token on the few rows, by layers: what the tuned model has to reach, and what it aims at.
REQUIRED = {25: 2.40, 20: 2.80, 15: 3.40}
AIMED = {25: 2.30, 20: 2.70, 15: 3.20}
FULL_DEPTH_SLACK = 0.02
NUM_FEW, FEW_SEED = 48, 1
TIMED_TOKENS, TIMED_ROUNDS, TIMED_BATCHES = 48, 9, (1, 8)


def few_rows(llm: LLM, rows: Sequence[Instruction]) -> list[Example]:
    """The rows that searches are judged on: no search and no training has seen them."""
    positions = llm.model.decoder_config.max_positions
    return draw_conversations(
        llm.tokenizer,
        rows,
        (NUM_FEW,),
        llm.model.eos_token_ids[0],
        FEW_SEED,
        positions,  # type: ignore[arg-type]
    )[0]


def test_rows(llm: LLM, rows: list[Instruction]) -> list[Example]:
    """All test rows of the paper's split that have an answer; inputs stand below their instructions."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None, "a model that speaks"
    examples = []
    for row in split_instructions(rows)[2]:
        if row.output:
            prompt = "\n\n".join(part for part in (row.instruction, row.input) if part)
            text = tokenizer(row.output, add_special_tokens=False, split_special_tokens=True, verbose=False)
            answer = (*text["input_ids"][:MAX_ANSWER_TOKENS], llm.model.eos_token_ids[0])
            examples.append(Example(tuple(encode_prompt(tokenizer, prompt)), answer, 0))
    return examples


class Bench:
    """The models, loaded when they are asked for, and what is known already."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows = read_rows(args.data)
        self.data_hash = file_hash(args.data)
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.file = FOLDER / f"{args.model}.jsonl"
        if args.fresh:
            self.file.unlink(missing_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.results: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a result."""
        row = {**row, **describe()}
        self.results.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(", ".join(f"{name} {value}" for name, value in row.items() if name not in describe()), flush=True)

    def has(self, **labels: Any) -> bool:
        """Whether there is a result with these labels."""
        return any(all(row.get(name) == value for name, value in labels.items()) for row in self.results)

    def measure(self) -> None:
        """What is missing."""
        llms = {"untuned": LLM(self.args.base), "tuned": LLM(self.args.model, adapter=self.args.adapter)}
        paths = [LayerPath.full(llms["tuned"].model.num_layers)]
        paths += [LayerPath.found(llms["tuned"].model, budget) for budget in (25, 20, 15)]
        uniform = [LayerPath.uniform(path.num_layers, path.budget) for path in paths[1:]]
        for name, llm in llms.items():
            rules = {"found": paths, **({"uniform": uniform} if name == "untuned" else {})}
            few = few_rows(llm, self.rows)
            self._judge(name, llm, few, rules, ("loss", "own", "path"))
            if self.args.all:
                self._judge(name, llm, test_rows(llm, list(self.rows)), {"found": paths}, ("loss",))
        self._time(llms["tuned"].model, paths)

    def _judge(
        self, name: str, llm: LLM, examples: list[Example], rules: dict[str, list[LayerPath]], kinds: Sequence[Kind]
    ) -> None:
        item = WorkItem("", llm.model.weights_digest, "", self.data_hash, "", FEW_SEED, 0, (("rows", len(examples)),))
        for kind in kinds:
            for rule, paths in rules.items():
                labels = [
                    {
                        "what": kind,
                        "model": name,
                        "weights": llm.model.weights_digest[:16],
                        "rule": rule,
                        "num_rows": len(examples),
                        "layers": path.budget,
                    }
                    for path in paths
                ]
                if all(self.has(**each) for each in labels):
                    continue
                bar = Bar(shown=True)
                with ItemStore(self.args.work / "measurements") as store:
                    gauge = Gauge(llm.model, examples, store, dataclasses.replace(item, split=name), bar)
                    measured = gauge.measure(kind, paths)
                bar.close()
                for label, path, each in zip(labels, paths, measured, strict=True):
                    self.add({**label, "path": str(path), **_interval(kind, each)})

    def _time(self, model: CausalLM, paths: Sequence[LayerPath]) -> None:
        for batch in TIMED_BATCHES:
            if all(self.has(what="ms", layers=path.budget, batch=batch) for path in paths):
                continue
            llm = LLM(model)
            params = SamplingParams(max_tokens=TIMED_TOKENS, ignore_eos=True)
            prompts = [[1, *range(100, 163)]] * batch
            times: dict[LayerPath, list[float]] = {path: [] for path in paths}
            for turn in range(TIMED_ROUNDS + 1):
                for path in paths if turn % 2 else paths[::-1]:
                    outputs = llm.generate(prompts, params, path)
                    if turn:
                        times[path].append(1000 * statistics.median(output.tpot_s or 0.0 for output in outputs))
            for path, each in times.items():
                row = {"what": "ms", "layers": path.budget, "batch": batch, "value": round(statistics.median(each), 3)}
                self.add({**row, "samples": [round(value, 3) for value in each]})


def _interval(kind: Kind, measured: Measured) -> dict[str, Any]:
    weights = np.array(measured.num_tokens, dtype=np.float64)
    sums = np.array(measured.nats if kind == "loss" else measured.agreed, dtype=np.float64)
    return bootstrap_mean(sums / weights, weights).row()


def page(results: Sequence[dict[str, Any]], model: str) -> str:
    """The table."""

    def cell(**labels: Any) -> str:
        row = find(results, **labels)
        if row is None:
            return "-"
        ends = f" [{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
        return f"{row['value']:.3f}{ends}"

    num_rows = sorted({row["num_rows"] for row in results if row["what"] == "loss"})
    layers = sorted({row["layers"] for row in results if row["what"] == "ms"}, reverse=True)
    body = []
    for each in layers:
        target = f"{REQUIRED[each]:.2f} / {AIMED[each]:.2f}" if each in REQUIRED else f"untuned + {FULL_DEPTH_SLACK}"
        line = [str(each), cell(what="loss", model="untuned", rule="uniform", num_rows=NUM_FEW, layers=each)]
        line += [cell(what="loss", model="untuned", rule="found", num_rows=count, layers=each) for count in num_rows]
        line += [cell(what="loss", model="tuned", rule="found", num_rows=count, layers=each) for count in num_rows]
        line += [target, verdict(results, each)]
        line += [
            cell(what=kind, model="tuned", rule="found", num_rows=NUM_FEW, layers=each) for kind in ("own", "path")
        ]
        line += [cell(what="ms", layers=each, batch=batch) for batch in TIMED_BATCHES]
        body.append(line)
    head = ["layers", f"uniform, untuned, {NUM_FEW} rows"]
    head += [f"untuned, {count} rows" for count in num_rows] + [f"tuned, {count} rows" for count in num_rows]
    head += ["required / aimed", "verdict", "agrees, own entries", "agrees, path's entries"]
    head += [f"ms a token, batch {batch}" for batch in TIMED_BATCHES]
    found = {row["layers"]: row["path"] for row in results if row["what"] == "loss" and row["rule"] == "found"}
    paths = "\n".join(f"- {found[each]}" for each in layers)
    timed = next(row for row in results if row["what"] == "ms")
    return (
        f"# {model}\n\nNats a response token of reference answers, cut at {MAX_ANSWER_TOKENS} tokens, along searched "
        f"paths before and after tuning; 95 % intervals of a bootstrap over rows. Agreement with the own greedy full "
        f"depth on {NUM_FEW} rows' prompts, and milliseconds a token behind prompts of 64, medians of "
        f"{TIMED_ROUNDS} rounds in turns on {timed['cpu']}, {timed['date']}.\n\n"
        f"{markdown_table(head, body, range(1, len(head)))}\n\n{paths}\n\n![quality against time]({model}.svg)\n"
    )


def verdict(results: Sequence[dict[str, Any]], layers: int) -> str:
    """Whether the tuned model reaches its bar on the few rows, with so many layers."""
    labels = {"what": "loss", "rule": "found", "num_rows": NUM_FEW, "layers": layers}
    untuned, tuned = (find(results, model=model, **labels) for model in ("untuned", "tuned"))
    if untuned is None or tuned is None:
        return "-"
    if layers not in REQUIRED:
        return "met" if tuned["value"] <= untuned["value"] + FULL_DEPTH_SLACK else "MISSED"
    if tuned["value"] <= AIMED[layers]:
        return "aim met"
    return "met" if tuned["value"] <= REQUIRED[layers] else "MISSED"


def find(results: Sequence[dict[str, Any]], **labels: Any) -> dict[str, Any] | None:
    """The last result with these labels."""
    fitting = [row for row in results if all(row.get(name) == value for name, value in labels.items())]
    return fitting[-1] if fitting else None


def curves(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[tuple[float, dict[str, Any]]]]]:
    """By name: milliseconds a token at batch 1, and the nats there."""
    for name, model, rule in (
        ("untuned, uniform", "untuned", "uniform"),
        ("untuned, searched", "untuned", "found"),
        ("tuned, searched", "tuned", "found"),
    ):
        points = []
        for row in results:
            if row["what"] == "ms" and row["batch"] == 1:
                asked = "found" if row["layers"] == max(each["layers"] for each in results) else rule
                nats = find(results, what="loss", model=model, rule=asked, num_rows=NUM_FEW, layers=row["layers"])
                if nats is not None:
                    points.append((row["value"], nats))
        yield name, sorted(points, key=lambda pair: pair[0])


def figure(results: Sequence[dict[str, Any]]) -> str:
    """Quality against time."""

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for (name, points), marker in zip(curves(results), ("s", "o", "D"), strict=True):
            times = [ms for ms, _ in points]
            values = [row["value"] for _, row in points]
            spans = [
                [row["value"] - row["low"] for _, row in points],
                [row["high"] - row["value"] for _, row in points],
            ]
            axes.errorbar(times, values, yerr=spans, label=name, marker=marker, capsize=2, linewidth=1)
            if name.startswith("tuned"):
                for ms, row in points:
                    axes.annotate(
                        str(row["layers"]), (ms, row["value"]), textcoords="offset points", xytext=(0, -14), ha="center"
                    )
        axes.set(xlabel="milliseconds a token, batch 1", ylabel="nats a response token (less is better)")
        axes.legend()

    return svg("paths", draw, 6.4, 4.2)


def main() -> int:
    """Measure what is missing, write table and figure; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="Alpaca as *.json[.xz]")
    parser.add_argument("--base", default=BASE, help=f"the model as it came ({BASE})")
    parser.add_argument("--model", default=TUNED, help=f"the tuned model ({TUNED})")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="of the tuned model, where its name has none")
    parser.add_argument("--all", action="store_true", help="also all test rows")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/paths-judged", help="where measures are kept")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    bench.measure()
    write_text(FOLDER / f"{args.model}.md", page(bench.results, args.model))
    write_text(FOLDER / f"{args.model}.svg", figure(bench.results))
    layers = {row["layers"] for row in bench.results}
    verdicts = {each: verdict(bench.results, each) for each in sorted(layers, reverse=True)}
    print(", ".join(f"{each} layers: {told}" for each, told in verdicts.items()))
    return int("MISSED" in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
