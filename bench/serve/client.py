"""HTTP/1.1 as a client that costs little: kept connections, and answers handed over piece by piece as they come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OnData = Callable[[bytes], None]
# A kept connection is not used after so long: servers close theirs after 5 seconds, in the middle of a request, too.
_KEPT_S = 3.0


class Broken(ConnectionError):
    """The connection has ended before the answer had."""


@dataclass(frozen=True)
class Answer:
    """What a server has answered; body: empty where the pieces were handed over."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Connection(asyncio.Protocol):
    """One connection, for one exchange at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._reset(None, None)
        self.free_since_s = 0.0

    @staticmethod
    async def open(host: str, port: int) -> Connection:
        """A connection to that address."""
        _, made = await asyncio.get_running_loop().create_connection(Connection, host, port)
        return made

    @property
    def is_reusable(self) -> bool:
        """Whether the next exchange may use it."""
        assert self._transport is not None, "it is open"
        return not self._transport.is_closing() and time.monotonic() < self.free_since_s + _KEPT_S

    def exchange(self, request: bytes, on_data: OnData | None = None) -> asyncio.Future[Answer]:
        """Send ``request``; the answer once it has ended, or `Broken`. on_data: takes each piece of a chunked body."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._reset(future, on_data)
        self.write(request)
        return future

    def write(self, data: bytes) -> None:
        """Send ``data`` as it is."""
        assert self._transport is not None, "it is open"
        self._transport.write(data)

    def close(self) -> None:
        """Go away, in the middle of an exchange, too."""
        assert self._transport is not None, "it is open"
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport), "of a stream"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        self._buffer += data
        if self._status == 0:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(bytes(self._buffer[:end]).decode("latin-1"))
            del self._buffer[: end + 4]
        if self._is_chunked:
            self._read_chunks()
        elif len(self._buffer) >= self._length:
            self._parts.append(bytes(self._buffer[: self._length]))
            del self._buffer[: self._length]
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        if self._future is not None and not self._future.done():
            self._future.set_exception(Broken(f"the connection ended before the answer, {error or 'closed'}"))

    def _reset(self, future: asyncio.Future[Answer] | None, on_data: OnData | None) -> None:
        self._future, self._on_data = future, on_data
        self._status, self._length, self._is_chunked = 0, 0, False
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        self._status = int(first.split(" ", 2)[1])
        self._headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._is_chunked = self._headers.get("transfer-encoding") == "chunked"
        self._length = int(self._headers.get("content-length", 0))

    def _read_chunks(self) -> None:
        buffer = self._buffer
        while (end := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:end], 16)
            if len(buffer) < end + size + 4:
                return
            data = bytes(buffer[end + 2 : end + 2 + size])
            del buffer[: end + size + 4]
            if not size:
                self._finish()
                return
            if self._on_data is None:
                self._parts.append(data)
            else:
                self._on_data(data)

    def _finish(self) -> None:
        self.free_since_s = time.monotonic()
        answer = Answer(self._status, self._headers, b"".join(self._parts))
        if self._headers.get("connection") == "close":
            self.close()
        if self._future is not None and not self._future.done():
            self._future.set_result(answer)


class Client:
    """Exchanges with one server, on as many connections as are needed at once."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._free: list[Connection] = []

    async def connection(self) -> Connection:
        """One for an exchange: a kept one, or a new one."""
        while self._free:
            kept = self._free.pop()
            if kept.is_reusable:
                return kept
            kept.close()
        return await Connection.open(self._host, self._port)

    async def send(self, request: bytes, on_data: OnData | None = None) -> Answer:
        """The answer to ``request``; its connection is kept. Cancelled, it goes away."""
        connection = await self.connection()
        try:
            answer = await connection.exchange(request, on_data)
        except BaseException:
            connection.close()
            raise
        if answer.headers.get("connection") != "close":
            self._free.append(connection)
        return answer

    async def post(self, route: str, body: Any, on_data: OnData | None = None) -> Answer:
        """The answer to ``body`` as JSON."""
        return await self.send(post_of(route, json.dumps(body).encode()), on_data)

    async def get(self, route: str) -> Answer:
        """The answer to a GET."""
        return await self.send(f"GET {route} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def close(self) -> None:
        """Close what is kept."""
        for connection in self._free:
            connection.close()
        self._free.clear()


def post_of(route: str, body: bytes, length: int | None = None) -> bytes:
    """A POST of ``body``; length: of a body whose rest comes later, or never."""
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def events_in(data: bytes) -> list[bytes]:
    """The data of the server-sent events that ``data`` holds whole."""
    return [line[6:] for line in data.split(b"\n\n") if line.startswith(b"data: ")]
