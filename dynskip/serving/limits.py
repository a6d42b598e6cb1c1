"""`Admission`: how many outputs a server takes on at a time, and what those beyond are told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from dynskip.serving.errors import APIError, bad_request

# Seconds after which a client may try again: at least, where nothing has ended yet, and at most.
_LEAST_RETRY_S, _MOST_RETRY_S = 1, 60
# Of the mean time of a request, what the last one counts.
_SHARE_OF_LAST = 0.1


class Admission:
    """Counts the outputs that have not ended: ``num_resident`` of them run, ``max_queue`` wait, more are refused."""

    def __init__(self, num_resident: int, max_queue: int) -> None:
        if max_queue < 0:
            raise ValueError(f"Admission: max_queue must be at least 0, got {max_queue}.")
        self.most = num_resident + max_queue
        self.num_held = self.num_refused = 0
        self._num_read = 0
        self._mean_s = 0.0

    @contextmanager
    def hold(self, num_outputs: int) -> Iterator[None]:
        """Room for ``num_outputs`` until the end of the block; an APIError with status 429 where there is none."""
        self.check(num_outputs)
        if self.num_held + num_outputs > self.most:
            raise self._refused(num_outputs)
        self.num_held += num_outputs
        try:
            yield
        finally:
            self.num_held -= num_outputs

    def check(self, num_outputs: int, field: str = "n") -> None:
        """Raise an APIError, about ``field``, where there would be no room for so many were nothing else there."""
        if num_outputs > self.most:
            raise bad_request(
                f"{field}: a request must have at most {self.most} outputs, all its prompts together, got "
                f"{num_outputs}.",
                field,
            )

    @contextmanager
    def read(self) -> Iterator[None]:
        """In the block a request is read, whose prompts may be long: a 429 where it could not be held behind it."""
        if self.num_held + self._num_read >= self.most:
            raise self._refused(1)
        self._num_read += 1
        try:
            yield
        finally:
            self._num_read -= 1

    def ended(self, seconds: float) -> None:
        """A request has ended, after ``seconds``: others will take about as long."""
        share = _SHARE_OF_LAST if self._mean_s else 1.0
        self._mean_s += share * (seconds - self._mean_s)

    def _refused(self, num_outputs: int) -> APIError:
        self.num_refused += 1
        return APIError(
            429,
            f"The server holds {self.num_held} of {self.most} outputs and has no room for {num_outputs} more. Try "
            "again later.",
            headers={"Retry-After": str(self._retry_s())},
        )

    def _retry_s(self) -> int:
        return min(max(math.ceil(self._mean_s), _LEAST_RETRY_S), _MOST_RETRY_S)
