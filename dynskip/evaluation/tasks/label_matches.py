"""Whether the likeliest of a template's labels is the right one, along many paths: items of the task "labels"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dynskip.data.closed_labels import LabelledRow, judged_part, read_labelled
from dynskip.data.examples import Example
from dynskip.evaluation.stats.intervals import Floats
from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, Option, WorkItem
from dynskip.evaluation.tasks.path_families import Member
from dynskip.measure.passes import Measured, Pass, in_parts, run_paths
from dynskip.paths import LayerPath


def label_items(setup: Setup, checkpoint: Checkpoint, paths: Sequence[str]) -> list[WorkItem]:
    """The items that choose labels along ``paths``; none where the setup names no T0 file."""
    if setup.labels_hash is None:
        return []
    options: dict[str, Option] = {"dtype": setup.dtype, "labels": setup.labels_hash, "num_rows": setup.label_prompts}
    return shard_items(setup, "labels", checkpoint, " ".join(paths), setup.split, 0, **options)


def run_labels(item: WorkItem, context: Context) -> dict[str, Any]:
    """By path, row by row of the shard: 1 where the right label is the likeliest of its template's, else 0.

    A label's likelihood is that of its tokens and the end behind them. rows: their places among those that are judged
    on and fit the model's positions. templates, right: of each row, and the place of its label among that one's.
    """
    llm = context.llm(item.checkpoint)
    assert context.setup.labels is not None and llm.tokenizer is not None, "label_items makes none without"
    num_rows, size = int(item.option("num_rows")), int(item.option("shard_size"))
    rows = labelled_rows(context.setup.labels, llm.tokenizer, llm.model.decoder_config.max_positions, num_rows)
    shard = rows[item.shard * size :][:size]
    texts = [text for row in shard for text in row.texts]
    names = item.path.split()
    paths = [LayerPath.parse(name, llm.model.num_layers, llm.model) for name in names]
    nats: dict[LayerPath, list[float]] = {path: [] for path in paths}

    def keep(path: LayerPath, measured: Measured) -> None:
        nats[path].extend(measured.nats)

    for part in in_parts(texts):
        run_paths(Pass(llm.model, part), paths, keep)
    ends = np.cumsum([len(row.texts) for row in shard])[:-1]
    matches = {
        name: [
            int(np.argmin(each) == row.right)
            for each, row in zip(np.split(np.array(nats[path]), ends), shard, strict=True)
        ]
        for name, path in zip(names, paths, strict=True)
    }
    return {
        "rows": list(range(item.shard * size, item.shard * size + len(shard))),
        "templates": [row.template for row in shard],
        "num_labels": [len(row.texts) for row in shard],
        "right": [row.right for row in shard],
        "paths": {name: {"matches": found} for name, found in matches.items()},
    }


class _Labelled:
    """The texts of a row, one a label, and the place of the right one."""

    def __init__(self, row: LabelledRow, tokenizer: Any) -> None:
        prompt_ids = tuple(tokenizer(row.prompt, verbose=False)["input_ids"])
        answers = tokenizer(list(row.labels), add_special_tokens=False, verbose=False)["input_ids"]
        self.texts = [Example(prompt_ids, (*answer, tokenizer.eos_token_id), 0) for answer in answers]
        self.template = row.template
        self.right = row.labels.index(row.label)
        self.longest = max(text.num_tokens for text in self.texts)


@lru_cache(maxsize=4)
def labelled_rows(path: Path, tokenizer: Any, max_positions: int, num_rows: int) -> list[_Labelled]:
    """The first ``num_rows`` judged rows whose texts fit; ValueError where there are fewer."""
    found: list[_Labelled] = []
    for row in judged_part(read_labelled(path)):
        labelled = _Labelled(row, tokenizer)
        if labelled.longest <= max_positions:
            found.append(labelled)
        if len(found) == num_rows:
            return found
    raise ValueError(
        f"eval: label_prompts must be at most the {len(found)} judged rows of {path.name} that have closed labels and "
        f"fit {max_positions} positions, got {num_rows}."
    )


def read_matches(setup: Setup, store: ItemStore, members: Sequence[Member]) -> Floats:
    """[N, K]: 1 where the path of a member chooses the right label."""
    columns = []
    for member in members:
        items = label_items(setup, member.checkpoint, [member.path])
        results = [store.result(item) for item in sorted(items, key=lambda item: item.shard)]
        columns.append([match for result in results for match in result["paths"][member.path]["matches"]])
    return np.array(columns, dtype=np.float64).T


def without_reading(setup: Setup, store: ItemStore, member: Member) -> dict[str, Floats]:
    """What is right without reading the row, [N] each: chance, the label drawn among its template's; majority, 1 where
    the label is the one that is right most often in the template's judged rows, which flatters it."""
    items = label_items(setup, member.checkpoint, [member.path])
    results = [store.result(item) for item in sorted(items, key=lambda item: item.shard)]
    num_labels = np.array([count for result in results for count in result["num_labels"]], dtype=np.float64)
    right = [pair for result in results for pair in zip(result["templates"], result["right"], strict=True)]
    counts = Counter(right)
    best = {template: label for (template, label), _ in reversed(counts.most_common())}
    majority = np.array([label == best[template] for template, label in right], dtype=np.float64)
    return {"chance": 1 / num_labels, "majority": majority}


def match_items(setup: Setup, members: Sequence[Member]) -> list[WorkItem]:
    """The items that ``read_matches`` reads."""
    return [item for member in members for item in label_items(setup, member.checkpoint, [member.path])]
