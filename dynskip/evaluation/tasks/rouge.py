"""ROUGE-L of generated texts, by the rouge_score package, on all cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

# Below this many pairs one process is done before others have started.
_PAIRS_WORTH_A_POOL = 512


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ImportError(
            "rouge_l: the package rouge_score must be installed, got none. Install it with `pip install dynskip[eval]`."
        ) from None
    return RougeScorer(["rougeL"], use_stemmer=False)


def _score(pair: tuple[str, str]) -> float:
    reference, prediction = pair
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


def rouge_l(references: Sequence[str], predictions: Sequence[str], num_processes: int | None = None) -> list[float]:
    """The F-measure of ROUGE-L of each prediction against its reference, without stemming, in order.

    num_processes: 1 for this process alone; None for all cores, where there are enough texts for it to pay.
    """
    if len(references) != len(predictions):
        raise ValueError(
            f"rouge_l: predictions must be one per reference, got {len(predictions)} for {len(references)}."
        )
    pairs = list(zip(references, predictions, strict=True))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_processes is None:
        num_processes = cores if len(pairs) >= _PAIRS_WORTH_A_POOL else 1
    if num_processes == 1:
        return [_score(pair) for pair in pairs]
    _scorer()  # a missing package is reported here, not from another process
    # Forking a process in which torch has started its threads can hang; spawned ones import nothing of torch.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_score, pairs, chunksize=max(1, len(pairs) // (8 * num_processes))))
