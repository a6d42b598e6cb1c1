"""The frontier as a table and as a figure, from the rows of a summary alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynskip.evaluation.report.drawing import series, svg
from dynskip.evaluation.report.rows import bounds, distinct, find, select

_TITLES = {
    "nats": "nats a response token",
    "agreement": "agreement with the full path",
    "agreement_path": "agreement, reading the full path's entries",
    "gain_own": "gain as a draft with entries of its own, predicted",
    "gain_path": "gain as a draft that reads the full path's entries, predicted",
}


def table(rows: Sequence[Mapping[str, Any]], families: Sequence[str]) -> str:
    """A block a metric, a line a budget, a column a family; intervals in brackets."""
    section = {"rows": rows}
    lines = []
    for metric in distinct(rows, "metric"):
        full = find(section, metric=metric, family="full")
        at_full = "" if full is None else f"; at full depth {_cell(full)}"
        lines += [f"{_TITLES[metric]}{at_full}", f"{'layers':>6}" + "".join(f"{family:>24}" for family in families)]
        for budget in distinct(select(section, metric=metric, family="found"), "budget"):
            cells = [_cell(find(section, metric=metric, family=family, budget=budget)) for family in families]
            lines.append(f"{budget:>6}" + "".join(f"{cell:>24}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


def figure(rows: Sequence[Mapping[str, Any]], families: Sequence[str]) -> str:
    """The SVG text of a panel for each metric, over layers."""
    section = {"rows": rows}
    metrics = distinct(rows, "metric")

    def draw(canvas: Any) -> None:
        panels = canvas.subplots(1, len(metrics), squeeze=False)[0]
        for axes, metric in zip(panels, metrics, strict=True):
            for style, family in enumerate(families):
                series(axes, select(section, metric=metric, family=family), "budget", family, style)
            full = find(section, metric=metric, family="full")
            if full is not None:
                axes.axhline(full["value"], color="#000000", linewidth=0.9, linestyle=(0, (2, 2)))
            axes.set(xlabel="layers", title=_TITLES[metric].replace(", ", ",\n"))
        handles, labels = panels[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="outside lower center", ncols=len(families))

    return svg("frontier", draw, 4.6 * len(metrics), 4.0)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    ends = bounds(row)
    return f"{row['value']:.3f}" + ("" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]")
