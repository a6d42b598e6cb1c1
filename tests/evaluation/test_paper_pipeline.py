"""The whole suite in a minute: a tiny random model, made-up instructions, every experiment, the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import item_lines
from models import NUM_LAYERS, VOCAB_SIZE, tiny_hf, word_tokenizer

from dynskip.cli import main
from dynskip.controllers import ModelSizes, make_controller, save_controller
from dynskip.evaluation.report.sentences import section_sentences

for package in ("datasets", "rouge_score", "sklearn", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install dynskip[eval]")

SECTIONS = ("hidden_states", "static", "controllers", "oracle", "router", "depth")
CONTROLLERS = ("fixed", "hidden", "mlp:4", "window:4")
NUM_ROWS = 120


def made_up_instructions(num_rows: int) -> list[dict[str, str]]:
    """Rows as Alpaca has them, of the words that ``word_tokenizer`` knows."""
    generator = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{generator.randrange(4, VOCAB_SIZE):03}" for _ in range(generator.randint(least, most)))

    verbs = ("Write", "Describe", "Classify", "What")
    return [
        {
            "instruction": f"{generator.choice(verbs)} {words(2, 8)}",
            "input": words(1, 3) if number % 3 == 0 else "",
            "output": words(3, 12),
        }
        for number in range(num_rows)
    ]


def made_up_controller(name: str, seed: int, model: Path, folder: Path) -> None:
    """A random controller of the tiny model that skips about every other layer, in a folder as training leaves it."""
    torch.manual_seed(seed)
    controller = make_controller(name, ModelSizes(NUM_LAYERS, 32, 32))
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.normal_()
    save_controller(controller, name, folder, {"alpha": 4.0, "backbone": "frozen", "model": str(model)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a finished run, and the arguments of the command that filled it."""
    folder = tmp_path_factory.mktemp("paper")
    for name, seed in (("model", 0), ("full", 1), ("shallow", 2)):
        tiny_hf(seed=seed).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    for number, name in enumerate(CONTROLLERS):
        made_up_controller(name, number, folder / "model", folder / f"controller-{number}")
    (folder / "data.json").write_text(json.dumps(made_up_instructions(NUM_ROWS)), encoding="utf-8")
    options = {
        "--model": folder / "model",
        "--data": folder / "data.json",
        "--out": folder / "run",
        "--prompts": 16,
        "--train-prompts": 16,
        "--seeds": 1,
        "--max-tokens": 8,
        "--shard-size": 8,
        "--timed-batch": 4,
        "--timed-rounds": 2,
        "--resamples": 50,
        "--dtype": "float32",
    }
    arguments = ["eval", "all", *(str(part) for pair in options.items() for part in pair), "--quiet"]
    for number in range(len(CONTROLLERS)):
        arguments += ["--controller", str(folder / f"controller-{number}")]
    arguments += ["--sibling", f"6={folder / 'full'}", "--sibling", f"1={folder / 'shallow'}"]
    assert main(arguments) == 0
    return folder / "run", arguments


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_filled(run: tuple[Path, list[str]], name: str) -> None:
    section = summary_of(run[0])[name]
    assert section["n"] == 16
    assert section_sentences(summary_of(run[0]), name)
    with_interval = [row for row in section["rows"] if row["low"] is not None and row["high"] is not None]
    assert len(with_interval) >= len(section["rows"]) / 2
    assert all(row["low"] <= row["high"] and row["detectable"] >= 0 for row in with_interval)
    assert any("nats" in row["metric"] for row in section["rows"]), "both scores"


def test_every_router_is_judged_and_timed(run: tuple[Path, list[str]]) -> None:
    rows = summary_of(run[0])["router"]["rows"]
    for family in ("paths", "siblings"):
        for metric in ("rouge_l", "ms_per_token", "speedup", "overhead_ms_single", "overhead_ms_batched"):
            found = {row["predictor"] for row in rows if row["metric"] == metric and row["family"] == family}
            assert found - {"full"} == {"logistic", "boosting", "ridge", "transformer"}, (family, metric)


def test_the_same_command_again_adds_nothing(run: tuple[Path, list[str]]) -> None:
    folder, arguments = run
    before, summary = item_lines(folder / "items"), summary_of(folder)
    assert main(arguments) == 0
    assert item_lines(folder / "items") == before
    again = summary_of(folder)
    assert {name: again[name] for name in SECTIONS} == {name: summary[name] for name in SECTIONS}


def test_no_text_of_the_data_is_kept(run: tuple[Path, list[str]]) -> None:
    for path in run[0].rglob("*"):
        if path.is_file():
            content = path.read_text(encoding="utf-8")
            assert not any(row["output"] in content for row in made_up_instructions(NUM_ROWS)), path.name


def test_the_report_of_the_run(run: tuple[Path, list[str]]) -> None:
    folder, _ = run
    assert main(["report", str(folder)]) == 0
    html, markdown = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    summary = summary_of(folder)
    for name in SECTIONS:
        assert f"`{name}`" not in markdown, f"{name} is not missing"
        for sentence in section_sentences(summary, name):
            assert sentence in markdown
    assert html.count("<svg") >= 8
