"""What the report says of hidden states, budgets and depth, for made-up summaries that turn each verdict over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from summaries import changed, example_summary, row, section, text_of

from dynskip.evaluation.report import claims, drawing
from dynskip.evaluation.report.document import to_markdown
from dynskip.evaluation.report.rows import select
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.report.short import in_short
from dynskip.evaluation.report.write import report_blocks

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


def test_closed_labels_are_told_beside_what_is_right_without_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "svg", lambda *_, **__: "<svg ></svg>")
    summary = example_summary()
    assert "Closed labels" not in to_markdown(*report_blocks(summary))
    of = {"metric": "label_match", "family": "paths"}
    summary["static"]["rows"] += [
        *(row(value, 0.02, budget=budget, **of) for budget, value in ((24, 0.55), (12, 0.54), (4, 0.42))),
        *(
            row(value, 0.02, **{**of, "metric": "label_match - full"}, budget=budget, verdict=verdict)
            for budget, value, verdict in ((24, 0.0, "equivalent"), (12, -0.01, "open"), (4, -0.13, "lower"))
        ),
        *(row(value, 0.02, metric="label_match", rule=rule) for rule, value in (("chance", 0.4), ("majority", 0.5))),
    ]
    summary["conditions"]["label_prompts"] = 500
    page = to_markdown(*report_blocks(summary))
    assert "of 500 rows of T0 the share whose right label" in page
    assert "chance 40.0 % [38.0 %, 42.0 %], majority 50.0 % [48.0 %, 52.0 %]; majority is" in page
    assert "| 24 | 55.0 % [53.0 %, 57.0 %] | – | – | – |" in page
    assert "| 4 | 42.0 % [40.0 %, 44.0 %] | −0.130 [−0.150, −0.110] | 0.029 | lower |" in page
    told = text_of(summary, "static")
    assert "of closed labels 55 % [53 %, 57 %] are right at full depth, where each template's most frequent one" in told
    assert "fewer are right than at full depth at 4 layers; the paired difference at 4 layers is −0.130" in told
    assert "at 12 layers the difference is not told apart from none, which is no equality: at 12 a loss under" in told
