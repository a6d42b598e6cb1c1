"""The verdicts on the claims of the paper: made-up summaries turn each of them over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from summaries import changed, example_summary, recipe_rows

from dynskip.evaluation.report.paper_claims import _ORDER, BESIDE, claims_table, tally, verdicts
from dynskip.evaluation.report.rows import select
from dynskip.evaluation.report.short import in_short


def verdict_on(part: str, summary: dict[str, Any]) -> tuple[str, str]:
    """The verdict on the one claim that has ``part`` in its words, and what was measured."""
    (found,) = (each for each in verdicts(summary) if part in each.claim)
    (row,) = (row for row in claims_table(summary).rows if part in row[0])
    assert list(row) == [found.claim, found.verdict, found.measured or "–", found.seen or "–"]
    return found.verdict, found.measured


def power_beside(part: str, summary: dict[str, Any]) -> str:
    """From which size on an effect is seen, beside the one claim that has ``part`` in its words."""
    (found,) = (each for each in verdicts(summary) if part in each.claim)
    return found.seen


def test_claims_are_counted_and_stand_in_the_order_of_their_verdicts(committed: dict[str, Any]) -> None:
    found = [row[1] for row in claims_table(committed).rows]
    assert found == sorted(found, key=list(_ORDER).index) and len(set(found)) > 3
    told = tally(committed)
    assert told.startswith(f"Of {len(found) - found.count(BESIDE)} claims of the paper {found.count('holds')} hold, ")
    assert f" and {found.count('untested')} are untested." in told and "open" not in told
    assert tally({"conditions": {}}).startswith("Of 8 claims of the paper 8 are untested.")


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
            {0.5: "holds in part", 1.0: "open"},
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
    found, measured = verdict_on("on fewer layers, in ROUGE-L", committed)
    assert found == "holds in part", "what knows nothing of depths matches full depth, too"
    assert "; a choice among paths of one depth on 66.8 %" in measured and ", noise alone on 62.3 % [" in measured
    assert ", an oracle that chose on another output at no budget" in measured
    alone = copy.deepcopy(committed)
    rows = alone["oracle"]["rows"]
    rows[:] = [r for r in rows if r["metric"] != "matching_share" or r["control"] == "oracle"]
    found, measured = verdict_on("on fewer layers, in ROUGE-L", alone)
    assert found == "holds" and measured.endswith("]")
    assert power_beside("on fewer layers, in ROUGE-L", alone) == "2.0 %"


def test_an_oracle_has_a_verdict_by_either_score(committed: dict[str, Any]) -> None:
    found, measured = verdict_on("on fewer layers, in log-likelihood", committed)
    assert found == "holds in part" and measured.startswith("on 95.0 % [94.0 %, 95.7 %]")
    assert "; a choice among paths of one depth on 94.9 % [" in measured
    for score in ("ROUGE-L", "log-likelihood"):
        assert verdict_on(f"on 23.3 % of the layers, in {score}", committed)[0] == "untested"


def test_a_claim_that_holds_at_some_depths_holds_in_part_and_says_where() -> None:
    labels = {"metric": "rouge_l - full", "family": "siblings", "budget": 20}
    summary = changed("static", {"value": 0.3, "low": 0.2, "high": 0.4}, **labels)
    found, measured = verdict_on("each static path", summary)
    assert found == "holds in part" and measured.startswith("less at 4, 8, more at 20, open at 12, 16 layers; +0.3000")
    assert power_beside("each static path", summary) == "0.1429", "in the measure's unit"
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
        assert found == verdict and "+0.0100 [+0.0050, +0.0150] nats a token" in measured
        assert power_beside(part, summary) == "0.0071"
        assert measured.endswith("lacking: trainings") == (told == "untested")
        assert ("**untested**" in in_short(summary)[2]) == (told == "untested")
    within = recipe_rows("open")
    within["conditions"]["margin_nats"] = 0.02
    assert verdict_on(part, within)[0] == "holds", "no gain as large as the margin"
    prompt = recipe_rows("better")
    for each in prompt["controllers"]["rows"]:
        each["kind"] = "window"
    assert verdict_on(part, prompt)[0] == "untested", "these read the prompt, not hidden states"
