"""The report's verdicts: made-up summaries turn each of them over, and the committed run has the ones it is told by."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import lzma
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from summaries import example_summary, row, section

from dynskip.evaluation.report import claims, drawing
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.claims import NUM_NOISE_SEEDS, NUM_ROWS, NUM_TRAININGS
from dynskip.evaluation.report.document import to_html, to_markdown
from dynskip.evaluation.report.evidence import (
    apart,
    ceiling,
    detectable,
    direction,
    holm,
    kept_by_means,
    luck,
    negated,
    p_value,
)
from dynskip.evaluation.report.numbers import signed
from dynskip.evaluation.report.paper_claims import _OPENINGS, BESIDE, paragraph, verdicts
from dynskip.evaluation.report.rows import select
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.report.short import in_short
from dynskip.evaluation.report.write import report_blocks
from dynskip.evaluation.stats.oracle_controls import OracleScores

ROOT = Path(__file__).parents[2]
RUN = ROOT / "bench" / "results" / "paper-smollm2"


def changed(name: str, change: dict[str, Any], **labels: Any) -> dict[str, Any]:
    """The example summary, the rows of one section with ``labels`` changed."""
    summary = example_summary()
    rows = [r for r in summary[name]["rows"] if all(r.get(label) == wanted for label, wanted in labels.items())]
    assert rows
    for each in rows:
        each.update(change)
    return summary


def text_of(summary: dict[str, Any], name: str) -> str:
    return "\n".join(section_sentences(summary, name))


# What an interval carries


def test_direction_and_distance_need_intervals() -> None:
    above, below, open_, bare = row(0.3, 0.1), row(-0.3, 0.1), row(0.05, 0.1), row(0.3)
    assert [direction(each) for each in (above, below, open_, bare)] == [1, -1, 0, 0]
    assert (apart(above, below), apart(below, above), apart(above, row(0.15, 0.1))) == (1, -1, 0)
    assert apart(above, bare) == 0
    assert negated(above) == {"value": -0.3, "low": pytest.approx(-0.4), "high": pytest.approx(-0.2)}
    assert negated(bare) == {"value": -0.3, "low": None, "high": None}


def test_what_80_percent_of_runs_would_see() -> None:
    size = detectable(row(0.0, 1.96))
    assert size == pytest.approx(2.80, abs=0.01) and detectable(row(1.0)) is None
    # A true effect of that size, with that error: the interval leaves zero out in four runs of five.
    drawn = np.random.default_rng(0).normal(size, 1.0, 20_000)
    assert np.mean(drawn - 1.96 > 0) == pytest.approx(0.8, abs=0.01)


def test_p_values_and_holm() -> None:
    assert p_value(row(1.96, 1.96)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(row(0.0, 0.0)) == 1.0 and p_value(row(0.1, 0.0)) == 0.0 and p_value(row(0.1)) is None
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("signal", "noise"), [(0.02, 0.08), (0.05, 0.05)])
def test_the_ceiling_is_what_expected_scores_gain(signal: float, noise: float) -> None:
    """Scores of a known signal and noise: the share that survives gives away the rest."""
    generator = np.random.default_rng(0)
    expected = 0.2 + signal * generator.standard_normal((6000, 4))
    sampled = expected + noise * generator.standard_normal((8, 6000, 4))
    scores = OracleScores((4, 8, 12, 24), expected, sampled, resamples=0)
    whole = scores.controls["in-sample"].gain[0, -1]
    share = {"value": float(scores.controls["cross-fitted"].gain[0, -1] / whole)}
    assert share["value"] == pytest.approx(signal**2 / (signal**2 + noise**2), abs=0.02)
    assert ceiling(share)["value"] == pytest.approx(scores.controls["oracle"].gain[0, -1] / whole, abs=0.03)
    assert luck(share)["value"] == pytest.approx(scores.controls["equal depth"].gain[0, -1] / whole, abs=0.03)
    half = scores.controls["cross-fitted means"].gain[0, -1] / whole
    assert kept_by_means(share, 4)["value"] == pytest.approx(half, abs=0.03)


def test_ceilings_of_shares_beyond_zero_and_one() -> None:
    found = ceiling({"value": 0.01, "low": -0.2, "high": 0.04})
    assert found == {"value": pytest.approx(0.1), "low": 0.0, "high": pytest.approx(0.2)}
    assert luck({"value": 0.36, "low": 0.19, "high": 1.2}) == pytest.approx({"value": 0.8, "low": 0.0, "high": 0.9})
    assert ceiling({"value": -0.5}) == {"value": 0.0}
    assert kept_by_means({"value": 1.0}, 6) == {"value": 1.0} and kept_by_means({"value": 0.0}, 6) == {"value": 0.0}


# The oracle


def test_the_null_model_on_the_papers_means_gives_what_it_was_not_fitted_to() -> None:
    null = claims.paper_null()
    assert null.best_up_to[24] == pytest.approx(paper.BEST_UP_TO[24], abs=1e-4)
    for budget in (8, 12):
        assert null.best_up_to[budget] == pytest.approx(paper.BEST_UP_TO[budget], abs=0.005)
    assert null.sd == pytest.approx(0.08, abs=0.001) and 0.26 < null.matching_share < 0.28
    assert section_sentences(example_summary(), "oracle")[0].startswith("On the paper's own four means")
    assert f"does on {100 * null.matching_share:.1f} %" in paragraph(example_summary())


def test_a_matching_budget_near_the_floor_and_one_far_from_it() -> None:
    told = text_of(example_summary(), "oracle")
    assert "5.90 [5.70, 6.10] of 24 layers, near the floor of 4, the cheapest path (16.7 % of the layers)" in told
    assert "300 of 500 sequences run it, and full depth leads the cheapest path by +0.0833" in told
    far = changed("oracle", {"value": 12.0, "low": 11.0, "high": 13.0}, metric="matching_budget", control="oracle")
    assert "12.00 [11.00, 13.00] of 24 layers, well above the cheapest path's 4" in text_of(far, "oracle")
    nowhere = changed("oracle", {"value": None, "low": None, "high": None}, metric="matching_budget", control="oracle")
    assert "floor" not in text_of(nowhere, "oracle")


def test_the_lead_is_taken_from_the_means_where_it_was_not_paired() -> None:
    summary = example_summary()
    del summary["static"]
    near = claims.floor(summary, "paths")
    assert near is not None and near.lead == {"value": pytest.approx(0.4 / 4 - 0.4 / 24)}


def test_like_is_compared_with_like() -> None:
    summary = example_summary()
    found = claims.Matching(summary["oracle"], "paths")
    (curve,) = (c for c in summary["oracle"]["curves"] if (c["family"], c["name"]) == ("paths", "in-sample"))
    reached = np.interp(0.3 - 0.4 / 24 - 0.02, curve["values"], curve["budgets"])
    assert found.sampled_oracle == pytest.approx(reached)
    assert f"on sampled outputs the oracle matches full depth at {reached:.2f} layers" in text_of(summary, "oracle")
    curve["values"] = [0.1] * len(curve["values"])
    assert claims.Matching(summary["oracle"], "paths").sampled_oracle is None


def test_a_share_that_survives_and_one_that_need_not() -> None:
    labels = {"metric": "surviving_share", "control": "cross-fitted", "place": "third"}
    open_ = text_of(example_summary(), "oracle")
    assert "10.0 % [−20.0 %, 40.0 %] of the oracle's gain on one draw survives" in open_
    assert "does not lie above zero, where 42.9 % could have been seen (80 % power)" in open_
    assert "keep 32 % [0 %, 63 %] of it, the square root of that share: an interval that holds 0 %" in open_
    clear = changed("oracle", {"value": 0.25, "low": 0.16, "high": 0.36}, **labels)
    told = text_of(clear, "oracle")
    assert "keep 50 % [40 %, 60 %] of it, the square root of that share." in told and "holds 0 %" not in told
    # An interval of equal depth around 0.95 leaves room for a ceiling, whatever survives.
    room = f"{100 * math.sqrt(1 - 0.65**2):.0f} %"
    assert f"leaves room for a ceiling of {room}" in told


def test_how_alike_the_paths_of_the_control_are_is_counted(committed: dict[str, Any]) -> None:
    summary = example_summary()
    assert "near neighbours" not in text_of(summary, "oracle"), "this run does not name them"
    uniform, swapped, other = (
        "uniform:12",
        "layers:1,2,4,6,8,10,12,14,16,18,20,22",
        "layers:0,3,4,6,8,10,12,14,16,18,20,22",
    )
    summary["oracle"]["equal_paths"] = [{"family": "paths", "paths": [uniform, swapped, other]}]
    (told,) = (text for text in section_sentences(summary, "oracle") if "near neighbours" in text)
    assert told.startswith(
        "With one set of weights, several paths, the 3 paths of one depth are near neighbours: two of"
    )
    # 11 layers with the uniform path each, 10 with each other; 12 of 24 at random share half of them.
    assert "share a mean of 10.7 of their 12 layers, two drawn at random would share 6.0" in told
    assert "puts no bound on what one among paths of one depth that differ more would gain" in told
    (own,) = committed["oracle"]["equal_paths"]
    layers = [set(path.removeprefix("layers:").split(",")) for path in own["paths"]]
    shared = [len(layers[first] & layers[second]) for first in range(len(layers)) for second in range(first)]
    told = text_of(committed, "oracle")
    assert f"share a mean of {sum(shared) / len(shared):.1f} of their {len(layers[0])} layers" in told


# Routers


def test_routers_that_gain_and_routers_that_could_not_have_shown_it() -> None:
    told = text_of(example_summary(), "router")
    assert "With one set of weights, several paths, 4 of 8 prompt-only routers gain more" in told
    none = changed("router", {"value": 0.0, "low": -0.002, "high": 0.002}, metric="gain")
    told = text_of(none, "router")
    assert "0 of 8 prompt-only routers gain more" in told
    assert "the median router that has a share could have shown 7 % of the oracle's gain (80 % power)" in told
    wide = changed("router", {"low": -1.0, "high": 1.0}, metric="captured_share")
    assert "could have shown 143 % of the oracle's gain" in text_of(wide, "router")


def test_routers_without_a_share_or_without_a_choice_are_counted() -> None:
    summary = changed("router", {"value": 4.0}, metric="layers", family="paths", at=6.0)
    for each in summary["router"]["rows"]:
        if each["metric"] == "captured_share" and each["family"] == "paths" and each["at"] == 6.0:
            each.update(value=None, low=None, high=None)
    found = claims.Routers(summary["router"], "paths")
    assert (len(found.gains), len(found.shares), found.num_shallow) == (8, 4, 4)
    assert "4 of them leave no share to capture, and are in no figure" in text_of(summary, "router")


def test_routers_by_log_likelihood_are_those_that_learned_most() -> None:
    def share(value: float, half: float, predictor: str, size: int, **labels: Any) -> list[dict[str, Any]]:
        labels = {"family": "paths", "features": "text", "at": 20.0, "predictor": predictor, "size": size, **labels}
        return [
            row(value, half, metric="captured_share_nats", **labels),
            row(value / 100, half / 100, metric="over_static_nats", **labels),
        ]

    few, many = share(0.9, 0.1, "ridge", 250), [*share(0.3, 0.1, "ridge", 1000), *share(0.1, 0.2, "kernel", 1000)]
    other = share(0.8, 0.1, "ridge", 4000, family="untuned")
    cascade = share(-0.2, 0.1, "cascade", 0)
    found = claims.RoutersInNats(section([*few, *many, *other, *cascade]), "paths")
    assert (found.size, len(found.shares), found.above) == (1000, 2, 1)
    assert found.best is not None and found.best["predictor"] == "ridge" and found.best["value"] == 0.3
    assert found.over_static is not None and found.over_static["value"] == 0.3 / 100
    assert found.cascade is not None and found.cascade["value"] == -0.2
    told = text_of({"conditions": {}, "router": section([*few, *many, *cascade])}, "router")
    assert (
        "1 of 2 routers that learned from 1,000 prompts capture a share of the oracle's gain above zero after" in told
    )
    assert "ridge on text, captures 30 %" in told
    assert "full depth where it is unsure, captures \N{MINUS SIGN}20 %" in told
    # Alone the interval lies above zero; among twenty of which none does anything else it may be chance.
    weak = share(0.3, 0.28, "ridge", 1000)
    assert claims.RoutersInNats(section(weak), "paths").above == 1
    idle = [each for place in range(19) for each in share(0.0, 0.28, f"other {place}", 1000)]
    among = claims.RoutersInNats(section([*weak, *idle]), "paths")
    assert among.above == 0 and among.best is not None and direction(among.best) == 1
    assert among.adjusted == pytest.approx([20 * (p_value(weak[0]) or 0.0), *[1.0] * 19])
    assert claims.RoutersInNats(section([*weak, *share(0.0, 0.28, "ridge", 250), *idle[:8]]), "paths").above == 0
    below = claims.RoutersInNats(section(share(-0.9, 0.1, "ridge", 1000)), "paths")
    assert below.above == 0 and below.adjusted[0] < 1e-6
    alone = claims.RoutersInNats(section(cascade), "paths")
    assert alone.best is None and alone.over_static is None and alone.cascade is not None
    none = claims.RoutersInNats(section(many), "untuned")
    assert none.best is None and none.cascade is None and not none.shares


def test_more_prompts_to_learn_from_move_a_share_or_do_not() -> None:
    def summary_of(*moves: tuple[float, float, float]) -> dict[str, Any]:
        rows = []
        for place, (value, half, q) in enumerate(moves):
            labels = {"family": "paths", "predictor": "ridge", "features": f"text {place}", "at": 20.0, "size": 1000}
            rows.append(row(0.3, 0.1, metric="captured_share_nats", **labels))
            rows.append(row(value, half, metric=claims.MORE_PROMPTS, fewest=250, q=q, **labels))
        return {"conditions": {}, "router": section(rows)}

    told = text_of(summary_of((0.01, 0.07, 0.9), (-0.02, 0.07, 0.9)), "router")
    assert (
        "From 250 to 1,000 prompts learned from, with one set of weights, several paths, the share that a router "
        "captures moves for none of 2 after control of false discoveries; it moves most for ridge on text 1, by "
        "−0.020 [−0.090, +0.050] of the oracle's gain; the median router could have shown a change of 0.100 (80 % "
        "power)."
    ) in told
    told = text_of(summary_of((0.2, 0.07, 0.001), (-0.02, 0.07, 0.9)), "router")
    assert "moves for 1 of 2 after" in told and "ridge on text 0, by +0.200 [+0.130, +0.270] of" in told
    alone = summary_of((0.2, 0.07, 0.001))
    alone["router"]["rows"] = alone["router"]["rows"][:1]
    assert "Whether more prompts to learn from help is **untested**" in text_of(alone, "router")


def test_routers_have_the_q_of_the_run_where_it_says_one() -> None:
    labels = {"metric": "captured_share_nats", "family": "paths", "features": "text", "at": 20.0, "size": 1000}
    rows = [row(0.3, 0.1, predictor=name, q=q, **labels) for name, q in (("ridge", 0.2), ("boosting", 0.04))]
    found = claims.RoutersInNats(section(rows), "paths")
    assert found.adjusted == [0.2, 0.04] and found.above == 1


# Controllers


def comparison(**changes: Any) -> dict[str, Any]:
    """Fixed-input controllers from 4 to 16 layers and one that reads hidden states at 8, trained and drawn often."""
    options = {"layers": 8.0, "noise_seeds": NUM_NOISE_SEEDS, "trainings": NUM_TRAININGS, "alike": False, "twin": False}
    options |= changes
    rows = []

    def add(name: str, layers: float, score: float, over: tuple[float, float] | None = None, **labels: Any) -> None:
        labels = {"controller": name, "backbone": "frozen", **labels}
        rows.append(row(layers, 0.1, metric="layers", **labels))
        rows.append(row(score, 0.01, metric="rouge_l", **labels))
        if over is not None:
            rows.append(row(over[0], over[1], metric="over_fixed", **labels))
            rows.append(row(over[0], over[1], metric="over_static", **labels))

    for seed in range(options["noise_seeds"] + 1):
        choice = {"choice": "sampled" if seed else "argmax", "seed": seed}
        for training in range(options["trainings"]):
            for alpha, layers in ((4, 16.0), (10, 4.0)):
                score = 0.2 if options["alike"] else 0.2 + 0.001 * layers + 0.0001 * training
                add(f"fixed {alpha} {training} {seed}", layers, score, kind="fixed", alpha=alpha, **choice)
            over = (0.0, 0.0) if options["twin"] and not seed else (0.02, 0.005)
            add(f"hidden {training} {seed}", options["layers"], 0.23, over, kind="hidden", alpha=4, **choice)
    return section(rows)


def test_a_comparison_that_lacks_nothing_is_a_test() -> None:
    found = claims.Controllers(comparison())
    assert (found.verdict, found.reasons, found.reach) == ("tested", [], 16.0)
    num = NUM_TRAININGS * (NUM_NOISE_SEEDS + 1)
    assert (len(found.names), found.better, found.worse) == (num, num, 0)
    summary = {"conditions": {}, "controllers": comparison()}
    assert text_of(summary, "controllers").startswith(f"{num} of {num} controllers that read hidden states")
    assert "untested" not in text_of(summary, "controllers") + in_short(summary)[2]


@pytest.mark.parametrize(
    ("changes", "reason", "told"),
    [
        ({"layers": 17.0}, "beyond", "run more layers than the 16.0 that fixed-input controllers reach"),
        ({"alike": True}, "alike", "6 fixed-input controllers have one and the same score"),
        ({"noise_seeds": 1}, "noise", "is shared by all sequences, which intervals over sequences cannot see, and was"),
        ({"trainings": 1}, "trainings", "each kind was trained once"),
    ],
)
def test_each_thing_that_a_comparison_lacks_makes_it_untested(changes: dict[str, Any], reason: str, told: str) -> None:
    found = claims.Controllers(comparison(**changes))
    assert (found.verdict, found.reasons) == ("untested", [reason])
    summary = {"conditions": {}, "controllers": comparison(**changes)}
    text = text_of(summary, "controllers")
    assert text.startswith("Whether hidden states help to choose layers is **untested**.") and told in text
    assert "score more than fixed-input ones" not in text
    assert any("is **untested**" in line for line in in_short(summary))


def test_a_difference_that_one_draw_of_the_noise_makes_is_named() -> None:
    assert claims.Controllers(comparison(noise_seeds=1, trainings=1)).twins == []
    found = claims.Controllers(comparison(noise_seeds=1, trainings=1, twin=True))
    assert found.twins == ["hidden 0 1"]


def test_only_comparisons_within_reach_are_printed_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")
    summary = {"conditions": {}, "controllers": comparison(layers=17.0)}
    tables = [block for block in report_blocks(summary)[2] if getattr(block, "title", "") == "ROUGE-L of controllers"]
    cells = {line[0]: line[3] for line in tables[0].rows}
    assert cells["hidden 0 0"] == "untested" and cells["fixed 4 0 0"] == "–"
    near = report_blocks({"conditions": {}, "controllers": comparison()})[2]
    (table,) = (block for block in near if getattr(block, "title", "") == "ROUGE-L of controllers")
    assert {line[0]: line[3] for line in table.rows}["hidden 0 0"] == "0.0200 [0.0150, 0.0250]"


def recipe_rows(*verdicts: str, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    """A section of recipes, one for each verdict, by both scores."""
    rows = []
    for place, verdict in enumerate(verdicts):
        for metric in ("over_fixed", "over_fixed_nats"):
            labels = {"recipe": f"hidden, alpha {place}", "trainings": 3, "runs": 15, "layers": 9.0, "inside": 1.0}
            own = list(reasons) if verdict == "untested" else []
            tested = {"p": 0.01, "q": 0.02 + place, "reasons": own, "verdict": verdict}
            rows.append(row(0.01, 0.005, metric=metric, **labels, **tested))
    rows.append(row(0.3, 0.01, metric="rouge_l", controller="hidden", kind="hidden", choice="argmax"))
    return {"conditions": {}, "controllers": section(rows, noise="by sequence")}


def test_recipes_are_told_by_their_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = recipe_rows("better", "open", "untested", reasons=("beyond", "noise"))
    told = text_of(summary, "controllers")
    assert "of 6 comparisons with fixed-input controllers at as many layers, by ROUGE-L and by log-likelihood" in told
    assert "2 better, 0 worse, 2 open, 2 untested, after control of false discoveries" in told
    assert "Why untested: 2 of 6 run layers that no fixed-input controller reaches." in told
    assert f"Why untested: 2 of 6 have fewer than {NUM_NOISE_SEEDS} draws of the noise" in told
    assert "The clearest by log-likelihood is hidden, alpha 0: +0.0100 [+0.0050, +0.0150] nats a token" in told
    assert "shared by all sequences" not in told and "**untested**" not in told
    assert in_short(summary)[2] == (
        "Hidden states help to choose layers: +0.0100 [+0.0050, +0.0150] nats a token over fixed-input controllers at "
        "as many layers, in the clearest of 2 comparisons."
    )
    assert "is **untested**" in in_short(recipe_rows("untested", reasons=("trainings",)))[2]
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")
    page = to_markdown(*report_blocks(summary))
    assert "| hidden, alpha 2 | ROUGE-L | 9.00 | 3 × 5 |" in page and "untested (beyond, noise)" in page
    assert claims.Controllers(summary["controllers"]).num_trainings == 3


def test_controllers_of_which_references_alone_were_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"recipe": "hidden, target 25", "trainings": 3, "runs": 3, "layers": 25.0, "inside": 1.0}
    tested = {"p": 0.01, "q": 0.02, "reasons": [], "verdict": "worse"}
    rows = [row(-0.01, 0.005, metric="over_fixed_nats", **labels, **tested)]
    for name, kind, layers in (("layers:0,2,3", "static", 3.0), ("hidden", "hidden", 25.0)):
        own = {"controller": name, "kind": kind, "parameters": None if kind == "static" else 34_620}
        rows += [row(2.0, 0.01, metric="nats", **own), row(layers, 0.1, metric="layers_nats", **own)]
    rows += [row(-0.3, 0.01, metric="over_static_nats", **own), row(0.5, 0.1, metric="skip_rate_nats", layer=7, **own)]
    summary = {"conditions": {}, "controllers": section(rows, noise="by sequence") | {"seeds": 0}}
    told = text_of(summary, "controllers")
    assert told == (
        "A controller that reads something (hidden, target 25) chooses layers worse than fixed-input ones at as many "
        "layers, 25.0: −0.0100 [−0.0150, −0.0050] nats a token over 3 trainings; one of 0.0071 could have been seen "
        "(80 % power)."
    )
    assert in_short(summary)[2].startswith(
        "Hidden states do not help to choose layers: −0.0100 [−0.0150, −0.0050] nats"
    )
    untested = {**rows[0], "verdict": "untested", "reasons": ["beyond"]}
    other = {"conditions": {}, "controllers": section([untested, *rows[1:]])}
    assert "is **untested**, −0.0100 [−0.0150, −0.0050] nats a token at 25.0 layers: of 1 comparison with fixed" in (
        text_of(other, "controllers")
    )
    beyond = {**untested, "value": None, "low": None, "high": None}
    other_beyond = {"conditions": {}, "controllers": section([beyond, *rows[1:]])}
    assert "is **untested**: of 1 comparison with fixed-input" in text_of(other_beyond, "controllers")
    assert ", by log-likelihood, 0 better, 0 worse, 0 open, 1 untested" in text_of(other, "controllers")
    drawn: list[str] = []
    monkeypatch.setattr(drawing, "svg", lambda name, *_, **__: drawn.append(name) or "<svg ></svg>")
    page = to_markdown(*report_blocks(summary))
    assert drawn == ["controllers-nats", "skip-rates"]
    assert "| hidden | 34,620 | 25.00 [24.90, 25.10] | not measured | 2.0000 [1.9900, 2.0100] |" in page
    assert "| 2.0000 [1.9900, 2.0100] | −0.3000 [−0.3100, −0.2900] |" in page
    assert "| static path of 3 layers | – | 3.00 [2.90, 3.10] |" in page
    assert "ROUGE-L of controllers" not in page and "skip_rate" not in page and "By the log-likelihood" not in page
    assert "sequences. This section scores references alone" in page, "no seed was drawn"


def test_trainings_are_drawn_and_what_they_lack_is_told() -> None:
    summary = recipe_rows("untested", reasons=("curves", "rows", "moving"))
    told = text_of(summary, "controllers")
    assert f"Why untested: 2 of 2 have a training on fewer than {NUM_ROWS:,} rows." in told
    assert "2 of 2 have a training whose losses are not known" in told and "validation loss still moved" in told
    assert "How far controllers were trained" not in to_markdown(*report_blocks(summary))
    losses = {"training": [[step, 3.0 - step / 100] for step in range(1, 41)], "validation": [[20, 2.5], [40, 2.375]]}
    known = {"controller": "hidden, seed 1", "recipe": "hidden, target 26, frozen", "training_seed": 1}
    unknown = {**known, "controller": "saved", "num_rows": None, "moved": None, "training": [], "validation": []}
    summary["controllers"]["trained"] = [{**known, "num_rows": 160, "moved": -0.125, **losses}, unknown]
    page, drawn = to_markdown(*report_blocks(summary)), to_html(*report_blocks(summary))
    assert "| hidden, seed 1 | 160 | 2.375 | −0.125 |" in page and "| saved |" not in page
    assert "controller-training-" in drawn and ">hidden, target 26<" in drawn and ">seed 1<" in drawn


# Hidden states


def test_random_skipping_and_late_exits_are_told_as_they_are() -> None:
    told = text_of(example_summary(), "hidden_states")
    assert "by the cosine of final states uniform skipping is closer to the full model than early exit at 4, 8" in told
    assert (
        "early exit is closer to the full model than uniform skipping at 20 layers: +0.0020 [+0.0010, +0.0030]" in told
    )
    assert "random skipping is closer to the full model than early exit at 4, 8, 12, 16, 20 layers" in told
    farther = changed("hidden_states", {"value": 0.1, "low": 0.09, "high": 0.11}, strategy="rls", metric="cosine_final")
    assert "random skipping is farther from the full model than early exit at 4, 8, 12, 16, 20 layers" in text_of(
        farther, "hidden_states"
    )


def test_the_paths_of_the_training_stand_beside_the_comparison() -> None:
    summary = example_summary()
    told = text_of(summary, "hidden_states")
    assert "Which paths opt-example was trained along is not known here; what skipping as such does is said by" in told
    summary["conditions"]["model"] = "opt-mini"
    told = text_of(summary, "hidden_states")
    assert "opt-mini was trained along uniform paths of 4, 8, 12, 24 layers and never on early exits; what" in told
    assert "said by the weights tuned at full depth only, which were never trained along a path with layers" in told
    summary["hidden_states"]["rows"] = select(summary["hidden_states"], weights="paths")
    assert "never on early exits: whether skipping as such stays closer than exiting is **untested**." in text_of(
        summary, "hidden_states"
    )
    assert "as such does is **untested**" in in_short(summary)[0]


def test_the_trained_paths_are_those_of_the_recipe_or_of_the_adapter() -> None:
    assert claims.trained_paths("opt-mini") == claims.TrainedPaths("uniform", (4, 8, 12, 24))
    assert claims.trained_paths("smollm2-135m-paths") == claims.TrainedPaths("searched", (15, 20, 25))
    assert claims.trained_paths("smollm2-135m-instruct") is None and claims.trained_paths(None) is None


def test_the_headline_on_hidden_states_is_of_weights_that_were_never_trained_to_skip() -> None:
    summary = example_summary()
    labels = {"metric": "cosine_final", "strategy": "uls - exit"}
    told = in_short(summary)[0]
    assert told.startswith("With the weights tuned at full depth only, uniform skipping ends closer to the full model")
    for each in select(summary["hidden_states"], weights="paths", **labels):
        each.update(value=-0.5, low=-0.6, high=-0.4)
    assert in_short(summary)[0] == told, "trained to skip, so not asked"
    for each in select(summary["hidden_states"], weights="full-tuned", **labels):
        sign = {4: 1, 8: 0, 12: -1, 16: -1, 20: -1}[each["budget"]]
        each.update(value=0.1 * sign, low=0.1 * sign - 0.05, high=0.1 * sign + 0.05)
    assert in_short(summary)[0].endswith(
        "ends closer to the full model than early exit at 4 layers, farther at 12, 16, 20 layers, not told apart at 8 "
        "layers: +0.100 [+0.050, +0.150] in cosine at 4 layers."
    )


# The paper's claims


def verdict_on(part: str, summary: dict[str, Any]) -> tuple[str, str]:
    """The verdict on the one claim that has ``part`` in its words, and what was measured."""
    (found,) = (each for each in verdicts(summary) if part in each.claim)
    words = paragraph(summary)
    assert str(found) in words.split(_OPENINGS[found.verdict] + ": ")[1].split(" **")[0], "under its own verdict"
    return found.verdict, found.measured


@pytest.mark.parametrize(
    ("part", "name", "labels", "by_value"),
    [
        (
            "uniform skipping",
            "hidden_states",
            {"metric": "cosine_final", "strategy": "uls - exit", "weights": "full-tuned"},
            {0.3: "holds", -0.3: "does not hold", 0.0: "open"},
        ),
        (
            "each static path",
            "static",
            {"metric": "rouge_l - full", "family": "siblings"},
            {-0.3: "holds", 0.3: "does not hold", 0.0: "open"},
        ),
        (
            "on fewer layers",
            "oracle",
            {"metric": "matching_share", "family": "siblings", "control": "oracle"},
            {0.5: "holds", 1.0: "open"},
        ),
        (
            "on 23.3 % of the layers",
            "oracle",
            {"metric": "matching_share", "family": "siblings", "control": "oracle"},
            {0.22: "holds", 0.5: "does not hold"},
        ),
        (
            "gain comes of depth",
            "oracle",
            {"metric": "surviving_share", "control": "equal depth"},
            {0.0: "holds", 0.5: "holds in part", 1.0: "does not hold"},
        ),
        (
            "prompt alone",
            "router",
            {"metric": "captured_share"},
            {0.3: "no claim of the paper", 0.0: "no claim of the paper"},
        ),
        (
            "response's length",
            "depth",
            {"metric": "pearson", "feature": "response_length"},
            {0.3: "does not hold", 0.0: "holds", 0.07: "open"},
        ),
    ],
)
def test_the_claims_of_the_paper_follow_the_summary(
    part: str, name: str, labels: dict[str, Any], by_value: dict[float, str]
) -> None:
    for value, verdict in by_value.items():
        summary = changed(name, {"value": value, "low": value - 0.08, "high": value + 0.08}, **labels)
        found, measured = verdict_on(part, summary)
        assert found == verdict, (value, measured)
        del summary[name]
        assert verdict_on(part, summary)[0] == "untested"


def test_what_the_paper_leaves_open_is_no_claim_of_it_and_scores_may_disagree(committed: dict[str, Any]) -> None:
    assert verdict_on("random skipping", committed)[0] == verdict_on("prompt alone", committed)[0] == BESIDE
    by_rouge, by_nats = (verdict_on(f"length, in {score}", committed)[1] for score in ("ROUGE-L", "log-likelihood"))
    assert by_rouge.startswith("Pearson's r −") and by_nats.startswith("Pearson's r +")


def test_an_oracle_stands_beside_its_controls(committed: dict[str, Any]) -> None:
    measured = verdict_on("on fewer layers", committed)[1]
    assert "; a choice among paths of one depth on 66.8 %" in measured and ", noise alone on 62.3 % [" in measured
    assert ", an oracle that chose on another output at no budget" in measured
    alone = copy.deepcopy(committed)
    rows = alone["oracle"]["rows"]
    rows[:] = [r for r in rows if r["metric"] != "matching_share" or r["control"] == "oracle"]
    assert verdict_on("on fewer layers", alone)[1].endswith("seen from 2.0 %")


def test_a_claim_that_holds_at_some_depths_holds_in_part_and_says_where() -> None:
    labels = {"metric": "rouge_l - full", "family": "siblings", "budget": 20}
    summary = changed("static", {"value": 0.3, "low": 0.2, "high": 0.4}, **labels)
    found, measured = verdict_on("each static path", summary)
    assert found == "holds in part" and measured.startswith("less at 4, 8, more at 20, open at 12, 16 layers; +0.3000")
    assert measured.endswith("seen from 0.1429"), "the power stands beside it"
    everywhere = changed("static", {"value": -0.3, "low": -0.4, "high": -0.2}, metric="rouge_l - full")
    assert verdict_on("each static path", everywhere)[1].startswith("at 4, 8, 12, 16, 20 layers; −0.3000 [")


def test_a_share_of_layers_below_the_cheapest_path_is_untested() -> None:
    summary = example_summary()
    for each in select(summary["oracle"], metric="mean", family="siblings"):
        each["budget"] += 4
    found, measured = verdict_on("on 23.3 % of the layers", summary)
    assert found == "untested" and measured.startswith("the cheapest path has 33.3 %")


def test_the_claim_on_controllers_has_the_verdict_of_their_comparison() -> None:
    part = "fixed-input controllers choose"
    for told, verdict in (("better", "does not hold"), ("worse", "holds"), ("open", "open"), ("untested", "untested")):
        summary = recipe_rows(told, reasons=("trainings",))
        found, measured = verdict_on(part, summary)
        assert found == verdict and "+0.0100 [+0.0050, +0.0150] nats a token; seen from 0.0071" in measured
        assert measured.endswith("lacking: trainings") == (told == "untested")
        assert ("**untested**" in in_short(summary)[2]) == (told == "untested")
    within = recipe_rows("open")
    within["conditions"]["margin_nats"] = 0.02
    assert verdict_on(part, within)[0] == "holds", "no gain as large as the margin"
    prompt = recipe_rows("better")
    for each in prompt["controllers"]["rows"]:
        each["kind"] = "window"
    assert verdict_on(part, prompt)[0] == "untested", "these read the prompt, not hidden states"


# Budgets


def test_a_loss_a_gain_and_a_difference_that_is_none() -> None:
    labels = {"metric": "rouge_l - full", "family": "paths", "budget": 4}
    lost = text_of(example_summary(), "static")
    assert "ROUGE-L is lower than at full depth at 4, 8, 12 layers; the paired difference at 4 layers is −0.08" in lost
    assert "not told apart from zero at 16, 20 layers, which is no equality: it is −0.0083 [−0.0173, +0.00" in lost
    assert "where a true loss under 0.0129 would be missed in more than one run of five" in lost
    labels = {"metric": "rouge_l - full", "family": "siblings", "budget": 20}
    for value, word in (
        (0.05, "higher than at full depth"),
        (0.0, "not told apart from full depth's"),
        (-0.05, "lower than at full depth"),
    ):
        summary = changed("static", {"value": value, "low": value - 0.01, "high": value + 0.01}, **labels)
        assert f"ROUGE-L at 20 of 24 layers is {word}: " in in_short(summary)[1]
        assert ("higher than at full depth at 20 layers" in text_of(summary, "static")) == (value > 0)
    assert "no loss" not in lost


# Depth


def test_correlations_are_corrected_for_all_that_were_looked_at() -> None:
    summary = example_summary()
    found = claims.Correlations(summary["depth"])
    assert (len(found.rows), len(found.clear), len(found.kept)) == (8, 2, 2)
    told = text_of(summary, "depth")
    assert "Of 8 rank correlations of the oracle's depth, 2 have an uncorrected interval that leaves zero out" in told
    assert "and 2 stay after Holm's correction" in told and "**untested**" in told
    # Alone this is clear; among eight it is not.
    labels = {"metric": "spearman", "feature": "full_loss"}
    one_of_many = changed("depth", {"value": 0.09, "low": 0.01, "high": 0.17}, **labels)
    assert "and 0 stay after Holm's correction" in text_of(one_of_many, "depth")
    strong = changed("depth", {"value": 0.4, "low": 0.32, "high": 0.48}, metric="spearman", feature="full_loss", at=8.0)
    weak = next(r for r in strong["depth"]["rows"] if r["metric"] == "spearman" and r["feature"] == "full_loss")
    weak.update(value=-0.1, low=-0.18, high=-0.02)
    told = text_of(strong, "depth")
    assert "and 1 stay after Holm's correction" in told
    assert "The largest is that with the loss of the full model, +0.40 [+0.32, +0.48] at a mean of 8 layers" in told
    assert "Its sign depends on the budget: −0.10 [−0.18, −0.02] at a mean of 6 layers" in told
    yardstick = copy.deepcopy(summary)
    for each in yardstick["depth"]["rows"]:
        if each.get("feature") == "full_loss":
            each["feature"] = "full_rouge_l"
    assert len(claims.Correlations(yardstick["depth"]).rows) == 6


def test_correlations_without_ties_have_the_sections_own_correction() -> None:
    summary = example_summary()
    for place, each in enumerate(r for r in summary["depth"]["rows"] if r["metric"] == "spearman"):
        each["q"] = 0.01 if place in (3, 7) else 0.5
    summary["depth"]["corrected"] = "Benjamini and Hochberg"
    told = text_of(summary, "depth")
    assert "and 2 stay after the correction by Benjamini and Hochberg" in told and "are left out of them" in told
    assert "Holm" not in told and "untested" not in told


def test_difficulties_without_labels_are_told_with_their_n_or_are_untested() -> None:
    def told_of(value: float, half: float, q: float, feature: str = "prefill_entropy", **more: Any) -> str:
        summary = example_summary()
        labels = {"metric": "spearman", "family": "paths", "at": 8.0, "feature": feature, "q": q, "num": 1949}
        summary["depth"]["rows"].append(row(value, half, **labels, **more))
        return "\n".join(text for text in section_sentences(summary, "depth") if text.startswith("Difficulty without"))

    start = "Difficulty without labels: with one set of weights, several paths, the depth that the oracle chooses by "
    of = "ROUGE-L at a mean of 8 layers correlates with the entropy behind the prompt by "
    assert told_of(0.3, 0.05, 0.001) == f"{start}{of}+0.300 [+0.250, +0.350] (n = 1,949)."
    none = "none found where one of 0.07 could have been seen (80 % power)"
    assert told_of(0.01, 0.05, 0.7) == f"{start}{of}+0.010 [−0.040, +0.060] (n = 1,949), {none}."
    few = "**untested**: only one of 0.29 or more could have been seen (80 % power)"
    assert told_of(0.01, 0.2, 0.7) == f"{start}{of}+0.010 [−0.190, +0.210] (n = 1,949), {few}."
    assert "deviation of the draws' lengths by +0.300" in told_of(0.3, 0.05, 0.001, "sd_of_draw_lengths")
    assert told_of(0.3, 0.05, 0.001, "sd_of_draws") == "", "that one takes the reference"


def test_what_is_equivalent_and_what_never_reaches_are_told() -> None:
    labels = {"metric": "rouge_l - full", "family": "paths", "budget": 16}
    summary = changed("static", {"verdict": "equivalent", "margin": 0.01}, **labels)
    assert (
        "ROUGE-L is equivalent to full depth's at 16 layers: two one-sided tests put the difference within 0.010"
        in (text_of(summary, "static"))
    )
    labels = {"metric": "matching_budget", "control": "oracle"}
    never = changed("oracle", {"value": 9.0, "low": 7.0, "high": None, "never": 0.1}, **labels)
    assert "9.00 [7.00, ∞) of 24 layers" in text_of(never, "oracle")


def test_log_likelihoods_have_a_table_in_each_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")
    summary = example_summary()
    title = "By the log-likelihood of references"
    assert title not in to_markdown(*report_blocks(summary))
    found = row(0.5, 0.1, metric="nats - full", family="paths", budget=4, verdict="higher", detectable=0.14)
    summary["static"]["rows"].append(found)
    page = to_markdown(*report_blocks(summary))
    assert page.count(title) == 1
    assert "| nats - full | family paths, budget 4 | 0.5000 [0.4000, 0.6000] | 0.1400 | higher |" in page
    assert "a token of the reference costs +0.5000 [+0.4000, +0.6000] nats more at 4 layers" in page


def test_milliseconds_stand_beside_layers_where_a_path_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")
    timed = {"metric": "ms_per_token", "family": "paths"}
    times = [row(0.5, 0.01, mix="4", path="layers:0,1", **timed), row(0.4, 0.01, mix="a mix", path=None, **timed)]
    static = [
        row(2.0, 0.01, metric="nats", family=family, budget=budget, path=path)
        for family in ("paths", "backbone")
        for budget, path in ((4, "layers:0,1"), (6, "layers:0,2"))
    ]
    learned = []
    for name, kind in (("layers:0,1", "static"), ("layers:0,2", "static"), ("hidden", "hidden")):
        own = {"controller": name, "kind": kind, "parameters": None}
        learned += [row(2.0, 0.01, metric="nats", **own), row(4.0, 0.1, metric="layers_nats", **own)]
    summary = {
        "conditions": {"num_layers": 24, "timed_batch": 32},
        "static": section(static),
        "oracle": section([*times, row(2.0, 0.01, metric="mean_nats", family="paths", budget=4)]),
        "controllers": section(learned),
    }
    page = to_markdown(*report_blocks(summary))
    assert page.count("| ms a token, batch of 32 |") == 2
    assert "| 4 | 0.500 [0.490, 0.510] | 2.000 [1.990, 2.010] | 2.000 [1.990, 2.010] |" in page
    assert "| 6 | not measured | 2.000 [1.990, 2.010] |" in page
    assert page.count("| 4.00 [3.90, 4.10] | 0.500 [0.490, 0.510] | 2.0000 [1.9900, 2.0100] |") == 1
    assert page.count("| 4.00 [3.90, 4.10] | not measured | 2.0000 [1.9900, 2.0100] |") == 2


# The committed run


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    return summary


def test_the_committed_report_is_what_the_command_writes(
    committed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the drawings, whose bytes are matplotlib's own."""
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")
    written = report_blocks(committed)
    again = f"run `dynskip report {RUN.relative_to(ROOT)}`"
    assert to_markdown(*written) == (RUN / "report.md").read_text(encoding="utf-8"), again
    linked = re.findall(r"\]\((figures/[^)]+)\)", to_markdown(*written))
    assert sorted(linked) == sorted(file.relative_to(RUN).as_posix() for file in RUN.glob("figures/*")), again
    html = (RUN / "report.html").read_text(encoding="utf-8")
    pages = [re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL) for page in (to_html(*written), html)]
    assert pages[0] == pages[1], again


def test_the_readme_tells_what_the_committed_report_opens_with() -> None:
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert RUN.name == table.PAPER_RUN
    summary = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    block = readme.split(table.PAPER_BEGIN)[1].split(table.PAPER_END)[0]
    assert " ".join(block.split()) == " ".join(
        [*(f"- {text}" for text in in_short(summary)), f"Of the paper's claims: {paragraph(summary)}"]
    )


def test_the_committed_times_are_of_the_machine_that_is_named(committed: dict[str, Any]) -> None:
    timed_on = json.loads((RUN / "config.json").read_text(encoding="utf-8"))["timed_on"]
    assert committed["conditions"]["timed_on"] == timed_on and timed_on.keys() == {"host", "machine", "isa"}
    with lzma.open(RUN / "items.jsonl.xz", "rt", encoding="utf-8") as file:
        lines = [line for line in map(json.loads, file) if "machine" in line["item"]["options"]]
    assert {(line["host"], line["item"]["options"]["machine"], line["isa"]) for line in lines} == {
        tuple(timed_on.values())
    }
    medians = {label: np.median(ms) for line in lines for label, ms in line["result"]["ms_per_token"].items()}
    told = {r["mix"]: r["value"] for r in committed["oracle"]["rows"] if r["metric"] == "ms_per_token"}
    assert told == {label: pytest.approx(value, rel=0.01) for label, value in medians.items()}


def test_the_committed_controllers_are_untested_and_their_trainings_beside_them(committed: dict[str, Any]) -> None:
    section = committed["controllers"]
    found = claims.Controllers(section)
    assert (found.verdict, found.reasons) == ("untested", ["rows", "moving"])
    short = in_short({"conditions": {}, "controllers": section})[2]
    assert signed(found.recipes[0], 4) in short and "**untested**" in short
    with (RUN / "curves.csv").open(encoding="utf-8", newline="") as file:
        logged = list(csv.DictReader(file))
    for each in section["trained"]:
        own = [line for line in logged if line["controller"] == each["controller"]]
        for name, column in (("training", "loss"), ("validation", "eval_loss")):
            losses = [[int(line["step"]), pytest.approx(float(line[column]), abs=1e-5)] for line in own if line[column]]
            assert each[name] == losses and losses
    assert {line["controller"] for line in logged} == {each["controller"] for each in section["trained"]}


def test_the_committed_depths_are_held_against_the_variance_of_draws(committed: dict[str, Any]) -> None:
    features = {r["feature"] for r in select(committed["depth"], metric="spearman") if r.get("q") is not None}
    assert {"sd_of_draws", "sd_of_draw_lengths", "prefill_entropy"} <= features


def test_what_was_cut_has_the_numbers_of_the_run(committed: dict[str, Any]) -> None:
    cut = (RUN / "cut.txt").read_text(encoding="utf-8").splitlines()
    assert committed["cut"] == cut
    rows = select(committed["static"])
    paired = [r for r in rows if r["metric"].startswith("nats - ") and r.get("detectable")]
    needed = sorted(math.ceil(2000 * (r["detectable"] / r["margin"]) ** 2) for r in paired)
    assert committed["static"]["n_nats"] == 2000
    for number in needed[-3:]:
        assert f"{number:,}" in cut[0]
    assert needed[-3] < 5000 < needed[-2], "all comparisons but two"


def test_the_committed_routers_have_their_q(committed: dict[str, Any]) -> None:
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")
    rows = select(committed["router"], metric="captured_share_nats")
    adjusted = scipy_stats.false_discovery_control([each["p"] for each in rows], method="bh")
    assert [each["q"] for each in rows] == pytest.approx(list(adjusted), abs=1e-7) and len(rows) >= 4
    assert [each["p"] for each in rows] == pytest.approx([p_value(each) for each in rows], abs=1e-7)
