"""What the report says of controllers, for made-up summaries that turn each verdict over."""

from __future__ import annotations

from typing import Any

import pytest
from summaries import recipe_rows, row, section, text_of

from dynskip.evaluation.report import claims, drawing
from dynskip.evaluation.report.claims import NUM_NOISE_SEEDS, NUM_ROWS, NUM_TRAININGS
from dynskip.evaluation.report.document import to_html, to_markdown
from dynskip.evaluation.report.short import in_short
from dynskip.evaluation.report.write import report_blocks


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


def test_recipes_are_told_by_their_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = recipe_rows("better", "open", "untested", reasons=("beyond", "noise"))
    told = text_of(summary, "controllers")
    assert "of 6 comparisons with fixed-input controllers at as many layers, by ROUGE-L and by log-likelihood" in told
    assert "2 better, 0 worse, 2 open, 2 untested, after control of false discoveries" in told
    assert "Why untested: 2 of 6 with layers that no fixed-input controller reaches." in told
    assert f"Why untested: 2 of 6 with fewer than {NUM_NOISE_SEEDS} draws of the noise" in told
    assert "The clearest by log-likelihood is hidden, alpha 0: +0.0100 [+0.0050, +0.0150] nats a token" in told
    assert "shared by all sequences" not in told and "**untested**" not in told
    assert in_short(summary)[2] == (
        "Hidden states help to choose layers: +0.0100 [+0.0050, +0.0150] nats a token over the line between "
        "fixed-input controllers at 9 layers, in the clearest of 3 comparisons, 2 of them tested."
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
    assert f"Why untested: 2 of 2 with a training on fewer than {NUM_ROWS:,} rows." in told
    assert "2 of 2 with a training whose losses are not known" in told and "validation loss that still moved" in told
    assert "How far controllers were trained" not in to_markdown(*report_blocks(summary))
    losses = {"training": [[step, 3.0 - step / 100] for step in range(1, 41)], "validation": [[20, 2.5], [40, 2.375]]}
    known = {"controller": "hidden, seed 1", "recipe": "hidden, target 26, frozen", "training_seed": 1}
    unknown = {**known, "controller": "saved", "num_rows": None, "moved": None, "training": [], "validation": []}
    summary["controllers"]["trained"] = [{**known, "num_rows": 160, "moved": -0.125, **losses}, unknown]
    page, drawn = to_markdown(*report_blocks(summary)), to_html(*report_blocks(summary))
    assert "| hidden, seed 1 | 160 | 2.375 | −0.125 |" in page and "| saved |" not in page
    assert "controller-training-" in drawn and ">hidden, target 26<" in drawn and ">seed 1<" in drawn
