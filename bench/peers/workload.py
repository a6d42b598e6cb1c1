"""What every peer is given: prompts, and the requests of a stream."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dynskip.paths import LayerPath
from dynskip.simulation.workload import Request, Workload

PROMPT_LEN = 64
STREAM_PROMPT_LEN = 32
MEAN_OUTPUT = 16
NUM_REQUESTS = 256
STREAM_BATCH = 32
# The shares of arXiv 2410.20022's budgets, and those budgets as parts of its 24 layers.
PAPER_SHARES = {4 / 24: 74.0, 8 / 24: 18.0, 12 / 24: 6.0, 1.0: 2.0}
_FIRST_ID = 10  # special tokens come before


def paper_paths(num_layers: int) -> tuple[tuple[LayerPath, float], ...]:
    """The paper's depths scaled to ``num_layers``, as uniform paths, each with its share."""
    return tuple(
        (LayerPath.uniform(num_layers, max(1, round(part * num_layers))), share) for part, share in PAPER_SHARES.items()
    )


def depths_text(num_layers: int, shares: Sequence[tuple[int, float]]) -> str:
    """How many of ``num_layers`` layers run in which percentage of the requests; shares: of each number of layers."""
    total = sum(share for _, share in shares)
    mean = sum(layers * share for layers, share in shares) / total
    depths, parts = ("/".join(f"{value:g}" for value in values) for values in zip(*shares, strict=True))
    return f"{depths} of {num_layers} layers in {parts}% of the requests, a mean of {mean:.1f}"


def paper_text(num_layers: int) -> str:
    """The paper's depths scaled to ``num_layers``, in words."""
    return (
        depths_text(num_layers, [(path.budget, share) for path, share in paper_paths(num_layers)]) + ", uniform paths"
    )


def draw_prompts(num_prompts: int, prompt_len: int, vocab_size: int) -> list[list[int]]:
    """[B, T]: the same for every peer."""
    draw = random.Random(f"{num_prompts} {prompt_len} {vocab_size}")
    return [[draw.randrange(_FIRST_ID, vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)]


def draw_requests(num_layers: int, paper_depths: bool, num_requests: int = NUM_REQUESTS) -> list[Request]:
    """The requests of a stream, at full depth or at the paper's depths scaled to ``num_layers``; lengths are equal."""
    paths = paper_paths(num_layers) if paper_depths else ((LayerPath.full(num_layers), 1.0),)
    return Workload(num_requests, paths, STREAM_PROMPT_LEN, MEAN_OUTPUT).draw()
