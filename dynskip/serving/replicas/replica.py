"""`EngineReplica`: one engine and its whole API, asked for answers by message instead of over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from dynskip.async_llm import AsyncLLM
from dynskip.serving.app import make_app
from dynskip.serving.depths import DepthTable
from dynskip.serving.service import Service


class EngineReplica:
    """What runs in a replica. open_service: loads the model and begins its service."""

    def __init__(self, open_service: Callable[[], Service]) -> None:
        self._service = open_service()
        self._app = make_app(self._service)

    @property
    def _served(self) -> AsyncLLM:
        return self._service.served

    async def table(self) -> DepthTable:
        """The paths on offer, for those who have no model."""
        return self._service.table.without_model()

    async def alive(self) -> None:
        """Returns at once: the replica is there, and answers."""

    async def check_health(self) -> None:
        """Raises RequestError where the engine has stopped. Asked by Ray Serve, which then starts another replica."""
        await self._served.stats()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
        """The messages by which the API answers a request, in lists of those that have come together.

        Closing or cancelling it is to the API as if the client had gone away.
        """
        async with aclosing(messages_of(self._app, scope, body)) as messages:
            async for each in messages:
                yield each


async def messages_of(app: ASGIApp, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
    """What ``app`` sends as its answer to one request, in lists of what has come together."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    received: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if received:
            return received.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.put_nowait(message)

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            sent.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        is_open = True
        while is_open:
            messages = [await sent.get()]
            while not sent.empty():
                messages.append(sent.get_nowait())
            is_open = None not in messages
            found = [message for message in messages if message is not None]
            if found:
                yield found
        await running  # raises what the application has raised
    finally:
        gone.set()
        # The application ends its request by itself; a second cancellation must not keep it from that.
        await asyncio.shield(asyncio.gather(running, return_exceptions=True))
