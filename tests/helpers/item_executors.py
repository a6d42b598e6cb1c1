"""Executors as ``--executor`` finds them by import path: one that works, and some that lose what they are given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from typing import Any


def threads() -> ThreadPoolExecutor:
    """Two threads of this process."""
    return ThreadPoolExecutor(2)


class Losing(ThreadPoolExecutor):
    """Loses the first items that it is given and every third one after them, as a cluster loses nodes."""

    def __init__(self) -> None:
        super().__init__(2)
        self.num_submitted = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.num_submitted += 1
        if self.num_submitted > 2 and self.num_submitted % 3:
            return super().submit(fn, *args, **kwargs)
        future: Future[Any] = Future()
        future.set_exception(ConnectionError("the node\nis gone"))
        return future


class Breaking(ThreadPoolExecutor):
    """Does two items, and breaks with the third."""

    num_made = 0

    def __init__(self) -> None:
        super().__init__(1)
        self.num_left = 2
        Breaking.num_made += 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.num_left -= 1
        if self.num_left >= 0:
            return super().submit(fn, *args, **kwargs)
        if self.num_left == -1:
            future: Future[Any] = Future()
            future.set_exception(BrokenExecutor("a process has died"))
            return future
        raise BrokenExecutor("no process is left")


class Broken(ThreadPoolExecutor):
    """Breaks before it does anything."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise BrokenExecutor("no process can be started")


class Nowhere(ThreadPoolExecutor):
    """Loses every item."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(ConnectionError("the node is gone"))
        return future
