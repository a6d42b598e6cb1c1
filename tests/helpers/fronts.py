"""A front before replicas that are engines of this process, which may be lost, stop answering, and come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import httpx2
from api import ROUTE, Local, local
from prometheus_client.parser import text_string_to_metric_families

from dynskip import LLM
from dynskip.serving.app import guarded
from dynskip.serving.depths import DepthTable
from dynskip.serving.replicas import front as front_module
from dynskip.serving.replicas.front import Front, ReplicaLostError
from dynskip.serving.replicas.replica import messages_of


@dataclass
class Near:
    """A replica in this process, which may be lost, stop answering, and come back."""

    name: str
    server: Local
    num_asked: int = 0
    hangs: bool = False
    _lost: asyncio.Event = field(default_factory=asyncio.Event)

    def lose(self) -> None:
        """From now on nothing is answered, and what has begun breaks off."""
        self._lost.set()

    def come_back(self) -> None:
        """Answer again."""
        self._lost = asyncio.Event()

    async def answer(self, scope: Any, body: bytes) -> AsyncGenerator[list[Any]]:
        """As `EngineReplica.answer`, as it is to be had over a wire."""
        self.num_asked += scope["path"] == ROUTE
        lost = self._lost
        async with aclosing(messages_of(self.server.app, scope, body)) as messages:
            while True:
                coming, losing = asyncio.ensure_future(anext(messages, [])), asyncio.ensure_future(lost.wait())
                try:
                    await asyncio.wait((coming, losing), return_when=asyncio.FIRST_COMPLETED)
                    if lost.is_set():
                        raise ReplicaLostError(self.name)
                    found = coming.result()
                finally:
                    for task in (coming, losing):
                        task.cancel()
                    await asyncio.gather(coming, losing, return_exceptions=True)
                if not found:
                    return
                yield found

    async def table(self) -> DepthTable:
        """As `EngineReplica.table`."""
        await self.alive()
        return self.server.service.table.without_model()

    async def alive(self) -> None:
        """As `EngineReplica.alive`."""
        if self.hangs:
            await asyncio.Event().wait()
        if self._lost.is_set():
            raise ReplicaLostError(self.name)


@dataclass
class Before:
    """A front, its replicas, and a client of it."""

    front: Front
    app: Any
    replicas: list[Near]
    client: httpx2.AsyncClient

    async def post(self, body: Any, **options: Any) -> httpx2.Response:
        """The answer to a completion."""
        return await self.client.post(ROUTE, json=body, **options)

    def holder(self) -> Near:
        """The replica that holds the only request."""
        (found,) = [each for each in self.replicas if each.server.service.admission.num_held]
        return found

    async def until_held(self, count: int) -> None:
        """Wait until all replicas together hold so many outputs."""
        while sum(each.server.service.admission.num_held for each in self.replicas) != count:
            await asyncio.sleep(0)

    async def values(self, name: str) -> dict[str, float]:
        """A metric by replica."""
        page = (await self.client.get("/metrics")).text
        samples = [sample for each in text_string_to_metric_families(page) for sample in each.samples]
        return {sample.labels["replica"]: sample.value for sample in samples if sample.name == name}


@asynccontextmanager
async def fronted(
    llm: LLM, count: int = 2, gate: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Before]:
    """A front before so many engines, which it looks after often. gate: options of `guarded`."""
    async with AsyncExitStack() as stack:
        stack.enter_context(patch.object(front_module, "PING_S", 0.01))
        servers = [await stack.enter_async_context(local(llm, **options)) for _ in range(count)]
        replicas = [Near(f"replica-{index}", server) for index, server in enumerate(servers)]
        front = Front(replicas, batch=4)
        stack.push_async_callback(front.close)
        app = guarded(front, **(gate or {}))
        transport = httpx2.ASGITransport(app=app)
        client = await stack.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://test"))
        await front.ready()
        yield Before(front, app, replicas, client)


def text_of(events: list[Any]) -> str:
    return "".join(choice["text"] for each in events if each != "[DONE]" for choice in each["choices"])
