"""Templates with closed labels: which they are, who judges, and that the likeliest label is found."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_models import tiny_setup
from torch.nn.functional import cross_entropy

from dynskip import LayerPath
from dynskip.data.closed_labels import judged_part, passage_of, read_labelled
from dynskip.evaluation.registry import run_item
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.store import ItemStore
from dynskip.evaluation.tasks.label_matches import (
    label_items,
    labelled_rows,
    match_items,
    read_matches,
    without_reading,
)
from dynskip.evaluation.tasks.path_families import families

pytest.importorskip("datasets", reason="datasets is not installed")


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(template: str, labels: list[str], count: int) -> list[dict[str, str]]:
    """Rows whose passages are all different, their labels one after the other."""
    return [
        {
            "task": template,
            "prompt": f"w{5 + row % 90:03} w007 w008 w009 w{4 + row // 90:03}\nw010",
            "completion": f"{labels[row % len(labels)]}<|endoftext|>",
        }
        for row in range(count)
    ]


def test_templates_with_few_answers_are_closed(tmp_path: Path) -> None:
    closed, open_ = (
        rows_of("closed", ["w020", "w021 w022"], 40),
        rows_of("open", [f"w{n:03}" for n in range(30, 50)], 40),
    )
    few, once = (
        rows_of("few", ["w020", "w021"], 10),
        [*rows_of("once", ["w020", "w021"], 39), *rows_of("once", ["w9"], 1)],
    )
    found = read_labelled(save(tmp_path / "t0.jsonl", [*closed, *open_, *few, *once]))
    assert {row.template for row in found} == {"closed"} and len(found) == 40
    assert found[1].label == "w021 w022" and found[1].labels == ("w020", "w021 w022")
    packed = tmp_path / "t0.jsonl.xz"
    packed.write_bytes(lzma.compress((tmp_path / "t0.jsonl").read_bytes()))
    assert read_labelled(packed) == found
    with pytest.raises(ValueError, match=r"t0.jsonl line 2 must hold task, prompt and completion, got no task"):
        read_labelled(save(tmp_path / "t0.jsonl", [closed[0], {"prompt": "a", "completion": "b"}]))


def test_a_passage_is_on_one_side_whatever_is_asked_of_it(tmp_path: Path) -> None:
    first, second = rows_of("first", ["w020", "w021"], 400), rows_of("second", ["w030", "w031"], 400)
    for row in second:
        row["prompt"] = "w011\n" + row["prompt"].removesuffix("\nw010") + "\nw012 w013"
    judged = judged_part(read_labelled(save(tmp_path / "t0.jsonl", [*first, *second])))
    by_template = [{passage_of(row.prompt) for row in judged if row.template == name} for name in ("first", "second")]
    assert by_template[0] == by_template[1] and 30 < len(by_template[0]) < 90, "about 15 % of 400"


def test_the_likeliest_label_is_that_of_plain_passes(tmp_path: Path) -> None:
    file = save(tmp_path / "t0.jsonl", rows_of("closed", ["w020", "w021 w022", "w050"], 300))
    setup = tiny_setup(tmp_path, labels=file, label_prompts=9)
    context = Context(setup)
    members = families(setup)["paths"]
    with ItemStore(tmp_path / "items.jsonl") as store:
        for item in store.missing(match_items(setup, members)):
            store.add(item, run_item(item, context), 1.0)
        found = read_matches(setup, store, members)
        ignorant = without_reading(setup, store, members[0])
    rows = judged_part(read_labelled(file))[:9]
    assert ignorant["chance"].tolist() == [1 / 3] * 9
    usual = max({row.label for row in rows}, key=[row.label for row in rows].count)
    assert ignorant["majority"].mean() == sum(row.label == usual for row in rows) / 9
    assert found.shape == (9, 3) and set(np.unique(found)) <= {0.0, 1.0}
    llm = context.llm(setup.checkpoint.hash)
    for place, row in enumerate(judged_part(read_labelled(file))[:9]):
        for column, member in enumerate(members):
            nats = []
            for label in row.labels:
                answer = [*llm.tokenizer(label, add_special_tokens=False)["input_ids"], llm.tokenizer.eos_token_id]
                ids = [*llm.tokenizer(row.prompt)["input_ids"], *answer]
                with torch.no_grad():
                    logits = llm.model(torch.tensor([ids]), paths=[LayerPath.parse(member.path, 6)]).logits[0]
                scored = logits[len(ids) - len(answer) - 1 : -1]
                nats.append(float(cross_entropy(scored, torch.tensor(answer), reduction="sum")))
            assert found[place, column] == (row.labels[int(np.argmin(nats))] == row.label)
    with pytest.raises(ValueError, match=r"label_prompts must be at most the \d+ judged rows .* got 9000"):
        labelled_rows(file, llm.tokenizer, 64, 9000)


def test_without_a_file_nothing_is_chosen(tmp_path: Path) -> None:
    setup = tiny_setup(tmp_path)
    assert label_items(setup, setup.checkpoint, ["full"]) == []
    with pytest.raises(FileNotFoundError, match="labels must be a file, got"):
        tiny_setup(tmp_path, labels=tmp_path / "nowhere.jsonl")
