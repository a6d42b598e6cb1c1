"""What does items, each way behind the interface of `concurrent.futures.Executor`: this process, others beside it, any
executor by name; and `Outcome`, what one try of an item came to."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any

from dynskip.evaluation.registry import run_item
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.place import Place
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import WorkItem

RAY = "ray"
_local = threading.local()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one try of ``item`` came to. result: None where it failed, with the error and where that arose.

    place: where it was tried; without a host where a worker was lost.
    """

    item: WorkItem
    result: dict[str, Any] | None
    seconds: float
    place: Place
    error: str = ""
    trace: str = ""


def attempt(item: WorkItem, context: Context) -> Outcome:
    """Do ``item`` here. Whatever error it ends with, ends this try and nothing else."""
    place = Place.here(context.setup.device)
    start = time.perf_counter()
    try:
        result = run_item(item, context)
        json.dumps(result, allow_nan=False)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Outcome(item, None, time.perf_counter() - start, place, text, traceback.format_exc())
    return Outcome(item, result, time.perf_counter() - start, place)


def attempt_for(setup: Setup, item: WorkItem) -> Outcome:
    """Do ``item`` in whatever process and thread an executor has for it; what it loads is there for the next one."""
    context: Context | None = getattr(_local, "context", None)
    if context is None or context.setup != setup:
        context = _local.context = Context(setup)
    return attempt(item, context)


@dataclass(frozen=True)
class Crew:
    """Who does items. make: an executor, another one where that broke. work: does an item, wherever it is sent.

    num_at_once: how many items are handed over at a time; None for the ``num_slots`` of the executor. is_here: on this
    machine.
    """

    make: Callable[[], Executor]
    work: Callable[[WorkItem], Outcome]
    num_at_once: int | None
    is_here: bool


def crew_here(context: Context, num_workers: int = 1) -> Crew:
    """This process, or so many beside it."""
    if num_workers == 1:
        return Crew(ThisProcess, partial(attempt, context=context), 1, is_here=True)
    make = partial(WorkerProcesses, num_workers)
    return Crew(make, partial(attempt_for, context.setup), num_workers, is_here=True)


def crew_named(name: str, setup: Setup, num_workers: int | None) -> Crew:
    """Those that ``--executor`` names: ray:ADDRESS, or MODULE:FACTORY, called without arguments.

    num_workers: items that are handed over at a time; None for as many as a cluster of Ray has room for, else 1.
    Raises ValueError where nothing of that name can be imported, or is no executor.
    """
    module, colon, rest = name.partition(":")
    if not module or not colon or not rest:
        raise ValueError(f"eval: executor must be {RAY}:ADDRESS or MODULE:FACTORY, got {name!r}.")
    if module == RAY:
        from dynskip.evaluation.ray_executor import RayExecutor

        return Crew(partial(RayExecutor, rest, setup.device), partial(attempt_for, setup), num_workers, is_here=False)
    try:
        factory = getattr(importlib.import_module(module), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"eval: executor must be {RAY}:ADDRESS or MODULE:FACTORY that Python finds, got {name!r}: {error}. "
            "Add its folder to PYTHONPATH."
        ) from error
    return Crew(partial(_made, factory, name), partial(attempt_for, setup), num_workers or 1, is_here=False)


def _made(factory: Callable[[], Any], name: str) -> Executor:
    executor = factory()
    if not isinstance(executor, Executor):
        raise ValueError(f"eval: executor {name} must make a concurrent.futures.Executor, got {executor!r}.")
    return executor


class ThisProcess(Executor):
    """Does what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future that is done."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class WorkerProcesses(Executor):
    """Processes of one thread each, started when they are needed. One that dies fails its own item, and is replaced.

    A `ProcessPoolExecutor` of several ends with each of its processes, and cannot tell whose item it was.
    """

    def __init__(self, num_workers: int) -> None:
        self._free: SimpleQueue[ProcessPoolExecutor | None] = SimpleQueue()
        self._pools: set[ProcessPoolExecutor] = set()
        for _ in range(num_workers):
            self._free.put(None)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of ``fn`` in a process that is free, or will be: until then this waits."""
        pool = self._free.get() or self._started()
        try:
            future = pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:  # its process has died without an item
            self._pools.discard(pool)
            pool = self._started()
            future = pool.submit(fn, *args, **kwargs)
        future.add_done_callback(partial(self._done, pool))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes once they have done what they are at."""
        for pool in list(self._pools):
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)
        self._pools.clear()

    def _started(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=(os.getpid(),))
        self._pools.add(pool)
        return pool

    def _done(self, pool: ProcessPoolExecutor, future: Future[Any]) -> None:
        is_dead = not future.cancelled() and isinstance(future.exception(), BrokenProcessPool)
        if is_dead:
            pool.shutdown(wait=False)
            self._pools.discard(pool)
        self._free.put(None if is_dead else pool)


def _start(parent: int) -> None:
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # the parent has a bar for all of them, or none
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process with its parent: one that was killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
