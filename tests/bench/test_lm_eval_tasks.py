"""The tasks that lm-eval reads from the T0 file, and the table of what it finds."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.lm_eval_table import CONSTANT, Table, contenders, find, page
from bench.lm_eval_tasks import TASKS, write_tasks


@pytest.fixture
def t0_file(tmp_path: Path) -> Callable[..., Path]:
    """A file like the T0 file, with ``count`` rows of each template that a task is of."""

    def made(count: int = 4, **completions: str) -> Path:
        lines = []
        for task in TASKS:
            for number in range(count):
                completion = task.labels[number % len(task.labels)] if task.labels else f"answer {number}"
                completion = completions.get(task.template, completion)
                row = {
                    "task": task.template,
                    "prompt": f"Question {number}?",
                    "completion": f"{completion}<|endoftext|>",
                }
                lines.append(json.dumps(row) + "\n")
        path = tmp_path / "t0.jsonl"
        path.write_text("".join(lines) * 2)  # each row twice: prompts come once
        return path

    return made


def test_tasks_are_configs_and_documents(t0_file: Callable[..., Path], tmp_path: Path) -> None:
    files = write_tasks(t0_file(), tmp_path / "tasks")
    assert [path.name for path in files] == [f"{task.name}.yaml" for task in TASKS]
    kinds = []
    for path, task in zip(files, TASKS, strict=True):
        config = yaml.safe_load(path.read_text())
        documents = Path(config["dataset_kwargs"]["data_files"]["test"])
        assert documents.is_absolute() and config["task"] == task.name and config["dataset_path"] == "json"
        rows = [json.loads(line) for line in documents.read_text().splitlines()]
        assert len(rows) == 4
        kinds.append(config["output_type"])
        if task.labels:
            assert config["doc_to_choice"] == list(task.labels)
            numbers = [int(row["prompt"].split()[1].rstrip("?")) for row in rows]
            assert sorted(numbers) == [0, 1, 2, 3], "each prompt once"
            assert [row["label"] for row in rows] == [number % len(task.labels) for number in numbers]
        else:
            assert {row.get("answer", row.get("text")) for row in rows} == {f"answer {number}" for number in range(4)}
    assert sorted(kinds) == ["generate_until", "loglikelihood_rolling", *["multiple_choice"] * 3]


def test_tasks_are_the_same_each_time(t0_file: Callable[..., Path], tmp_path: Path) -> None:
    data = t0_file(20)
    for folder in ("a", "b"):
        write_tasks(data, tmp_path / folder)
    for task in TASKS:
        first, second = ((tmp_path / folder / f"{task.name}.jsonl").read_text() for folder in ("a", "b"))
        assert first == second


def test_other_files_are_told(t0_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"completions of glue_qqp_duplicate_or_not must be of .*, got 'perhaps'"):
        write_tasks(t0_file(glue_qqp_duplicate_or_not="perhaps"), tmp_path / "tasks")
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"task": "other", "prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(
        ValueError, match=r"lm_eval_tasks: other\.jsonl must hold glue_qqp_duplicate_or_not, .*, got none"
    ):
        write_tasks(path, tmp_path / "tasks")
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 must hold task and prompt and completion, got \['completion', 'pro"):
        write_tasks(path, tmp_path / "tasks")


def made_up(model: str, path: str, task: str, value: float, **changes: Any) -> dict[str, Any]:
    versions = {"dynskip": "1", "torch": "2", "transformers": "5"}
    row = {"model": model, "path": path, "dtype": "bfloat16", "limit": 8, "task": task, "metric": "acc"}
    row |= {
        "value": value,
        "stderr": 0.05,
        "num_documents": 8,
        "cpu_seconds": 2.5,
        "lm_eval": "0.4",
        "versions": versions,
    }
    return {**row, "commit": "abc", "date": "2026-11-26 12:00 UTC", "cpu": "a CPU", "num_threads": 1, **changes}


def test_the_table_has_the_last_row_of_each() -> None:
    first, second = TASKS[0].name, TASKS[-1].name
    rows = [made_up("hf", "full", first, 0.1), made_up("hf", "full", first, 0.5), made_up("hf", "full", second, 30.0)]
    rows.append(made_up("dynskip", "found:20", first, 0.25, stderr=None, cpu_seconds=1.0))
    text = page(rows, "tiny")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["model", "path", "dtype", f"{first}: acc", f"{second}: acc", "CPU seconds"]
    assert lines[2] == ["hf", "full", "bfloat16", "0.500 ± 0.050", "30.000 ± 0.050", "5"]
    assert lines[3] == ["dynskip", "found:20", "bfloat16", "0.250", "-", "1"]
    assert "8 documents a task" in text and "1 thread(s) on a CPU" in text
    assert "commit abc, 2026-11-26, lm-eval 0.4, dynskip 1, torch 2, transformers 5: hf full bfloat16, dyn" in text


def test_rows_are_known_by_their_labels() -> None:
    rows = [made_up("hf", "full", "t0_social", 0.1), made_up("hf", "full", "t0_social", 0.2)]
    assert find(rows, model="hf", task="t0_social") is rows[1]
    assert find(rows, model="hf", task="t0_social", limit=9) is None
    names = [(each.model, each.path, each.dtype) for each in contenders(["found:20"])]
    assert len(set(names)) == len(names) and ("dynskip", "found:20", "bfloat16") in names
    assert {("hf", "full", "float32"), ("hf", "full", "bfloat16")} <= set(names)


def test_an_answer_that_is_always_the_same_stands_beside_the_models(
    t0_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.lm_eval_table.contenders", lambda _: [])
    same = TASKS[0]
    data = t0_file(6, **{same.template: same.labels[1]})
    args = Namespace(data=data, work=tmp_path, out=tmp_path, model="tiny", fresh=False, limit=100, paths=[])
    table = Table(args)
    table.fill()
    found = {row["task"]: row for row in table.rows}
    assert set(found) == {task.name for task in TASKS if task.labels}
    assert (found[same.name]["value"], found[same.name]["stderr"]) == (1.0, 0.0)
    social = next(task for task in TASKS if len(task.labels) == 3)
    assert found[social.name]["value"] == pytest.approx(2 / 6) and found[social.name]["num_documents"] == 6
    assert found[social.name]["stderr"] == pytest.approx((2 / 6 * 4 / 6 / 5) ** 0.5)
    Table(args).fill()
    assert len(Table(args).rows) == 3, "found once"
    text = page([*table.rows, made_up("hf", "full", same.name, 0.5)], "tiny")
    assert f"0.500 of {same.name}, 0.333 of {social.name}" in text and f"| {CONSTANT} |" in text
    assert text.count("- commit") == 1, "it has no versions"
