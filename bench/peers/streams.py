"""Streams of a peer that is driven call by call, and of one that knows closed batches alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from bench.peers.workload import STREAM_BATCH, STREAM_PROMPT_LEN, draw_requests


class CallByCall(ABC):
    """The stream at full depth, made of calls. A class that takes this has ``num_layers`` behind ``load``."""

    num_layers: int

    def begin_stream(self, name: str, num_requests: int) -> dict[str, Any]:
        """Hand over the requests of the stream at full depth, the only one that it knows."""
        assert name == "full", name
        lengths = [request.num_output for request in draw_requests(self.num_layers, False, num_requests)]
        self.stream_tokens, self.stream_done = sum(lengths), 0
        self.calls = self.calls_of(lengths)
        return {"tokens": self.stream_tokens, "layers": float(self.num_layers)}

    def stream(self, name: str, share: float) -> float:
        """The seconds to get to ``share`` of the stream's tokens."""
        elapsed_ms = 0.0
        while self.stream_done < share * self.stream_tokens:
            num_tokens, ms = next(self.calls)
            self.stream_done += num_tokens
            elapsed_ms += ms
        return elapsed_ms / 1e3

    @abstractmethod
    def calls_of(self, lengths: list[int]) -> Iterator[tuple[int, float]]:
        """Of each call the tokens that it gave and that were asked for, and its milliseconds; lengths: of outputs."""


class ClosedBatches(CallByCall):
    """Batches of requests in their order, each until its longest output is there; a row that has ended stays."""

    @abstractmethod
    def prefill(self, batch: int, prompt_len: int, num_new: int) -> float:
        """The milliseconds of a prefill, first tokens chosen."""

    @abstractmethod
    def decode(self, num_steps: int) -> list[float]:
        """The milliseconds of each of the next steps."""

    def calls_of(self, lengths: list[int]) -> Iterator[tuple[int, float]]:
        """A prefill and decode steps, batch by batch."""
        for start in range(0, len(lengths), STREAM_BATCH):
            batch = lengths[start : start + STREAM_BATCH]
            yield len(batch), self.prefill(len(batch), STREAM_PROMPT_LEN, max(batch))
            for step in range(1, max(batch)):
                yield sum(length > step for length in batch), self.decode(1)[0]
