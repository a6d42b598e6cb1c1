"""Servers for tests: of a tiny model, in this process or on loopback, and clients that do as they are told."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI
from models import NUM_LAYERS, tiny_model, word_tokenizer

from dynskip import LLM, AsyncLLM, SamplingParams
from dynskip.costs.step_costs import StepCosts
from dynskip.serving.app import make_app
from dynskip.serving.depths import DepthTable
from dynskip.serving.gate import MAX_BODY
from dynskip.serving.server import Server, bind, url_of
from dynskip.serving.service import Service

NAME = "tiny"
COSTS = dataclasses.replace(StepCosts.h200(), num_layers=NUM_LAYERS)
# Each message begins with a word that the tokenizer does not know: its role.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
TABLE = "uniform:2\nlayers:0,1,3,5\n"
JSON = {"content-type": "application/json"}
# A completion that ends when it has all its tokens, whole and as a stream.
ROUTE = "/v1/completions"
LONG = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 40, "ignore_eos": True}
STREAM = {**LONG, "stream": True}


def tiny_llm(**options: Any) -> LLM:
    """A tiny model with a tokenizer of words and a chat template, whose rows do not depend on their neighbours."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return LLM(tiny_model(deterministic=True, **options), tokenizer)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, in an event loop of its own. None of these tests may hang."""
    return asyncio.run(asyncio.wait_for(coroutine, timeout=300))


@dataclass
class Local:
    """A server in this process, without a socket."""

    llm: LLM
    served: AsyncLLM
    service: Service
    app: FastAPI
    client: httpx2.AsyncClient

    async def post(self, route: str, body: Any, **options: Any) -> httpx2.Response:
        """The answer to ``body``."""
        return await self.client.post(route, json=body, **options)

    async def generated(self, **body: Any) -> dict[str, Any]:
        """The answer to a completion, which must succeed."""
        answer = await self.post("/v1/completions", {"prompt": [5, 6, 7], "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def until_idle(self) -> Any:
        """The engine's stats once no request is left; all its memory is free then."""
        while (stats := await self.served.stats()).num_running or stats.num_waiting or stats.num_prefilling:
            await asyncio.sleep(0)
        assert stats.kv_bytes == 0
        assert self.service.admission.num_held == 0
        return stats


@asynccontextmanager
async def local(
    llm: LLM,
    *,
    table: str | None = None,
    path: str = "full",
    draft: str | None = None,
    max_queue: int = 64,
    gate: dict[str, Any] | None = None,
    folder: Path | None = None,
    **engine: Any,
) -> AsyncIterator[Local]:
    """A server of ``llm``. table: the text of its file of paths, in ``folder``. gate: options of `make_app`."""
    file = None
    if table is not None:
        assert folder is not None, "the file needs a folder"
        file = folder / "paths.txt"
        file.write_text(table, encoding="utf-8")
    async with AsyncLLM(llm, **{"batch": 4, "costs": COSTS, **engine}) as served:
        service = Service(served, DepthTable(llm.model, NAME, file, path, draft), max_queue)
        app = make_app(service, **(gate or {}))
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            try:
                yield Local(llm, served, service, app, client)
            finally:
                service.close()


class Brake:
    """Lets an engine make as many steps as it is told, so that requests stand where a test wants them."""

    def __init__(self, served: AsyncLLM) -> None:
        engine = served._worker._engine
        self._allowed = threading.Semaphore(0)
        self._step = engine.step
        self._is_open = False
        engine.step = self._step_if_allowed  # type: ignore[method-assign]

    def let(self, num_steps: int) -> None:
        """Allow so many more steps."""
        self._allowed.release(num_steps)

    def release(self) -> None:
        """Allow all steps from now on."""
        self._is_open = True
        self._allowed.release()

    def _step_if_allowed(self) -> Any:
        if not self._is_open:
            self._allowed.acquire()
        return self._step()


@dataclass
class Exchange:
    """One request to an ASGI application, whose client may go away at any moment.

    num_ends: the messages that say that nothing comes behind them.
    """

    app: Any
    route: str
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    sent: bytes = b""
    num_ends: int = 0

    def __post_init__(self) -> None:
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._has_body = True
        headers = {**JSON, **self.headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.route,
            "raw_path": self.route.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.ensure_future(self.app(scope, self._receive, self._send))

    @property
    def events(self) -> list[Any]:
        """The data of the events that have come; the end is the text ``[DONE]``."""
        return events_of(self.sent.decode())

    async def until_events(self, count: int) -> None:
        """Wait for so many events."""
        while len(self.events) < count:
            assert not self.task.done(), self.sent
            self._changed.clear()
            await self._changed.wait()

    async def go_away(self) -> None:
        """Close the connection, and wait until the application has noticed."""
        self._gone.set()
        await self.task

    async def _receive(self) -> dict[str, Any]:
        if self._has_body:
            self._has_body = False
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.num_ends += not message.get("more_body", False)
        self.sent += message.get("body", b"")
        self._changed.set()


def events_of(text: str) -> list[Any]:
    """The data of the server-sent events in ``text``."""
    found = []
    for block in text.split("\n\n"):
        if block:
            assert block.startswith("data: "), block
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@contextmanager
def on_loopback(
    llm: LLM,
    *,
    name: str = NAME,
    api_key: str | None = None,
    table: Path | None = None,
    draft: str | None = None,
    max_queue: int = 64,
    port: int = 0,
    max_body: int = MAX_BODY,
    on_start: Callable[[AsyncLLM, Server], None] = lambda *_: None,
    **engine: Any,
) -> Iterator[str]:
    """The address of a server of ``llm`` in a thread of its own, until the end of the block.

    table: the file of its paths. draft: of requests that name none. on_start: called in its event loop before it
    listens.
    """
    started, found = threading.Event(), {}

    async def main() -> None:
        with bind("127.0.0.1", port) as bound:
            async with AsyncLLM(llm, **engine) as served:
                service = Service(served, DepthTable(llm.model, name, table, draft=draft), max_queue)
                found["server"] = Server(make_app(service, api_key=api_key, max_body=max_body), started.set)
                found["url"] = url_of(bound)
                on_start(served, found["server"])
                await found["server"].serve([bound])
                service.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert started.wait(120), "the server listens"
        yield found["url"]
    finally:
        found["server"].should_exit = True
        thread.join(120)
    assert not thread.is_alive()
    assert found["server"].has_drained


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """The most likely tokens, as many as that."""
    return SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, **options})
