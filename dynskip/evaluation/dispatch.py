"""`Dispatch`: items handed to a crew, a few at a time, each tried three times at most."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from typing import Any, cast

from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.store import WorkItem
from dynskip.evaluation.workers import Crew, Outcome

NUM_TRIES = 3
# Executors that break one after another before a single item has ended.
_MOST_BROKEN = 3


class Dispatch:
    """The executor of a crew, and another where it breaks. told: of each try that failed and is not the last one.

    num_at_once: how many items are handed over at a time, whatever number there is to do.
    """

    def __init__(self, crew: Crew, told: Callable[[str], None]) -> None:
        self._crew, self._told = crew, told
        self._executor = crew.make()
        self.num_at_once: int = crew.num_at_once or cast(Any, self._executor).num_slots
        self._num_broken = 0

    def __enter__(self) -> Dispatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def outcomes(self, items: Iterable[WorkItem]) -> Iterator[Outcome]:
        """The last outcome of each item, as they end: its result, or its third error. ``items`` is read as it is due.

        Raises RuntimeError where executors break again and again and do nothing.
        """
        first = ((item, 1) for item in items)
        again: deque[tuple[WorkItem, int]] = deque()
        running: dict[Future[Outcome], tuple[WorkItem, int]] = {}
        while True:
            while len(running) < self.num_at_once:
                turn = again.popleft() if again else next(first, None)
                if turn is None:
                    break
                running[self._submit(turn[0])] = turn
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                item, num_tries = running.pop(future)
                outcome = _outcome(item, future)
                if outcome.result is not None:
                    self._num_broken = 0
                elif num_tries < NUM_TRIES:
                    self._told(f"try {num_tries} of item {item.key} failed on {outcome.place}: {outcome.error}")
                    again.append((item, num_tries + 1))
                    continue
                yield outcome

    def _submit(self, item: WorkItem) -> Future[Outcome]:
        while True:
            try:
                future: Future[Outcome] = self._executor.submit(self._crew.work, item)
                return future
            except BrokenExecutor as error:
                self._num_broken += 1
                if self._num_broken > _MOST_BROKEN:
                    raise RuntimeError(
                        f"eval: executors must do items, got {self._num_broken} that broke before: {error}. "
                        "Finished items are safe."
                    ) from error
                self._told(f"another executor for one that broke: {error}")
                # What it has left to do it may finish, or fail; futures that it cancelled would be waited for in vain.
                self._executor.shutdown(wait=False)
                self._executor = self._crew.make()


def _outcome(item: WorkItem, future: Future[Outcome]) -> Outcome:
    """What came of a try; an error of the future is that of an executor: it has lost who did the item."""
    try:
        return future.result()
    except Exception as error:
        return Outcome(item, None, 0.0, Place(), f"worker lost: {type(error).__name__}: {' '.join(str(error).split())}")
