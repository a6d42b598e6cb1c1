"""Items mapped over processes of this machine; results come back as they are finished."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from dynskip.evaluation.registry import run_item
from dynskip.evaluation.sweep.context import Context
from dynskip.evaluation.sweep.setup import Setup
from dynskip.evaluation.sweep.store import WorkItem

Finished = tuple[WorkItem, dict[str, Any], float]

_context: Context | None = None


def run_here(items: Sequence[WorkItem], context: Context) -> Iterator[Finished]:
    """Each item with its result and its seconds, one after another in this process."""
    for item in items:
        start = time.perf_counter()
        result = run_item(item, context)
        yield item, result, time.perf_counter() - start


def run_in_processes(items: Sequence[WorkItem], setup: Setup, num_workers: int) -> Iterator[Finished]:
    """The same from ``num_workers`` processes with one thread each, in the order in which they finish.

    Raises RuntimeError where a worker dies; what came before is not lost.
    """
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_start, initargs=(setup, os.getpid()))
    try:
        for future in as_completed([pool.submit(_run, item) for item in items]):
            yield future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"eval: workers must live, got one of {num_workers} that was killed, perhaps for want of memory. "
            "Finished items are safe; start the same command again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(setup: Setup, parent: int) -> None:
    import torch
    from transformers.utils import logging

    global _context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # the parent has a bar for all of them, or none
    _context = Context(setup)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End this process with its parent: one that was killed cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(item: WorkItem) -> Finished:
    assert _context is not None, "a pool starts its processes with a context"
    (finished,) = run_here([item], _context)
    return finished
