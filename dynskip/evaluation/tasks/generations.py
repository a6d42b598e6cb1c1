"""Generations along many paths: items of the task "generate", and their ROUGE-L and lengths as arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dynskip.evaluation.sweep.checkpoints import Checkpoint
from dynskip.evaluation.sweep.context import Context, shard_items
from dynskip.evaluation.sweep.dataset import Row
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import ItemStore, WorkItem
from dynskip.llm import Output
from dynskip.paths import LayerPath
from dynskip.sampling import SamplingParams

GREEDY = 0


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError(
            "rouge_l: the package rouge_score must be installed, got none. Install it with `pip install dynskip[eval]`."
        ) from None
    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> list[float]:
    """The F-measure of ROUGE-L of each prediction against its reference, without stemming, in order."""
    if len(references) != len(predictions):
        raise ValueError(
            f"rouge_l: predictions must be one per reference, got {len(predictions)} for {len(references)}."
        )
    pairs = zip(references, predictions, strict=True)
    return [float(_scorer().score(reference, prediction)["rougeL"].fmeasure) for reference, prediction in pairs]


@dataclass(frozen=True)
class Generations:
    """Scores of N prompts along K paths.

    rows: [N], the place of each prompt in its split. paths: K texts. rouge_l, num_tokens: [N, K].
    """

    rows: npt.NDArray[np.int64]
    paths: tuple[str, ...]
    rouge_l: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.int64]

    def along(self, paths: Sequence[str]) -> Generations:
        """The columns of ``paths``, in that order."""
        columns = [self.paths.index(path) for path in paths]
        return Generations(self.rows, tuple(paths), self.rouge_l[:, columns], self.num_tokens[:, columns])


def generate_items(
    setup: Setup, checkpoint: Checkpoint, paths: Sequence[str], split: str | None = None, seed: int = GREEDY
) -> list[WorkItem]:
    """The items that generate for every prompt of ``split`` along each of ``paths``, greedily for seed 0."""
    split = split or setup.split
    drawn = {} if seed == GREEDY else {"temperature": setup.temperature, "top_p": setup.top_p}
    grows = bool(setup.draws)
    return shard_items(setup, "generate", checkpoint, " ".join(paths), split, seed, grows, dtype=setup.dtype, **drawn)


def run_generate(item: WorkItem, context: Context) -> dict[str, Any]:
    """Rows of the item's shard, and by path ROUGE-L, number of new tokens and the tokens themselves, row by row.

    All prompts and paths share one batch.
    """
    rows = context.shard(item)
    paths = item.path.split()
    outputs = _generate(item, context, rows)
    texts = [output.text or "" for output in outputs]
    scores = rouge_l([row.reference for row in rows for _ in paths], texts)
    by_path = {}
    for column, path in enumerate(paths):
        of_path = outputs[column :: len(paths)]
        by_path[path] = {
            "rouge_l": [round(score, 6) for score in scores[column :: len(paths)]],
            "num_tokens": [len(output.token_ids) for output in of_path],
            "token_ids": [output.token_ids for output in of_path],
        }
    return {"rows": [row.index for row in rows], "paths": by_path}


def _generate(item: WorkItem, context: Context, rows: Sequence[Row]) -> list[Output]:
    """The outputs of each row along each path, paths side by side."""
    llm = context.llm(item.checkpoint)
    paths = item.path.split()
    params = [_params(item, row.index, path, context.setup) for row in rows for path in paths]
    parsed = [LayerPath.parse(path, llm.model.num_layers, llm.model) for path in paths]
    outputs = llm.generate([list(row.prompt_ids) for row in rows for _ in paths], params, parsed * len(rows))
    for output in outputs:
        if output.error is not None:
            raise output.error  # no score stands for it
    return outputs


def read_generations(store: ItemStore, items: Sequence[WorkItem]) -> Generations:
    """What the items of one checkpoint, path list, split and seed gave, in the order of the split."""
    results = [store.result(item) for item in sorted(items, key=lambda item: item.shard)]
    paths = tuple(items[0].path.split())
    rows = np.array(store.column(items, "rows"), dtype=np.int64)

    def column(path: str, name: str) -> list[Any]:
        return [value for result in results for value in result["paths"][path][name]]

    scores = np.array([column(path, "rouge_l") for path in paths], dtype=np.float64).T
    num_tokens = np.array([column(path, "num_tokens") for path in paths], dtype=np.int64).T
    return Generations(rows, paths, scores, num_tokens)


def stable_seed(*parts: object) -> int:
    """A seed that depends on ``parts`` alone, the same in every process."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _params(item: WorkItem, row: int, path: str, setup: Setup) -> SamplingParams:
    if item.seed == GREEDY:
        return SamplingParams(max_tokens=setup.max_tokens)
    # Every path draws its own numbers: equal ones would make the texts of two depths alike by chance.
    seed = stable_seed("generate", item.checkpoint, path, item.split, row, item.seed)
    return SamplingParams(max_tokens=setup.max_tokens, temperature=setup.temperature, top_p=setup.top_p, seed=seed)
