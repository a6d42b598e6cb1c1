"""The figures of the paper, redrawn from the rows of a summary, and those of what it left open."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.drawing import band, count_layers, forest, keep_in_view, points, series, svg
from dynskip.evaluation.report.rows import Row, curves_of, distinct, find, score_suffix, select

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
RULES = {
    "uniform": "uniform",
    "exit": "early exit",
    "random": "random",
    "random-first": "random, layer 0 kept",
    "influence": "most influence",
    "searched": "searched",
}
# Curves by the outputs that they are scored on: name in the summary, name in the legend.
GREEDY_CURVES = {
    "oracle": "oracle",
    "null": "null model: noise alone",
    "cross-fitted greedy": "depths chosen on sampled outputs",
    "random, as the oracle's": "random, the oracle's depths",
    "static mixture": "best mix of fixed budgets",
}
SAMPLED_CURVES = {
    "in-sample": "oracle, judged on what it chose on",
    "equal depth": "the same choice among equal depths",
    "cross-fitted": "cross-fitted oracle",
    "cross-fitted means": "cross-fitted on means of outputs",
    "random, as in-sample": "random, the oracle's depths",
}
# Intervals of all curves would hide each other: the oracle's and the cross-fitted one's are shown.
SHADED = frozenset(("oracle", "cross-fitted greedy", "in-sample", "cross-fitted"))
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
FEATURES = {
    "prompt_length": "prompt length",
    "response_length": "reference length",
    "generated_length": "length of the full model's output",
    "full_loss": "loss of the full model",
    "full_rouge_l": "ROUGE-L of the full model",
    "prefill_entropy": "entropy behind the prompt",
    "sd_of_draws": "deviation of the full model's draws",
}


def _drawn(name: str, width: float, height: float) -> Callable[[Callable[..., None]], Callable[..., str]]:
    """Makes a function that draws a section into a figure one that takes the section and gives the SVG text.

    name: of the figure in a page; of several of a kind with a place for what follows the section.
    """

    def decorate(draw: Callable[..., None]) -> Callable[..., str]:
        @wraps(draw)
        def text(section: Row, *more: Any) -> str:
            return svg(name.format(*more), lambda figure: draw(figure, section, *more), width, height)

        return text

    return decorate


@_drawn("hidden-{}", 10.0, 3.5)
def hidden_states(figure: Any, section: Row, weights: str) -> None:
    """Similarity of hidden states, and divergence of predictions, by budget and strategy."""
    titles = {
        "cosine_final": "cosine of final states",
        "cosine_layers": "cosine, mean over layers",
        "kl": "KL of predictions (nats)",
    }
    panels = figure.subplots(1, 3)
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        for style, (strategy, label) in enumerate(STRATEGIES.items()):
            rows = select(section, metric=metric, strategy=strategy, weights=weights)
            series(axes, rows, "budget", label, style)
        axes.set(title=title, xlabel="layers executed")
        axes.set_xticks(distinct(select(section, metric=metric, weights=weights), "budget"))
    _legend_below(figure, panels[0], columns=4)


@_drawn("static", 9.0, 4.0)
def static_budgets(figure: Any, section: Row, num_layers: int) -> None:
    """ROUGE-L by budget: absolute, and as a share of full depth beside the paper's."""
    absolute, relative = figure.subplots(1, 2)
    for style, (family, label) in enumerate(FAMILIES.items()):
        rows = select(section, metric="rouge_l", family=family)
        series(absolute, rows, "budget", label, style, shift=0.25 * (style - 1))
        full = find(section, metric="rouge_l", family=family, budget=num_layers)
        if full is not None and full["value"]:
            shares = [{"share": row["budget"] / num_layers, "value": row["value"] / full["value"]} for row in rows]
            series(relative, shares, "share", label, style)
    at_paper = [
        {"share": budget / paper.NUM_LAYERS, "value": value / paper.STATIC_ROUGE_L[paper.NUM_LAYERS]}
        for budget, value in paper.STATIC_ROUGE_L.items()
    ]
    series(relative, at_paper, "share", "the paper, OPT-1.3B, weights per budget", 3)
    absolute.set(ylabel="ROUGE-L", title="ROUGE-L by budget", xlabel="layers executed")
    absolute.set_xticks(sorted({row["budget"] for row in select(section, metric="rouge_l")}))
    relative.set(title="as a share of full depth", xlabel="share of the layers executed")
    _legend_below(figure, relative, columns=2)


@_drawn("static-nats", 9.0, 4.2)
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
    for axes in (families, rules):
        count_layers(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))


@_drawn("wall-clock", 10.0, 3.7)
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
    _legend_below(figure, in_batch, columns=3)


@_drawn("controllers", 9.0, 4.8)
def controllers(figure: Any, section: Row) -> None:
    """ROUGE-L of learned controllers against layers and against milliseconds per token; sampling ones are hollow."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric in zip(panels, ("layers", "ms_per_token"), strict=True):
        _controller_points(axes, section, "rouge_l", metric)
    count_layers(panels[0])
    panels[0].set(ylabel="ROUGE-L", title="against layers", xlabel="mean layers of a generated token")
    panels[1].set(title="against time, likelier decisions", xlabel="ms per generated token, in a batch")
    _legend_below(figure, panels[0], columns=3)


@_drawn("controllers-nats", 9.0, 4.8)
def controllers_nats(figure: Any, section: Row) -> None:
    """Nats a token of references under learned controllers against their layers; sampling ones are hollow."""
    axes = figure.subplots(1, 1)
    _controller_points(axes, section, "nats", "layers_nats")
    count_layers(axes)
    axes.set(ylabel="nats a token (less is better)", xlabel="mean layers of a token of a response")
    _legend_below(figure, axes, columns=3)


def _controller_points(axes: Any, section: Row, score: str, place: str) -> None:
    """Draw the metric ``score`` of each controller and static path at its metric ``place``, a series for each kind."""
    scores = select(section, metric=score)
    for style, kind in enumerate(sorted({controller_kind(row) for row in scores}, key=_kind_order)):
        for hollow in (False, True):
            placed = [
                (found["value"], row)
                for row in scores
                if controller_kind(row) == kind and (row.get("choice") == "sampled") == hollow
                for found in [find(section, metric=place, controller=row["controller"])]
                if found is not None
            ]
            placed.sort(key=lambda pair: pair[0])
            look = {} if kind == _STATIC else {"linestyle": "none"}
            look |= {"markerfacecolor": "w"} if hollow else {}
            label = f"{kind}, sampled" if hollow else kind
            if placed:
                points(axes, [each for each, _ in placed], [row for _, row in placed], label, style, **look)


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


@_drawn("oracle-{}", 10.0, 5.2)
def oracle(figure: Any, section: Row, family: str) -> None:
    """The oracle's curve over mean budgets with its controls: on greedy outputs, and on sampled ones."""
    curves = curves_of(section, family)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, names, metric in zip(panels, (GREEDY_CURVES, SAMPLED_CURVES), ("mean", "mean_sampled"), strict=True):
        for style, (name, label) in enumerate(names.items()):
            if name in curves:
                band(axes, curves[name], label, style, shaded=name in SHADED)
        means = select(section, metric=metric, family=family)
        budgets = [row["budget"] for row in means]
        points(axes, budgets, means, "each budget alone", 0, linestyle="none", markerfacecolor="w")
        if means:
            axes.axhline(means[-1]["value"], color="#000000", linewidth=0.9, linestyle=(0, (2, 2)))
        count_layers(axes)
        axes.set_xlabel("mean layers executed")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0].set(title="greedy outputs", ylabel="mean ROUGE-L")
    panels[1].set(title="sampled outputs")


def surviving(section: Row, family: str) -> str:
    """What of the oracle's gain is left under each control."""
    rows = [row for row in select(section, metric="surviving_share", family=family) if row.get("place") != "full"]
    labels = [f"{CONTROLS.get(row['control'], row['control'])}, at {row['at']:g} layers" for row in rows]
    return _forest(f"surviving-{family}", rows, labels, 9.6, 0.27)


def router(section: Row) -> str:
    """The share of the oracle's gain that each prompt-only router captures."""
    rows = select(section, metric="captured_share")
    labels = [f"{row['predictor']}, budget {row['at']:g} ({row.get('family', 'paths')})" for row in rows]
    return _forest("router", rows, labels, 9.0, 0.32)


def _forest(
    name: str, rows: Sequence[Row], labels: Sequence[str], width: float, line_height: float, shares: bool = True
) -> str:
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

    return svg(name, draw, width, 1.1 + line_height * len(rows))


@_drawn("depth-{}", 10.0, 3.5)
def depth(figure: Any, section: Row, family: str) -> None:
    """The oracle's chosen depth against lengths and losses, in bins of equally many sequences."""
    rows = select(section, metric=f"binned_depth{score_suffix(section)}", family=family)
    features = distinct(rows, "feature")
    panels = figure.subplots(1, max(len(features), 1), sharey=True, squeeze=False)[0]
    for axes, feature in zip(panels, features, strict=False):
        bins = [row for row in rows if row["feature"] == feature]
        for style, at in enumerate(distinct(bins, "at")):
            chosen = [row for row in bins if row["at"] == at]
            middles = [row.get("bin_median", (row["bin_low"] + row["bin_high"]) / 2) for row in chosen]
            points(axes, middles, chosen, f"mean budget {at:g}", style)
        axes.set_xlabel(textwrap.fill(FEATURES.get(feature, feature), 18))
    panels[0].set_ylabel("mean chosen depth")
    _legend_below(figure, panels[0], columns=4)


def correlations(rows: Sequence[Row], name: str) -> str:
    """Correlations of chosen depth with each feature."""
    labels = [f"{FEATURES.get(row['feature'], row['feature'])}, budget {row['at']:g}" for row in rows]
    return _forest(name, rows, labels, 9.0, 0.3, shares=False)


def _legend_below(figure: Any, axes: Any, columns: int) -> None:
    """One legend under all panels, of the series of ``axes``."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
