"""What benchmarks found on one card: a file of JSON lines, one a row, that grows run by run, and its page."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynskip.benchmark.report import Row, markdown_table

_WIDTH = 120


@dataclass(frozen=True)
class Run:
    """The rows of one run of one part of the benchmark; conditions: card, versions, commit, shapes, measured speed."""

    conditions: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def part(self) -> str:
        """Which part of the benchmark it is of."""
        return str(self.conditions["part"])

    @property
    def title(self) -> str:
        """The shape that was measured, and the part."""
        return f"{self.conditions['shape']}, {self.part}"


@dataclass(frozen=True)
class DeviceReport:
    """All runs that a file holds, the oldest first."""

    runs: tuple[Run, ...]

    @staticmethod
    def read(path: Path) -> DeviceReport:
        """The report in the file ``path``; raises ValueError where the file is something else."""
        runs: list[tuple[dict[str, Any], list[Row]]] = []
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = json.loads(text)
                conditions = line["conditions"]
                assert conditions["gpu"] and conditions["part"]
                row = Row.of_line(line)
            except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
                raise ValueError(
                    f"DeviceReport.read: {path} must hold rows of a device's report, got line {number}: {error!r}."
                ) from error
            if not runs or runs[-1][0] != conditions:
                runs.append((conditions, []))
            runs[-1][1].append(row)
        if not runs:
            raise ValueError(f"DeviceReport.read: {path} must hold at least one row, got none. Run `make gpu`.")
        return DeviceReport(tuple(Run(conditions, tuple(rows)) for conditions, rows in runs))

    @property
    def latest(self) -> tuple[Run, ...]:
        """The last rows of each part, shape and batch, by run; parts in the order in which they first ran."""
        last = {(run.title, row.batch): run for run in self.runs for row in run.rows}
        titles = list(dict.fromkeys(run.title for run in self.runs))
        kept = [
            Run(run.conditions, tuple(row for row in run.rows if last[run.title, row.batch] is run))
            for run in sorted(self.runs, key=lambda run: titles.index(run.title))
        ]
        return tuple(run for run in kept if run.rows)

    def page(self) -> str:
        """What stands in ``<card>.md``: the last rows of each part, shape and batch."""
        text = f"# {self.runs[-1].conditions['gpu']}\n"
        for run in self.latest:
            header = ("rows", "what", "dynskip us", "other us", "value", "target", "verdict")
            cells = [
                (
                    str(row.batch),
                    row.what,
                    _microseconds(row.ours_ms),
                    _microseconds(row.other_ms),
                    row.show(row.value),
                    row.shown_target,
                    row.verdict,
                )
                for row in run.rows
            ]
            table = markdown_table(header, cells, right={0, 2, 3, 4})
            text += f"\n## {run.title}\n\n{conditions_text(run.conditions)}\n\n{table}"
            for title, found in (
                ("Not measured", [(row, row.failure) for row in run.rows if row.failure]),
                ("Wrong results, timed all the same", [(row, row.wrong) for row in run.rows if row.wrong]),
            ):
                if found:
                    lines = (f"- {row.what}, {row.batch} rows: {reason}\n" for row, reason in found)
                    text += f"\n{title}:\n\n{''.join(lines)}"
        return text

    def summary(self) -> str:
        """Every question that has a target, one line each, one column per row count: the card's table in the README."""
        asked = [(run, row) for run in self.latest for row in run.rows if row.target is not None]
        counts = sorted({row.batch for _, row in asked})
        lines: dict[str, dict[int, Row]] = {}
        for run, row in asked:
            section, *switches = run.part.split(", ")
            of = ", ".join([run.conditions["shape"], section.partition(" ")[0], *switches])
            lines.setdefault(f"{of}: {row.what}", {})[row.batch] = row
        cells = []
        for name, found in lines.items():
            targets = " / ".join(dict.fromkeys(row.shown_target for row in found.values()))
            cells.append((name, *(found[count].cell if count in found else "" for count in counts), targets))
        header = ("", *(f"{count} rows" for count in counts), "target")
        table = markdown_table(header, cells, right=set(range(1, len(counts) + 1)))
        return f"{table}\n{_common_conditions([run.conditions for run in self.latest])}\n"


def append_row(directory: Path, row: Row, conditions: dict[str, Any]) -> Path:
    """Append ``row`` with all ``conditions`` to ``<card>.jsonl`` in ``directory``; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{conditions['machine']}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row.line(), "conditions": conditions}) + "\n")
    return path


def conditions_of_run(directory: Path, machine: str, run: str) -> dict[str, Any] | None:
    """The conditions under which the run called ``run`` last appended a row there; None where it has not yet."""
    path = directory / f"{machine}.jsonl"
    if path.exists():
        for text in reversed(path.read_text(encoding="utf-8").splitlines()):
            conditions: dict[str, Any] = json.loads(text)["conditions"]
            if conditions.get("run") == run:
                return conditions
    return None


def write_page(data: Path) -> Path:
    """Write ``<card>.md`` beside ``<card>.jsonl``; returns the page."""
    page = data.with_suffix(".md")
    page.write_text(DeviceReport.read(data).page(), encoding="utf-8")
    return page


def conditions_text(found: dict[str, Any]) -> str:
    """The conditions in words, in lines of at most 120 characters."""
    return _common_conditions([found])


def _common_conditions(runs: Sequence[dict[str, Any]]) -> str:
    """The same of several runs on one card: what differs is listed, measured speeds as a range."""
    first = runs[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items() if version)
    notes = dict.fromkeys(note for found in runs for note in found.get("notes", ()))
    shapes, dtypes = (" and ".join(dict.fromkeys(found[key] for found in runs)) for key in ("shape", "dtype"))
    commits = dict.fromkeys(f"{found['commit']}, {found['date']}" for found in runs)
    text = (
        f"{shapes} shapes, random {dtypes} weights on {first['gpu']} ({first['gpu_memory_gib']:g} GiB, copies "
        f"{_span(found['bandwidth_gbps'] for found in runs)} GB/s, multiplies "
        f"{_span(found['peak_gflops'] / 1e3 for found in runs)} TFLOP/s at best in "
        f"{'this run' if len(runs) == 1 else 'these runs'}); medians of device time, everything timed in turns in one "
        f"run. {''.join(f'{note} ' for note in notes)}{versions}; commit {'; '.join(commits)}."
    )
    return textwrap.fill(text, _WIDTH)


def _span(values: Iterable[float]) -> str:
    low, *_, high = sorted([*values] * 2)
    return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f}"


def _microseconds(ms: float) -> str:
    return "-" if ms != ms else f"{ms * 1e3:.4g}" if ms < 1 else f"{ms * 1e3:.0f}"
