"""`EngineWorker`: the thread in which the steps of one engine run, and what it sends to those who wait for requests."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from dynskip.engine.engine import Engine
from dynskip.engine.metrics import MetricsLog
from dynskip.engine.request import EngineStoppedError, OnToken, OutputSequence, RequestError, RequestOutput

T = TypeVar("T")
# Adds a request to the engine, perhaps with a callback for its tokens; returns its id.
Add = Callable[[Engine, OnToken | None], Hashable]


class MetricsWarning(UserWarning):
    """Metrics are no longer written."""


class NewToken(NamedTuple):
    """A token of output number ``output``; logprobs, was_guessed: as in `SequenceOutput`, of this token."""

    output: int
    token_id: int
    logprobs: dict[int, float] | None
    was_guessed: bool | None


class Ticket:
    """What a request sends to the consumer that waits for it in an event loop.

    added: the id of the request once it is in the engine, or why it is not. At most n * max_tokens tokens wait here.
    request_id: that id; only for the worker.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.added: Future[Hashable] = Future()
        self.request_id: Hashable = None
        self._arrived = asyncio.Event()
        self._tokens: list[NewToken] = []
        self._end: RequestOutput | RequestError | None = None

    async def next(self) -> tuple[list[NewToken], RequestOutput | None]:
        """The tokens that have come since the last call, and the output where they are the last.

        Waits until there is something. Raises RequestError where the engine is gone.
        """
        await self._arrived.wait()
        self._arrived.clear()
        tokens, self._tokens = self._tokens, []
        if isinstance(self._end, RequestError):
            raise self._end
        return tokens, self._end

    async def end(self) -> RequestOutput:
        """What the request has become; raises RequestError where the engine is gone."""
        while True:
            _, output = await self.next()
            if output is not None:
                return output

    def arrive(self, tokens: list[NewToken], end: RequestOutput | RequestError | None) -> None:
        """Take in what the worker sent; in the loop's thread."""
        self._tokens += tokens
        self._end = self._end or end
        self._arrived.set()


class _Command:
    """A call that the worker makes between two steps, and the future of its result."""

    def __init__(self, function: Callable[[Engine], Any], future: Future[Any]) -> None:
        self._function = function
        self.future = future

    def run(self, engine: Engine) -> None:
        """Make the call. What is no Exception ends the worker, too."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._function(engine)
        except Exception as error:
            self.future.set_exception(error)
        except BaseException as error:
            self.future.set_exception(_gone(error))
            raise
        else:
            self.future.set_result(result)


class EngineWorker:
    """Owns an engine, which no other thread touches. Steps while there are requests, sleeps while there are none.

    An exception that no request is to blame for ends the worker: all that wait get a RequestError with its cause, and
    so do all later calls. log: told of each step, and closed at the end. A log that cannot be written ends with a
    warning and costs no request.
    """

    def __init__(self, engine: Engine, log: MetricsLog | None = None) -> None:
        self._engine = engine
        self._log = log
        self._changed = threading.Condition()
        self._commands: deque[_Command] = deque()
        self._is_closing = False
        self._failure: BaseException | None = None
        self._process_id = os.getpid()
        # Only in the worker's thread:
        self._tickets: dict[Hashable, Ticket] = {}
        self._outbox: dict[Ticket, tuple[list[NewToken], list[RequestOutput | RequestError]]] = {}
        self._thread = threading.Thread(target=self._run, name="dynskip-engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """What ``function`` makes of the engine between two steps. Raises RequestError once the worker has ended."""
        future: Future[T] = Future()
        self._queue(_Command(function, future))
        return future

    def check(self) -> None:
        """Raise RequestError where `call` would, without waiting for a step."""
        self._check_process()
        with self._changed:
            self._check_open()

    def submit(self, add: Add, streams: bool) -> Ticket:
        """The ticket of the request that ``add`` adds, to be given back with `abandon`; called in an event loop.

        streams: send its tokens as they come; else its output only.
        """
        ticket = Ticket(asyncio.get_running_loop())
        sequences: list[OutputSequence] = []

        def send(_id: Hashable, index: int, token: int) -> None:
            sequence = sequences[index]
            logprobs = sequence.logprobs[-1] if sequence.logprobs else None
            was_guessed = None if sequence.request.draft is None else sequence.was_guessed[-1]
            self._letter(ticket)[0].append(NewToken(index, token, logprobs, was_guessed))

        def enter(engine: Engine) -> Hashable:
            ticket.request_id = add(engine, send if streams else None)
            sequences.extend(engine.request(ticket.request_id).sequences)
            self._tickets[ticket.request_id] = ticket
            return ticket.request_id

        self._queue(_Command(enter, ticket.added))
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """Abort the request of ``ticket``, which is waited for no more, if it has not ended. Returns at once."""
        ticket.added.cancel()
        if self._is_copy():
            return
        with self._changed:
            if self._failure is None and not self._is_closing:  # else nothing of it is left, or soon will be
                self._commands.append(_Command(lambda _: self._drop(ticket), Future()))
                self._changed.notify()

    def abort(self, request_id: Hashable) -> Future[RequestOutput]:
        """What the request has become, which ends where it stands; its ticket gets the same."""

        def end(engine: Engine) -> RequestOutput:
            output = engine.abort(request_id)
            self._end(output)
            return output

        return self.call(end)

    def close(self) -> None:
        """Abort what has not ended, release the engine's memory and wait for the thread's end.

        A copy in a forked process has no thread, and its memory goes with the process.
        """
        if self._is_copy():
            return
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:  # a collector may call from anywhere
            self._thread.join()

    def _is_copy(self) -> bool:
        """Whether a fork made this: its thread is not here, and its lock may never be released."""
        return os.getpid() != self._process_id

    def _check_process(self) -> None:
        if self._is_copy():
            raise RequestError(
                f"AsyncLLM: it must be used in the process that made it, {self._process_id}, got a copy in "
                f"{os.getpid()}, which was forked. Make another."
            )

    def _check_open(self) -> None:
        if self._failure is not None:
            raise _gone(self._failure)
        if self._is_closing:
            raise EngineStoppedError("AsyncLLM: it must be open, got one that was closed. Make another.")

    def _queue(self, command: _Command) -> None:
        self._check_process()
        with self._changed:
            self._check_open()
            self._commands.append(command)
            self._changed.notify()

    # In the worker's thread

    def _run(self) -> None:
        try:
            while self._obey():
                for output in self._engine.step():
                    self._end(output)
                self._send()
                self._write_log(MetricsLog.update)
            for request_id in list(self._tickets):
                self._end(self._engine.abort(request_id))
            self._send()
        except BaseException as error:
            self._fail(error)
        finally:
            try:
                self._write_log(MetricsLog.close)
            finally:
                self._engine.close()

    def _obey(self) -> bool:
        """Run commands, and wait for some while there is nothing to step; returns False once it was told to close."""
        while True:
            with self._changed:
                while not (self._commands or self._is_closing or self._engine.has_unfinished):
                    self._changed.wait()
                command = self._commands.popleft() if self._commands else None
                is_closing = self._is_closing
            if command is None:
                return not is_closing
            command.run(self._engine)
            self._send()

    def _letter(self, ticket: Ticket) -> tuple[list[NewToken], list[RequestOutput | RequestError]]:
        """What is to be sent to ``ticket``: tokens, and at most one end."""
        return self._outbox.setdefault(ticket, ([], []))

    def _end(self, output: RequestOutput) -> None:
        ticket = self._tickets.pop(output.request_id, None)
        if ticket is not None:  # else it was abandoned
            self._letter(ticket)[1].append(output)

    def _drop(self, ticket: Ticket) -> None:
        self._outbox.pop(ticket, None)
        if self._tickets.get(ticket.request_id) is ticket:  # else it was never added, or has ended
            del self._tickets[ticket.request_id]
            self._engine.abort(ticket.request_id)

    def _send(self) -> None:
        """Hand over what has come up, with one call per event loop."""
        letters: dict[
            asyncio.AbstractEventLoop, list[tuple[Ticket, list[NewToken], RequestOutput | RequestError | None]]
        ]
        letters = {}
        for ticket, (tokens, ends) in self._outbox.items():
            letters.setdefault(ticket.loop, []).append((ticket, tokens, ends[0] if ends else None))
        self._outbox = {}
        for loop, own in letters.items():
            try:
                loop.call_soon_threadsafe(_deliver, own)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                for ticket, _, _ in own:
                    self._drop(ticket)

    def _write_log(self, write: Callable[[MetricsLog], None]) -> None:
        if self._log is None:
            return
        try:
            write(self._log)
        except Exception as error:
            self._log = None
            warnings.warn(
                f"AsyncLLM: metrics end here, the log cannot be written: {error}", MetricsWarning, stacklevel=2
            )

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            commands, self._commands = self._commands, deque()
        for command in commands:
            if command.future.set_running_or_notify_cancel():
                command.future.set_exception(_gone(error))
        for ticket in self._tickets.values():
            self._letter(ticket)[1].append(_gone(error))
        self._tickets = {}
        self._send()


def _deliver(letters: list[tuple[Ticket, list[NewToken], RequestOutput | RequestError | None]]) -> None:
    for ticket, tokens, end in letters:
        ticket.arrive(tokens, end)


def _gone(error: BaseException) -> EngineStoppedError:
    gone = EngineStoppedError(
        f"AsyncLLM: the engine's thread must be alive, got {error!r}, by which it ended. Make another."
    )
    gone.__cause__ = error
    return gone
