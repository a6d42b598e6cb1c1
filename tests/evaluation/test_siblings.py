"""Weights tuned for one budget each: what is compared, and that it can be said again when they are gone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import adapted
from checkpoints import PEFT_WARNS
from evaluation_models import save_checkpoint, tiny_setup
from families import family_hf

from bench import paper
from dynskip.evaluation.experiments import siblings
from dynskip.evaluation.report.document import Figure, Paragraph, Table
from dynskip.evaluation.report.paper_claims import verdicts
from dynskip.evaluation.report.sections import SECTIONS
from dynskip.evaluation.report.sentences import section_sentences
from dynskip.evaluation.report.write import write_report
from dynskip.evaluation.run_folder import RunFolder
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.likelihoods import member_likelihoods
from dynskip.evaluation.tasks.path_families import families
from dynskip.paths import LayerPath

for package in ("datasets", "rouge_score", "sklearn", "scipy", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install dynskip[eval]")


def setup_in(folder: Path, budgets: tuple[int, ...] = (2, 4, 6), **changes: Any) -> Setup:
    for seed, budget in enumerate((2, 4, 6), 1):
        if not (folder / f"s{budget}").exists():
            save_checkpoint(folder / f"s{budget}" / "model", seed)
            layers = {"path": list(LayerPath.uniform(6, budget).layers)}
            first = str(folder / "first" / "adapter")
            trained = {"method": "lora", "rank": 16, "adapter": first, "batch_size": 8, "learning_rate": 1e-3}
            record = {"config": {"num_steps": 7, **trained}, "layers": layers}
            (folder / f"s{budget}" / "run.json").write_text(json.dumps(record))
            (folder / f"s{budget}" / "training").mkdir()
            (folder / f"s{budget}" / "training" / "curves.csv").write_text(f"step,loss\n1,{budget}.5\n")
    if not (folder / "first").exists():
        (folder / "first" / "training").mkdir(parents=True)
        (folder / "first" / "run.json").write_text(json.dumps({"config": {"num_steps": 9}}))
        (folder / "first" / "training" / "curves.csv").write_text("step,loss\n1,1.5\n")
    if not (folder / "before").exists():
        save_checkpoint(folder / "before", 9)
    own = {budget: str(folder / f"s{budget}" / "model") for budget in budgets}
    options: dict[str, Any] = {"siblings": own, "backbone": str(folder / "before"), "likelihood_only": True}
    return tiny_setup(folder, **{**options, **changes})


def test_siblings_are_held_against_other_weights_along_the_same_paths(tmp_path: Path) -> None:
    setup = setup_in(tmp_path)
    summary = paper.run(setup, ["siblings"], tmp_path / "committed", tmp_path / "work", progress=False)
    section = summary["siblings"]
    found = families(setup)
    with ItemStore(tmp_path / "work" / "items") as store:
        scored = {name: member_likelihoods(setup, store, found[name]) for name in found}
    tokens = scored["paths"].num_tokens
    nats = {name: -each.scores for name, each in scored.items()}

    def value(metric: str, budget: int) -> float:
        (row,) = (row for row in section["rows"] if row["metric"] == metric and row.get("budget") == budget)
        return float(row["value"])

    def mean(values: Any) -> float:
        return float(np.average(values, weights=tokens))

    for column, budget in enumerate((2, 4, 6)):
        for other in ("untuned", "paths", "backbone")[budget == 6 :]:
            difference = nats["siblings"][:, column] - nats[other][:, column]
            assert value(f"nats - {other}", budget) == pytest.approx(mean(difference), abs=1e-5)
            if budget < 6 and other != "untuned":
                of_full = nats["siblings"][:, -1] - nats[other][:, -1]
                assert value(f"loss - loss of {other}", budget) == pytest.approx(mean(difference - of_full), abs=1e-5)
    metrics = {(row["metric"], row.get("budget")) for row in section["rows"]}
    assert ("nats - untuned", 6) not in metrics, "at full depth they are the same weights"
    tested = [row for row in section["rows"] if row["metric"].startswith("loss - ")]
    assert len(tested) == 4, "weights tuned at full depth only have the siblings' own full depth"
    assert all(row["p"] <= row["q"] <= 1 for row in tested)
    matched = {row["family"] for row in section["rows"] if row["metric"] == "matching_budget"}
    assert matched == {"siblings", "paths"}
    told = " ".join(section_sentences(summary, "siblings"))
    assert "In weights tuned for one budget each" in told and "Beside shared weights along the same path" in told
    for row in section["rows"]:
        if row["metric"] == "loss - loss of paths":
            is_clear = row["q"] < 0.05 and row["low"] * row["high"] > 0
            word = ("less" if row["value"] < 0 else "more") if is_clear else "no less or more"
            lines = section_sentences(summary, "siblings")
            (line,) = (each for each in lines if "beside what shared weights lose" in each)
            assert re.search(rf"{word} at (\d+ \([^)]+\), )*{row['budget']} \(", line), line
    (verdict,) = (each for each in verdicts({**summary, "static": {}}) if "one budget each" in each.claim)
    assert verdict.verdict != "untested" and "nats a token at 4" in verdict.measured
    blocks = SECTIONS["siblings"][1](section, summary)
    assert [type(block) for block in blocks] == [Paragraph, Figure, Table, Table, Table, Table]
    by_budget, beside, losses = (block for block in blocks[2:5] if isinstance(block, Table))
    assert [row[0] for row in by_budget.rows] == [row[0] for row in beside.rows] == ["6", "4", "2"]
    assert [row[0] for row in losses.rows] == ["4", "2"], "full depth loses nothing"


def test_a_difference_within_the_margin_is_neither_better_nor_worse() -> None:
    def row(budget: int, value: float, verdict: str) -> dict[str, Any]:
        bounds = {"value": value, "low": value - 0.001, "high": value + 0.001}
        return {"metric": "nats - paths", "family": "siblings", "budget": budget, "verdict": verdict, **bounds}

    rows = [row(2, -0.5, "lower"), row(3, 0.004, "equivalent"), row(4, -0.003, "equivalent"), row(5, 0.3, "higher")]
    summary = {"conditions": {"num_layers": 6}, "siblings": {"n": 9, "rows": rows, "notes": []}}
    (told,) = section_sentences(summary, "siblings")
    assert "siblings are better at 2 (" in told and "worse at 5 (" in told
    assert re.search(r"within the margin at 4 \([^)]+\), 3 \([^)]+\) layers", told), told


@pytest.mark.parametrize("budgets", [(), (6,), (2, 4)])
def test_without_full_depth_or_any_other_nothing_is_said(budgets: tuple[int, ...], tmp_path: Path) -> None:
    setup = setup_in(tmp_path, budgets)
    with ItemStore(tmp_path / "items") as store:
        assert siblings.plan(setup, store) == []
        section = siblings.summarise(setup, store)
    assert section["rows"] == [] and "name folders with --sibling" in section["notes"][0]
    assert section_sentences({"conditions": {"num_layers": 6}, "siblings": section}, "siblings") == []


def test_what_was_said_of_siblings_is_said_again_without_them(tmp_path: Path) -> None:
    committed = tmp_path / "committed"
    given = {budget: tmp_path / f"s{budget}" / "model" for budget in (2, 4, 6)}
    setup = setup_in(tmp_path)
    before = paper.run(setup, ["siblings"], committed, tmp_path / "first", progress=False)
    paper.check_siblings(given, setup)
    with pytest.raises(ValueError, match=r"the sibling of 4 layers must be trained along 4/6 layers .* alone, got "):
        paper.check_siblings({4: given[2]}, setup)
    paper.keep_siblings(given, setup.siblings, committed)
    curves = (committed / paper.SIBLING_CURVES).read_text(encoding="utf-8").splitlines()
    assert curves == ["budget,step,loss", "2,1,2.5", "before,1,1.5", "4,1,4.5", "6,1,6.5"]
    assert paper.trainings_of(committed) == [
        "Siblings of 2, 4, 6 layers: adapters of rank 16, from an adapter of full depth, 7 steps of 8 rows, learning "
        "rate 0.001."
    ]
    assert paper.trainings_of(tmp_path) == []
    held = json.loads((committed / paper.SIBLINGS).read_text(encoding="utf-8"))
    assert held["4"]["trained"]["num_steps"] == 7 and held["4"]["before"]["num_steps"] == 9
    again = setup_in(tmp_path, ())
    for budget in (2, 4, 6):
        shutil.rmtree(tmp_path / f"s{budget}")
    known = paper.known_siblings(committed)
    assert [(budget, each.hash) for budget, each in known] == [(b, each.hash) for b, each in setup.siblings]
    again = dataclasses.replace(again, siblings=known)
    after = paper.run(again, ["siblings"], committed, tmp_path / "b", progress=False)
    assert after["siblings"] == before["siblings"]
    # Other pieces know nothing of them, in the same folder; of their weights nothing is asked.
    static = paper.run(again, ["static"], committed, tmp_path / "c", progress=False)
    assert {row.get("family") for row in static["static"]["rows"]} == {"paths", "backbone", None}
    assert static["siblings"] == before["siblings"]
    for page in write_report(committed):
        assert "Weights of their own for each budget" in page.read_text(encoding="utf-8")


def test_siblings_may_come_and_be_left_out_but_are_the_same_weights(tmp_path: Path) -> None:
    with_two, without = setup_in(tmp_path, (2, 6)), setup_in(tmp_path, ())
    for setup in (without, with_two, without):
        RunFolder(tmp_path / "run", setup).close()
    record = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert set(record["setup"]["siblings"]) == {"2", "6"}
    other = setup_in(tmp_path, (), siblings={2: str(tmp_path / "s4" / "model")})
    with pytest.raises(ValueError, match=r"the setup must be that of the run .* siblings"):
        RunFolder(tmp_path / "run", other)


@PEFT_WARNS
def test_the_folder_of_an_adapter_is_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="adapters are made by peft: pip install dynskip[train]")
    base = save_checkpoint(tmp_path / "base", family="llama")
    adapted(family_hf("llama"), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    held = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**held, "base_model_name_or_path": str(base)}), encoding="utf-8")
    found = Checkpoint.of(tmp_path / "adapter")
    assert (found.directory, found.adapter, found.num_layers) == (base, tmp_path / "adapter", 6)
    assert found.hash != Checkpoint.of(base).hash
    config.write_text(json.dumps({**held, "base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"Checkpoint.of: .*adapter_config.json must name its model"):
        Checkpoint.of(tmp_path / "adapter")
