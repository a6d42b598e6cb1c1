"""The one table of the README: what each model gains on each machine, from the results of steps, peers and streams."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.plan import CELLS
from bench.peers.results import read
from bench.peers.table import TARGETS
from bench.peers.workload import MEAN_OUTPUT, PROMPT_LEN, STREAM_BATCH, STREAM_PROMPT_LEN
from bench.report.serving import key_figures
from dynskip.benchmark.report import Report, markdown_table

_MISSED = "\\*"
_LONG = max(prompt_len for _, prompt_len in CELLS)
_NOT_MEASURED = "Not measured yet.\n"
# The columns that `dynskip bench` measures, by section and question.
_STEPS = {
    ("decode", "full depth / its products, keys and values"): "step over its floor",
    ("paths", "decode, shared 25% path, speed-up over full depth"): "a quarter of the layers",
    ("decode", "speed-up over transformers"): "step over transformers",
}
# Those that `make peers` does, by what was timed and the length of its prompts.
_BESIDE_VLLM = {
    ("decode", PROMPT_LEN): "step over vLLM",
    ("prefill", PROMPT_LEN): "prompts over vLLM",
    ("prefill", _LONG): "long prompts over vLLM",
    ("stream", None): "stream over vLLM",
    ("stream, paper's depths", None): "mixed stream over vLLM",
}
_COHORT = "mixed stream"


@dataclass
class _Line:
    """What is known of one model on one machine: a cell by column; runs: when and at which commit it was measured."""

    cells: dict[str, str] = field(default_factory=dict)
    runs: set[tuple[str, str]] = field(default_factory=set)  # date, commit


def overview(results: Path, streams: Sequence[Path]) -> str:
    """The table of the folder ``results``, whose streams are in the files ``streams``; a line a model and machine.

    What an older name of a machine measured stands in the tables of the pages alone.
    """
    lines: dict[tuple[str, str], _Line] = {}
    for path in sorted((results / "cpu").glob("*.jsonl")):
        report = Report.read(path)
        line = lines.setdefault((report.conditions["shape"], report.conditions["cpu"]), _Line())
        _add_steps(line, report)
    for path in sorted((results / "peers").glob("*.jsonl")):
        conditions, rows = read(path)
        line = lines.setdefault((conditions["shape"], conditions["cpu"]), _Line())
        _add_peers(line, conditions, rows)
    cpus = {cpu for _, cpu in lines}
    for conditions, gains in key_figures(streams) if streams else ():
        model = conditions["model"].partition(" shapes")[0].removesuffix("-instruct")
        if conditions["cpu"] in cpus:
            line = lines.setdefault((model, conditions["cpu"]), _Line())
            line.runs.add((conditions["date"], conditions["commit"]))
            line.cells[_COHORT] = _joined({batch: f"{gain:.2f}" for batch, gain in gains.items()})
    if not lines:
        return _NOT_MEASURED
    columns = [_COHORT, *_STEPS.values(), *_BESIDE_VLLM.values()]
    columns = [name for name in columns if any(name in line.cells for line in lines.values())]
    table = markdown_table(
        ("model", "CPU", *columns),
        [[model, cpu, *(line.cells.get(name, "") for name in columns)] for (model, cpu), line in sorted(lines.items())],
        right=set(range(2, len(columns) + 2)),
    )
    notes = textwrap.fill(" ".join(_notes(lines)), 120, break_long_words=False, break_on_hyphens=False)
    return f"{table}\n{notes}\n"


def _add_steps(line: _Line, report: Report) -> None:
    line.runs.add((report.conditions["date"], report.conditions["commit"]))
    for (section, what), column in _STEPS.items():
        found = {
            row.batch: row.show(row.value).removesuffix("x") + _MISSED * (row.passed is False)
            for row in report.rows
            if (row.section, row.what) == (section, what)
        }
        if found:
            line.cells[column] = _joined(found)


def _add_peers(line: _Line, conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    line.runs.add((conditions["date"], conditions["commit"]))
    targets = TARGETS[conditions["shape"]]
    for (what, prompt_len), column in _BESIDE_VLLM.items():
        found = {}
        for row in rows:
            if (row["peer"], row["what"], row.get("prompt_len")) == ("vLLM", what, prompt_len):
                key = (what, row.get("batch"), prompt_len)
                is_missed = key in targets and not row.get("value", 0) >= targets[key]
                found[row.get("batch")] = "failed" if "error" in row else f"{row['value']:.2f}" + _MISSED * is_missed
        if found:
            line.cells[column] = _joined(found)


def _joined(by_batch: Mapping[int | None, str]) -> str:
    """The figures from batch to batch, and at which if these are no usual ones."""
    batches = sorted(batch for batch in by_batch if batch is not None)
    cell = " / ".join(by_batch[batch] for batch in batches) if batches else by_batch[None]
    where = "" if batches in ([], [1, 8, 32]) else f" at {' / '.join(map(str, batches))}"
    return f"{cell}{where}"


def _notes(lines: Mapping[tuple[str, str], _Line]) -> Iterator[str]:
    runs = sorted(run for line in lines.values() for run in line.runs)
    yield (
        f"How many times as fast, at batch 1 / 8 / 32 unless another is named; {_MISSED} misses its target. *Mixed "
        "stream*: requests at the paper's depths, decoded by `cohort`, over the same requests at full depth. *A "
        "quarter of the layers*: a decode step along one path for all, over one of all layers. *Step over its "
        "floor*: the time of a decode step of all layers over that of its matrix products and of reading its keys "
        "and values. Over transformers and vLLM: decode steps of all layers, prompts of "
        f"{PROMPT_LEN} and of {_LONG} tokens, a stream of all layers (256 requests, prompts of {STREAM_PROMPT_LEN}, "
        f"outputs geometric with a mean of {MEAN_OUTPUT}, at most {STREAM_BATCH} in a step), and a mixed stream over "
        "vLLM's at full depth, the only one that it knows."
    )
    yield (
        "All in bfloat16 with 2 threads on 2 cores; of opt-1.3b and llama-3.2-1b the shapes with random weights. "
        f"Measured from {runs[0][0]} to {runs[-1][0]} at {len({commit for _, commit in runs})} commits."
    )
