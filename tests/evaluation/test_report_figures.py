"""The figures of the report: a file each, linked and described, and in them what their captions promise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from summaries import example_summary, row

from dynskip.evaluation.report import drawing
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.rows import curves_of, find, select
from dynskip.evaluation.report.write import report_blocks, write_report

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install dynskip[eval]")

RUN = Path(__file__).parents[2] / "bench" / "results" / "paper-smollm2"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Filled with the figures of every report made from here on, by name, as matplotlib has them."""
    from matplotlib.figure import Figure

    figures: dict[str, Any] = {}

    def svg(name: str, draw: Any, *_: float) -> str:
        draw(figures.setdefault(name, Figure()))
        return "<svg ></svg>"

    monkeypatch.setattr(drawing, "svg", svg)
    return figures


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    return summary


def bars(axes: Any) -> dict[str, np.ndarray]:
    """The lengths of the interval bars of each series of a panel."""
    return {
        each.get_label(): np.array([np.ptp(segment[:, 1]) for segment in each.lines[2][0].get_segments()])
        for each in axes.containers
    }


def test_every_figure_is_a_file_that_the_markdown_links(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(example_summary()), encoding="utf-8")
    html, markdown = (page.read_text(encoding="utf-8") for page in write_report(tmp_path))
    links = re.findall(r"^!\[([^\]]+)\]\((figures/[^)]+)\)$", markdown, re.MULTILINE)
    files = {file.relative_to(tmp_path).as_posix(): file.read_text(encoding="utf-8") for file in tmp_path.glob("*/*")}
    assert len(links) == len(files) == html.count("<svg ") and {path for _, path in links} == set(files)
    for alt, path in links:
        assert len(alt) > 30 and "{" not in alt
        assert ElementTree.fromstring(files[path]).tag == "{http://www.w3.org/2000/svg}svg"
        assert "<dc:date>" not in files[path]
        assert files[path].rstrip("\n").removeprefix("<svg ") in html, "the page holds the same drawing"
    write_report(tmp_path)
    again = {file.relative_to(tmp_path).as_posix(): file.read_text(encoding="utf-8") for file in tmp_path.glob("*/*")}
    assert again == files


def test_each_question_has_its_figures(committed: dict[str, Any], drawn: dict[str, Any]) -> None:
    report_blocks(committed)
    of_states = {f"{kind}-{weights}" for kind in ("hidden", "trajectory") for weights in ("paths", "backbone")}
    of_choices = ("oracle", "oracle-nats", "surviving", "router-nats", "depth", "depth-nats", "correlations")
    by_paths = {f"{kind}-paths" for kind in of_choices}
    others = {"static-nats", "siblings", "controllers-nats", "controller-training", "skip-rates"}
    assert set(drawn) == of_states | by_paths | others
    assert {f"{name}.svg" for name in drawn} == {file.name for file in (RUN / "figures").iterdir()}


def test_distances_of_states_are_on_log_scales(committed: dict[str, Any], drawn: dict[str, Any]) -> None:
    report_blocks(committed)
    hidden, trajectory = drawn["hidden-paths"].axes, drawn["trajectory-paths"].axes
    assert [axes.get_yscale() for axes in (*hidden, *trajectory)] == ["log"] * 8
    uniform = {"strategy": "uls", "weights": "paths"}
    for axes, metric, distance in (
        (hidden[0], "log_distance", lambda value: 10**value),
        (hidden[1], "cosine_layers", lambda value: 1 - value),
        (hidden[2], "kl", lambda value: value),
    ):
        rows = select(committed["hidden_states"], metric=metric, **uniform)
        assert axes.lines[0].get_ydata() == pytest.approx([distance(each["value"]) for each in rows])
    layers = select(committed["hidden_states"], metric="trajectory", budget=10, **uniform)
    apart = [each for each in layers if each["value"] < 1]
    assert list(trajectory[0].lines[0].get_xdata()) == [each["layer"] for each in apart] and len(apart) < len(layers)
    assert trajectory[0].lines[0].get_ydata() == pytest.approx([1 - each["value"] for each in apart])


def test_without_log_distances_final_states_have_the_mean_cosine(drawn: dict[str, Any]) -> None:
    report_blocks(example_summary())
    final = drawn["hidden-paths"].axes[0]
    cosines = select(example_summary()["hidden_states"], metric="cosine_final", strategy="uls", weights="paths")
    assert final.lines[0].get_ydata() == pytest.approx([1 - each["value"] for each in cosines])
    assert bars(final)["uniform skipping (ULS)"] == pytest.approx(0.02)


def test_skip_rates_are_a_line_a_controller_and_a_column_a_layer(committed: dict[str, Any], drawn: Any) -> None:
    report_blocks(committed)
    (axes,) = drawn["skip-rates"].axes
    rates = select(committed["controllers"], metric="skip_rate_nats")
    shown = np.asarray(axes.collections[0].get_array())
    assert shown.shape == (21, 30) and shown.ravel() == pytest.approx([100 * each["value"] for each in rates])
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[0] == "fixed, target 18, seed 0" and labels[-1] == "hidden, target 27, seed 2"
    numbers = [int(text.get_text()) for text in axes.texts]
    assert numbers == [round(100 * each["value"]) for each in rates if each["value"] >= 0.005]


def test_controllers_are_not_pressed_flat_by_paths_far_below(committed: dict[str, Any], drawn: dict[str, Any]) -> None:
    report_blocks(committed)
    axes = drawn["controllers-nats"].axes[0]
    (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
    scores = [row for row in select(committed["controllers"], metric="nats") if row["kind"] != "static"]
    places = [row["value"] for row in select(committed["controllers"], metric="layers_nats") if row["kind"] != "static"]
    assert low < min(row["value"] for row in scores) and max(row["value"] for row in scores) < high
    assert left < min(places) and max(places) < right
    static = [row["value"] for row in select(committed["controllers"], metric="nats", kind="static")]
    assert max(static) > high, "the path of 10 layers"


def test_trainings_of_many_recipes_take_several_lines(committed: dict[str, Any], drawn: dict[str, Any]) -> None:
    report_blocks(committed)
    panels = drawn["controller-training"].axes
    recipes = dict.fromkeys(each["recipe"] for each in committed["controllers"]["trained"])
    assert [axes.get_title() for axes in panels] == [", ".join(recipe.split(", ")[:2]) for recipe in recipes]
    tops = [round(axes.get_position().y0, 2) for axes in panels]
    assert [tops.count(top) for top in dict.fromkeys(tops)] == [4, 3]


def test_the_oracles_curves_mean_the_same_in_both_panels(committed: dict[str, Any], drawn: dict[str, Any]) -> None:
    report_blocks(committed)
    greedy, sampled, _, chosen = drawn["oracle-paths"].axes
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines if line.get_label()[0] != "_"}
        for axes in (greedy, sampled)
    ]
    shared = set(looks[0]) & set(looks[1])
    assert len(shared) == 4 and all(looks[0][label] == looks[1][label] for label in shared)
    union = looks[0] | looks[1]
    assert len(union) == 7 and len(set(union.values())) == 7
    (histogram,) = committed["oracle"]["histogram"]
    assert [bar.get_height() for bar in chosen.patches] == pytest.approx([71.2, 16.7, 5.5, 6.6])
    assert [text.get_text() for text in chosen.get_xticklabels()] == list(histogram["counts"])


def test_the_papers_oracle_stands_beside_as_shares_of_full_depth(
    committed: dict[str, Any], drawn: dict[str, Any]
) -> None:
    _, _, blocks = report_blocks(committed)
    relative = drawn["oracle-paths"].axes[2]
    shown = {line.get_label(): line for line in relative.lines}
    oracle, fixed = shown["the paper's oracle, OPT-1.3B"], shown["the paper's fixed budgets, OPT-1.3B"]
    full = paper.STATIC_ROUGE_L[24]
    assert list(oracle.get_xdata()) == pytest.approx([4 / 24, paper.MATCHING_SHARE, 1.0], abs=1e-3)
    assert list(oracle.get_ydata()) == pytest.approx([0.2493 / full, 1.0, 0.3964 / full])
    assert list(fixed.get_ydata()) == pytest.approx([value / full for value in paper.STATIC_ROUGE_L.values()])
    # Own curves end where they should, and no marker of the paper's is one of theirs.
    curve = curves_of(committed["oracle"], "paths")["oracle"]
    (mean,) = select(committed["oracle"], metric="mean", family="paths", budget=30)
    own = shown["oracle, judged on what it chose on"]
    assert own.get_ydata()[-1] == pytest.approx(curve["values"][-1] / mean["value"])
    assert own.get_xdata()[[0, -1]] == pytest.approx([0.5, 1.0])
    papers = {oracle.get_marker(), fixed.get_marker()}
    assert len(papers) == 2 and not papers & {style["marker"] for style in drawing.STYLES}
    labels = [text.get_text() for text in drawn["oracle-paths"].legends[0].get_texts()]
    assert oracle.get_label() in labels and fixed.get_label() in labels
    caption = next(block.caption for block in blocks if getattr(block, "caption", "").startswith("Mean ROUGE-L at"))
    assert "OPT-1.3B, another model" in caption


def test_the_null_model_has_a_band_of_as_many_sequences(committed: dict[str, Any]) -> None:
    from dynskip.evaluation.report.claims import null_band

    section = committed["oracle"]
    band, curve = null_band(section, "paths"), curves_of(section, "paths")["null"]
    assert band is not None and band["values"] == curve["values"] and curve["low"] is None
    low, high, values = (np.array(band[name]) for name in ("low", "high", "values"))
    assert np.mean((low <= values) & (values <= high)) > 0.95
    # Means are fixed, so at the ends there is the noise of the best alone; four times the sequences, half the width.
    more = null_band({**section, "n": 4 * section["n"]}, "paths")
    assert more is not None
    ratio = np.mean(high - low) / np.mean(np.array(more["high"]) - np.array(more["low"]))
    assert ratio == pytest.approx(2.0, rel=0.15)
    assert null_band({**section, "null_model": []}, "paths") == curve and null_band(section, "siblings") is None


def test_the_papers_controllers_stand_beside(committed: dict[str, Any], drawn: dict[str, Any]) -> None:
    for summary, name in ((committed, "controllers-nats"), (example_summary(), "controllers")):
        report_blocks(summary)
        own, papers = drawn[name].axes[0], drawn[name].axes[-1]
        assert papers.get_title().startswith("the paper")
        shown = {each.get_label(): each.lines[0] for each in papers.containers}
        assert shown["static paths"].get_ydata() == pytest.approx(list(paper.STATIC_ROUGE_L.values()))
        points = {label: (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for label, line in shown.items()}
        assert (points["fixed input"], points["hidden state, linear"]) == ((7.8, 0.299), (7.3, 0.293))
        assert "layers not reported" in papers.texts[0].get_text()
        colors = {each.get_label(): each.lines[0].get_color() for each in own.containers}
        assert all(colors[label] == line.get_color() for label, line in shown.items())


def test_sampled_decisions_have_a_panel_of_their_own(drawn: dict[str, Any]) -> None:
    summary = example_summary()
    for each in summary["controllers"]["rows"]:
        if each["controller"] == "hidden  alpha=4":
            each["choice"] = "sampled"
    report_blocks(summary)
    likelier, sampled, by_time, _ = drawn["controllers"].axes
    counts = [
        {each.get_label(): len(bars(axes)[each.get_label()]) for each in axes.containers}
        for axes in (likelier, sampled, by_time)
    ]
    assert counts[1] == {"static paths": 6, "hidden state, linear": 1}
    assert counts[0] == counts[2] and counts[0]["hidden state, linear"] == 3


def test_shares_of_full_depth_have_the_bars_of_paired_differences(drawn: dict[str, Any]) -> None:
    report_blocks(example_summary())
    relative = drawn["static"].axes[1]
    section = example_summary()["static"]
    full = find(section, metric="rouge_l", family="paths", budget=24)
    assert full is not None
    found = bars(relative)
    assert found["one set of weights, several paths"][:-1] == pytest.approx(2 * 0.009 / full["value"])
    assert found["one set of weights, several paths"][-1] == 0.0, "full depth is its own measure"


def test_intervals_that_go_on_and_shares_that_are_none_are_marked(drawn: dict[str, Any]) -> None:
    summary = example_summary()
    shares = select(summary["router"], metric="captured_share")
    shares[0].update(low=-9.0, high=0.2)
    summary["router"]["rows"].remove(shares[1])
    report_blocks(summary)
    (axes,) = drawn["router"].axes
    assert [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "<"] == [len(shares) - 1]
    assert not any(line.get_marker() == ">" for line in axes.lines)
    assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [("undefined", len(shares) - 2)]
    assert len(axes.get_yticklabels()) == len(shares)


def test_routers_by_log_likelihood_have_learning_curves_and_a_table(drawn: dict[str, Any]) -> None:
    summary = example_summary()
    for size, share in ((250, 0.1), (1000, 0.3)):
        labels = {"family": "paths", "predictor": "ridge", "features": "state", "size": size, "at": 8.0}
        values = {"captured_share": share, "over_static": share / 10, "score": -2.0, "random": -2.1, "oracle": -1.9}
        summary["router"]["rows"] += [
            row(value, 0.01, metric=f"{name}_nats", **labels) for name, value in (values | {"layers": 7.5}).items()
        ]
    _, _, blocks = report_blocks(summary)
    shares, gains = drawn["router-nats-paths"].axes
    assert bars(shares)["ridge, state"] == pytest.approx([0.02, 0.02])
    assert shares.lines[0].get_ydata() == pytest.approx([0.1, 0.3])
    oracle = next(line for line in gains.lines if line.get_label() == "the oracle at a router's cost")
    assert oracle.get_ydata() == pytest.approx([0.11, 0.13]), "oracle - score + over static"
    table = next(block for block in blocks if getattr(block, "title", "").startswith("What routers score, learned"))
    assert "1,000 prompts" in table.title and len(table.rows) == 1
    assert list(table.rows[0]) == [
        "ridge",
        "state",
        "7.50 [7.49, 7.51]",
        "2.000",
        "2.100",
        "1.900",
        "0.30 [0.29, 0.31]",
        "0.01",
        "+0.030 [+0.020, +0.040]",
    ]


def test_the_oracle_by_log_likelihood_stands_beside_its_controls(
    committed: dict[str, Any], drawn: dict[str, Any]
) -> None:
    report_blocks(committed)
    scores, gains = drawn["oracle-nats-paths"].axes
    rows = select(committed["oracle"], metric="gain_nats", family="paths")
    shown = {float(value) for line in gains.lines for value in line.get_ydata()}
    assert {each["value"] for each in rows} <= shown and len({each["control"] for each in rows}) == 4
    oracles = select(committed["oracle"], metric="score_nats", family="paths", control="oracle per token")
    assert {-each["value"] for each in oracles} <= {float(value) for line in scores.lines for value in line.get_ydata()}


def test_depths_are_drawn_by_both_scores_four_panels_beside_each_other(
    committed: dict[str, Any], drawn: dict[str, Any]
) -> None:
    report_blocks(committed)
    for name, metric in (("depth-paths", "binned_depth"), ("depth-nats-paths", "binned_depth_nats")):
        features = {each["feature"] for each in select(committed["depth"], metric=metric)}
        seen = [axes for axes in drawn[name].axes if axes.get_visible()]
        assert len(seen) == len(features)
        assert len({round(axes.get_position().x0, 3) for axes in seen}) == min(4, len(features))
