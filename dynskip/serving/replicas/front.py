"""`Front`: the application before the replicas. It chooses one for each request and passes on what that answers."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

from starlette.types import Message, Receive, Scope, Send

from dynskip.paths import LayerPath
from dynskip.scheduler.placement import Choose, place
from dynskip.serving.depths import DepthTable
from dynskip.serving.errors import APIError
from dynskip.serving.metrics import CONTENT_TYPE
from dynskip.serving.replicas.asked import Asked
from dynskip.serving.replicas.pages import family, merged
from dynskip.serving.sse import DONE, event, unless_gone

T = TypeVar("T")
LOG = logging.getLogger("dynskip.serving")
# Seconds between two looks at a replica, and for how long one may not answer before requests are taken from it.
PING_S, PING_TIMEOUT_S = 1.0, 5.0
# Replicas that one request may lose before it has begun: whatever is in it, it does not end all of them.
_MOST_LOST = 2
# Of a replica that has no room, and of one whose engine has stopped.
_REFUSALS = (429, 503)
_PLACED = frozenset(("/v1/completions", "/v1/chat/completions"))
# What of a request an application elsewhere needs; the key has been looked at here.
_PASSED = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")


class ReplicaLostError(Exception):
    """A replica has ended, or cannot be reached, before its answer was there."""


class Replica(Protocol):
    """A replica as `Front` asks it: `EngineReplica` elsewhere. All methods may raise ReplicaLostError."""

    @property
    def name(self) -> str: ...

    def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]: ...

    async def table(self) -> DepthTable: ...

    async def alive(self) -> None: ...


class _Known:
    """What the front knows of a replica. held: by path, the outputs that it has been sent and that have not ended."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.held: Counter[LayerPath] = Counter()
        self.lost = asyncio.Event()
        self.lost.set()  # until it has answered once

    @property
    def is_up(self) -> bool:
        return not self.lost.is_set()

    async def unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` comes to; ReplicaLostError as soon as the replica is known to be lost."""
        working, losing = asyncio.ensure_future(work), asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait((working, losing), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ReplicaLostError(self.replica.name)
        finally:
            for task in (working, losing):
                task.cancel()
            await asyncio.gather(working, losing, return_exceptions=True)

    @contextmanager
    def holding(self, asked: Asked) -> Iterator[None]:
        """Counts a request until the end of the block."""
        self.held[asked.path] += asked.num_outputs
        try:
            yield
        finally:
            self.held[asked.path] -= asked.num_outputs
            self.held += Counter()  # forgets the paths of which it holds none


class Front:
    """Answers requests by replicas, which it asks again and again whether they are there.

    batch: most rows of a decode step of each. choose: which of them a request goes to, as `place` does.

    What a replica has not begun to answer when it is lost, and what it has no room for, goes to another; what it has
    begun ends with an error, as in a server of one engine.
    """

    def __init__(self, replicas: Sequence[Replica], batch: int, choose: Choose = place) -> None:
        self._known = {replica.name: _Known(replica) for replica in replicas}
        self._choose = choose
        self._batch = batch
        self._table: DepthTable | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._num_moved: Counter[str] = Counter()
        self._is_stopping = False
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Begin to look after the replicas, in the event loop that runs; nothing the second time."""
        if not self._watching:
            self._watching = [asyncio.ensure_future(self._watch(known)) for known in self._known.values()]

    async def close(self) -> None:
        """Look after them no more."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)

    async def ready(self) -> DepthTable:
        """The paths on offer, once all replicas are there."""
        self.start()
        await self._until(lambda: self._table is not None and all(known.is_up for known in self._known.values()))
        assert self._table is not None, "a replica that is up has told it"
        return self._table

    async def drain(self) -> None:
        """Take no more requests, and return when those that have come are answered."""
        self._is_stopping = True
        await self._until(lambda: not self._running)

    async def stop(self) -> None:
        """Take no more requests, and cut off those that have come."""
        self._is_stopping = True
        for task in self._running:
            task.cancel()
        await self.drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or raise an APIError."""
        self.start()
        body = await _body(receive)
        if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            self._check_up()
            await _send(send, b"", "text/plain; charset=utf-8")
        elif scope["path"] == "/metrics" and scope["method"] == "GET":
            await _send(send, (await self._metrics(scope)).encode(), CONTENT_TYPE)
        else:
            await self._run(self._pass_on(scope, body, send), receive)

    # Answers

    async def _run(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Answer as ``work`` does, until it is done, its client goes away, or the front is stopped."""
        running = asyncio.ensure_future(unless_gone(work, receive))
        self._running.add(running)
        try:
            await asyncio.wait((running,))
        finally:
            running.cancel()  # nothing where it is done
            await asyncio.gather(running, return_exceptions=True)
            self._running.discard(running)
            self._changed.set()
        if running.cancelled():
            raise _stopping()
        running.result()

    async def _pass_on(self, scope: Scope, body: bytes, send: Send) -> None:
        self._check_up()
        assert self._table is not None, "a replica that is up has told it"
        is_placed = scope["path"] in _PLACED
        asked = Asked.of(body, self._table) if is_placed else None
        tried: list[str] = []
        num_lost = 0
        refusal: list[Message] | None = None
        while num_lost < _MOST_LOST and (left := self._left(tried)):
            self._num_moved.update(tried[-1:])
            # What is no generation goes to the first: it says the same each time, such as when it began.
            name = next(iter(left)) if asked is None else self._place(left, asked)
            tried.append(name)
            known = left[name]
            try:
                with known.holding(asked) if asked is not None else nullcontext():
                    refusal = await self._ask(known, scope, body, send)
            except ReplicaLostError:
                self._lose(known)
                num_lost += 1
                continue
            if refusal is None:
                return
        if refusal is None:
            raise _lost()
        for message in refusal:
            await send(message)

    def _left(self, tried: Sequence[str]) -> dict[str, _Known]:
        """The replicas that are there and have not been asked."""
        return {name: known for name, known in self._known.items() if known.is_up and name not in tried}

    def _place(self, left: dict[str, _Known], asked: Asked) -> str:
        return self._choose({name: known.held for name, known in left.items()}, asked.path, asked.prefix, self._batch)

    async def _ask(self, known: _Known, scope: Scope, body: bytes, send: Send) -> list[Message] | None:
        """Pass on what a replica answers; where it has no room, or its engine has stopped, return that instead.

        Raises ReplicaLostError where it is lost before anything was passed on.
        """
        async with aclosing(known.replica.answer(_passed(scope), body)) as answers:
            messages = await known.unless_lost(_next(answers))
            if not messages:
                raise RuntimeError("Front: a replica must answer each request, got no answer.")
            start = messages[0]
            # The gate here gives the answer its id.
            start["headers"] = [each for each in start["headers"] if each[0] != b"x-request-id"]
            if not _is_stream(start):
                while more := await known.unless_lost(_next(answers)):
                    messages += more
                if start["status"] in _REFUSALS:
                    return messages
                for message in messages:
                    await send(message)
                return None
            # Behind the last message a server says that the client has gone: it is sent when the replica is done.
            last: list[Message] = []
            try:
                while messages:
                    if _is_last(messages[-1]):
                        last = [messages.pop()]
                    for message in messages:
                        await send(message)
                    messages = await known.unless_lost(_next(answers))
            except ReplicaLostError:
                self._lose(known)
                if not last:
                    LOG.error("%s is lost in the middle of %s", known.replica.name, scope["state"]["request_id"])
                    end = event(_lost().body) + DONE
                    last = [{"type": "http.response.body", "body": end, "more_body": False}]
            for message in last:
                await send(message)
        return None

    async def _metrics(self, scope: Scope) -> str:
        self._check_up()
        up = {name: known for name, known in self._known.items() if known.is_up}
        pages = await asyncio.gather(*(self._page(known, scope) for known in up.values()))
        known = self._known
        is_up = {name: each.is_up for name, each in known.items()}
        held = {name: sum(each.held.values()) for name, each in known.items()}
        moved = {name: self._num_moved[name] for name in known}
        own = family("dynskip_replica_up", "gauge", "Whether the replica answers.", is_up)
        own += family("dynskip_replica_held", "gauge", "Outputs sent to the replica that have not ended.", held)
        own += family("dynskip_replica_moved_total", "counter", "Requests that went on to another replica.", moved)
        return merged({name: page for name, page in zip(up, pages, strict=True) if page is not None}) + own

    async def _page(self, known: _Known, scope: Scope) -> str | None:
        """The replica's own page; None where it has none, because it is lost or its engine has stopped."""
        body = b""
        try:
            async with aclosing(known.replica.answer(_passed(scope), b"")) as answers:
                while messages := await known.unless_lost(_next(answers)):
                    if messages[0].get("status", 200) != 200:
                        return None
                    body += b"".join(message.get("body", b"") for message in messages)
        except ReplicaLostError:
            self._lose(known)
            return None
        return body.decode()

    # Replicas

    async def _watch(self, known: _Known) -> None:
        """Keeps what is known of a replica true."""
        while True:
            try:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    if self._table is None:
                        self._table = await known.replica.table()
                    await known.replica.alive()
            except (ReplicaLostError, TimeoutError):
                self._lose(known)
            else:
                if not known.is_up:
                    LOG.info("%s is there", known.replica.name)
                    known.lost.clear()
                    self._changed.set()
            await asyncio.sleep(PING_S)

    def _lose(self, known: _Known) -> None:
        if known.is_up:
            LOG.error("%s is lost", known.replica.name)
            known.lost.set()

    def _check_up(self) -> None:
        """Raise an APIError unless requests can be answered."""
        if self._is_stopping:
            raise _stopping()
        if not any(known.is_up for known in self._known.values()):
            raise APIError(503, "No replica answers.", code="stopped", headers={"Retry-After": "1"})

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._changed.clear()
            await self._changed.wait()


def _stopping() -> APIError:
    return APIError(503, "The server is stopping.", code="stopping")


def _lost() -> APIError:
    return APIError(
        503,
        "The replica that had this request is lost. Send it again.",
        code="replica_lost",
        headers={"Retry-After": "1"},
    )


def _passed(scope: Scope) -> Scope:
    """What of ``scope`` a replica is sent: with the id that the request has here, without the key."""
    headers = [
        (name, value) for name, value in scope["headers"] if name.lower() not in (b"authorization", b"x-request-id")
    ]
    headers.append((b"x-request-id", scope["state"]["request_id"].encode()))
    return {**{name: scope[name] for name in _PASSED if name in scope}, "headers": headers}


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _next(answers: AsyncGenerator[list[Message]]) -> list[Message]:
    """What has come next; nothing at the end."""
    return await anext(answers, [])


async def _body(receive: Receive) -> bytes:
    """The body, which `Gate` hands over in one piece."""
    message = await receive()
    body: bytes = message["body"]
    return body


async def _send(send: Send, body: bytes, media_type: str) -> None:
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
