"""What `bench/drafts.py` compares: which draft, how often it is right, how many requests, what it should gain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynskip.paths import LayerPath
from dynskip.speculation.draft import Draft

# What drafts should gain, by part, acceptance, common beginning and batch.
TARGETS = {
    **{("random", 0.8, common, 1): 1.40 for common in ("none", "all")},
    ("random", 0.8, "none", 4): 1.25,
    ("random", 0.8, "all", 4): 1.28,
    ("random", 0.8, "none", 8): 1.08,
    ("random", 0.8, "all", 8): 1.12,
    ("mini", None, "own", 1): 1.3,
    ("mini", None, "own", 4): 1.0,
}
NO_LOSS = 0.98
# Requests one after the other at batch 1: the text of one alone is right more or less often than texts are. Those of
# opt-mini take no time.
_ALONE, _MINI_ALONE = 3, 8


@dataclass(frozen=True)
class Cell:
    """What is compared with the same engine without drafts.

    common: how much of the path's beginning the draft shares; of opt-mini's whose entries it reads. num_requests: of a
    closed batch as many as ``batch``; more are a stream. num_tokens: of the longest output. wanted: the acceptance that
    outputs of layers are scaled for; None where weights are what they are. is_cold: each run with the draft is
    the first that an engine learns from; in other cells it has seen the same requests before.
    """

    part: str
    common: str
    draft: Draft
    batch: int
    num_requests: int
    num_tokens: int
    wanted: float | None = None
    is_cold: bool = False

    @property
    def name(self) -> str:
        """Such as random-0.8-none-4, random-0-none-16-stream, mini-own-1, mini-own-4-cold."""
        words = [self.part, *([] if self.wanted is None else [f"{self.wanted:g}"]), self.common, str(self.batch)]
        return "-".join([*words, *["stream"] * self.is_stream, *["cold"] * self.is_cold])

    @property
    def is_stream(self) -> bool:
        """Whether requests come and go; at batch 1 one follows the other."""
        return self.num_requests > self.batch > 1

    @property
    def target(self) -> float:
        """The least gain."""
        if self.is_stream or self.is_cold:
            return NO_LOSS
        return TARGETS.get((self.part, self.wanted, self.common, self.batch), NO_LOSS)

    def output_lens(self) -> list[int]:
        """The tokens of each request: those of a stream end at different times."""
        quarter = self.num_tokens // 4
        return [self.num_tokens - quarter * (index % 4 * self.is_stream) for index in range(self.num_requests)]


def random_cells(num_layers: int) -> Iterator[Cell]:
    """A draft of a quarter of the layers that shares the path's beginning, or none of it, by acceptance."""
    spread = Draft(LayerPath.of(num_layers, range(1, num_layers, 4)), "own")
    begin = Draft(LayerPath.early_exit(num_layers, num_layers // 4), "path")

    def closed(wanted: float, common: str, draft: Draft, batch: int) -> Cell:
        num_tokens = {16: 48, 64: 24}.get(batch, 64)
        return Cell("random", common, draft, batch, _ALONE if batch == 1 else batch, num_tokens, wanted)

    def stream(wanted: float, batch: int) -> Cell:
        return Cell("random", "none", spread, batch, 3 * batch, 32, wanted)

    for wanted in (0.8, 0.0, 0.3, 0.9, 0.7, 0.6):
        if wanted == 0.8:
            yield from (closed(wanted, "all", begin, batch) for batch in (1, 4, 8))
        batches = (1, 4, 8, 16, 64) if wanted in (0.8, 0.0) else (1, 4, 64)
        yield from (closed(wanted, "none", spread, batch) for batch in batches)
        yield from (stream(wanted, batch) for batch in ((4, 16) if wanted in (0.8, 0.0) else (16,)))
    yield from (Cell("random", "none", spread, batch, batch, 64, 0.0, is_cold=True) for batch in (1, 4))


def mini_cells() -> Iterator[Cell]:
    """opt-mini with the path that it was trained along."""
    path = LayerPath.uniform(24, 4)
    for batch in (1, 4, 16):
        yield Cell("mini", "own", Draft(path, "own"), batch, _MINI_ALONE if batch == 1 else batch, 128)
    yield Cell("mini", "path", Draft(path, "path"), 1, _MINI_ALONE, 128)
    yield from (Cell("mini", "own", Draft(path, "own"), batch, batch, 128, is_cold=True) for batch in (4, 16))


def transformers_cells(num_layers: int) -> Iterator[Cell]:
    """The first quarter of the layers, which is what `assistant_early_exit` guesses with."""
    begin = Draft(LayerPath.early_exit(num_layers, num_layers // 4), "path")
    yield Cell("transformers", "all", begin, 1, 1, 64, 0.8)
