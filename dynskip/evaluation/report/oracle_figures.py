"""The figures of the oracle, of routers that stand in for it, and of the depths that it chooses."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dynskip.evaluation.report import claims
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.document import Drawing
from dynskip.evaluation.report.drawing import (
    STYLES,
    band,
    count_layers,
    drawing_of,
    drawn,
    forest,
    keep_in_view,
    legend_below,
    points,
)
from dynskip.evaluation.report.figures import FEATURES
from dynskip.evaluation.report.rows import Row, curves_of, distinct, find, mapped, score_suffix, select

# What a curve is, and its name in the summary on greedy outputs and on sampled ones, empty for none.
CURVES = (
    ("oracle, judged on what it chose on", "oracle", "in-sample"),
    ("the same choice among outputs of one depth", "equal depth, greedy", "equal depth"),
    ("chosen on one output, judged on another", "", "cross-fitted"),
    ("chosen on means of outputs, judged on others", "cross-fitted greedy", "cross-fitted means"),
    ("random, the oracle's depths", "random, as the oracle's", "random, as in-sample"),
    ("null model: noise alone", "null", ""),
    ("best mix of fixed budgets", "static mixture", ""),
)
# Intervals of all curves would hide each other.
SHADED = frozenset(("oracle", "in-sample", "cross-fitted", "cross-fitted greedy", "null"))
CONTROLS = {
    "oracle": "oracle, greedy outputs",
    "in-sample": "oracle, sampled outputs",
    "cross-fitted": "cross-fitted, one output each",
    "cross-fitted means": "cross-fitted, means of outputs",
    "cross-fitted greedy": "chosen on sampled, judged on greedy",
    "equal depth": "equal depth, best of as many outputs",
    "equal depth, greedy": "as many paths of one depth, greedy outputs",
    "null": "null model",
}
# What chooses by log-likelihood, and the controls of one depth.
IN_NATS = {
    "oracle": "oracle, a depth a sequence",
    "equal depth, greedy": "as many paths of one depth, one a sequence",
    "oracle per token": "oracle, a depth a token",
    "equal depth per token": "as many paths of one depth, one a token",
}
_MOST_PANELS = 4  # beside each other
READS = {
    "embedding": "embeddings",
    "state": "state",
    "all": "both",
    "entropy": "entropy",
}


@drawn(
    "oracle-{}",
    "Two charts of mean ROUGE-L by mean layers, the oracle's curve and its controls on greedy and on sampled outputs, "
    "the oracle's as shares of full depth beside the paper's points, and the share of sequences that the oracle gives "
    "each depth, {}.",
    10.0,
    9.0,
)
def oracle(figure: Any, section: Row, family: str) -> None:
    """The oracle's curve over mean budgets with its controls, on greedy and on sampled outputs, as shares of full depth
    beside what the paper reports, and its histogram."""
    curves = curves_of(section, family)
    if (null := claims.null_band(section, family)) is not None:
        curves["null"] = null
    (greedy, sampled), (relative, chosen) = figure.subplots(2, 2)
    sampled.sharey(greedy)
    for axes, column, metric in ((greedy, 0, "mean"), (sampled, 1, "mean_sampled")):
        for style, (label, *names) in enumerate(CURVES, 1):
            name = names[column]
            if name in curves:
                band(axes, curves[name], label, style, shaded=name in SHADED)
        means = select(section, metric=metric, family=family)
        budgets = [row["budget"] for row in means]
        points(axes, budgets, means, "each budget alone", 0, linestyle="none", markerfacecolor="w")
        if means:
            axes.axhline(means[-1]["value"], color="#000000", linewidth=0.9, linestyle=(0, (2, 2)))
        count_layers(axes)
        axes.set_xlabel("mean layers executed")
    _beside_the_paper(relative, curves, select(section, metric="mean", family=family))
    greedy.set(title="greedy outputs", ylabel="mean ROUGE-L")
    sampled.set(title="sampled outputs")
    for histogram in section.get("histogram", ()):
        if histogram["family"] == family:
            _histogram(chosen, histogram)
    legend_below(figure, (greedy, sampled, relative), columns=2)


@drawn(
    "oracle-nats-{}",
    "Two charts by mean layers, {}: the nats a token of each budget, of the best of all up to it and of oracles that "
    "choose for each sequence and for each token, and what these gain over dealing their depths at random, beside as "
    "many paths of one depth.",
    10.0,
    4.8,
)
def oracle_nats(figure: Any, section: Row, family: str) -> None:
    """What an oracle by the log-likelihood of references scores and gains, beside its controls of one depth."""
    scores, gains = figure.subplots(1, 2)
    for style, (label, metric) in enumerate(
        (("each budget alone", "mean_nats"), ("best of all up to it", "best_up_to_nats"))
    ):
        rows = select(section, metric=metric, family=family)
        points(scores, [row["budget"] for row in rows], rows, label, style)
    for style, (control, label) in enumerate(IN_NATS.items(), 2):
        at = {"family": family, "control": control}
        chosen = [mapped(row, lambda value: -value) for row in select(section, metric="score_nats", **at)]
        gained = select(section, metric="gain_nats", **at)
        if "equal" not in control:
            points(scores, [row["at"] for row in chosen], chosen, label, style, linestyle="none")
        points(gains, [row["at"] for row in gained], gained, label, style)
    scores.set(title="score", ylabel="nats a token (less is better)")
    gains.set(title="gain over the same depths at random", ylabel="nats a token (more is better)")
    gains.axhline(0.0, color="#000000", linewidth=0.8, linestyle="--")
    for axes in (scores, gains):
        axes.set_xlabel("mean layers executed")
        count_layers(axes)
    legend_below(figure, (scores, gains), columns=2)


# The paper's points have no line, no filling and no colour: they are of another model.
_PAPERS = (
    ("the paper's oracle, OPT-1.3B", "x", paper.ORACLE_ROUGE_L),
    ("the paper's fixed budgets, OPT-1.3B", "+", paper.STATIC_ROUGE_L),
)


def _beside_the_paper(axes: Any, curves: Mapping[str, Row], means: Sequence[Row]) -> None:
    """Draw the greedy curves that the paper has points of, and these, over layers and ROUGE-L of full depth."""
    if means and means[-1]["value"]:
        num_layers, full = means[-1]["budget"], means[-1]["value"]
        for style, (label, name, _) in enumerate(CURVES, 1):
            if name in _OF_THE_PAPER and name in curves:
                band(axes, _of_full(curves[name], num_layers, full), label, style, shaded=name in SHADED)
        own = [mapped(row, lambda value: value / full) for row in means]
        shares = [row["budget"] / num_layers for row in means]
        points(axes, shares, own, "each budget alone", 0, linestyle="none", markerfacecolor="w")
    for label, marker, known in _PAPERS:
        places = [budget / paper.NUM_LAYERS for budget in known]
        values = [value / paper.STATIC_ROUGE_L[paper.NUM_LAYERS] for value in known.values()]
        look = {"color": "#000000", "marker": marker, "markersize": 9, "markeredgewidth": 1.8, "linestyle": "none"}
        axes.plot(places, values, label=label, **look)
    axes.axhline(1.0, color="#000000", linewidth=0.9, linestyle=(0, (2, 2)))
    axes.set(
        title="greedy outputs, of full depth", xlabel="share of the layers", ylabel="share of full depth's ROUGE-L"
    )


_OF_THE_PAPER = ("oracle", "static mixture")


def _of_full(curve: Row, num_layers: int, full: float) -> Row:
    """``curve`` with budgets as shares of the layers, and scores of full depth's."""
    scores = {name: [value / full for value in curve[name]] for name in ("values", "low", "high") if curve.get(name)}
    return {**curve, **scores, "budgets": [budget / num_layers for budget in curve["budgets"]]}


def _histogram(axes: Any, histogram: Row) -> None:
    """Draw the per cent of sequences that the oracle gives each depth."""
    counts = histogram["counts"]
    shares = [100 * count / sum(counts.values()) for count in counts.values()]
    bars = axes.bar(list(counts), shares, color="#bbbbbb", edgecolor="#000000", width=0.7)
    axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.grid(axis="x", visible=False)
    axes.set(title=f"oracle at {histogram['at']:.1f} layers", xlabel="layers", ylabel="% of sequences")


def surviving(section: Row, family: str) -> Drawing:
    """What of the oracle's gain is left under each control."""
    rows = select(section, metric="surviving_share", family=family)
    labels = [f"{CONTROLS.get(row['control'], row['control'])}, at {row['at']:g} layers" for row in rows]
    alt = "The share of the oracle's gain that is left under each control, a line each, with intervals."
    return _forest(f"surviving-{family}", alt, rows, labels, 9.6, 0.27)


def router(section: Row) -> Drawing:
    """The share of the oracle's gain that each prompt-only router captures; of some there is no gain to share."""
    names = ("family", "predictor", "at")
    routers = [{name: row.get(name) for name in names} for row in select(section, metric="rouge_l")]
    rows = [find(section, metric="captured_share", **each) or {"value": None} for each in routers]
    labels = [f"{each['predictor']}, budget {each['at']:g} ({each['family']})" for each in routers]
    alt = "The share of the oracle's gain that each router captures, a line each, with intervals."
    return _forest("router", alt, rows, labels, 9.0, 0.32)


@drawn(
    "router-nats-{}",
    "Two charts by the number of prompts that routers learned from, a line a router, {}: the share of the oracle's "
    "gain that they capture, and the nats a token that they gain over the best mix of fixed budgets, and the oracle's.",
    10.0,
    4.8,
)
def learning_curves(figure: Any, section: Row, family: str) -> None:
    """What routers capture of the oracle's gain, and gain over fixed budgets, by the prompts that they learned from."""
    shares, gains = figure.subplots(1, 2)
    captured = select(section, metric="captured_share_nats", family=family)
    sizes = sorted(distinct(captured, "size"))
    routers = list(dict.fromkeys((row["predictor"], row["features"], row["at"]) for row in captured))
    several = len({at for *_, at in routers}) > 1
    for style, (predictor, features, at) in enumerate(routers):
        name = {"family": family, "predictor": predictor, "features": features, "at": at}
        label = f"{predictor}, {READS.get(features, features)}" + (f", budget {at:g}" if several else "")
        aside = 1 + 0.025 * (style - len(routers) / 2)  # so that bars of several routers do not cover each other
        for axes, metric in ((shares, "captured_share_nats"), (gains, "over_static_nats")):
            rows = sorted(select(section, metric=metric, **name), key=lambda row: row["size"])
            points(axes, [aside * row["size"] for row in rows], rows, label, style)
        reached = _oracles_over_static(section, name)
        look = {"color": STYLES[style % len(STYLES)]["color"], "marker": "_", "markersize": 9, "linestyle": "none"}
        sizes_aside = [aside * size for size in reached]
        gains.plot(sizes_aside, list(reached.values()), label="the oracle at a router's cost", **look)
    shares.axhline(1.0, color="#000000", linewidth=0.8, linestyle=":")
    shares.set(title="share of the oracle's gain", ylabel="0: the same depths at random, 1: the oracle")
    gains.set(title="over the best mix of fixed budgets", ylabel="nats a token (more is better)")
    for axes in (shares, gains):
        axes.axhline(0.0, color="#000000", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel="prompts learned from")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
    legend_below(figure, (shares, gains), columns=4)


def _oracles_over_static(section: Row, labels: Row) -> dict[int, float]:
    """By prompts learned from what the oracle gains over the best mix of fixed budgets at a router's own mean cost."""
    found = [select(section, metric=f"{name}_nats", **labels) for name in ("oracle", "score", "over_static")]
    values = [{row["size"]: row["value"] for row in rows} for rows in found]
    everywhere = [size for size in values[2] if size in values[0] and size in values[1]]
    return {size: values[0][size] - values[1][size] + values[2][size] for size in everywhere}


def _forest(
    name: str,
    alt: str,
    rows: Sequence[Row],
    labels: Sequence[str],
    width: float,
    line_height: float,
    shares: bool = True,
) -> Drawing:
    """Shares of the oracle's gain, or correlations with the depths that it chooses, one a line."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 1)
        forest(axes, rows, labels)
        if shares:
            axes.axvline(1.0, color="#000000", linewidth=0.8, linestyle=":")
            axes.set_xlabel("share of the oracle's gain over random assignment (0: none, 1: all)")
            keep_in_view(axes, rows)
        else:
            axes.set_xlabel("Spearman's correlation with the chosen depth")

    return drawing_of(name, alt, draw, width, 1.1 + line_height * len(rows))


def depth(section: Row, family: str, score: str = "") -> Drawing:
    """The oracle's chosen depth against lengths and losses, in bins of equally many sequences.

    score: "" of the depths by the score that the section is about, "_nats" of those by log-likelihood.
    """
    rows = select(section, metric=f"binned_depth{score or score_suffix(section)}", family=family)
    features = distinct(rows, "feature")
    columns = max(min(len(features), _MOST_PANELS), 1)
    lines = max(-(-len(features) // columns), 1)

    def draw(figure: Any) -> None:
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes, feature in zip(panels.flat, features, strict=False):
            bins = [row for row in rows if row["feature"] == feature]
            for style, at in enumerate(distinct(bins, "at")):
                chosen = [row for row in bins if row["at"] == at]
                middles = [row.get("bin_median", (row["bin_low"] + row["bin_high"]) / 2) for row in chosen]
                points(axes, middles, chosen, f"mean budget {at:g}", style)
            axes.set_xlabel(textwrap.fill(FEATURES.get(feature, feature), 26))
            axes.locator_params(axis="x", nbins=4)
        for axes in [*panels.flat][len(features) :]:
            axes.set_visible(False)
        for first in panels[:, 0]:
            first.set_ylabel("mean chosen depth")
        legend_below(figure, panels.flat[0], columns=4)

    alt = (
        f"A chart a feature, {family}: the oracle's mean chosen depth by length, loss or entropy in bins, a line a "
        "mean budget."
    )
    return drawing_of(f"depth{score.replace('_', '-')}-{family}", alt, draw, 10.0, 0.7 + 2.7 * lines)


def correlations(rows: Sequence[Row], name: str) -> Drawing:
    """Correlations of chosen depth with each feature."""
    labels = [f"{FEATURES.get(row['feature'], row['feature'])}, budget {row['at']:g}" for row in rows]
    alt = "Rank correlations of the oracle's chosen depth with each feature, a line each, with intervals."
    return _forest(name, alt, rows, labels, 9.0, 0.3, shares=False)
