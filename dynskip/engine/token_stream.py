"""`TokenStream`: the tokens of one request, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from dynskip.engine.request import Request, RequestError


class Stepping(Protocol):
    """What a stream asks of its engine."""

    def advance(self) -> None:
        """Make one step."""
        ...

    def discard(self, request: Request) -> None:
        """Abort ``request`` unless it has ended."""
        ...

    def forsake(self, request: Request) -> None:
        """As `discard`, but later; safe in a destructor and inside a step."""
        ...


class TokenStream(Iterator[int]):
    """Iterates over the tokens of the first output of ``request``.

    Asking for one makes steps of ``engine``, in which other requests get theirs, too. Closing the stream, or letting go
    of it, aborts the request. Raises RequestError where the request ends with an error.
    """

    def __init__(self, engine: Stepping, request: Request) -> None:
        self.request = request
        self._engine = engine
        self._tokens = request.sequences[0].token_ids
        self._num_given = 0
        self._is_closed = False

    def __next__(self) -> int:
        """The next token, once it has been chosen."""
        if self._is_closed:
            raise StopIteration
        while self._num_given == len(self._tokens):
            if self.request.has_ended:
                self.close()
                error = self.request.error
                if error is not None:
                    raise RequestError(f"stream: the request ended by {error!r}.") from error
                raise StopIteration
            self._engine.advance()
        self._num_given += 1
        return self._tokens[self._num_given - 1]

    def close(self) -> None:
        """Abort the request unless it has ended; its output is handed to nobody."""
        self._is_closed = True
        self._engine.discard(self.request)

    def __del__(self) -> None:
        """Let the engine abort the request when it is next asked for something: this may happen within a step."""
        if not self._is_closed:
            self._engine.forsake(self.request)
