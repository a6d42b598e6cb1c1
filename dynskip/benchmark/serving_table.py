"""The table of measured streams, from the JSON lines that `bench/serving.py` leaves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynskip.benchmark.report import markdown_table

# The lines of one batch, by part and name.
Lines = Mapping[tuple[str, str], Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """What a row of the table answers.

    part, name: whose lines it is about; batches without one stay empty. value: the figure, from that line and all
    lines of its batch. form: how it is written. least: what it should reach, for a batch or (None) for any.
    """

    what: str
    part: str
    name: str
    value: Callable[[Mapping[str, Any], Lines], float]
    form: str = "{:.2f}x"
    least: Mapping[int | None, float] = field(default_factory=dict)

    def row(self, batches: Mapping[int, Lines]) -> list[str] | None:
        """The cells: the question, a figure per batch, and what it should reach. None where there is no figure."""
        cells, targets = [], []
        for batch, lines in batches.items():
            line = lines.get((self.part, self.name))
            if line is None:
                cells.append("")
                continue
            value, least = self.value(line, lines), self.least.get(batch, self.least.get(None))
            cells.append(self.form.format(value) + (" (missed)" if least is not None and value < least else ""))
            targets.append("" if least is None else f">= {self.form.format(least)}")
        return [self.what, *cells, " / ".join(dict.fromkeys(filter(None, targets)))] if any(cells) else None


def _over_lockstep(line: Mapping[str, Any], lines: Lines) -> float:
    other_s: float = lines["stream", "lockstep"]["decode_s"]
    return other_s / line["decode_s"]


QUESTIONS = (
    Question("decode, cohort over full depth", "stream", "cohort", lambda line, _: line["decode_gain"]),
    Question(
        "decode, share of the ideal",
        "stream",
        "cohort",
        lambda line, _: line["decode_gain"] / line["ideal_decode"],
        "{:.0%}",
        {None: 0.85},
    ),
    Question("decode, cohort over lockstep", "stream", "cohort", _over_lockstep, least={16: 1.8, 32: 1.4}),
    Question("with prefill, cohort over full depth", "stream", "cohort", lambda line, _: line["gain"]),
    Question(
        "with prefill, share of the ideal",
        "stream",
        "cohort",
        lambda line, _: line["gain"] / line["ideal_all"],
        "{:.0%}",
        {None: 0.85},
    ),
    *(
        Question(f"tokens/s, {name}", "stream", name, lambda line, _: line["tokens_per_s"], "{:.0f}")
        for name in ("full depth", "lockstep", "cohort")
    ),
    *(
        Question(f"layers that a step reads, {name}", "stream", name, lambda line, _: line["union"], "{:.1f}")
        for name in ("lockstep", "cohort")
    ),
    Question(
        "longest wait for a token, share of W",
        "stream",
        "cohort",
        lambda line, _: line["longest_wait"] / line["max_wait"],
        "{:.0%}",
    ),
    Question(
        "a closed batch, cohort over lockstep",
        "closed",
        "cohort",
        lambda line, _: line["over_lockstep"],
        least={None: 1.0},
    ),
    Question(
        "full depth, over static batches",
        "static",
        "engine, cohort",
        lambda line, _: line["over_static"],
        least={None: 1.0},
    ),
    Question(
        "full depth, over transformers' generate",
        "static",
        "engine, cohort",
        lambda line, _: line["over_transformers"],
        least={None: 2.0},
    ),
)


def serving_tables(paths: Sequence[Path]) -> str:
    """A table per model and machine, each from all of its files among ``paths``."""
    if not paths:
        raise ValueError("serving_tables: paths must name a file, got none. Run `python bench/serving.py`.")
    by_model: dict[tuple[str, str], dict[Path, list[dict[str, Any]]]] = {}
    for path in sorted(paths):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_model.setdefault((lines[0]["model"], lines[0]["machine"]), {})[path] = lines
    return "\n".join(_table(files) for files in by_model.values())


def _table(files: Mapping[Path, Sequence[Mapping[str, Any]]]) -> str:
    batches: dict[int, dict[tuple[str, str], Mapping[str, Any]]] = {}
    lines = [line for own in files.values() for line in own]
    for line in lines:
        if line["part"] in ("stream", "closed", "static"):
            batches.setdefault(line["batch"], {})[line["part"], line["name"]] = line
    batches = dict(sorted(batches.items()))
    streams = [own for own in files.values() if any(line["part"] == "stream" for line in own)]
    if not streams:
        raise ValueError(
            f"serving_tables: {', '.join(map(str, files))} must hold a stream, got other parts only. "
            "Run `python bench/serving.py --only stream`."
        )
    rows = [row for question in QUESTIONS if (row := question.row(batches)) is not None]
    header = ("", *(f"batch {batch}" for batch in batches), "target")
    table = markdown_table(header, rows, right=set(range(1, len(batches) + 1)))
    notes = [
        f"Scheduler and bookkeeping took {line['share']:.1%} of a step with {line['resident']:.0f} resident sequences "
        "(target: at most 3%)."
        for line in lines
        if line["part"] == "overhead" and line["name"] == "engine"
    ]
    pages = ", ".join(f"[{path.stem}.md](bench/results/{path.stem}.md)" for path in files)
    text = " ".join([*notes, _conditions(streams[0][0]), f"All that was measured: {pages}."])
    return f"{table}\n{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n"


def _conditions(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("dynskip", "torch"))
    return (
        f"{found['model']}, {found['dtype']}, {found['requests']:,} requests that are all there at the beginning, "
        f"{found['prompts']}, outputs geometric with a mean of {found['mean_output']:g} tokens, a mean of "
        f"{found['mean_layers']:.2f} of {found['num_layers']} layers; {found['num_threads']} threads on "
        f"{found['cpu']} ({found['num_cores']} cores), backend {found['backend']}; the policies in turns in one run. "
        f"{versions}; commit {found['commit']}, {found['date']}."
    )
