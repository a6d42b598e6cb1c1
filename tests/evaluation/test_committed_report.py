"""The committed run: its report is what the command writes, and says what it was told by."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import lzma
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynskip.evaluation.registry import EXPERIMENTS
from dynskip.evaluation.report import claims, drawing
from dynskip.evaluation.report.document import to_html, to_markdown
from dynskip.evaluation.report.evidence import (
    p_value,
)
from dynskip.evaluation.report.numbers import signed
from dynskip.evaluation.report.paper_claims import tally
from dynskip.evaluation.report.rows import select
from dynskip.evaluation.report.sentences.oracle_controls import paper_null
from dynskip.evaluation.report.short import in_short
from dynskip.evaluation.report.write import report_blocks
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import GROWING, Setup
from dynskip.evaluation.sweep.store import ItemStore

ROOT = Path(__file__).parents[2]
RUN = ROOT / "bench" / "results" / "paper-smollm2"


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
        [*(f"- {text}" for text in in_short(summary)), paper_null(), tally(summary)]
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


def test_the_committed_controllers_are_a_test_where_they_stand_still_and_their_trainings_beside_them(
    committed: dict[str, Any],
) -> None:
    section = committed["controllers"]
    found = claims.Controllers(section)
    assert [(row["verdict"], row["reasons"]) for row in found.recipes] == [
        ("better", []),
        *[("untested", ["moving"])] * 2,
    ]
    moved: dict[str, list[float]] = {}
    for each in section["trained"]:
        assert each["num_rows"] >= claims.NUM_ROWS
        moved.setdefault(each["recipe"], []).append(each["moved"])
    assert {len(each) for each in moved.values()} == {claims.NUM_TRAININGS}
    still = {recipe for recipe, own in moved.items() if abs(np.mean(own)) <= committed["conditions"]["margin_nats"]}
    for row in found.recipes:
        assert ({row["recipe"], *row["neighbours"]} <= still) == (row["verdict"] != "untested")
    short = in_short({"conditions": {}, "controllers": section})[2]
    assert signed(found.recipes[0], 4) in short and short.startswith("Hidden states help") and " at 20 layers" in short
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
    assert {"sd_of_draw_lengths", "prefill_entropy"} <= features
    assert not {"sd_of_draws", "full_rouge_l"} & features, "yardsticks: the reference makes them"


def test_what_was_cut_has_the_numbers_of_the_run(committed: dict[str, Any]) -> None:
    cut = (RUN / "cut.txt").read_text(encoding="utf-8").splitlines()
    assert committed["cut"] == cut
    rows = {(r["metric"], r.get("family"), r.get("budget")): r for r in select(committed["siblings"])}
    rows |= {(r["metric"], r.get("family"), r.get("budget")): r for r in select(committed["static"])}
    paired = [r for r in rows.values() if r["metric"].startswith("nats - ") and r.get("detectable")]
    needed = sorted(math.ceil(2000 * (r["detectable"] / r["margin"]) ** 2) for r in paired)
    assert committed["static"]["n_nats"] == 2000
    for number in needed[-8:]:
        assert f"{number:,}" in cut[0]
    assert needed[-8] < 5000 < needed[-7], "all comparisons but seven"
    assert sum(number > 7801 for number in needed) == 4, "more than the test part has"


def test_the_committed_routers_have_their_q(committed: dict[str, Any]) -> None:
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install dynskip[eval]")
    rows = select(committed["router"], metric="captured_share_nats")
    adjusted = scipy_stats.false_discovery_control([each["p"] for each in rows], method="bh")
    assert [each["q"] for each in rows] == pytest.approx(list(adjusted), abs=1e-7) and len(rows) >= 4
    assert [each["p"] for each in rows] == pytest.approx([p_value(each) for each in rows], abs=1e-7)


@pytest.mark.parametrize("name", ["static", "hidden-states", "oracle", "depth"])
def test_the_committed_items_are_all_that_the_code_asks_for(
    committed: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Without the data: what an experiment asks for hangs on hashes and sizes."""
    held = json.loads((RUN / "config.json").read_text(encoding="utf-8"))["setup"]
    gone, num_layers = tmp_path / "not committed", committed["conditions"]["num_layers"]
    others = {"checkpoint", "backbone", "budgets", "candidates", "searched", "siblings", "prompts"}
    plain = {each.name for each in dataclasses.fields(Setup)} & held.keys() - others
    setup = Setup(
        checkpoint=Checkpoint(gone, held["checkpoint"], num_layers),
        backbone=Checkpoint(gone / "before", held["backbone"], num_layers),
        data=gone,
        budgets=tuple(held["budgets"]),
        candidates=tuple(held["candidates"]),
        searched=tuple(sorted((int(budget), path) for budget, path in held["searched"].items())),
        likelihood_only=True,
        prompts=committed["static"]["n"],
        **{each: committed["conditions"][each] for each in GROWING},
        **{
            each: held[each]
            for each in plain & held.keys() - {"checkpoint", "backbone", "budgets", "candidates", "searched"}
        },
    )
    with lzma.open(RUN / "items.jsonl.xz", "rt", encoding="utf-8") as packed:
        (tmp_path / "items.jsonl").write_text(packed.read(), encoding="utf-8")
    with ItemStore(tmp_path / "items") as store:
        assert store.missing(EXPERIMENTS[name].plan(setup, store)) == []
