"""The table of measured streams, from the JSON lines that `bench/serving.py` leaves."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynskip.benchmark.report import markdown_table

# The lines of one batch, by part and name.
Lines = Mapping[tuple[str, str], Mapping[str, Any]]
# What one model left on one machine: the lines of each file, the first of them its conditions.
Files = Mapping[Path, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Question:
    """What a row of the table answers.

    part, name: whose lines it is about; batches without one stay empty. figure: of that line, or of the line ``of`` the
    same part. by: the figure of the line that it is divided by. form: how it is written. least: what it should reach,
    for a batch or (None) for any. of_models: the same for models that have bars of their own.
    """

    what: str
    part: str
    name: str
    figure: str
    by: str = ""
    of: str = ""
    form: str = "{:.2f}x"
    least: Mapping[int | None, float] = field(default_factory=dict)
    of_models: Mapping[str, Mapping[int | None, float]] = field(default_factory=dict)

    def cell(self, model: str, batch: int, lines: Lines) -> str:
        """The figure of a batch, and whether it misses what it should reach; empty where there is none."""
        line = lines.get((self.part, self.name))
        if line is None:
            return ""
        value = lines[self.part, self.of or self.name][self.figure] / (line[self.by] if self.by else 1)
        least = self._least(model, batch)
        return self.form.format(value) + (" (missed)" if least is not None and value < least else "")

    def target(self, model: str, batches: Iterable[int]) -> str:
        """What each of the batches should reach, what is the same for all of them once."""
        leasts = (least for batch in batches if (least := self._least(model, batch)) is not None)
        return " / ".join(dict.fromkeys(f">= {self.form.format(least)}" for least in leasts))

    def row(self, model: str, batches: Mapping[int, Lines]) -> list[str] | None:
        """The cells: the question, a figure per batch, and what it should reach. None where there is no figure."""
        cells = [self.cell(model, batch, lines) for batch, lines in batches.items()]
        measured = [batch for batch, cell in zip(batches, cells, strict=True) if cell]
        return [self.what, *cells, self.target(model, measured)] if measured else None

    def _least(self, model: str, batch: int) -> float | None:
        least = self.of_models.get(model, self.least)
        return least.get(batch, least.get(None))


_COHORT = ("stream", "cohort")
# What a stream should reach is said of a model: layers of others cost, and paths go together, as they do.
_IDEAL: dict[str, Any] = {
    "form": "{:.0%}",
    "of_models": {"opt-mini": {16: 0.90, 32: 0.88}, "opt-1.3b shapes with random weights": {16: 0.95, 32: 0.94}},
}
_STATIC = ("static", "engine, cohort")
_PADDED = "full depth, over transformers' generate, left-padded, each batch to its longest output"
_LOCKSTEP = {"opt-mini": {16: 1.9, 32: 1.7}}
_QUEUE = {None: 0.98}
# The name that the line of the lowest queue of a batch has beside its own.
_WORST = "worst"
_BEYOND = (
    "More than 100% of the ideal is possible: runs differ by noise, full depth falls short of its own ideal, too, and "
    "the ideal comes from costs that were calibrated before"
)
# Those of the table over all models.
KEY_QUESTIONS = (
    Question("decode, cohort over full depth", *_COHORT, "decode_gain"),
    Question("decode, share of the ideal", *_COHORT, "decode_gain", "ideal_decode", **_IDEAL),
    Question("decode, cohort over lockstep", *_COHORT, "decode_s", "decode_s", of="lockstep", of_models=_LOCKSTEP),
    Question("worst queue, cohort over lockstep", "queues", _WORST, "over_lockstep", least=_QUEUE),
)
QUESTIONS = (
    *KEY_QUESTIONS,
    Question("with prefill, cohort over full depth", *_COHORT, "gain"),
    Question("with prefill, share of the ideal", *_COHORT, "gain", "ideal_all", **_IDEAL),
    *(
        Question(f"tokens/s, {name}", "stream", name, "tokens_per_s", form="{:.0f}")
        for name in ("full depth", "lockstep", "cohort")
    ),
    *(
        Question(f"layers that a step reads, {name}", "stream", name, "union", form="{:.1f}")
        for name in ("lockstep", "cohort")
    ),
    Question("longest wait for a token, share of W", *_COHORT, "longest_wait", "max_wait", form="{:.0%}"),
    Question("a closed batch, cohort over lockstep", "closed", "cohort", "over_lockstep", least={None: 1.0}),
    Question("full depth, over static batches", *_STATIC, "over_static", least={None: 1.0}),
    Question(_PADDED, *_STATIC, "over_transformers", least={None: 2.0}),
)


def _queue_questions(batches: Mapping[int, Lines]) -> list[Question]:
    """One for each queue that was timed under each kind of costs."""
    queues = {name: line for lines in batches.values() for (part, name), line in lines.items() if part == "queues"}
    return [
        Question(
            f"a queue of {line['requests']}, costs {line['costs']}, cohort over lockstep",
            "queues",
            name,
            "over_lockstep",
            least=_QUEUE,
        )
        for name, line in queues.items()
    ]


def serving_tables(paths: Sequence[Path], results: str = "bench/results") -> str:
    """A table per model and machine, each from all of its files among ``paths``; results: their folder, in links."""
    return "\n".join(_table(files, results) for files in _by_model(paths))


def key_table(paths: Sequence[Path]) -> str:
    """The key figures of the streams among ``paths``, a line per model, machine and batch, and their conditions."""
    streams = {}
    for files in _by_model(paths):
        found = _conditions(files, "stream")
        assert found is not None, "checked when the files were read"
        measured = {batch: lines for batch, lines in _batches(files).items() if _COHORT in lines}
        streams[found["model"], found["cpu"]] = (found, measured)
    rows = [
        [model, cpu, f"{found['mean_layers']:.1f} of {found['num_layers']}", str(batch)]
        + [question.cell(model, batch, _with_worst(lines)) for question in KEY_QUESTIONS]
        for (model, cpu), (found, measured) in sorted(streams.items())
        for batch, lines in measured.items()
    ]
    batches = sorted({batch for _, measured in streams.values() for batch in measured})
    models: dict[tuple[str, ...], list[str]] = {}  # by their targets
    for model in dict.fromkeys(model for model, _ in sorted(streams)):
        own = [row[4:] for row in rows if row[0] == model]
        targets = tuple(
            question.target(model, batches) if any(cells[column] for cells in own) else ""
            for column, question in enumerate(KEY_QUESTIONS)
        )
        models.setdefault(targets, []).append(model)
    for targets, names in models.items():
        if not any(targets):
            continue
        whose = f", {' and '.join(names)}" if len(models) > 1 else ""
        rows.append([f"target{whose}", "", "", " / ".join(map(str, batches)), *targets])
    header = ("model", "CPU", "mean layers", "batch", *(question.what for question in KEY_QUESTIONS))
    text = _key_note([found for found, _ in streams.values()])
    if any(_exceeds_ideal(measured) for _, measured in streams.values()):
        text += f" {_BEYOND}."
    table = markdown_table(header, rows, right=set(range(2, len(header))))
    return f"{table}\n{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n"


def key_figures(paths: Sequence[Path]) -> list[tuple[Mapping[str, Any], dict[int, float]]]:
    """Of each model and machine the conditions, and by batch how many times as fast `cohort` decodes as full depth."""
    found = []
    for files in _by_model(paths):
        conditions = _conditions(files, "stream")
        assert conditions is not None, "checked when the files were read"
        batches = {batch: lines[_COHORT] for batch, lines in _batches(files).items() if _COHORT in lines}
        found.append((conditions, {batch: float(line["decode_gain"]) for batch, line in batches.items()}))
    return found


def _with_worst(lines: Lines) -> Lines:
    queues = [line for (part, _), line in lines.items() if part == "queues"]
    worst = min(queues, key=lambda line: float(line["over_lockstep"]), default=None)
    return lines if worst is None else {**lines, ("queues", _WORST): worst}


def _key_note(streams: Sequence[Mapping[str, Any]]) -> str:
    """What is common to the conditions of ``streams``, and what their ratios are."""

    def each(name: str, form: str = "") -> str:
        return " or ".join(f"{value:{form}}" for value in sorted({found[name] for found in streams}))

    older = (
        " CPUs without family and model are those of runs before these were kept."
        if any("family" not in found["cpu"] and "AMD" in found["cpu"] for found in streams)
        else ""
    )
    return (
        f"{each('dtype')}, {each('num_threads')} threads, backend {each('backend')}.{older} Mean layers are those of "
        "the requests that were drawn. For each line the engine served the same requests at full depth, in lock-step "
        "and by cohort, interleaved in turns of a quarter of a second: "
        f"{each('requests', ',')} requests, all there at the beginning, with outputs geometric with a mean of "
        f"{each('mean_output', 'g')} tokens. A ratio divides the seconds that the decode steps of two whole streams "
        "cost; it is one number a run, no median. A queue is 32 to 256 requests and nobody after them, costs "
        "calibrated or predicted, with prefill."
    )


def _by_model(paths: Sequence[Path]) -> list[Files]:
    if not paths:
        raise ValueError("serving_tables: paths must name a file, got none. Run `python bench/serving.py`.")
    by_model: dict[tuple[str, str], dict[Path, list[dict[str, Any]]]] = {}
    for path in sorted(paths):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_model.setdefault((lines[0]["model"], lines[0]["machine"]), {})[path] = lines
    for files in by_model.values():
        if not any(line["part"] == "stream" for own in files.values() for line in own):
            raise ValueError(
                f"serving_tables: {', '.join(map(str, files))} must hold a stream, got other parts only. "
                "Run `python bench/serving.py --only stream`."
            )
    return list(by_model.values())


def _batches(files: Files) -> dict[int, dict[tuple[str, str], Mapping[str, Any]]]:
    """The lines of each batch, by part and name."""
    batches: dict[int, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for own in files.values():
        for line in own:
            if line["part"] in ("stream", "closed", "static", "queues"):
                batches.setdefault(line["batch"], {})[line["part"], line["name"]] = line
    return dict(sorted(batches.items()))


def _conditions(files: Files, part: str) -> Mapping[str, Any] | None:
    """The conditions of the file that holds ``part``; None where no file does."""
    return next((own[0] for own in files.values() if any(line["part"] == part for line in own)), None)


def _table(files: Files, results: str) -> str:
    batches = _batches(files)
    found = _conditions(files, "stream")
    assert found is not None, "checked when the files were read"
    questions = (*QUESTIONS, *_queue_questions(batches))
    rows = [row for question in questions if (row := question.row(found["model"], batches)) is not None]
    header = ("", *(f"batch {batch}" for batch in batches), "target")
    table = markdown_table(header, rows, right=set(range(1, len(batches) + 1)))
    pages = ", ".join(f"[{path.stem}.md]({results}/{path.stem}.md)" for path in files)
    text = " ".join([*_notes(files, batches), f"All that was measured: {pages}."])
    return f"{table}\n{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n"


def _notes(files: Files, batches: Mapping[int, Lines]) -> Iterator[str]:
    """The conditions of each part, and what its figures need to be understood."""
    found = _conditions(files, "stream")
    assert found is not None, "checked when the files were read"
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("dynskip", "torch"))
    rows = {f"{line['layers']:.2f}" for lines in batches.values() if (line := lines.get(("stream", "cohort")))}
    yield (
        f"{found['model']}, {found['dtype']}; {found['num_threads']} threads on {found['cpu']} ({found['num_cores']} "
        f"cores), backend {found['backend']}; {versions}; competitors take turns in one run. Streams: "
        f"{found['requests']:,} requests that are all there at the beginning, {found['prompts']}, outputs geometric "
        f"with a mean of {found['mean_output']:g} tokens; of {found['num_layers']} layers {found['mean_layers']:.2f} "
        f"per request, {' and '.join(sorted(rows))} per decoded row; {_origin(found)}."
    )
    if _exceeds_ideal(batches):
        yield f"{_BEYOND} ({found['calibrated']['date']})."
    texts = {
        "closed": "Closed batch: the first {batch} of these requests, and nobody after them",
        "static": "Static batches and transformers: the first {requests} of these requests at full depth, in batches "
        "of {batch}; transformers' generate pads prompts on the left and decodes each batch to its longest output",
        "queues": "Queues: the first so many of these requests and nobody after them, with prefill, medians of three "
        "runs or more; costs calibrated, or predicted as where nothing is calibrated",
    }
    for part, text in texts.items():
        if (origin := _conditions(files, part)) is not None:
            line = next(line for lines in batches.values() for (kind, _), line in lines.items() if kind == part)
            yield f"{text.format(**line)}; {_origin(origin)}."
    origin = _conditions(files, "overhead")
    for line in (line for own in files.values() for line in own):
        if line["part"] == "overhead" and line["name"] == "engine" and origin is not None:
            yield (
                f"Scheduler and bookkeeping took {line['share']:.1%} of a step with {line['resident']:.0f} resident "
                f"sequences and at most {line['batch']} rows (target: at most 3%"
                f"{', missed' * (line['share'] > 0.03)}); "
                f"{_origin(origin)}."
            )


def _exceeds_ideal(batches: Mapping[int, Lines]) -> bool:
    cohorts = (lines.get(("stream", "cohort")) for lines in batches.values())
    return any(line["decode_gain"] > line["ideal_decode"] for line in cohorts if line is not None)


def _origin(found: Mapping[str, Any]) -> str:
    return f"commit {found['commit']}, {found['date']}"
