"""What the report says of the oracle and its controls, for made-up summaries that turn each verdict over."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from summaries import changed, example_summary, text_of

from dynskip.evaluation.report import claims
from dynskip.evaluation.report import paper_numbers as paper
from dynskip.evaluation.report.paper_claims import claims_table
from dynskip.evaluation.report.sentences import section_sentences


def test_the_null_model_on_the_papers_means_gives_what_it_was_not_fitted_to() -> None:
    null = claims.paper_null()
    assert null.best_up_to[24] == pytest.approx(paper.BEST_UP_TO[24], abs=1e-4)
    for budget in (8, 12):
        assert null.best_up_to[budget] == pytest.approx(paper.BEST_UP_TO[budget], abs=0.005)
    assert null.sd == pytest.approx(0.08, abs=0.001) and 0.26 < null.matching_share < 0.28
    assert section_sentences(example_summary(), "oracle")[0].startswith("On the paper's own four means")
    (untested,) = (row for row in claims_table(example_summary()).rows if "on 23.3 % of the layers" in row[0])
    assert f"does on {100 * null.matching_share:.1f} %" in untested[2]


def test_a_matching_budget_near_the_floor_and_one_far_from_it() -> None:
    told = text_of(example_summary(), "oracle")
    assert "5.90 [5.70, 6.10] of 24 layers, near the floor of 4, the cheapest path (16.7 % of the layers)" in told
    assert "300 of 500 sequences run it, and full depth leads the cheapest path by +0.0833" in told
    far = changed("oracle", {"value": 12.0, "low": 11.0, "high": 13.0}, metric="matching_budget", control="oracle")
    assert "12.00 [11.00, 13.00] of 24 layers, 40 % of the way from the cheapest path's 4" in text_of(far, "oracle")
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


def test_a_feature_that_the_two_scores_follow_in_opposite_directions_is_said() -> None:
    summary = example_summary()
    rows = summary["depth"]["rows"]
    first = next(row for row in rows if row["metric"] == "spearman" and row["low"] > 0)
    assert "the sign is the other one" not in text_of(summary, "depth")
    rows.append({**first, "metric": "spearman_nats", "at": 9.0, "value": -0.3, "low": -0.4, "high": -0.2})
    told = text_of(summary, "depth")
    assert (
        "By log-likelihood the sign is the other one" in told
        and "the one by log-likelihood by −0.30 [−0.40, −0.20]" in told
    )
