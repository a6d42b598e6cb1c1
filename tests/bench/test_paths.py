"""What `bench/paths.py` writes of its results: verdicts, table, figure."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="figures need the extra 'eval' (matplotlib)")

from bench.paths import AIMED, FULL_DEPTH_SLACK, NUM_FEW, REQUIRED, figure, page, verdict


def results(tuned: dict[int, float], untuned_full: float = 2.0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for layers, value in tuned.items():
        labels = {"what": "loss", "num_rows": NUM_FEW, "layers": layers, "path": f"{layers}/30 layers"}
        before = untuned_full if layers == 30 else value + 1
        for model, rule, nats in (("untuned", "found", before), ("tuned", "found", value), ("untuned", "uniform", 9.0)):
            if (layers, rule) != (30, "uniform"):
                ends = {"value": nats, "low": nats - 0.1, "high": nats + 0.1}
                rows.append({**labels, "model": model, "rule": rule, **ends})
        rows += [{"what": "ms", "layers": layers, "batch": batch, "value": layers / 2 + batch} for batch in (1, 8)]
    return [{**row, "cpu": "a CPU", "date": "2026-11-26 18:21 UTC"} for row in rows]


def test_a_bar_is_missed_met_or_better_than_met() -> None:
    for layers, required in REQUIRED.items():
        for nats, wanted in ((required + 0.01, "MISSED"), (required, "met"), (AIMED[layers], "aim met")):
            assert verdict(results({layers: nats}), layers) == wanted
    for slack, wanted in ((FULL_DEPTH_SLACK - 0.001, "met"), (FULL_DEPTH_SLACK + 0.001, "MISSED")):
        assert verdict(results({30: 2.0 + slack}), 30) == wanted
    assert verdict([], 25) == "-"


def test_the_last_result_of_a_kind_counts() -> None:
    old, new = results({20: 3.5}), results({20: 2.75})
    assert verdict([*old, *new], 20) == "met" and verdict([*new, *old], 20) == "MISSED"


def test_the_table_has_a_line_a_depth_and_the_figure_a_point() -> None:
    rows = results({30: 2.0, 25: 2.35, 20: 2.9, 15: 3.1})
    text = page(rows, "some-model")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    head, *body = lines
    assert [line[0] for line in body] == ["30", "25", "20", "15"]
    shown = [line[head.index("verdict")] for line in body]
    assert shown == ["met", "met", "MISSED", "aim met"]
    assert body[2][head.index(f"tuned, {NUM_FEW} rows")] == "2.900 [2.800, 3.000]"
    assert body[0][head.index(f"uniform, untuned, {NUM_FEW} rows")] == "-"
    drawn = ElementTree.fromstring(figure(rows))
    texts = {"".join(each.itertext()) for each in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"untuned, uniform", "untuned, searched", "tuned, searched", "20"} <= texts
