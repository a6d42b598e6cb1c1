"""The tables of the README: what skipped layers save, and other engines, a line a model and machine."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.plan import CELLS, DYNSKIP
from bench.peers.results import read
from bench.peers.table import TARGETS
from bench.peers.workload import MEAN_OUTPUT, PROMPT_LEN, STREAM_BATCH, STREAM_PROMPT_LEN
from bench.report.serving import key_figures
from dynskip.benchmark.report import Report, markdown_table

_MISSED = "\\*"
_LONG = max(prompt_len for _, prompt_len in CELLS)
# Of a table a cell by model and CPU, and by column.
_Cells = dict[tuple[str, str], dict[str, str]]
_FLOOR = "step time over its floor"
# Columns that `dynskip bench` measures, by section and question.
_STEPS = {
    ("paths", "decode, shared 25% path, speed-up over full depth"): "a quarter of the layers, decode",
    ("decode", "full depth / its products, keys and values"): _FLOOR,
}
_MIX, _MIXED = "mixed stream, mean layers", "mixed stream, decode"
# Columns that `make peers` measures, by the peer, what was timed and the length of its prompts.
_PEERS = {
    ("vLLM", "decode", PROMPT_LEN): "decode over vLLM",
    ("transformers", "decode", PROMPT_LEN): "decode over transformers",
    ("CTranslate2 int8", "decode", PROMPT_LEN): "decode over CTranslate2 int8",
    ("llama.cpp Q4_1", "decode", PROMPT_LEN): "decode over llama.cpp 4-bit",
    ("vLLM", "prefill", PROMPT_LEN): f"prompts of {PROMPT_LEN} over vLLM",
    ("vLLM", "prefill", _LONG): f"prompts of {_LONG} over vLLM",
    ("vLLM", "stream", None): "stream over vLLM",
    ("vLLM", "stream, paper's depths", None): "mixed stream over vLLM",
}


def overview(results: Path, streams: Sequence[Path]) -> str:
    """Both tables from the folder ``results``, whose streams are in the files ``streams``.

    What an older name of a machine has measured stands in the tables of the pages alone.
    """
    saved: _Cells = {}
    runs = []
    for path in sorted((results / "cpu").glob("*.jsonl")):
        report = Report.read(path)
        saved[report.conditions["shape"], report.conditions["cpu"]] = _steps(report)
        runs.append(report.conditions)
    if not saved:
        return "Not measured yet.\n"
    cpus = {cpu for _, cpu in saved}
    for conditions, gains in key_figures(streams) if streams else ():
        model = conditions["model"].partition(" shapes")[0].removesuffix("-instruct")
        if conditions["cpu"] in cpus:
            cells = saved.setdefault((model, conditions["cpu"]), {})
            cells[_MIX] = f"{conditions['mean_layers']:.1f} of {conditions['num_layers']}"
            cells[_MIXED] = _joined({batch: f"{gain:.2f}" for batch, gain in gains.items()})
            runs.append(conditions)
    beside: _Cells = {}
    older = []
    for path in sorted((results / "peers").glob("*.jsonl")):
        conditions, rows = read(path)
        beside[conditions["shape"], conditions["cpu"]] = _peers(conditions, rows)
        runs.append(conditions)
        if _is_one_stream_with_caching(rows):
            older.append(f"{conditions['shape']} on {conditions['cpu']}")
    quality = _quality(results / "paths" / "smollm2-135m-paths.jsonl")
    parts = [
        _table(saved, (_MIX, _MIXED, *_STEPS.values())),
        _wrapped([_SAVED_NOTE, *quality]),
        _table(beside, tuple(_PEERS.values())),
        _wrapped(_notes(older, runs)),
    ]
    return "\n".join(filter(None, parts))


def _steps(report: Report) -> dict[str, str]:
    found = {}
    for (section, what), column in _STEPS.items():
        rows = [row for row in report.rows if (row.section, row.what) == (section, what)]
        if rows:
            found[column] = _joined(
                {row.batch: row.show(row.value).removesuffix("x") + _MISSED * (row.passed is False) for row in rows}
            )
    return found


def _peers(conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    targets = TARGETS[conditions["shape"]]
    found = {}
    for (peer, what, prompt_len), column in _PEERS.items():
        cells = {}
        for row in rows:
            if (row["peer"], row["what"], row.get("prompt_len")) == (peer, what, prompt_len):
                target = targets.get((what, row.get("batch"), prompt_len)) if peer == "vLLM" else None
                is_missed = target is not None and not row.get("value", 0) >= target
                cells[row.get("batch")] = "failed" if "error" in row else f"{row['value']:.2f}" + _MISSED * is_missed
        if cells:
            found[column] = _joined(cells)
    return found


def _is_one_stream_with_caching(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run is of the time before streams were repeated, without prefix caching."""
    own = [row for row in rows if row["peer"] == DYNSKIP.name and row["what"] == "load"]
    streams = [row for row in rows if row["what"] == "stream" and "error" not in row]
    had_caching = any("prefix caching" not in row.get("settings", "") for row in own)
    return bool(streams) and had_caching and not any("repeats" in row for row in streams)


def _joined(by_batch: Mapping[int | None, str]) -> str:
    """The figures from batch to batch, and at which if these are no usual ones."""
    batches = sorted(batch for batch in by_batch if batch is not None)
    if not batches:
        return by_batch[None]
    where = {(1, 8, 32): "", (1, 8): ""}.get(tuple(batches), f" at {' / '.join(map(str, batches))}")
    return f"{' / '.join(by_batch[batch] for batch in batches)}{where}"


def _table(cells: _Cells, columns: Sequence[str]) -> str:
    shown = [name for name in columns if any(name in line for line in cells.values())]
    if not shown:
        return ""
    lines = [[model, cpu, *(line.get(name, "") for name in shown)] for (model, cpu), line in sorted(cells.items())]
    return markdown_table(("model", "CPU", *shown), lines, right=set(range(2, len(shown) + 2)))


def _wrapped(sentences: Sequence[str] | Iterator[str]) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False) + "\n"


_SAVED_NOTE = (
    f"Times as fast as all layers, at batch 1 / 8 / 32 unless another is named; {_MISSED} misses a goal of this "
    "project. *A quarter of the layers*: a decode step along one path for all. *Mixed stream*: requests at the paper's "
    "depths, the decode steps of `cohort` over those of the same requests at full depth. *Step time over its floor*: a "
    "decode step of all layers over its matrix products and the reading of its keys and values, 1 is ideal."
)


def _quality(path: Path) -> Iterator[str]:
    """What the shallower paths of the model in the box cost, where that was measured."""
    if not path.is_file():
        return
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [row for row in rows if row["what"] == "loss"]
    most = max(row["num_rows"] for row in losses)
    tuned = {row["layers"]: row["value"] for row in losses if row["model"] == "tuned" and row["num_rows"] == most}
    untuned = {row["layers"]: row["value"] for row in losses if row["rule"] == "uniform" and row["model"] == "untuned"}
    depths = sorted(tuned, reverse=True)
    shallow = min(untuned)
    yield (
        "Speed is not quality: the loss of smollm2-135m-paths is "
        f"{' / '.join(f'{tuned[depth]:.2f}' for depth in depths)} nats a token along its paths of "
        f"{' / '.join(map(str, depths))} layers ({most:,} references), that of SmolLM2 as it came, along a uniform "
        f"path of {shallow}, {untuned[shallow]:.1f}, which is no text at all: lines of models that were not trained "
        "along paths are timings alone."
    )


def _notes(older: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        f"Times as fast as the other engine, at batch 1 / 8 / 32, of prompts of {_LONG} at 1 / 8; below 1 is slower. "
        "All layers, but in the *mixed stream*, which vLLM runs at full depth, the only one that it knows. Streams: "
        f"256 requests, prompts of {STREAM_PROMPT_LEN}, outputs geometric with a mean of {MEAN_OUTPUT}, at most "
        f"{STREAM_BATCH} in a step."
    )
    if older:
        yield (
            f"Those of {', '.join(older)} are one stream each, with prefix caching in dynskip alone; the others three "
            "and without."
        )
    first, *_, last = sorted(run["date"] for run in [*runs, *runs])
    commits = {run["commit"] for run in runs}
    yield (
        "Both tables: bfloat16 but where a column says otherwise, 2 threads on 2 cores; opt-1.3b and llama-3.2-1b are "
        "random weights of these shapes, and so are all in the columns of the quarter and of the floor. Measured from "
        f"{first} to {last} at {len(commits)} commits."
    )
