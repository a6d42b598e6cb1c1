"""What a benchmark found: rows with a target and a verdict, as JSON lines and as Markdown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECTIONS = ("decode", "prefill", "paths", "mix", "overhead", "ctranslate2")

# The parts of a native call, in the order in which it counts them, and all that is not in one.
REST = "rest of the call"
INSIDE, OUTSIDE = ("products", "attention", REST), "outside of the call"

_WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One ratio, measured in one interleaved run.

    section: one of ``SECTIONS``. batch: sequences. what: what was measured against what.
    value: the ratio. target: what it should be, None where the row is for information.
    at_least: True where the value must not be below the target, False where it must not be above.
    ours_ms, other_ms: the medians that it comes from. num_samples: how often each was timed.
    low, high: the value's 95 % interval over rounds; None where it has none.
    lost_ms: by part the milliseconds of ours beyond those with which the value would be 1, negative where a part takes
        less; None where parts were not measured.
    failure: why nothing was measured; the numbers are NaN then.
    wrong: what was wrong with the results of what was timed; the numbers stand, and meet no target.
    """

    section: str
    batch: int
    what: str
    value: float
    target: float | None
    at_least: bool
    ours_ms: float
    other_ms: float
    num_samples: int
    failure: str = ""
    wrong: str = ""
    low: float | None = None
    high: float | None = None
    lost_ms: dict[str, float] | None = None

    @staticmethod
    def failed(section: str, batch: int, what: str, target: float | None, at_least: bool, failure: str) -> Row:
        """The row of a ratio that could not be measured."""
        nan = float("nan")
        return Row(section, batch, what, nan, target, at_least, nan, nan, 0, failure or "no reason given")

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None without a target, or where nothing was measured or its results are wrong."""
        if self.target is None or self.failure or self.wrong:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def is_share(self) -> bool:
        """True where the value is read as a percentage."""
        return self.section == "overhead" or "share of" in self.what

    @property
    def is_time(self) -> bool:
        """True where the value is no ratio but a time in microseconds."""
        return self.what.endswith(", us")

    def show(self, value: float) -> str:
        """``value`` as this row's ratio is written."""
        if self.failure:
            return "failed"
        return f"{value:.2f} us" if self.is_time else f"{value:.1%}" if self.is_share else f"{value:.2f}x"

    @property
    def interval(self) -> str:
        """The interval of the value, or nothing."""
        if self.low is None or self.high is None:
            return ""
        return f"{self.show(self.low)} to {self.show(self.high)}"

    @property
    def cell(self) -> str:
        """The value, and what is wrong with it."""
        return f"{self.show(self.value)}{' (wrong)' if self.wrong else ' (missed)' if self.passed is False else ''}"

    @property
    def shown_target(self) -> str:
        """The target with its direction, or nothing."""
        if self.target is None:
            return ""
        target = f"{self.target:.0%}" if self.is_share else f"{self.target:g}{' us' if self.is_time else 'x'}"
        return f"{'>=' if self.at_least else '<='} {target}"

    @property
    def verdict(self) -> str:
        """met, missed, failed, wrong, or a dash without a target."""
        if self.failure or self.wrong:
            return "FAILED" if self.failure else "WRONG"
        return {True: "met", False: "MISSED", None: "-"}[self.passed]

    def line(self) -> dict[str, Any]:
        """What a JSON line holds of it; numbers that were not measured are null."""
        values = {**asdict(self), "verdict": self.verdict}
        for name in ("failure", "wrong"):
            if not values[name]:
                del values[name]
        for name in ("low", "high", "lost_ms"):
            if values[name] is None:
                del values[name]
        return values | dict.fromkeys(("value", "ours_ms", "other_ms")) if self.failure else values

    @staticmethod
    def of_line(line: dict[str, Any]) -> Row:
        """The row that `line` described; raises TypeError for anything else."""
        values = {name: value for name, value in line.items() if name not in ("verdict", "conditions")}
        if values.get("failure"):
            values |= dict.fromkeys(("value", "ours_ms", "other_ms"), float("nan"))
        return Row(**values)


@dataclass(frozen=True)
class Report:
    """The rows of one run and what they were measured under.

    conditions: machine, versions, shapes, dtype, the best speed of memory and arithmetic that the run saw.
    skipped: what was not measured, with the reason.
    """

    conditions: dict[str, Any]
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    def lines(self) -> list[dict[str, Any]]:
        """What the JSON lines hold: each row, and each thing skipped, with all conditions."""
        lines = [{**row.line(), "conditions": self.conditions} for row in self.rows]
        lines += [{"skipped": name, "reason": why, "conditions": self.conditions} for name, why in self.skipped.items()]
        return lines

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write ``<shape>-<machine>.jsonl``, a line a row with all conditions, and ``.md``; returns both paths."""
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{self.conditions['shape']}-{self.conditions['machine']}"
        data, page = (directory / f"{name}{suffix}" for suffix in (".jsonl", ".md"))
        data.write_text("".join(json.dumps(line) + "\n" for line in self.lines()), encoding="utf-8")
        page.write_text(self.page(), encoding="utf-8")
        return data, page

    def page(self) -> str:
        """What stands in ``<shape>-<machine>.md``."""
        return f"# {self.conditions['shape']} on {self.conditions['cpu']}\n\n{self.markdown()}"

    @staticmethod
    def read(path: Path) -> Report:
        """The report that ``write`` left at ``path``; raises ValueError where the file is something else."""
        rows, skipped, conditions = [], {}, None
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = json.loads(text)
                found = line.pop("conditions")
                if "skipped" in line:
                    skipped[line["skipped"]] = line["reason"]
                else:
                    rows.append(Row.of_line(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"Report.read: {path} must hold rows of a report, got line {number}: {error!r}."
                ) from error
            if conditions is not None and found != conditions:
                raise ValueError(f"Report.read: {path} must hold one run, got other conditions in line {number}.")
            conditions = found
        if conditions is None:
            raise ValueError(f"Report.read: {path} must hold at least one row, got none. Run `dynskip bench --out`.")
        return Report(conditions, tuple(rows), skipped)

    def markdown(self) -> str:
        """Conditions in words, then every row with its target and verdict."""
        cells: list[tuple[str, ...]] = [
            (
                row.section,
                str(row.batch),
                row.what,
                f"{row.ours_ms:.1f}",
                f"{row.other_ms:.1f}",
                row.show(row.value),
                row.interval,
                row.shown_target,
                row.verdict,
            )
            for row in self.rows
        ]
        header = ["section", "batch", "what", "dynskip ms", "other ms", "value", "95 %", "target", "verdict"]
        columns = [place for place in range(len(header)) if header[place] != "95 %" or any(row[place] for row in cells)]
        header, cells = [header[place] for place in columns], [tuple(row[place] for place in columns) for row in cells]
        right = {place for place, name in enumerate(header) if name not in ("section", "what", "target", "verdict")}
        text = f"{self.conditions_text()}\n\n{markdown_table(header, cells, right=right)}"
        for name, why in self.skipped.items():
            text += f"\nNot measured: {name}. {why}\n"
        return text + self._parts() + self._losses()

    def _parts(self) -> str:
        """Where the milliseconds of a decode step and of a prefill go, by path and batch, and steps' roofline."""
        text, floors = "", self.conditions.get("roofline_ms", {})
        for name, of in (("parts_ms", "a decode step"), ("prefill_parts_ms", "a prefill")):
            measured: dict[str, dict[str, float]] = self.conditions.get(name, {})
            if not measured:
                continue
            parts = list(dict.fromkeys(part for step in measured.values() for part in step))
            cells = [(part, *(f"{step.get(part, 0.0):.2f}" for step in measured.values())) for part in parts]
            if name == "parts_ms":
                # A roofline is that of all layers: it stands below the columns of full depth.
                cells.append(("roofline", *(_optional(floors, path) for path in measured)))
            table = markdown_table(("ms", *measured), cells, right=set(range(1, len(measured) + 1)))
            text += f"\nParts of {of}, by path and batch:\n\n{table}"
        return text

    def _losses(self) -> str:
        """Of each row that misses what it could have, where the time went that is too much."""
        missed = [(row, row.lost_ms) for row in self.rows if row.passed is False and row.lost_ms]
        if not missed:
            return ""
        parts = list(dict.fromkeys(part for _, lost in missed for part in lost))
        cells = [
            (row.what, str(row.batch), f"{sum(lost.values()):+.2f}", *(f"{lost[part]:+.2f}" for part in parts))
            for row, lost in missed
        ]
        table = markdown_table(("missed", "batch", "ms too many", *parts), cells, right=set(range(1, len(parts) + 3)))
        return (
            "\nWhere the time of what is missed goes: milliseconds beyond those that the value would be 100 %, or 1x, "
            "with, by part.\n"
            "A path is allowed each part of full depth over the allowed speed-up; a step its products, keys and "
            f"values.\n\n{table}"
        )

    def conditions_text(self) -> str:
        """The conditions in lines of at most 120 characters."""
        return textwrap.fill(self.conditions_words(), _WIDTH)

    def conditions_words(self) -> str:
        """The conditions in two sentences."""
        found = self.conditions
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
        return (
            f"{found['shape']} shapes, random {found['dtype']} weights, prompt {found['prompt_len']}, "
            f"{found['num_threads']} threads on {found['cpu']} ({found['num_cores']} cores, {found['isa']}, "
            f"{found['bandwidth_gbps']:.0f} GB/s and {found['peak_gflops']:.0f} GFLOP/s at best in this run), "
            f"backend {found['backend']}; medians, everything timed in turns in one run. {versions}; "
            f"commit {found['commit']}, {found['date']}, load {found['load'][0]} before the run."
        )


def _optional(floors: dict[str, float], name: str) -> str:
    path, _, batch = name.partition(" ")
    return f"{floors[batch]:.2f}" if path == "full" and batch in floors else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: set[int]) -> str:
    """A Markdown table whose columns are aligned in the source as well; the columns ``right`` to the right."""
    rows = [list(row) for row in rows]
    widths = [max(3, *(len(row[i]) for row in [list(header), *rows])) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i in right else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)]) + "\n"
