"""What the report says of routers, for made-up summaries that turn each verdict over."""

from __future__ import annotations

from typing import Any

import pytest
from summaries import changed, example_summary, row, section, text_of

from dynskip.evaluation.report import claims
from dynskip.evaluation.report.evidence import direction, p_value


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
