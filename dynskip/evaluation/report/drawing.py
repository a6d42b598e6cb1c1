"""How figures look: one style, readable in grey and by readers who tell colours apart with effort."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from dynskip.evaluation.report.rows import Row, bounds

# Every series has its own marker and its own line: colour, of Okabe and Ito's palette, only helps.
STYLES: Sequence[dict[str, Any]] = (
    {"color": "#000000", "marker": "o", "linestyle": "-"},
    {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    {"color": "#D55E00", "marker": "^", "linestyle": "-."},
    {"color": "#009E73", "marker": "D", "linestyle": ":"},
    {"color": "#7B3F99", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#8C6D00", "marker": "P", "linestyle": (0, (7, 2))},
    {"color": "#56707F", "marker": "X", "linestyle": (0, (1, 3))},
    {"color": "#B0306A", "marker": "*", "linestyle": (0, (3, 1, 1, 1))},
)
_SETTINGS: Any = {  # matplotlib types its settings as a set of literal names
    "svg.fonttype": "none",  # text stays text: small, sharp, and found by a search in the page
    "svg.hashsalt": "dynskip",  # the same figures give the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
}


def svg(name: str, draw: Callable[[Any], None], width: float = 9.0, height: float = 3.6) -> str:
    """The SVG text of a figure of ``width`` times ``height`` inches that ``draw`` fills, the same bytes each time.

    name: stands before every id in the text, so that figures can share a page.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return re.sub(r'(id="|="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :].rstrip("\n"))


def series(axes: Any, rows: Sequence[Row], along: str, label: str, style: int, shift: float = 0.0) -> None:
    """Draw ``rows`` as one line with interval bars, at the places that their label ``along`` gives.

    shift: moves the line sideways a little, so that bars of several lines do not cover each other.
    """
    rows = sorted(rows, key=lambda row: row[along])
    if rows:
        points(axes, [row[along] + shift for row in rows], rows, label, style)


def points(axes: Any, places: Sequence[float], rows: Sequence[Row], label: str, style: int, **options: Any) -> None:
    """Draw the values of ``rows`` at ``places`` as one line with interval bars."""
    look = {**STYLES[style % len(STYLES)], **options}
    values = [row["value"] for row in rows]
    ends = [bounds(row) or (row["value"], row["value"]) for row in rows]
    # A percentile interval may lie beside its value: a bar cannot be of negative length.
    below = [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)]
    axes.errorbar(places, values, yerr=[below, above], label=label, capsize=2.5, elinewidth=1.0, **look)


def band(axes: Any, curve: Row, label: str, style: int, shaded: bool) -> None:
    """Draw a curve of ``budgets`` and ``values`` with a marker here and there; ``shaded`` from ``low`` to ``high``."""
    look = STYLES[style % len(STYLES)]
    every = max(1, len(curve["budgets"]) // 10)
    # Markers of different curves stand at different places, so that curves on top of each other stay told apart.
    axes.plot(curve["budgets"], curve["values"], label=label, markevery=(style * every // 5, every), **look)
    if shaded and curve.get("low") and curve.get("high"):
        axes.fill_between(curve["budgets"], curve["low"], curve["high"], color=look["color"], alpha=0.12, linewidth=0)


def forest(axes: Any, rows: Sequence[Row], labels: Sequence[str], reference: float | None = 0.0) -> None:
    """Draw one value with its interval per line, the first on top, and a thin line at ``reference``."""
    places = list(range(len(rows)))[::-1]
    for place, row in zip(places, rows, strict=True):
        axes.plot(bounds(row) or [row["value"]] * 2, [place, place], color="#000000", linewidth=1.4)
        axes.plot([row["value"]], [place], color="#000000", marker="o", linestyle="none")
    if reference is not None:
        axes.axvline(reference, color="#000000", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, labels)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="y", visible=False)


def count_layers(axes: Any) -> None:
    """Let the horizontal axis be marked at whole layers, by fours where there are many."""
    from matplotlib.ticker import MultipleLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(MultipleLocator(4 if high - low > 8 else 1))


def keep_in_view(axes: Any, rows: Sequence[Row], low: float = -1.0, high: float = 2.0) -> None:
    """Cut the horizontal axis of shares at ``low`` and ``high``, so that one wide interval does not hide the others.

    Values themselves stay in view; intervals that go on beyond the edge are seen to do so.
    """
    values = [row["value"] for row in rows]
    ends = [end for row in rows for end in bounds(row) or ()]
    left = min([0.0, *values, max(low, min(ends, default=0.0))])
    right = max([1.0, *values, min(high, max(ends, default=1.0))])
    axes.set_xlim(left - 0.05 * (right - left), right + 0.05 * (right - left))
