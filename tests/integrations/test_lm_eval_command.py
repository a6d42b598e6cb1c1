"""The command line of lm-eval with the model dynskip, in a process of its own, and the entry point that names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from checkpoints import saved_model
from models import random_prompts

from bench.lm_eval_tasks import TASKS, write_tasks
from dynskip.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dynskip", "lm_eval", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def words(length: int, seed: int) -> str:
    return " ".join(f"w{token:03}" for token in random_prompts([length], seed)[0])


def test_lm_eval_runs_every_kind_of_task_along_a_path(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    lines = []
    for task in TASKS:
        for number in range(5):  # examples of others are among them
            completion = task.labels[number % len(task.labels)] if task.labels else words(20, number)
            row = {"task": task.template, "prompt": words(30, 9 + number), "completion": completion}
            lines.append(json.dumps(row) + "\n")
    (tmp_path / "t0.jsonl").write_text("".join(lines))
    write_tasks(tmp_path / "t0.jsonl", tmp_path / "tasks")
    folder = saved_model(tmp_path / "model")
    arguments = ["--model", "dynskip", "--model_args", f"pretrained={folder},path=uniform:3,dtype=float32"]
    arguments += ["--tasks", "t0", "--include_path", str(tmp_path / "tasks"), "--batch_size", "auto", "--limit", "2"]
    found = run(*arguments, "--output_path", str(tmp_path / "results"), cache=tmp_path / "cache")
    assert found.returncode == 0, found.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    read = json.loads(results.read_text())
    assert set(read["results"]) >= {task.name for task in TASKS}
    for task in TASKS:
        assert read["n-samples"][task.name]["effective"] == 2
        assert task.name in found.stdout
    assert read["config"]["dynskip_path"].startswith("3/6 layers")
    bad = run(*arguments[:3], f"pretrained={folder},path=half", *arguments[4:], cache=tmp_path / "cache")
    assert bad.returncode == 2
    assert bad.stderr.splitlines()[-1].startswith("dynskip lm_eval: error: LayerPath.parse: path must be full, uniform")


def test_options_of_lm_eval_are_passed_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append([*sys.argv]))
    assert main(["lm_eval", "--model", "dynskip", "-h", "run", "--", "--threads"]) == 0
    assert seen == [["lm-eval", "--model", "dynskip", "-h", "run", "--", "--threads"]]
    assert main(["lm_eval"]) == 0 and seen[1] == ["lm-eval"]
    assert capsys.readouterr().err == ""


def test_without_lm_eval_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    assert main(["lm_eval", "--tasks", "arc_easy"]) == 2
    expected = "dynskip lm_eval: error: lm-eval must be installed, got none. Use pip install 'dynskip[lm-eval]'\n"
    assert capsys.readouterr().err == expected


def test_the_entry_point_loaded_by_hand_is_the_model() -> None:
    """By hand, for lm-eval 0.4.13 reads no entry points: ``lm_eval --model dynskip`` does not find it there."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.registry import get_model

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    ((name, value),) = declared.items()
    found = EntryPoint(name, value, "lm_eval.models").load()
    assert name == "dynskip" and get_model(name) is found
