"""`Gate`: what every request passes before a route sees it: its id, its key, its size, and a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import traceback
import uuid
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynskip.serving.answers import as_json
from dynskip.serving.errors import APIError, internal_error
from dynskip.serving.page_files import PAGE_ROUTES
from dynskip.serving.sse import ClientGone

LOG = logging.getLogger("dynskip.serving")
# Of a request's body, in bytes.
MAX_BODY = 16 * 2**20
# Seconds from a request's headers to the end of its body: one that never ends would keep a server from draining.
BODY_TIMEOUT_S = 60.0
# What is still taken of a body behind a refusal, in seconds and bytes: a connection that is closed while its client
# writes loses the answer, one that stays open takes whatever comes.
LINGER_S = 2.0
MOST_LINGERED = 64 * 2**20
# What needs no key: probes, metrics, and what a browser asks for before it has one.
_OPEN = frozenset(("/health", "/version", "/metrics", "/openapi.json")) | PAGE_ROUTES
# What a page asks for several times a second: no line in the log, unless it is refused.
_POLLED = "/v1/engine"
# Characters of a path that a line of the log has.
_MOST_LOGGED = 200
# An id of the client's that may stand in a header and in a line of the log.
_REQUEST_ID = re.compile(r"[\w.:/=+@-]{1,128}", re.ASCII)
# nginx's, for a client that has closed its connection; only the log sees it.
_CLIENT_GONE = 499


@dataclass
class _Answer:
    """What has been sent so far; status: 0 before it begins. is_read: whether the request was read to its end."""

    status: int = 0
    is_read: bool = False


class Gate:
    """An ASGI application around another.

    api_key: what ``Authorization: Bearer`` must hold; None asks for none. max_body: most bytes of a body.
    log_bodies: whether the log has what clients send. Without it no line has anything of a prompt.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None = None, max_body: int = MAX_BODY, log_bodies: bool = False
    ) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._log_bodies = log_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        answer, begin_s = _Answer(is_read=not has_body), time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._pass(scope, headers, receive, send_with_id, answer)
        except ClientGone:
            answer.status = _CLIENT_GONE
        except APIError as error:
            await _refuse(error, answer, send_with_id, receive)
        except Exception as error:
            LOG.error("%s %s", request_id, self._described(error))
            await _refuse(internal_error(), answer, send_with_id, receive)
        finally:
            milliseconds = 1e3 * (time.monotonic() - begin_s)
            level = logging.DEBUG if scope["path"] == _POLLED and answer.status < 400 else logging.INFO
            # As it was sent: decoded it could hold the end of a line. Who has no key can send long ones, too.
            path = quote(scope["path"][:_MOST_LOGGED])
            LOG.log(level, "%s %s %s %d %.0f ms", request_id, scope["method"], path, answer.status, milliseconds)

    async def _pass(
        self, scope: Scope, headers: MutableMapping[bytes, bytes], receive: Receive, send: Send, answer: _Answer
    ) -> None:
        if scope["path"] not in _OPEN:
            self._check_key(headers.get(b"authorization", b""))
        body = await self._body(headers, receive)
        answer.is_read = True
        if self._log_bodies and body:
            LOG.info("%s %s", scope["state"]["request_id"], body.decode(errors="backslashreplace"))
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, authorization: bytes) -> None:
        if self._api_key is None:
            return
        scheme, _, key = authorization.partition(b" ")
        # Both are looked at whatever the other says: the time tells nothing of the key.
        is_key = hmac.compare_digest(key.strip(), self._api_key)
        if not (is_key and scheme.lower() == b"bearer"):
            message = "The API key must be given as `Authorization: Bearer KEY`, got none or another."
            raise APIError(401, message, headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: MutableMapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body; an APIError as soon as it is known to be too large, or too slow."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._all_parts(receive)
        except TimeoutError as error:
            message = f"body: it must come within {BODY_TIMEOUT_S:g} seconds, got a part of it."
            raise APIError(408, message) from error

    async def _all_parts(self, receive: Receive) -> bytes:
        parts, size, is_last = [], 0, False
        while not is_last:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large()
            is_last = not message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> APIError:
        return APIError(
            413, f"The body of a request must be at most {self._max_body} bytes, got more.", code="body_too_large"
        )

    def _described(self, error: BaseException) -> str:
        """``error`` for the log: where it arose; its text, which may hold a prompt, only with the bodies."""
        if self._log_bodies:
            return "".join(traceback.format_exception(error))
        return f"{type(error).__name__}\n{''.join(_frames(error))}".rstrip()


def _frames(error: BaseException) -> Iterable[str]:
    yield from traceback.format_tb(error.__traceback__)
    if error.__cause__ is not None:
        yield f"from {type(error.__cause__).__name__}\n"
        yield from traceback.format_tb(error.__cause__.__traceback__)


def _request_id(headers: MutableMapping[bytes, bytes]) -> str:
    """The client's, where it is one that may be repeated; else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives ``body`` first, then what ``receive`` has."""
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _refuse(error: APIError, answer: _Answer, send: Send, receive: Receive) -> None:
    """Answer with ``error``, unless another answer has begun: that one stays without its end.

    The connection of a request that was not read to its end is closed behind it.
    """
    if answer.status:
        return
    body = as_json(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    if not answer.is_read:
        headers["connection"] = "close"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    if not answer.is_read:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await _linger(receive)
        body = b""
    await send({"type": "http.response.body", "body": body})


async def _linger(receive: Receive) -> None:
    """Take what a client still sends, up to a bound."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while size < MOST_LINGERED:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                size += len(message.get("body", b""))
