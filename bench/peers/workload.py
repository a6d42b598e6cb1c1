"""What every peer is given: prompts, and the requests of a stream."""

from __future__ import annotations

import random

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


def draw_prompts(num_prompts: int, prompt_len: int, vocab_size: int) -> list[list[int]]:
    """[B, T]: the same for every peer."""
    draw = random.Random(f"{num_prompts} {prompt_len} {vocab_size}")
    return [[draw.randrange(_FIRST_ID, vocab_size) for _ in range(prompt_len)] for _ in range(num_prompts)]


def draw_requests(num_layers: int, paper_depths: bool, num_requests: int = NUM_REQUESTS) -> list[Request]:
    """The requests of a stream, at full depth or at the paper's depths scaled to ``num_layers``; lengths are equal."""
    shares = PAPER_SHARES if paper_depths else {1.0: 1.0}
    paths = tuple(
        (LayerPath.uniform(num_layers, max(1, round(part * num_layers))), share) for part, share in shares.items()
    )
    return Workload(num_requests, paths, STREAM_PROMPT_LEN, MEAN_OUTPUT).draw()
