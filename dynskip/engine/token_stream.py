"""`TokenStream`: the tokens of one request, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dynskip.engine.request import Request, RequestError


class TokenStream(Iterator[int]):
    """Iterates over the tokens of the first output of ``request``.

    Asking for one makes steps of the engine, in which other requests get theirs, too. Closing the stream, or letting go
    of it, aborts the request. Raises RequestError where the request ends with an error.

    advance: makes one step. discard: aborts a request unless it has ended. abort_later: the same, but safe in a
        destructor and inside a step.
    """

    def __init__(
        self,
        request: Request,
        advance: Callable[[], None],
        discard: Callable[[Request], None],
        abort_later: Callable[[Request], None],
    ) -> None:
        self.request = request
        self._advance, self._discard, self._abort_later = advance, discard, abort_later
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
            self._advance()
        self._num_given += 1
        return self._tokens[self._num_given - 1]

    def close(self) -> None:
        """Abort the request unless it has ended; its output is dropped."""
        self._is_closed = True
        self._discard(self.request)

    def __del__(self) -> None:
        """Let the engine abort the request when it is next asked for something: this may happen within a step."""
        if not self._is_closed:
            self._abort_later(self.request)
