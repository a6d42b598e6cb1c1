"""The figures of hidden states, budgets and controllers, redrawn from the rows of a summary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.document import Drawing
from dynskip.evaluation.report.drawing import (
    STYLES,
    band,
    count_layers,
    drawing_of,
    drawn,
    heat_map,
    legend_below,
    plain_log,
    points,
    series,
)
from dynskip.evaluation.report.rows import Row, distinct, find, mapped, score_suffix, select

STRATEGIES = {
    "uls": "uniform skipping (ULS)",
    "rls": "random skipping (RLS)",
    "rls-first": "random, layer 0 kept",
    "exit": "early exit (EE)",
}
FAMILIES = {
    "paths": "one set of weights, several paths",
    "siblings": "weights of their own per budget",
    "untuned": "full-depth weights, no tuning for paths",
    "backbone": "the weights before any tuning",
}
WEIGHTS = {
    "paths": "the weights shared by all paths",
    "full-tuned": "the weights tuned at full depth only",
    "backbone": "the weights before any tuning",
}
RULES = {  # those that are strategies too have the same place, so the same style
    "uniform": "uniform",
    "random": "random",
    "random-first": "random, layer 0 kept",
    "exit": "early exit",
    "influence": "most influence",
    "searched": "searched",
}
FEATURES = {
    "prompt_length": "prompt length",
    "response_length": "reference length",
    "generated_length": "length of the full model's output",
    "full_loss": "loss of the full model",
    "full_rouge_l": "ROUGE-L of the full model",
    "prefill_entropy": "entropy behind the prompt",
    "sd_of_draws": "deviation of the full model's draws",
    "sd_of_draw_lengths": "deviation of the draws' lengths",
}
# As the paper names what a controller reads, the kind here.
_PAPERS_KINDS = {"fixed input": "fixed", "hidden state": "hidden"}


@drawn(
    "hidden-{}",
    "Three charts on log scales by layers executed, a line a strategy, {}: 1 - cosine of final states, 1 - cosine as a "
    "mean over layers, divergence of predictions.",
    10.0,
    3.8,
)
def hidden_states(figure: Any, section: Row, weights: str) -> None:
    """Distance of hidden states, and divergence of predictions, by budget and strategy."""
    titles = {"final": "1 − cosine, final states", "layers": "1 − cosine, mean over layers", "kl": "KL (nats)"}
    panels = figure.subplots(1, 3)
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        for style, (strategy, label) in enumerate(STRATEGIES.items()):
            rows = _distances(section, metric, strategy=strategy, weights=weights)
            series(axes, rows, "budget", label, style)
        axes.set(title=title, xlabel="layers executed", yscale="log")
        axes.set_xticks(distinct(select(section, metric="kl", weights=weights), "budget"))
        plain_log(axes.yaxis)
    legend_below(figure, panels[0], columns=4)


def _distances(section: Row, metric: str, **labels: Any) -> list[Row]:
    """KL as it is, of final states the mean of log distances where a run has it, else 1 minus the mean cosine."""
    if metric == "kl":
        return select(section, metric="kl", **labels)
    if metric == "final" and (rows := select(section, metric="log_distance", **labels)):
        return [mapped(row, lambda exponent: 10**exponent) for row in rows]
    return [mapped(row, lambda cosine: 1 - cosine) for row in select(section, metric=f"cosine_{metric}", **labels)]


@drawn(
    "trajectory-{}",
    "A chart a budget, {}: 1 - cosine after each layer on a log scale, a line a strategy.",
    10.0,
    3.4,
)
def trajectories(figure: Any, section: Row, weights: str) -> None:
    """Distance of the states after each layer, a panel a budget; where the states are the same there is no point."""
    rows = select(section, metric="trajectory", weights=weights)
    budgets = distinct(rows, "budget")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        for style, (strategy, label) in enumerate(STRATEGIES.items()):
            along = select(section, metric="trajectory", weights=weights, strategy=strategy, budget=budget)
            apart = [mapped(row, lambda cosine: 1 - cosine) for row in along if row["value"] < 1]
            curve = {"budgets": [row["layer"] for row in apart], "values": [row["value"] for row in apart]}
            band(axes, curve, label, style, shaded=False)
        axes.set(title=f"{budget} layers", xlabel="after layer", yscale="log")
    panels[0].set_ylabel("1 − cosine")
    plain_log(panels[0].yaxis)
    legend_below(figure, panels[0], columns=4)


@drawn(
    "static",
    "Two charts, a line a set of weights: ROUGE-L by layers executed, and as a share of full depth beside the paper's.",
    9.0,
    4.0,
)
def static_budgets(figure: Any, section: Row, num_layers: int) -> None:
    """ROUGE-L by budget: absolute, and as a share of full depth beside the paper's."""
    absolute, relative = figure.subplots(1, 2)
    for style, (family, label) in enumerate(FAMILIES.items()):
        rows = select(section, metric="rouge_l", family=family)
        series(absolute, rows, "budget", label, style, shift=0.25 * (style - 1))
        full = find(section, metric="rouge_l", family=family, budget=num_layers)
        if full is not None and full["value"]:
            shares = [_of_full(section, row, full["value"], num_layers) for row in rows]
            series(relative, shares, "share", label, style, shift=0.008 * (style - 1))
    at_paper = [
        {"share": budget / paper.NUM_LAYERS, "value": value / paper.STATIC_ROUGE_L[paper.NUM_LAYERS]}
        for budget, value in paper.STATIC_ROUGE_L.items()
    ]
    series(relative, at_paper, "share", "the paper, OPT-1.3B, weights per budget", 3)
    absolute.set(ylabel="ROUGE-L", title="ROUGE-L by budget", xlabel="layers executed")
    absolute.set_xticks(sorted({row["budget"] for row in select(section, metric="rouge_l")}))
    relative.set(title="as a share of full depth", xlabel="share of the layers executed")
    legend_below(figure, relative, columns=2)


def _of_full(section: Row, row: Row, full: float, num_layers: int) -> Row:
    """``row`` over full depth's mean, its interval that of the paired difference."""
    lost = find(section, metric="rouge_l - full", family=row["family"], budget=row["budget"])
    of_full = {"value": row["value"] / full} if lost is None else mapped(lost, lambda loss: 1 + loss / full)
    return {**of_full, "share": row["budget"] / num_layers}


@drawn(
    "static-nats",
    "Two charts of nats a token by layers executed: a line a set of weights, and on a log scale a line a rule that "
    "names the layers.",
    9.0,
    4.4,
)
def likelihoods(figure: Any, section: Row) -> None:
    """Nats a token of references: by budget of each family, and by the rule that names the layers, on a log scale."""
    families, rules = figure.subplots(1, 2)
    for style, (family, label) in enumerate(FAMILIES.items()):
        series(families, select(section, metric="nats", family=family), "budget", label, style)
    weights = distinct(select(section, metric="rule_nats"), "weights")[-1:]
    for style, (rule, label) in enumerate(RULES.items()):
        rows = [row for name in weights for row in select(section, metric="rule_nats", rule=rule, weights=name)]
        series(rules, rows, "budget", label, style)
    families.set(ylabel="nats a token (less is better)", title="weights", xlabel="layers executed")
    rules.set(title=f"rules for the layers: {', '.join(weights)}", xlabel="layers executed", yscale="log")
    plain_log(rules.yaxis)
    for axes in (families, rules):
        count_layers(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))


@drawn("siblings", "A line a set of weights: nats a token by layers.", 5.4, 3.9)
def siblings(figure: Any, section: Row) -> None:
    """Nats a token of references by budget, of weights tuned for one budget each and of others along the same paths."""
    axes = figure.subplots()
    for style, (family, label) in enumerate(FAMILIES.items()):
        series(axes, select(section, metric="nats", family=family), "budget", label, style)
    axes.set(ylabel="nats a token (less is better)", xlabel="layers executed")
    count_layers(axes)
    axes.legend()


@drawn(
    "wall-clock",
    "Three charts, a line a set of weights: milliseconds a token by layers in a batch and alone, and ROUGE-L by "
    "milliseconds.",
    10.0,
    3.7,
)
def wall_clock(figure: Any, section: Row) -> None:
    """Milliseconds per generated token against layers, in a batch and alone, and ROUGE-L against milliseconds."""
    batch, single = "ms_per_token", "ms_per_token_single"
    in_batch, alone, against_score = figure.subplots(1, 3)
    for style, (family, label) in enumerate(FAMILIES.items()):
        for axes, metric in ((in_batch, batch), (alone, single)):
            rows = select(section, metric=metric, family=family)
            series(axes, rows, "budget", label, style, shift=0.25 * (style - 1))
        times = {row["budget"]: row["value"] for row in select(section, metric=batch, family=family)}
        scores = [row for row in select(section, metric="rouge_l", family=family) if row["budget"] in times]
        scores.sort(key=lambda row: times[row["budget"]])
        if scores:
            points(against_score, [times[row["budget"]] for row in scores], scores, label, style)
    for axes, title in ((in_batch, "ms per token, in a batch"), (alone, "ms per token, alone")):
        axes.set(title=title, xlabel="layers executed")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted(distinct(select(section, metric=batch), "budget")))
    against_score.set(title="ROUGE-L", xlabel="ms per token, in a batch")
    legend_below(figure, in_batch, columns=3)


def controllers(section: Row, suffix: str) -> Drawing:
    """The score of learned controllers by layers, by milliseconds a token where timed, and the paper's ROUGE-L.

    suffix: of the metrics, ``_nats`` where references are scored.
    """
    score, layers = ("nats", "layers_nats") if suffix else ("rouge_l", "layers")
    scores = select(section, metric=score)
    panels = [("likelier decisions", layers, False)]
    if any(row.get("choice") == "sampled" for row in scores):
        panels.append(("sampled decisions", layers, True))
    if select(section, metric="ms_per_token"):
        panels.append(("likelier decisions, by time", "ms_per_token", False))
    num_lines = (len(panels) + 2) // 2

    def draw(figure: Any) -> None:
        every = [axes for line in figure.subplots(num_lines, 2, squeeze=False) for axes in line]
        papers = every[len(panels)]
        for axes, (title, place, is_sampled) in zip(every, panels, strict=False):
            if axes is not every[0]:
                axes.sharey(every[0])
            _controller_points(axes, section, score, place, is_sampled)
            axes.set(title=title, ylabel="nats a token (less is better)" if suffix else "ROUGE-L")
            axes.set_xlabel("ms a generated token, in a batch" if place == "ms_per_token" else "mean layers of a token")
            if place == layers:
                count_layers(axes)
        _zoom(every[: len(panels)])
        _papers_controllers(papers)
        for axes in every[len(panels) + 1 :]:
            axes.remove()
        legend_below(figure, tuple(every[: len(panels) + 1]), columns=4)

    alt = f"A marker a controller, a line of static paths: {'nats a token' if suffix else 'ROUGE-L'} by mean layers of "
    alt += f"{', by '.join(title for title, *_ in panels)}; and the paper's ROUGE-L by mean layers."
    return drawing_of(f"controllers{suffix.replace('_', '-')}", alt, draw, 10.0, 0.8 + 3.7 * num_lines)


def _controller_points(axes: Any, section: Row, score: str, place: str, is_sampled: bool) -> None:
    """Draw the metric ``score`` of each controller that samples its decisions, or of each that does not, and of static
    paths at its metric ``place``, a series for each kind."""
    scores = select(section, metric=score)
    for kind, style in _styles(scores).items():
        placed = [
            (found["value"], row)
            for row in scores
            if controller_kind(row) == kind and (kind == _STATIC or (row.get("choice") == "sampled") == is_sampled)
            for found in [find(section, metric=place, controller=row["controller"])]
            if found is not None
        ]
        _kind_points(axes, placed, kind, style)


def _zoom(panels: Sequence[Any]) -> None:
    """Show what controllers reach, in charts of one height: static paths far below would take most of it."""
    heights = []
    for axes in panels:
        drawn = {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}
        static = drawn.pop(_STATIC, np.empty((0, 2)))
        if not drawn:
            continue
        reached = np.concatenate([*drawn.values()])
        span = max(np.ptp(reached[:, 0]), 1e-6)
        first, last = reached[:, 0].min() - 0.1 * span, reached[:, 0].max() + 0.1 * span
        axes.set_xlim(first, last)
        beside = static[(static[:, 0] >= first) & (static[:, 0] <= last)]
        heights.append(np.concatenate([reached, beside])[:, 1])
    if heights:
        low, high = np.min(np.concatenate(heights)), np.max(np.concatenate(heights))
        margin = 0.1 * max(high - low, 1e-6)
        panels[0].set_ylim(low - margin, high + margin)


def _papers_controllers(axes: Any) -> None:
    """Draw what the paper reports of its controllers, which sample their decisions, and of its static paths."""
    styles = _styles(())
    placed: dict[str, list[tuple[float, Row]]] = {
        _STATIC: [(budget, {"value": value}) for budget, value in paper.STATIC_ROUGE_L.items()]
    }
    for reads, alpha, layers, score in paper.CONTROLLERS:
        kind = controller_kind({"kind": _PAPERS_KINDS[reads]})
        if layers is None:
            axes.axhline(score, color=STYLES[styles[kind]]["color"], linewidth=1.0, linestyle=":")
            told = f"{reads}, α = {alpha}: layers not reported"
            place = (paper.NUM_LAYERS, score)
            axes.annotate(told, place, (0, -4), textcoords="offset points", ha="right", va="top", fontsize=8)
        else:
            placed.setdefault(kind, []).append((layers, {"value": score}))
    for kind, pairs in placed.items():
        _kind_points(axes, pairs, kind, styles[kind])
    axes.set(title="the paper: OPT-1.3B, sampled decisions", ylabel="ROUGE-L")
    axes.set_xlabel(f"mean layers of a token, of {paper.NUM_LAYERS}")
    count_layers(axes)


def _styles(rows: Sequence[Row]) -> dict[str, int]:
    """The style of each kind of controller in ``rows``; those of the paper have the same in every figure."""
    papers = {controller_kind({"kind": kind}) for kind in ("static", *_PAPERS_KINDS.values())}
    return {kind: style for style, kind in enumerate(sorted(papers | set(map(controller_kind, rows)), key=_kind_order))}


def _kind_points(axes: Any, placed: Sequence[tuple[float, Row]], kind: str, style: int) -> None:
    """Draw (place, row) pairs of one kind, static paths as a line."""
    if placed:
        look = {} if kind == _STATIC else {"linestyle": "none"}
        places, rows = zip(*sorted(placed, key=lambda pair: pair[0]), strict=True)
        points(axes, places, rows, kind, style, **look)


def skip_rates(section: Row) -> Drawing:
    """The share of tokens that leave each layer out, a line a controller, a column a layer."""
    rows = select(section, metric=f"skip_rate{score_suffix(section)}")
    controllers, layers = distinct(rows, "controller"), sorted(distinct(rows, "layer"))
    found = {(row["controller"], row["layer"]): 100 * row["value"] for row in rows}
    rates = [[found.get((controller, layer), math.nan) for layer in layers] for controller in controllers]
    # What all names have in common, such as the backbone, is left out.
    parts = [controller.split(", ") for controller in controllers]
    shared = set(parts[0]).intersection(*parts[1:]) if parts[1:] else set()
    labels = [", ".join(part for part in each if part not in shared) for each in parts]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 1)
        heat_map(axes, rates, layers, labels)
        axes.set_xlabel("layer; in a cell the per cent of tokens that leave it out, where it is 1 or more")

    alt = "A table in greys of the share of tokens that leave each layer out, a line a controller, a column a layer."
    return drawing_of("skip-rates", alt, draw, 10.0, 1.1 + 0.24 * len(controllers))


def controller_kind(row: Row) -> str:
    """What a controller's points are called in the figure: what it reads, and its width where it has one."""
    kind = str(row.get("kind"))
    known = {
        "static": _STATIC,
        "fixed": "fixed input",
        "hidden": "hidden state, linear",
        "mlp": "hidden state, MLP",
        "window": "prompt, windowed mean",
        "attention-pool": "prompt, attention",
    }
    width = f" {row['width']}" if row.get("width") else ""
    return f"{known.get(kind, kind)}{width}"


_STATIC = "static paths"


def _kind_order(kind: str) -> tuple[int, int, str]:
    starts = (_STATIC, "fixed", "hidden state, linear", "hidden state", "prompt")
    place = next((place for place, start in enumerate(starts) if kind.startswith(start)), len(starts))
    digits = "".join(filter(str.isdigit, kind))
    return place, int(digits or 0), kind
