"""How figures look: one style, readable in grey and by readers who tell colours apart with effort."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from dynskip.evaluation.report.document import Drawing
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


def drawing_of(name: str, alt: str, draw: Callable[[Any], None], width: float, height: float) -> Drawing:
    """The drawing ``name`` that ``draw`` fills, of ``width`` times ``height`` inches."""
    return Drawing(name, alt, svg(name, draw, width, height))


def drawn(name: str, alt: str, width: float, height: float) -> Callable[[Callable[..., None]], Callable[..., Drawing]]:
    """Makes a function that draws a section into a figure one that takes the section and gives the drawing.

    name, alt: of the drawing; of several of a kind with places for what follows the section.
    """

    def decorate(draw: Callable[..., None]) -> Callable[..., Drawing]:
        @wraps(draw)
        def drawing(section: Row, *more: Any) -> Drawing:
            called, told = name.format(*more), alt.format(*more)
            return drawing_of(called, told, lambda figure: draw(figure, section, *more), width, height)

        return drawing

    return decorate


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
        axes.fill_between(curve["budgets"], curve["low"], curve["high"], color=look["color"], alpha=0.15, linewidth=0)
        for edge in ("low", "high"):
            axes.plot(curve["budgets"], curve[edge], color=look["color"], linewidth=0.5)


def forest(axes: Any, rows: Sequence[Row], labels: Sequence[str], reference: float | None = 0.0) -> None:
    """Draw one value with its interval per line, the first on top, and a thin line at ``reference``.

    A row without a value is written to be undefined.
    """
    for place, row in zip(_places(rows), rows, strict=True):
        if row["value"] is None:
            axes.annotate("undefined", (0.0, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        axes.plot(bounds(row) or [row["value"]] * 2, [place, place], color="#000000", linewidth=1.4)
        axes.plot([row["value"]], [place], color="#000000", marker="o", linestyle="none")
    if reference is not None:
        axes.axvline(reference, color="#000000", linewidth=0.8, linestyle="--")
    axes.set_yticks(_places(rows), labels)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="y", visible=False)


def _places(rows: Sequence[Row]) -> range:
    return range(len(rows) - 1, -1, -1)


def count_layers(axes: Any) -> None:
    """Let the horizontal axis be marked at whole layers, by fours where there are many."""
    from matplotlib.ticker import MultipleLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(MultipleLocator(4 if high - low > 8 else 1))


def keep_in_view(axes: Any, rows: Sequence[Row], low: float = -1.0, high: float = 2.0) -> None:
    """Cut the horizontal axis of shares at ``low`` and ``high``, so that one wide interval does not hide the others.

    Values themselves stay in view; an arrow stands where an interval goes on beyond the edge.
    """
    values = [row["value"] for row in rows if row["value"] is not None]
    ends = [end for row in rows for end in bounds(row) or ()]
    left = min([0.0, *values, max(low, min(ends, default=0.0))])
    right = max([1.0, *values, min(high, max(ends, default=1.0))])
    edge = 0.05 * (right - left)
    axes.set_xlim(left - edge, right + edge)
    for place, row in zip(_places(rows), rows, strict=True):
        first, last = bounds(row) or (left, right)
        for beyond, at, marker in ((first < left, left - edge / 2, "<"), (last > right, right + edge / 2, ">")):
            if beyond:
                axes.plot([at], [place], color="#000000", marker=marker, linestyle="none")


def heat_map(axes: Any, values: Sequence[Sequence[float]], columns: Sequence[int], labels: Sequence[str]) -> None:
    """Draw ``values`` from 0 to 100 in greys, the first line on top, and the numbers from 1 on into their cells."""
    axes.pcolormesh(values, cmap="Greys", vmin=0.0, vmax=100.0, edgecolors="#dddddd", linewidth=0.5)
    for line, cells in enumerate(values):
        for column, value in enumerate(cells):
            if value >= 0.5:
                ink = "#ffffff" if value > 60 else "#000000"
                place = (column + 0.5, line + 0.5)
                axes.text(*place, f"{value:.0f}", color=ink, fontsize=7.5, ha="center", va="center_baseline")
    axes.set_xticks([place + 0.5 for place in range(len(columns))], columns, fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(length=0)


def legend_below(figure: Any, panels: Any, columns: int) -> None:
    """One legend under all panels, of the series of one panel or of several, each label once."""
    found: dict[str, Any] = {}
    for axes in panels if isinstance(panels, tuple) else (panels,):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def plain_log(axis: Any) -> None:
    """Mark a log axis with plain numbers, between the powers of ten as well where it spans few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
