"""The tables of what `dynskip bench` found on CPUs, one a machine, from the JSON lines of all models measured there."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from dynskip.benchmark.report import Report, Row, markdown_table

# What the rows of one model on one machine answer, by section, question and batch.
Rows = dict[tuple[str, str], dict[int, Row]]


def cpu_tables(reports: Mapping[Path, Report], folder: str) -> str:
    """A table per machine with the columns of each model, and below it the conditions of each file.

    reports: by file; several of one model and machine share its columns. folder: that of the files, in links.
    Raises ValueError where two files answer the same question.
    """
    machines: dict[str, dict[Path, Report]] = {}
    for path, report in reports.items():
        machines.setdefault(report.conditions["machine"], {})[path] = report
    return "\n".join(_table(found, folder) for found in machines.values())


def _table(reports: Mapping[Path, Report], folder: str) -> str:
    models = _by_model(reports)
    columns = [(name, batch) for name, rows in models.items() for batch in _batches(rows)]
    questions = dict.fromkeys(question for rows in models.values() for question in rows)
    cells = [
        (
            _words(*question),
            *(row.cell if (row := models[name].get(question, {}).get(batch)) else "" for name, batch in columns),
            _target({name: rows[question] for name, rows in models.items() if question in rows}),
        )
        for question in questions
    ]
    header = ("", *(f"{name}, batch {batch}" for name, batch in columns), "target")
    cpu = next(iter(reports.values())).conditions["cpu"]
    table = markdown_table(header, cells, right=set(range(1, len(columns) + 1)))
    return f"**{cpu}**\n\n{table}\n{''.join(_conditions(reports, folder))}"


def _by_model(reports: Mapping[Path, Report]) -> dict[str, Rows]:
    models: dict[str, Rows] = {}
    origin: dict[tuple[str, str, str, int], Path] = {}
    for path, report in reports.items():
        name = report.conditions["shape"]
        rows = models.setdefault(name, {})
        for row in report.rows:
            first = origin.setdefault((name, row.section, row.what, row.batch), path)
            if first != path:
                raise ValueError(
                    f"cpu_tables: {first} and {path} must answer different questions of {name} on one machine, got "
                    f"{_words(row.section, row.what)!r} at batch {row.batch} in both. Keep the one to be shown."
                )
            rows.setdefault((row.section, row.what), {})[row.batch] = row
    return models


def _batches(rows: Rows) -> list[int]:
    return sorted({batch for by_batch in rows.values() for batch in by_batch})


def _words(section: str, what: str) -> str:
    where = "prefill" if section == "prefill" or what.startswith("prefill") else "decode"
    return what if what.startswith(where) else f"{where}, {what}"


def _target(models: Mapping[str, Mapping[int, Row]]) -> str:
    """The targets of a question from batch to batch; by model where they differ."""
    texts = {
        name: " / ".join(filter(None, dict.fromkeys(row.shown_target for _, row in sorted(rows.items()))))
        for name, rows in models.items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)


def _conditions(reports: Mapping[Path, Report], folder: str) -> Iterator[str]:
    for path, report in reports.items():
        text = f"[{path.stem}]({folder}/{path.stem}.md): {report.conditions_words()}"
        for name, why in report.skipped.items():
            text += f" Not measured: {name}. {why}"
        lines = textwrap.fill(
            text, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        yield f"{lines}\n"
