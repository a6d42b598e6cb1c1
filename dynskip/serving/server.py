"""`Server`: an application behind an address, which from the first signal on ends when all requests have."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

LOG = logging.getLogger("dynskip.serving")
# Seconds that requests have to clean up once they are cut off.
_CLEAN_UP_S = 5
# Longer than clients keep a connection that is idle (httpx 5, aiohttp 15): a request that is on its way when the server
# closes it is lost. uvicorn's 5 lost such requests whenever the process had stood still for as long.
KEEP_ALIVE_S = 75
# A client that takes nothing for so long of what is sent to it is gone, as one that does not answer at all: its request
# would hold a place for ever, and the server could not end.
STALLED_S = 120
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address that does not listen yet; port 0: any that is free. Raises OSError where it is taken."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections have it from the socket that listens
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALLED_S)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """Serves ``app`` until a signal comes.

    The first SIGINT or SIGTERM ends it when the requests that have come are answered, the second at once.
    on_ready: called once it listens. has_drained: whether all requests that had come were answered.
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] = lambda: None) -> None:
        # No log of its own: the gate writes one line a request, and what goes wrong.
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self.has_drained = False
        self._on_ready = on_ready
        self._stopping = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for those that have come; cut them off once told to."""
        for server in self.servers:
            server.close()
        LOG.info("listening no more, %d requests to answer", len(self.server_state.tasks))
        draining = asyncio.ensure_future(super().shutdown(sockets))
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((draining, stopping), return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            draining.result()
            self.has_drained = True
        else:
            tasks = set(self.server_state.tasks)
            LOG.warning("stopping with %d requests unanswered", len(tasks))
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # to the requests it is as if their clients had gone away
            _, stuck = await asyncio.wait(tasks, timeout=_CLEAN_UP_S) if tasks else (None, set())
            for task in stuck:
                task.cancel()
        for waiting in (draining, stopping):
            waiting.cancel()
        await asyncio.gather(draining, stopping, return_exceptions=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does: drain, and the second time stop."""
        if self.should_exit:
            assert self._loop is not None, "handlers are set in it"
            self._loop.call_soon_threadsafe(self._stopping.set)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals within the block, in the main thread; unlike uvicorn's, raises none of them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._loop = asyncio.get_running_loop()
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Within the block the server's log goes to stderr, a line an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # Of uvicorn what goes wrong, such as bytes that are no HTTP; of asyncio not that a client no longer reads.
    levels = {
        LOG: logging.INFO,
        logging.getLogger("uvicorn.error"): logging.WARNING,
        logging.getLogger("asyncio"): logging.ERROR,
    }
    before = {log: (log.level, log.propagate) for log in levels}
    for log, level in levels.items():
        log.addHandler(handler)
        log.setLevel(level)
        log.propagate = False
    try:
        yield
    finally:
        for log, (level, propagate) in before.items():
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


def url_of(bound: socket.socket) -> str:
    """The address of ``bound`` as a client writes it."""
    host, port = bound.getsockname()[:2]
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
