"""Requests sent to a server all at once or as they arrive, and when their tokens came."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bench.serve.client import Client, Connection, post_of

PERCENTILES = (50, 90, 99)
ROUTE = "/v1/completions"
_DONE, _NO_CHOICES = b"data: [DONE]", b'"choices":[]'


class Loaded(Protocol):
    """What load is sent to: a server at an address, and the processor time that it has used."""

    host: str
    port: int

    def cpu_s(self) -> float:
        """Of all of its processes."""


@dataclass
class Call:
    """One request: what it asks for, and the times (`time.perf_counter`) at which it was sent and told something.

    due_s: after the beginning, when it is to be sent.
    """

    body: dict[str, Any]
    due_s: float = 0.0
    sent_s: float = 0.0
    times: list[float] = field(default_factory=list)
    answer: bytes = b""

    def __post_init__(self) -> None:
        self.request = post_of(ROUTE, json.dumps(self.body).encode())

    @property
    def num_tokens(self) -> int:
        """That it asks for, and must get."""
        return int(self.body["max_tokens"])

    @property
    def ttft_s(self) -> float:
        """Until its first token."""
        return self.times[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None where there is none."""
        return (self.times[-1] - self.times[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    def told(self, data: bytes) -> None:
        """A piece of its stream has come: some tokens, usage, or the end."""
        if _NO_CHOICES in data:
            self.answer = data
        elif not data.startswith(_DONE):
            self.times.append(time.perf_counter())

    def check(self) -> None:
        """Raise RuntimeError unless the whole output has come."""
        told = self.answer.removeprefix(b"data: ")
        answer = json.loads(told) if told else {}
        usage = answer.get("usage") or {}
        if usage.get("completion_tokens") != self.num_tokens:
            raise RuntimeError(f"load: an answer must have {self.num_tokens} tokens, got {told[:300]!r}")


@dataclass(frozen=True)
class Spent:
    """What a load took. client_cpu_s: processor time of this process; server_cpu_s: of the server's."""

    seconds: float
    client_cpu_s: float
    server_cpu_s: float

    def line(self) -> dict[str, float]:
        """Shares of one core."""
        return {
            "seconds": round(self.seconds, 4),
            "client_cpu": round(self.client_cpu_s / self.seconds, 4),
            "server_cpu": round(self.server_cpu_s / self.seconds, 4),
        }


def burst(server: Loaded, calls: Sequence[Call]) -> Spent:
    """Send all of ``calls`` at once, each on a connection of its own, open before."""

    async def main() -> Spent:
        connections = [await Connection.open(server.host, server.port) for _ in calls]
        with _quiet():
            cpu_s, server_s, begin_s = _cpu_s(), server.cpu_s(), time.perf_counter()
            answers = []
            for call, connection in zip(calls, connections, strict=True):
                call.sent_s = time.perf_counter()
                answers.append(connection.exchange(call.request, call.told))
            ended = await asyncio.gather(*answers)
            spent = Spent(time.perf_counter() - begin_s, _cpu_s() - cpu_s, server.cpu_s() - server_s)
        for call, connection, answer in zip(calls, connections, ended, strict=True):
            call.answer = call.answer or answer.body
            connection.close()
            call.check()
        return spent

    return asyncio.run(main())


def arrive(server: Loaded, calls: Sequence[Call]) -> Spent:
    """Send each of ``calls`` when it is due, whether or not those before it have ended."""

    async def main() -> Spent:
        client = Client(server.host, server.port)
        with _quiet():
            cpu_s, server_s, begin_s = _cpu_s(), server.cpu_s(), time.perf_counter()

            async def send(call: Call) -> None:
                await asyncio.sleep(begin_s + call.due_s - time.perf_counter())
                call.sent_s = time.perf_counter()
                await client.send(call.request, call.told)

            await asyncio.gather(*(send(call) for call in calls))
            spent = Spent(time.perf_counter() - begin_s, _cpu_s() - cpu_s, server.cpu_s() - server_s)
        client.close()
        for call in calls:
            call.check()
        return spent

    return asyncio.run(main())


def waits(calls: Sequence[Call]) -> dict[str, list[float]]:
    """Percentiles in milliseconds: to the first token, per token behind it, and from each piece to the next."""
    per_token = [call.tpot_s for call in calls if call.tpot_s is not None]
    gaps = np.concatenate([np.diff(call.times) for call in calls])
    kinds = {"ttft_ms": [call.ttft_s for call in calls], "tpot_ms": per_token, "gap_ms": gaps}
    return {name: [round(1e3 * float(np.percentile(each, p)), 3) for p in PERCENTILES] for name, each in kinds.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """No collection of garbage within the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
